// SPEC.md, section 6: lists of module paths, abbreviated by braces.

import { refuse } from "./errors.mjs";

const LIMITS = { count: 100000, path: 1024, digits: 9 };
const FORBIDDEN = /[\p{C}\p{Z}./{},*?[\]()|\\^$+"'`]/u;
const RANGE = /^(0|[1-9][0-9]*)\.\.(0|[1-9][0-9]*)$/;
const syntax = (pattern, why) => refuse("E_TARGET_SYNTAX", `${JSON.stringify(pattern)}: ${why}`);
const name = (text, pattern) => (text === "" || FORBIDDEN.test(text) ? syntax(pattern, `no name: ${text}`) : text);

/** One item in braces: how many it stands for, the longest of them, and a way to list them. */
function item(text, pattern) {
  if (!text.includes("..")) return { count: 1, longest: name(text, pattern).length, list: () => [text] };
  const found = RANGE.exec(text) ?? syntax(pattern, `no range: ${text}`);
  if (Math.max(found[1].length, found[2].length) > LIMITS.digits) refuse("E_TARGET_EXPANSION", "a number too long");
  const [low, high] = [Number(found[1]), Number(found[2])];
  if (low >= high) syntax(pattern, "a range that does not rise");
  const list = () => Array.from({ length: high - low + 1 }, (_, i) => String(low + i));
  return { count: high - low + 1, longest: found[2].length, list };
}

function parse(pattern) {
  const parts = [];
  let literal = "";
  let fresh = true; // whether a name between dots begins here
  const flush = () => {
    const text = literal;
    if (text) parts.push({ count: 1, longest: text.length, items: [{ list: () => [text] }] });
    literal = "";
  };
  for (let at = 0; at < pattern.length; ) {
    const c = pattern[at];
    if (c === "{") {
      const end = pattern.indexOf("}", at);
      if (end < 0) syntax(pattern, "a brace that is not closed");
      const items = pattern.slice(at + 1, end).split(",").map((text) => item(text, pattern));
      if (items.length === 1 && items[0].count === 1) syntax(pattern, "braces around one name");
      flush();
      const count = items.reduce((n, i) => n + i.count, 0);
      parts.push({ count, longest: Math.max(...items.map((i) => i.longest)), items });
      at = end + 1;
      fresh = false;
    } else if (c === ".") {
      if (fresh) syntax(pattern, "an empty name");
      literal += c;
      fresh = true;
      at += 1;
    } else {
      const point = String.fromCodePoint(pattern.codePointAt(at));
      literal += name(point, pattern);
      at += point.length;
      fresh = false;
    }
  }
  if (fresh) syntax(pattern, "an empty name");
  flush();
  return parts;
}

/** All paths that a list of targets stands for; how many they are is known before they are made. */
export function expand(patterns) {
  const parsed = patterns.map(parse);
  let total = 0;
  for (const parts of parsed) {
    total += parts.reduce((n, part) => n * part.count, 1);
    if (total > LIMITS.count) refuse("E_TARGET_EXPANSION", `more than ${LIMITS.count} paths`);
    if (parts.reduce((n, part) => n + part.longest, 0) > LIMITS.path) refuse("E_TARGET_EXPANSION", "a path too long");
  }
  const seen = new Set();
  for (const parts of parsed) {
    let paths = [""];
    for (const { items } of parts) {
      const values = items.flatMap((i) => i.list());
      paths = paths.flatMap((path) => values.map((value) => path + value));
    }
    for (const path of paths) {
      if (path.startsWith("__") || path.includes(".__")) syntax(path, "a name that begins with two underscores");
      if (seen.has(path)) refuse("E_TARGET_TWICE", `${path} twice`);
      seen.add(path);
    }
  }
  return [...seen];
}
