// The notation of einops (https://einops.rocks): rearrange, reduce, repeat and einsum.

import { refuse } from "./errors.mjs";
import { build, count, item, permute, reduce as over, reshape } from "./tensor.mjs";

const bad = (pattern) => refuse("E_KIND_SHAPE", `the pattern ${pattern} does not fit`);

/** One side of a pattern as groups of axis names; `...` stands for as many axes as are left. */
function side(text, spread) {
  const parts = text.match(/\([^()]*\)|\.\.\.|[^\s()]+/g) ?? [];
  return parts.flatMap((part) => {
    if (part === "...") return spread.map((axis) => [axis]);
    return [part.startsWith("(") ? part.slice(1, -1).trim().split(/\s+/).filter(Boolean).flatMap((p) => (p === "..." ? spread : [p])) : [part]];
  });
}

function sizes(groups, shape, lengths, pattern) {
  if (groups.length !== shape.length) bad(pattern);
  const out = { ...lengths };
  groups.forEach((group, i) => {
    const size = (name) => (/^\d+$/.test(name) ? Number(name) : out[name]);
    const open = group.filter((name) => size(name) === undefined);
    const known = group.filter((name) => size(name) !== undefined).reduce((n, name) => n * size(name), 1);
    if (open.length > 1 || shape[i] % known) bad(pattern);
    if (open.length) out[open[0]] = shape[i] / known;
    else if (known !== shape[i]) bad(pattern);
  });
  return out;
}

function both(x, pattern, lengths) {
  const [left, right] = pattern.split("->");
  const plain = side(left, []).length;
  const spread = left.includes("...") ? Array.from({ length: x.rank - plain }, (_, i) => `…${i}`) : [];
  const from = side(left, spread);
  // An axis of length 1 in a pattern has no name of its own: each gets one.
  const named = from.map((group, i) => group.map((name, j) => (name === "1" ? `¹${i}.${j}` : name)));
  const ones = Object.fromEntries(named.flat().filter((n) => n[0] === "¹").map((n) => [n, 1]));
  const all = sizes(named, x.shape, { ...lengths, ...ones }, pattern);
  const inner = named.flat();
  return { flat: reshape(x, inner.map((n) => all[n])), inner, to: side(right, spread), all };
}

const length = (all, name) => (/^\d+$/.test(name) ? Number(name) : all[name]);
const grouped = (to, all) => to.map((group) => group.reduce((n, name) => n * length(all, name), 1));

export function rearrange(x, pattern, lengths = {}) {
  return reduce(x, pattern, "sum", lengths);
}

/** Axes that the right side has not are reduced; rearrange is the case where only those of length 1 are. */
export function reduce(x, pattern, how, lengths = {}) {
  const { flat, inner, to, all } = both(x, pattern, lengths);
  const wanted = to.flat().filter((name) => name !== "1");
  const gone = inner.flatMap((name, i) => (wanted.includes(name) ? [] : [i]));
  const rules = {
    sum: (v) => v.reduce((a, b) => a + b, 0), mean: (v) => v.reduce((a, b) => a + b, 0) / v.length,
    max: (v) => v.reduce((a, b) => Math.max(a, b)), min: (v) => v.reduce((a, b) => Math.min(a, b)),
    prod: (v) => v.reduce((a, b) => a * b, 1),
  };
  const left = gone.length ? over(flat, gone, rules[how]) : flat;
  const names = inner.filter((_, i) => !gone.includes(i));
  return reshape(permute(left, wanted.map((name) => names.indexOf(name))), grouped(to, all));
}

export function repeat(x, pattern, lengths = {}) {
  const { flat, inner, to, all } = both(x, pattern, lengths);
  const names = to.flat();
  const made = build(names.map((name) => length(all, name)), (at) =>
    item(flat, inner.map((name) => (name[0] === "¹" ? 0 : at[names.indexOf(name)]))));
  return reshape(made, grouped(to, all));
}

export function einsum(xs, pattern) {
  const [left, right] = pattern.split("->");
  const texts = left.split(",");
  const spreads = texts.map((text, i) => (text.includes("...") ? xs[i].rank - side(text, []).length : 0));
  const spread = Array.from({ length: Math.max(...spreads) }, (_, i) => `…${i}`);
  const inputs = texts.map((text, i) => side(text, spread.slice(spread.length - spreads[i])).flat());
  const output = side(right, spread).flat();
  const all = {};
  inputs.forEach((names, i) => Object.assign(all, sizes(names.map((n) => [n]), xs[i].shape, all, pattern)));
  const summed = Object.keys(all).filter((name) => !output.includes(name));
  const total = count(summed.map((name) => all[name]));
  return build(output.map((name) => all[name]), (at) => {
    const where = Object.fromEntries(output.map((name, i) => [name, at[i]]));
    let sum = 0;
    for (let step = 0; step < total; step += 1) {
      let rest = step;
      for (const name of summed) {
        where[name] = rest % all[name];
        rest = Math.floor(rest / all[name]);
      }
      sum += inputs.reduce((product, names, i) => product * item(xs[i], names.map((n) => where[n])), 1);
    }
    return sum;
  });
}
