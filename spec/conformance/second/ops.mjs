// SPEC.md, section 5.7: what each operation computes. `op` gives it its signature; inside, `host` is what the kind is on.

import { Unsupported, refuse } from "./errors.mjs";
import * as einops from "./einops.mjs";
import {
  Tensor, add, along, axisOf, bmm, build, cat, count, item, map, matmul, mul, permute, reduce, reshape, swap,
  take, tensor, unsqueeze, zip,
} from "./tensor.mjs";

const MISSING = Symbol("needed");

/** `signature` is a list like "x, axis = -1": names with their defaults; `*xs` takes all that come without a name. */
function op(signature, f) {
  const parameters = signature.split(", ").map((part) => part.split(" = "));
  const defaults = parameters.map(([, text]) => (text === undefined ? MISSING : text === "None" ? null : /^[-\d.]/.test(text) ? Number(text) : text));
  return {
    call(host, args, named) {
      const variadic = parameters[0][0].startsWith("*");
      const given = variadic ? [args] : args;
      if (given.length > parameters.length) refuse("E_KIND_OP", "too many arguments");
      const values = parameters.map(([name], i) => {
        if (name.startsWith("**")) return Object.fromEntries(Object.entries(named).filter(([k]) => !parameters.some(([p]) => p === k)));
        const value = given[i] !== undefined ? given[i] : named[name] !== undefined ? named[name] : defaults[i];
        return value === MISSING ? refuse("E_KIND_OP", `${name} is missing`) : value;
      });
      return f(...values, host);
    },
  };
}

const unary = (f) => op("x", (x) => map(tensor(x), f));
const each = (value, n) => (Array.isArray(value) ? value : Array(n).fill(value));
const total = (v) => v.reduce((a, b) => a + b, 0);
const mean = (v) => total(v) / v.length;
const indices = (t) => [...t.data];

function erf(x) {
  // By its series near zero and its continued fraction beyond: both to double precision.
  const a = Math.abs(x);
  if (a > 6) return Math.sign(x);
  if (a < 2.5) {
    let term = a;
    let sum = a;
    for (let n = 1; Math.abs(term) > 1e-17 * Math.abs(sum) && n < 200; n += 1) {
      term *= (-a * a) / n;
      sum += term / (2 * n + 1);
    }
    return (Math.sign(x) * 2 * sum) / Math.sqrt(Math.PI);
  }
  let f = 0;
  for (let n = 60; n > 0; n -= 1) f = n / 2 / (a + f);
  return Math.sign(x) * (1 - Math.exp(-a * a) / Math.sqrt(Math.PI) / (a + f));
}

const sigmoid = (x) => 1 / (1 + Math.exp(-x));
const softplus = (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));
const elu = (x, alpha = 1) => (x > 0 ? x : alpha * Math.expm1(x));
const relu6 = (x) => Math.min(Math.max(x, 0), 6);
const silu = (x) => x * sigmoid(x);
export const ACTIVATIONS = {
  elu: (x) => elu(x), gelu: (x) => (x / 2) * (1 + erf(x / Math.SQRT2)),
  gelu_new: (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
  hardswish: (x) => (x * relu6(x + 3)) / 6, identity: (x) => x, leaky_relu: (x) => (x > 0 ? x : 0.01 * x),
  mish: (x) => x * Math.tanh(softplus(x)), quick_gelu: (x) => x * sigmoid(1.702 * x), relu: (x) => Math.max(x, 0), relu6,
  selu: (x) => 1.0507009873554805 * elu(x, 1.6732632423543772), sigmoid, silu, softplus, swish: silu, tanh: Math.tanh,
};

function evenRound(x) {
  const floor = Math.floor(x);
  const rest = x - floor;
  return rest < 0.5 || (rest === 0.5 && floor % 2 === 0) ? floor : floor + 1;
}

const softmaxOf = (log) => (v) => {
  const top = v.reduce((a, b) => Math.max(a, b));
  const sum = total(v.map((e) => Math.exp(e - top)));
  return v.map((e) => (log ? e - top - Math.log(sum) : Math.exp(e - top) / sum));
};
const euclid = (v) => Math.sqrt(total(v.map((e) => e * e)));

// ------------------------------------------------------------------------------------------- the channel axis, hosts

/** Where channels are: the last axis, or for convolutions the one after the batch. */
const channelAxis = (host, rank) => (host.family === "conv" ? rank - 1 - host.spatial : rank - 1);
const onChannels = (v, host) => (host.family === "conv" ? reshape(v, [v.data.length, ...Array(host.spatial).fill(1)]) : v);

function linear(h, w, bias, host) {
  const axis = channelAxis(host, h.rank);
  const flat = permute(h, [...h.shape.keys()].filter((i) => i !== axis).concat(axis));
  const lead = flat.shape.slice(0, -1);
  const out = reshape(bmm(reshape(flat, [-1, flat.shape.at(-1)]), swap(w, 0, 1)), [...lead, w.shape[0]]);
  const back = [...lead.keys()];
  back.splice(axis, 0, lead.length);
  const moved = permute(out, back);
  return bias === null ? moved : add(moved, onChannels(bias, host));
}

function norm(centred) {
  return (x, weight, bias, eps, host) => {
    const y = along(x, channelAxis(host, x.rank), (v) => {
      const middle = centred ? mean(v) : 0;
      const spread = Math.sqrt(mean(v.map((e) => (e - middle) ** 2)) + eps);
      return v.map((e) => (e - middle) / spread);
    });
    const scaled = weight === null ? y : mul(y, onChannels(weight, host));
    return bias === null ? scaled : add(scaled, onChannels(bias, host));
  };
}

export function applied(host, x, w) {
  if (host.family === "linear") return linear(x, w, null, host);
  if (host.family === "embedding") {
    const rows = take(swap(w, 0, 1), indices(x), 0);
    return reshape(rows, [...x.shape, w.shape[0]]);
  }
  if (host.family === "conv") return convolve(x, w, null, host.stride, host.padding, host.dilation, host.groups);
  throw new Unsupported(`host() on ${host.family}`);
}

// ------------------------------------------------------------------------------------------ windows over axes of space

export function convolve(x, w, bias, stride, padding, dilation, groups) {
  const n = w.rank - 2;
  const [steps, pads, gaps] = [stride, padding, dilation].map((v) => each(v, n));
  const space = x.shape.slice(2);
  const kernel = w.shape.slice(2);
  const size = space.map((d, i) => Math.floor((d + 2 * pads[i] - gaps[i] * (kernel[i] - 1) - 1) / steps[i]) + 1);
  const [perIn, perOut, taps] = [w.shape[1], w.shape[0] / groups, count(kernel)];
  return build([x.shape[0], w.shape[0], ...size], (at) => {
    const first = Math.floor(at[1] / perOut) * perIn;
    let sum = bias === null ? 0 : bias.data[at[1]];
    for (let tap = 0; tap < taps; tap += 1) {
      let rest = tap;
      const offsets = Array(n);
      for (let i = n - 1; i >= 0; i -= 1) {
        offsets[i] = rest % kernel[i];
        rest = Math.floor(rest / kernel[i]);
      }
      const from = offsets.map((k, i) => at[2 + i] * steps[i] - pads[i] + k * gaps[i]);
      if (from.some((v, i) => v < 0 || v >= space[i])) continue;
      for (let c = 0; c < perIn; c += 1) sum += item(x, [at[0], first + c, ...from]) * item(w, [at[1], c, ...offsets]);
    }
    return sum;
  });
}

/** Means over spans, one list of [begin, end, divisor] for each of the last axes. */
function pooled(x, spans) {
  const n = spans.length;
  return build([...x.shape.slice(0, -n), ...spans.map((s) => s.length)], (at) => {
    const chosen = spans.map((s, i) => s[at[at.length - n + i]]);
    let divisor = 1;
    let cells = [at.slice(0, -n)];
    for (const [begin, end, share] of chosen) {
      divisor *= share;
      cells = cells.flatMap((cell) => Array.from({ length: end - begin }, (_, i) => [...cell, begin + i]));
    }
    return cells.reduce((sum, cell) => sum + item(x, cell), 0) / divisor;
  });
}

function averagePool(n) {
  return (x, kernel, stride, padding, ceil, countPad) => {
    const [kernels, pads] = [each(kernel, n), each(padding, n)];
    const steps = stride === null ? kernels : each(stride, n);
    return pooled(x, x.shape.slice(-n).map((size, i) => {
      const [k, s, p] = [kernels[i], steps[i], pads[i]];
      let windows = Math.floor((size + 2 * p - k + (ceil ? s - 1 : 0)) / s) + 1;
      if (ceil && (windows - 1) * s >= size + p) windows -= 1;
      return Array.from({ length: windows }, (_, j) => {
        const [from, to] = [j * s - p, Math.min(j * s - p + k, size + p)];
        const [begin, end] = [Math.max(from, 0), Math.min(to, size)];
        return [begin, end, countPad ? to - from : end - begin];
      });
    }));
  };
}

const adaptivePool = (n) => (x, size) => {
  const sizes = each(size, n);
  return pooled(x, x.shape.slice(-n).map((full, i) => Array.from({ length: sizes[i] }, (_, j) => {
    const [begin, end] = [Math.floor((j * full) / sizes[i]), Math.ceil(((j + 1) * full) / sizes[i])];
    return [begin, end, end - begin];
  })));
};

function interpolate(x, size, mode) {
  return each(size, 2).reduce((y, to, i) => {
    const axis = y.rank - 2 + i;
    const full = y.shape[axis];
    const ticks = [...Array(to).keys()];
    if (mode === "nearest") return take(y, ticks.map((t) => Math.floor((t * full) / to)), axis);
    const at = ticks.map((t) => Math.max(((t + 0.5) * full) / to - 0.5, 0));
    const low = at.map((v) => Math.min(Math.floor(v), full - 1));
    const share = new Tensor([to, ...Array(y.rank - 1 - axis).fill(1)], Float64Array.from(at, (v, t) => v - low[t]));
    const high = take(y, low.map((v) => Math.min(v + 1, full - 1)), axis);
    return add(mul(take(y, low, axis), map(share, (v) => 1 - v)), mul(high, share));
  }, x);
}

function gated(x, how, axis) {
  const a = axisOf(axis, x.rank);
  const half = x.shape[a] / 2;
  const ticks = [...Array(half).keys()];
  const second = take(x, ticks.map((t) => t + half), a);
  return mul(take(x, ticks, a), how === "sigmoid" ? map(second, sigmoid) : second);
}

function attention(q, k, v, scale, causal) {
  const scores = map(bmm(q, swap(k, -1, -2)), (s) => s * (scale ?? 1 / Math.sqrt(q.shape.at(-1))));
  const seen = causal ? build(scores.shape, (at) => (at.at(-1) <= at.at(-2) ? item(scores, at) : -Infinity)) : scores;
  return bmm(along(seen, -1, softmaxOf(false)), v);
}

/** Gauss–Jordan with pivots: the x of a x = b, over the last two axes. */
function solve(a, b) {
  const n = a.shape.at(-1);
  const m = b.shape.at(-1);
  const batches = a.data.length / (n * n);
  const out = new Tensor([...a.shape.slice(0, -2), n, m]);
  for (let batch = 0; batch < batches; batch += 1) {
    const rows = Array.from({ length: n }, (_, i) => [
      ...a.data.subarray((batch * n + i) * n, (batch * n + i + 1) * n),
      ...b.data.subarray(((b.rank > 2 ? batch : 0) * n + i) * m, ((b.rank > 2 ? batch : 0) * n + i + 1) * m),
    ]);
    for (let c = 0; c < n; c += 1) {
      const best = rows.reduce((r, row, i) => (i >= c && Math.abs(row[c]) > Math.abs(rows[r][c]) ? i : r), c);
      [rows[c], rows[best]] = [rows[best], rows[c]];
      rows[c] = rows[c].map((v) => v / rows[c][c]);
      rows.forEach((row, i) => i !== c && (rows[i] = row.map((v, j) => v - row[c] * rows[c][j])));
    }
    rows.forEach((row, i) => out.data.set(row.slice(n), (batch * n + i) * m));
  }
  return out;
}

const eye = (n) => build([n, n], ([i, j]) => Number(i === j));
const triangle = (keep) => (x, k) => build(x.shape, (at) => (keep(at.at(-1) - at.at(-2), k) ? item(x, at) : 0));
const subtract = (a, b) => zip(a, b, (x, y) => x - y);

function groupNorm(x, groups, weight, bias, eps) {
  const y = reshape(along(reshape(x, [x.shape[0], groups, -1]), 2, (v) => {
    const middle = mean(v);
    const spread = Math.sqrt(mean(v.map((e) => (e - middle) ** 2)) + eps);
    return v.map((e) => (e - middle) / spread);
  }), x.shape);
  const by = (v) => reshape(v, [v.data.length, ...Array(x.rank - 2).fill(1)]);
  const scaled = weight === null ? y : mul(y, by(weight));
  return bias === null ? scaled : add(scaled, by(bias));
}

function skew(v, n) {
  const upper = build([...v.shape.slice(0, -1), n, n], (at) => {
    const [i, j] = at.slice(-2);
    return j > i ? item(v, [...at.slice(0, -2), i * n - (i * (i + 1)) / 2 + j - i - 1]) : 0;
  });
  return subtract(upper, swap(upper, -1, -2));
}

const reducing = (f) => op("x, axis, keep = 0", (x, axis, keep) => reduce(x, axis, f, Boolean(keep)));
const two = (f) => op("a, b", (a, b) => zip(tensor(a), tensor(b), f));
const pooling = (n) => op("x, kernel, stride = None, padding = 0, ceil = 0, count_pad = 1", averagePool(n));
const convolution = op("x, weight, bias = None, stride = 1, padding = 0, dilation = 1, groups = 1", convolve);

export const OPS = {
  ...Object.fromEntries(Object.entries(ACTIVATIONS).filter(([name]) => name !== "identity").map(([name, f]) => [name, unary(f)])),
  elu: op("x, alpha = 1", (x, alpha) => map(x, (v) => elu(v, alpha))),
  leaky_relu: op("x, slope = 0.01", (x, slope) => map(x, (v) => (v > 0 ? v : slope * v))),
  activation: op("x, name", (x, name) => map(x, ACTIVATIONS[name] ?? refuse("E_KIND_OP", `no activation ${name}`))),
  abs: unary(Math.abs), exp: unary(Math.exp), log: unary(Math.log), sqrt: unary(Math.sqrt), square: unary((v) => v * v),
  rsqrt: unary((v) => 1 / Math.sqrt(v)), sign: unary(Math.sign), sin: unary(Math.sin), cos: unary(Math.cos),
  round: unary(evenRound), floor: unary(Math.floor), float32: unary(Math.fround), stop_gradient: unary((v) => v),
  clip: op("x, low, high", (x, low, high) => map(x, (v) => Math.min(Math.max(v, low), high))),
  maximum: two(Math.max), minimum: two(Math.min), like: op("x, y", (x) => x),
  sum: reducing(total), mean: reducing(mean), norm: reducing(euclid),
  amax: reducing((v) => v.reduce((a, b) => Math.max(a, b))), amin: reducing((v) => v.reduce((a, b) => Math.min(a, b))),
  rms: reducing((v) => Math.sqrt(mean(v.map((e) => e * e)))),
  softmax: op("x, axis = -1", (x, axis) => along(x, axis, softmaxOf(false))),
  log_softmax: op("x, axis = -1", (x, axis) => along(x, axis, softmaxOf(true))),
  cumsum: op("x, axis", (x, axis) => along(x, axis, (v) => { let sum = 0; return v.map((e) => (sum += e)); })),
  normalize: op("x, axis = -1, eps = 1e-12", (x, axis, eps) => zip(x, reduce(x, axis, euclid, true), (v, n) => v / Math.max(n, eps))),
  layer_norm: op("x, weight = None, bias = None, eps = 1e-5", norm(true)),
  rms_norm: op("x, weight = None, eps = 1e-6", (x, weight, eps, host) => norm(false)(x, weight, null, eps, host)),
  group_norm: op("x, groups, weight = None, bias = None, eps = 1e-5", groupNorm),
  linear: op("h, w, bias = None", linear), channel: op("v", onChannels),
  rows: op("v", (v, host) => reshape(v, [v.data.length, ...Array(host.weightRank - 1).fill(1)])),
  columns: op("v", (v, host) => reshape(v, [1, v.data.length, ...Array(Math.max(host.weightRank - 2, 0)).fill(1)])),
  host: op("x, w", (x, w, host) => applied(host, x, w)), base: op("x", (x, host) => host.base(x)),
  reshape: op("x, shape", (x, shape) => reshape(x, [shape].flat())), reshape_as: op("x, y", (x, y) => reshape(x, y.shape)),
  expand_as: op("x, y", (x, y) => zip(x, y, (v) => v)), transpose: op("x, a = -2, b = -1", swap),
  permute: op("x, axes", (x, axes) => permute(x, [axes].flat())), unsqueeze: op("x, axis", unsqueeze),
  squeeze: op("x, axis", (x, axis) => reshape(x, x.shape.filter((_, i) => i !== axisOf(axis, x.rank)))),
  flatten: op("x, start = 0, end = -1", (x, start, end) => {
    const [from, to] = [axisOf(start, x.rank), axisOf(end, x.rank)];
    return reshape(x, [...x.shape.slice(0, from), count(x.shape.slice(from, to + 1)), ...x.shape.slice(to + 1)]);
  }),
  flip: op("x, axes", (x, axes) => [axes].flat().reduce((y, axis) => along(y, axis, (v) => v.slice().reverse()), x)),
  roll: op("x, shift, axis", (x, shift, axis) => along(x, axis, (v) => v.map((_, i) => v.at((i - shift) % v.length)))),
  pad: op("x, widths, value = 0", (x, widths, value) => {
    const before = x.shape.map((_, i) => widths[2 * (x.rank - 1 - i)] ?? 0);
    return build(x.shape.map((d, i) => d + before[i] + (widths[2 * (x.rank - 1 - i) + 1] ?? 0)), (at) => {
      const from = at.map((v, i) => v - before[i]);
      return from.every((v, i) => v >= 0 && v < x.shape[i]) ? item(x, from) : value;
    });
  }),
  cat: op("*xs, axis = -1", cat), stack: op("*xs, axis = 0", (xs, axis) => cat(xs.map((x) => unsqueeze(x, axis)), axis)),
  size: op("x, axis", (x, axis) => x.shape[axisOf(axis, x.rank)]),
  rearrange: op("x, pattern, **lengths", einops.rearrange), repeat: op("x, pattern, **lengths", einops.repeat),
  reduce: op("x, pattern, how, **lengths", einops.reduce),
  einsum: { call: (host, args, named) => (named.pattern ? einops.einsum(args, named.pattern) : einops.einsum(args.slice(0, -1), args.at(-1))) },
  zeros: op("shape, like", (shape) => new Tensor([shape].flat())),
  ones: op("shape, like", (shape) => map(new Tensor([shape].flat()), () => 1)),
  zeros_like: unary(() => 0), ones_like: unary(() => 1), eye: op("n, like", eye), arange: op("n, like", (n) => build([n], ([i]) => i)),
  bmm: op("a, b", bmm), inverse: op("x", (x) => solve(x, build(x.shape, (at) => Number(at.at(-1) === at.at(-2))))), solve: op("a, b", solve),
  kron: op("a, b", (a, b) => {
    const rank = Math.max(a.rank, b.rank);
    const [left, right] = [a, b].map((t) => reshape(t, [...Array(rank - t.rank).fill(1), ...t.shape]));
    return build(left.shape.map((d, i) => d * right.shape[i]), (at) =>
      item(left, at.map((v, i) => Math.floor(v / right.shape[i]))) * item(right, at.map((v, i) => v % right.shape[i])));
  }),
  diag: op("v", (v) => build([...v.shape, v.shape.at(-1)], (at) => (at.at(-1) === at.at(-2) ? item(v, at.slice(0, -1)) : 0))),
  diagonal: op("x", (x) => build([...x.shape.slice(0, -2), Math.min(...x.shape.slice(-2))], (at) => item(x, [...at, at.at(-1)]))),
  block_diag: op("x", (x) => build([x.shape[0] * x.shape[1], x.shape[0] * x.shape[2]], ([i, j]) => {
    const block = Math.floor(i / x.shape[1]);
    return block === Math.floor(j / x.shape[2]) ? item(x, [block, i % x.shape[1], j % x.shape[2]]) : 0;
  })),
  tril: op("x, k = 0", triangle((d, k) => d <= k)), triu: op("x, k = 0", triangle((d, k) => d >= k)), skew: op("v, n", skew),
  cayley: op("s", (s) => {
    const one = build(s.shape, (at) => Number(at.at(-1) === at.at(-2)));
    return solve(subtract(one, s), add(one, s));
  }),
  circulant: op("c", (c) => {
    const n = c.shape.at(-1);
    return build([...c.shape, n], (at) => item(c, [...at.slice(0, -2), (at.at(-2) - at.at(-1) + n) % n]));
  }),
  take: op("x, index, axis = 0", (x, index, axis) => {
    const a = axisOf(axis, x.rank);
    return reshape(take(x, indices(index), a), [...x.shape.slice(0, a), ...index.shape, ...x.shape.slice(a + 1)]);
  }),
  gather: op("x, axis, index", (x, axis, index) => build(index.shape, (at) => item(x, at.with(axisOf(axis, x.rank), item(index, at))))),
  embedding: op("index, table", (index, table) => reshape(take(table, indices(index), 0), [...index.shape, ...table.shape.slice(1)])),
  put: op("x, index, values, axis = 0", (x, index, values, axis) => {
    const [a, list] = [axisOf(axis, x.rank), indices(index).map((i) => axisOf(i, x.shape[axisOf(axis, x.rank)]))];
    return build(x.shape, (at) => {
      const from = list.lastIndexOf(at[a]);
      return from < 0 ? item(x, at) : item(values, at.with(a, from));
    });
  }),
  scatter_add: op("x, axis, index, values", (x, axis, index, values) => {
    const out = map(x, (v) => v);
    build(index.shape, (at) => {
      const to = at.with(axisOf(axis, x.rank), item(index, at));
      out.data[to.reduce((n, v, i) => n * x.shape[i] + v, 0)] += item(values, at);
      return 0;
    });
    return out;
  }),
  conv1d: convolution, conv2d: convolution, conv3d: convolution, avg_pool1d: pooling(1), avg_pool2d: pooling(2),
  adaptive_avg_pool1d: op("x, size", adaptivePool(1)), adaptive_avg_pool2d: op("x, size", adaptivePool(2)),
  interpolate: op("x, size, mode = bilinear", interpolate),
  shrink2d: op("x, by, how = avg", (x, by, how) =>
    how === "avg" ? averagePool(2)(x, by, by, 0, true, false)
      : adaptivePool(2)(x, x.shape.slice(-2).map((d) => Math.max(1, Math.floor(d / by))))),
  grow2d: op("x, by, size", (x, by, size) => (by === 1 ? x : interpolate(x, size, "bilinear"))),
  depthwise2d: op("x, weight, bias = None", (x, w, bias) => convolve(x, w, bias, 1, Math.floor(w.shape.at(-1) / 2), 1, w.shape[0])),
  gated: op("x, how = product, axis = -1", gated),
  attention: op("q, k, v, scale = None, causal = 0", attention),
  ifft2_real: op("x", (x) => {
    const [n, m] = x.shape.slice(-2);
    return build(x.shape, (at) => {
      let sum = 0;
      for (let i = 0; i < n; i += 1)
        for (let j = 0; j < m; j += 1)
          sum += item(x, [...at.slice(0, -2), i, j]) * Math.cos(2 * Math.PI * ((i * at.at(-2)) / n + (j * at.at(-1)) / m));
      return sum / (n * m);
    });
  }),
};
