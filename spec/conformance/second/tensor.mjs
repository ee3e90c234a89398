// Dense tensors of float64 in C order, and the few primitives that all operations are made of.

export class Tensor {
  constructor(shape, data) {
    this.shape = shape;
    this.data = data ?? new Float64Array(count(shape));
    if (this.data.length !== count(shape)) throw new RangeError(`${this.data.length} numbers for ${shape}`);
  }
  get rank() {
    return this.shape.length;
  }
}

export const count = (shape) => shape.reduce((n, d) => n * d, 1);
export const scalar = (value) => new Tensor([], Float64Array.of(value));
export const tensor = (value) => (value instanceof Tensor ? value : scalar(value));
export const axisOf = (axis, rank) => (axis < 0 ? axis + rank : axis);

export function strides(shape) {
  const out = new Array(shape.length);
  for (let i = shape.length - 1, step = 1; i >= 0; step *= shape[i], i -= 1) out[i] = step;
  return out;
}

/** A tensor of a shape whose element at each index (an array that is reused) is f(index). */
export function build(shape, f) {
  const out = new Tensor(shape);
  const at = new Array(shape.length).fill(0);
  for (let i = 0; i < out.data.length; i += 1) {
    out.data[i] = f(at);
    for (let axis = shape.length - 1; axis >= 0 && ++at[axis] === shape[axis]; axis -= 1) at[axis] = 0;
  }
  return out;
}

export function offset(x, at) {
  let out = 0;
  for (let i = 0; i < at.length; i += 1) out = out * x.shape[i] + at[i];
  return out;
}
export const item = (x, at) => x.data[offset(x, at)];
export const map = (x, f) => new Tensor(x.shape, x.data.map(f));

export function broadcastShape(a, b) {
  const rank = Math.max(a.length, b.length);
  return Array.from({ length: rank }, (_, i) => {
    const [left, right] = [a[i - rank + a.length] ?? 1, b[i - rank + b.length] ?? 1];
    if (left !== right && left !== 1 && right !== 1) throw new RangeError(`${a} and ${b} do not broadcast`);
    return left === 1 ? right : left;
  });
}

/** Elementwise, broadcasting as NumPy does. */
export function zip(a, b, f) {
  const shape = broadcastShape(a.shape, b.shape);
  const steps = [a, b].map((x) => {
    const s = strides(x.shape);
    return shape.map((_, i) => {
      const j = i - shape.length + x.rank;
      return j >= 0 && x.shape[j] !== 1 ? s[j] : 0;
    });
  });
  const dot = (at, s) => at.reduce((n, v, i) => n + v * s[i], 0);
  return build(shape, (at) => f(a.data[dot(at, steps[0])], b.data[dot(at, steps[1])]));
}

export const add = (a, b) => zip(a, b, (x, y) => x + y);
export const mul = (a, b) => zip(a, b, (x, y) => x * y);

export function reshape(x, shape) {
  const known = shape.filter((d) => d !== -1).reduce((n, d) => n * d, 1);
  return new Tensor(shape.map((d) => (d === -1 ? x.data.length / known : d)), x.data);
}

export function permute(x, axes) {
  const order = axes.map((a) => axisOf(a, x.rank));
  const s = strides(x.shape);
  const steps = order.map((a) => s[a]);
  return build(order.map((a) => x.shape[a]), (at) => x.data[at.reduce((n, v, i) => n + v * steps[i], 0)]);
}

export function swap(x, a, b) {
  const axes = x.shape.map((_, i) => i);
  [axes[axisOf(a, x.rank)], axes[axisOf(b, x.rank)]] = [axes[axisOf(b, x.rank)], axes[axisOf(a, x.rank)]];
  return permute(x, axes);
}

/** One axis by a function of its numbers; `f` gives a number, or as many as it got. */
export function along(x, axis, f) {
  const a = axisOf(axis, x.rank);
  const moved = permute(x, [...x.shape.keys()].filter((i) => i !== a).concat(a));
  const n = x.shape[a];
  const rows = Array.from({ length: moved.data.length / n }, (_, i) => f(moved.data.subarray(i * n, (i + 1) * n)));
  const single = typeof rows[0] === "number";
  const data = Float64Array.from(single ? rows : rows.flatMap((row) => [...row]));
  const lead = moved.shape.slice(0, -1);
  const out = new Tensor([...lead, single ? 1 : data.length / count(lead)], data);
  const back = [...lead.keys()];
  back.splice(a, 0, lead.length);
  return permute(out, back);
}

/** Several axes as one, by a function of their numbers; kept with length 1 or dropped. */
export function reduce(x, axes, f, keep = false) {
  const chosen = [axes].flat().map((a) => axisOf(a, x.rank));
  const rest = [...x.shape.keys()].filter((i) => !chosen.includes(i));
  const moved = permute(x, [...rest, ...chosen]);
  const n = count(chosen.map((a) => x.shape[a]));
  const shape = keep ? x.shape.map((d, i) => (chosen.includes(i) ? 1 : d)) : rest.map((i) => x.shape[i]);
  return new Tensor(shape, Float64Array.from({ length: count(shape) }, (_, i) => f(moved.data.subarray(i * n, (i + 1) * n))));
}

/** Slices along an axis by a list of indices. */
export function take(x, indices, axis) {
  const a = axisOf(axis, x.rank);
  return build(x.shape.map((d, i) => (i === a ? indices.length : d)), (at) => {
    const from = [...at];
    from[a] = axisOf(indices[at[a]], x.shape[a]);
    return item(x, from);
  });
}

export function cat(xs, axis) {
  const a = axisOf(axis, xs[0].rank);
  const starts = [];
  let total = 0;
  for (const x of xs) {
    starts.push(total);
    total += x.shape[a];
  }
  return build(xs[0].shape.map((d, i) => (i === a ? total : d)), (at) => {
    const which = starts.findLastIndex((start) => start <= at[a]);
    const from = [...at];
    from[a] -= starts[which];
    return item(xs[which], from);
  });
}

export function unsqueeze(x, axis) {
  const shape = [...x.shape];
  shape.splice(axisOf(axis, x.rank + 1), 0, 1);
  return new Tensor(shape, x.data);
}

/** Products over the last two axes, the others broadcast. */
export function bmm(a, b) {
  const [n, k] = a.shape.slice(-2);
  const m = b.shape.at(-1);
  const lead = broadcastShape(a.shape.slice(0, -2), b.shape.slice(0, -2));
  const pick = (x, at) => at.slice(at.length - (x.rank - 2)).map((v, i) => (x.shape[i] === 1 ? 0 : v));
  return build([...lead, n, m], (at) => {
    const [i, j] = at.slice(-2);
    const before = at.slice(0, -2);
    const [left, right] = [[...pick(a, before), i, 0], [...pick(b, before), 0, j]];
    let sum = 0;
    for (let l = 0, p = offset(a, left), q = offset(b, right); l < k; l += 1, p += 1, q += m) sum += a.data[p] * b.data[q];
    return sum;
  });
}

/** `@` of SPEC.md: NumPy's up to two axes; of more, the left's last axis with the right's first. */
export function matmul(a, b) {
  if (a.rank === 2 && b.rank > 2) {
    const flat = bmm(a, reshape(b, [b.shape[0], -1]));
    return reshape(flat, [a.shape[0], ...b.shape.slice(1)]);
  }
  const left = a.rank === 1 ? unsqueeze(a, 0) : a;
  const right = b.rank === 1 ? unsqueeze(b, 1) : b;
  const out = bmm(left, right);
  const shape = out.shape.filter((_, i) => !(a.rank === 1 && i === out.rank - 2) && !(b.rank === 1 && i === out.rank - 1));
  return new Tensor(shape, out.data);
}
