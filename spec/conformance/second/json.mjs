// JSON as SPEC.md, section 4.1, wants it: UTF-8, no member twice, bounded depth, and 8 is not 8.0.
// Integers become BigInt and all other numbers Number, so that nothing downstream can take one for the other.
// Written here because JSON.parse keeps the last of two members and forgets how a number was spelled.

import { refuse } from "./errors.mjs";

const SPACE = /[ \t\n\r]*/y;
const NUMBER = /-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/y;
const ESCAPES = { '"': '"', "\\": "\\", "/": "/", b: "\b", f: "\f", n: "\n", r: "\r", t: "\t" };
const SAFE = 2n ** 53n - 1n;

/** Codes that a fault of the text itself is refused with; tensor files have others than manifests. */
export const MANIFEST = {
  encoding: "E_MANIFEST_ENCODING", syntax: "E_MANIFEST_JSON", twice: "E_MANIFEST_DUPLICATE_KEY",
  number: "E_MANIFEST_NUMBER", depth: "E_MANIFEST_DEPTH", maxDepth: 64,
};
export const HEADER = {
  encoding: "E_TENSORS_HEADER_SYNTAX", syntax: "E_TENSORS_HEADER_SYNTAX", twice: "E_TENSORS_DUPLICATE",
  number: "E_TENSORS_SHAPE", depth: "E_TENSORS_HEADER_SYNTAX", maxDepth: 64,
};

export function decode(bytes, codes) {
  if (bytes[0] === 0xef && bytes[1] === 0xbb && bytes[2] === 0xbf) refuse(codes.encoding, "a byte order mark");
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    return refuse(codes.encoding, "not UTF-8");
  }
}

export function parse(text, codes) {
  let at = 0;
  const fail = (what) => refuse(codes.syntax, `${what} at character ${at}`);
  const skip = () => {
    SPACE.lastIndex = at;
    SPACE.test(text);
    at = SPACE.lastIndex;
  };
  const expect = (token) => (text.startsWith(token, at) ? (at += token.length) : fail(`no ${token}`));

  function string() {
    let out = "";
    for (at += 1; ; ) {
      const c = text[at];
      if (c === undefined || c < " ") fail("a string is cut or holds a control character");
      at += 1;
      if (c === '"') break;
      if (c !== "\\") {
        out += c;
        continue;
      }
      const kind = text[at++];
      if (kind === "u") {
        const hex = text.slice(at, at + 4);
        if (!/^[0-9a-fA-F]{4}$/.test(hex)) fail("an escape");
        out += String.fromCharCode(parseInt(hex, 16));
        at += 4;
      } else out += ESCAPES[kind] ?? fail("an escape");
    }
    if (!out.isWellFormed()) refuse(codes.encoding, "a surrogate stands alone");
    return out;
  }

  function number() {
    NUMBER.lastIndex = at;
    const found = NUMBER.exec(text);
    if (!found) {
      if (/^-?(NaN|Infinity)/.test(text.slice(at, at + 9))) refuse(codes.syntax, "NaN and Infinity are no JSON");
      fail("no value");
    }
    at = NUMBER.lastIndex;
    if (found[1] === undefined && found[2] === undefined) {
      if (found[0].length > 17) refuse(codes.number, "an integer beyond 2^53 - 1");
      const value = BigInt(found[0]);
      if (value > SAFE || value < -SAFE) refuse(codes.number, "an integer beyond 2^53 - 1");
      return value;
    }
    const value = Number(found[0]);
    return Number.isFinite(value) ? value : refuse(codes.number, "not a finite number");
  }

  function value(depth) {
    skip();
    const c = text[at];
    if (c === '"') return string();
    for (const [word, meaning] of [["true", true], ["false", false], ["null", null]]) {
      if (text.startsWith(word, at)) {
        at += word.length;
        return meaning;
      }
    }
    if (c !== "{" && c !== "[") return number();
    if (depth > codes.maxDepth) refuse(codes.depth, `deeper than ${codes.maxDepth}`);
    return c === "{" ? object(depth) : array(depth);
  }

  function array(depth) {
    const out = [];
    at += 1;
    for (skip(); text[at] !== "]"; skip()) {
      if (out.length) expect(",");
      out.push(value(depth + 1));
    }
    at += 1;
    return out;
  }

  function object(depth) {
    const out = new Map();
    at += 1;
    for (skip(); text[at] !== "}"; skip()) {
      if (out.size) expect(",");
      skip();
      if (text[at] !== '"') fail("no name of a member");
      const name = string();
      if (out.has(name)) refuse(codes.twice, `${JSON.stringify(name)} twice`);
      skip();
      expect(":");
      out.set(name, value(depth + 1));
    }
    at += 1;
    return out;
  }

  const root = value(1);
  skip();
  if (at !== text.length) fail("something after the value");
  return root;
}

/** A parsed value as text; what was a float stays one. */
export function write(value) {
  if (value instanceof Map) return `{${[...value].map(([k, v]) => `${JSON.stringify(k)}:${write(v)}`).join(",")}}`;
  if (Array.isArray(value)) return `[${value.map(write).join(",")}]`;
  if (typeof value === "bigint") return value.toString();
  if (typeof value === "number" && Number.isInteger(value)) return `${value}`.includes("e") ? `${value}` : `${value}.0`;
  return JSON.stringify(value);
}
