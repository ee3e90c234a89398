// SPEC.md, section 5.6: programs, from text to a tree, and the walk over it.

import { Unsupported, refuse } from "./errors.mjs";
import { OPS } from "./ops.mjs";
import { Tensor, cat, map, matmul, tensor, unsqueeze, zip, build, axisOf, item } from "./tensor.mjs";

const TOKEN = /(?:([A-Za-z][A-Za-z0-9_]*)|((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|'([^'\\\n]*)'|"([^"\\\n]*)"|(\*\*|\/\/|\.\.\.|[-+*/@()[\],:=]))/y;
const LOOPS = new Set(["sum", "cat", "stack", "chain"]);
const syntax = (why) => refuse("E_KIND_SYNTAX", why);

function tokens(text) {
  const out = [];
  let depth = 0;
  let at = 0;
  const source = text.replace(/#[^\n]*/g, "");
  while (at < source.length) {
    const space = /[ \t\r]*/y;
    space.lastIndex = at;
    at += space.exec(source)[0].length;
    if (at >= source.length) break;
    if (source[at] === "\n") {
      if (depth === 0 && out.length && out.at(-1).kind !== "end") out.push({ kind: "end" });
      at += 1;
      continue;
    }
    TOKEN.lastIndex = at;
    const found = TOKEN.exec(source);
    if (!found || TOKEN.lastIndex === at) syntax(`a character at ${at}: ${source[at]}`);
    at = TOKEN.lastIndex;
    const [, name, number, single, double, mark] = found;
    if (name !== undefined) out.push({ kind: "name", value: name });
    else if (number !== undefined) out.push({ kind: "number", value: Number(number) });
    else if (single !== undefined || double !== undefined) out.push({ kind: "text", value: single ?? double });
    else {
      depth += "([".includes(mark) ? 1 : ")]".includes(mark) ? -1 : 0;
      out.push({ kind: mark });
    }
  }
  if (out.at(-1)?.kind === "end") out.pop();
  return out;
}

/** The lines of a program: assignments, and the expression that is its value. */
export function parse(text) {
  const list = tokens(text);
  let at = 0;
  const peek = (ahead = 0) => list[at + ahead]?.kind;
  const next = (kind) => (kind === undefined || peek() === kind ? list[at++] : syntax(`no ${kind}`));
  const accept = (kind) => peek() === kind && (at += 1);
  const acceptName = (word) => peek() === "name" && list[at].value === word && (at += 1);

  const left = (kinds, operand) => () => {
    let tree = operand();
    while (kinds.includes(peek())) tree = { op: next().kind, left: tree, right: operand() };
    return tree;
  };
  const unary = () => (accept("-") ? { op: "negate", value: unary() } : power());
  const term = left(["*", "/", "//", "@"], unary);
  const expression = left(["+", "-"], term);
  function power() {
    const base = primary();
    return accept("**") ? { op: "**", left: base, right: unary() } : base;
  }

  function primary() {
    let tree;
    const token = next() ?? syntax("cut");
    if (token.kind === "number") tree = { op: "constant", value: token.value };
    else if (token.kind === "(") tree = bracket();
    else if (token.kind !== "name") syntax(`an unexpected ${token.kind}`);
    else tree = peek() === "(" ? call(token.value) : { op: "name", name: token.value };
    while (accept("[")) tree = { op: "subscript", value: tree, indices: indices() };
    return tree;
  }

  function bracket() {
    if (accept(")")) return { op: "tuple", items: [] };
    const first = expression();
    if (accept(")")) return first;
    const items = [first];
    while (accept(",") && peek() !== ")") items.push(expression());
    next(")");
    return { op: "tuple", items };
  }

  function rounds(value) {
    const name = next("name").value;
    if (!acceptName("in") || !acceptName("range")) syntax("a loop runs over a range");
    next("(");
    const ends = [expression()];
    if (accept(",")) ends.push(expression());
    next(")");
    return { value, name, ends };
  }

  function call(name) {
    next("(");
    if (LOOPS.has(name)) {
      const start = at;
      const inner = accept("(");
      if (inner !== false || peek() !== ")") {
        const value = expression();
        if (acceptName("for")) {
          const loop = { op: "loop", how: name, ...rounds(value) };
          next(")");
          if (inner) {
            next(",");
            if (!acceptName("axis")) syntax("a loop has an axis and nothing else");
            next("=");
            loop.axis = expression();
            next(")");
          }
          return loop;
        }
      }
      at = start;
    }
    const [args, named] = [[], {}];
    while (peek() !== ")") {
      const key = peek() === "name" && peek(1) === "=" ? (at += 2, list[at - 2].value) : undefined;
      const value = peek() === "text" ? { op: "constant", value: next().value } : expression();
      if (key === undefined) args.push(value);
      else named[key] = value;
      if (!accept(",")) break;
    }
    next(")");
    return { op: "call", name, args, named };
  }

  function indices() {
    const out = [];
    do {
      if (accept("...")) out.push({ op: "all" });
      else {
        const parts = [undefined, undefined, undefined];
        let part = 0;
        for (; peek() !== "," && peek() !== "]"; ) {
          if (accept(":")) part += 1;
          else parts[part] = expression();
        }
        out.push(part ? { op: "slice", parts } : parts[0]);
      }
    } while (accept(","));
    next("]");
    return out;
  }

  const lines = [];
  while (at < list.length) {
    const name = peek() === "name" && peek(1) === "=" ? (at += 2, list[at - 2].value) : undefined;
    lines.push({ name, value: expression() });
    if (at < list.length) next("end");
  }
  if (!lines.length || lines.at(-1).name !== undefined) syntax("a program ends with its value");
  return lines;
}

const NUMBERS = {
  "+": (a, b) => a + b, "-": (a, b) => a - b, "*": (a, b) => a * b, "/": (a, b) => a / b,
  "//": (a, b) => Math.floor(a / b), "**": (a, b) => a ** b,
};

function arithmetic(op, a, b) {
  if (a === null || b === null) refuse("E_KIND_TENSOR", `${op} of a tensor that is absent`);
  if (op === "@") return matmul(a, b);
  if (typeof a === "number" && typeof b === "number") {
    if ((op === "/" || op === "//") && b === 0) refuse("E_KIND_NUMBER", "a division by zero");
    return NUMBERS[op](a, b);
  }
  return zip(tensor(a), tensor(b), NUMBERS[op]);
}

function subscript(value, indices) {
  if (value === null) return null;
  if (Array.isArray(value)) return typeof indices[0] === "number" ? value.at(indices[0]) : value.slice(...indices[0].slice(0, 2));
  const spread = indices.indexOf("all");
  const full = [...indices];
  const missing = Array.from({ length: value.rank - indices.length + (spread < 0 ? 0 : 1) }, () => []);
  full.splice(spread < 0 ? full.length : spread, spread < 0 ? 0 : 1, ...missing);
  const picked = full.map((index, axis) => {
    const n = value.shape[axis];
    if (typeof index === "number") return { fixed: axisOf(index, n) };
    const [from, to, step = 1] = index;
    const end = (v, other) => (v === undefined ? other : Math.min(Math.max(v < 0 ? v + n : v, 0), n));
    const list = [];
    for (let i = end(from, 0); i < end(to, n); i += step) list.push(i);
    return { list };
  });
  const kept = picked.flatMap((p, axis) => (p.list ? [axis] : []));
  return build(kept.map((axis) => picked[axis].list.length), (at) => {
    const where = picked.map((p) => p.fixed);
    kept.forEach((axis, i) => (where[axis] = picked[axis].list[at[i]]));
    return item(value, where);
  });
}

function joined(how, values, axis) {
  if (how === "sum") return values.reduce((a, b) => arithmetic("+", a, b));
  if (how === "chain") return values.reduce(matmul);
  const axisAt = axis ?? (how === "cat" ? -1 : 0);
  return cat(how === "cat" ? values : values.map((v) => unsqueeze(v, axisAt)), axisAt);
}

/** The value of a program among names; `host` tells the operations what they stand on. */
export function run(lines, names, host) {
  const scope = new Map(Object.entries(names));
  const value = (tree) => {
    if (tree === undefined) return undefined;
    switch (tree.op) {
      case "constant": return tree.value;
      case "name": return scope.has(tree.name) ? scope.get(tree.name) : refuse("E_KIND_NAME", `${tree.name} has no meaning`);
      case "tuple": return tree.items.map(value);
      case "negate": {
        const inner = value(tree.value);
        return typeof inner === "number" ? -inner : map(inner, (v) => -v);
      }
      case "subscript":
        return subscript(value(tree.value), tree.indices.map((i) =>
          i.op === "all" ? "all" : i.op === "slice" ? i.parts.map(value) : value(i)));
      case "loop": {
        const ends = tree.ends.map(value);
        const [from, to] = ends.length === 2 ? ends : [0, ends[0]];
        const outer = scope.get(tree.name);
        const values = [];
        for (let i = from; i < to; i += 1) {
          scope.set(tree.name, i);
          values.push(value(tree.value));
        }
        if (outer === undefined) scope.delete(tree.name);
        else scope.set(tree.name, outer);
        return joined(tree.how, values, value(tree.axis));
      }
      case "call": return call(tree);
      default: return arithmetic(tree.op, value(tree.left), value(tree.right));
    }
  };
  const call = (tree) => {
    const op = OPS[tree.name];
    if (!op) throw new Unsupported(`the operation ${tree.name}`);
    return op.call(host, tree.args.map(value), Object.fromEntries(Object.entries(tree.named).map(([k, v]) => [k, value(v)])));
  };
  let out;
  for (const line of lines) {
    out = value(line.value);
    if (line.name !== undefined) scope.set(line.name, out);
  }
  return out instanceof Tensor ? out : tensor(out);
}
