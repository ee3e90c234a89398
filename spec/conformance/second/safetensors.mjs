// SPEC.md, section 7.1: the strict reading of a tensor file.

import { refuse } from "./errors.mjs";
import { HEADER, decode, parse } from "./json.mjs";

const LIMITS = { header: 16777216, count: 100000, dims: 16, name: 1024 };
export const BITS = {
  F4: 4, F6_E2M3: 6, F6_E3M2: 6, BOOL: 8, U8: 8, I8: 8, F8_E5M2: 8, F8_E4M3: 8, F8_E8M0: 8, F8_E4M3FNUZ: 8,
  F8_E5M2FNUZ: 8, I16: 16, U16: 16, F16: 16, BF16: 16, I32: 32, U32: 32, F32: 32, C64: 64, F64: 64, I64: 64, U64: 64,
};
const UNPRINTABLE = /[\p{C}\p{Zl}\p{Zp}]|(?! )\p{Zs}/u;
const isNatural = (value) => typeof value === "bigint" && value >= 0n;

export function read(bytes) {
  if (bytes.length < 8) refuse("E_TENSORS_HEADER_LENGTH", "shorter than a header's length");
  const length = bytes.readBigUInt64LE(0);
  if (length < 2n || length > LIMITS.header || length > bytes.length - 8)
    refuse("E_TENSORS_HEADER_LENGTH", `a header of ${length} bytes`);
  const begin = 8 + Number(length);
  const text = decode(bytes.subarray(8, begin), HEADER);
  // JSON reads -0 as a number like others; a header has no signs, fractions or exponents, and only spaces at its end.
  if (!/^\{[^]*\} *$/.test(text)) refuse("E_TENSORS_HEADER_SYNTAX", "no object from the first byte to the last");
  const header = parse(text, HEADER);
  checkNumbers(text);

  const metadata = {};
  if (header.has("__metadata__")) {
    const found = header.get("__metadata__");
    if (!(found instanceof Map)) refuse("E_TENSORS_METADATA", "__metadata__ is no object");
    for (const [key, value] of found) {
      if (typeof value !== "string") refuse("E_TENSORS_METADATA", `__metadata__.${key} is no text`);
      metadata[key] = value;
    }
    header.delete("__metadata__");
  }
  if (header.size > LIMITS.count) refuse("E_TENSORS_COUNT", `${header.size} tensors`);
  const tensors = new Map([...header].map(([name, entry]) => [name, checked(name, entry)]));
  layout(tensors, bytes.length - begin);
  for (const tensor of tensors.values()) {
    tensor.data = bytes.subarray(begin + tensor.begin, begin + tensor.end);
    if (tensor.dtype === "BOOL" && tensor.data.some((byte) => byte > 1)) refuse("E_TENSORS_BOOL", "a byte beyond 1");
  }
  return { metadata, tensors };
}

/** Signs, fractions and exponents outside strings. */
function checkNumbers(text) {
  if (/[-+.eE]/.test(text.replace(/"(?:[^"\\]|\\.)*"/g, "").replace(/true|false/g, "")))
    refuse("E_TENSORS_HEADER_SYNTAX", "a number that is not a plain one");
}

function checked(name, entry) {
  if (name === "" || [...name].length > LIMITS.name || UNPRINTABLE.test(name)) refuse("E_TENSORS_NAME", "a bad name");
  if (!(entry instanceof Map) || [...entry.keys()].sort().join() !== "data_offsets,dtype,shape")
    refuse("E_TENSORS_ENTRY", `${name}: not exactly dtype, shape and data_offsets`);
  const [dtype, shape, offsets] = ["dtype", "shape", "data_offsets"].map((key) => entry.get(key));
  if (typeof dtype !== "string" || !Object.hasOwn(BITS, dtype)) refuse("E_TENSORS_DTYPE", `${name}: dtype ${dtype}`);
  if (!Array.isArray(shape) || shape.length > LIMITS.dims || !shape.every(isNatural))
    refuse("E_TENSORS_SHAPE", `${name}: shape`);
  if (!Array.isArray(offsets) || offsets.length !== 2 || !offsets.every(isNatural))
    refuse("E_TENSORS_ENTRY", `${name}: data_offsets`);
  const bits = BigInt(BITS[dtype]);
  if (shape.reduce((n, d) => n * (d || 1n), bits) >= 2n ** 63n) refuse("E_TENSORS_SHAPE", `${name}: too big`);
  const size = shape.reduce((n, d) => n * d, bits);
  if (size % 8n) refuse("E_TENSORS_LAYOUT", `${name}: no whole number of bytes`);
  if (offsets[1] - offsets[0] !== size / 8n) refuse("E_TENSORS_LAYOUT", `${name}: size and offsets disagree`);
  return { dtype, shape: shape.map(Number), begin: Number(offsets[0]), end: Number(offsets[1]) };
}

function layout(tensors, size) {
  let at = 0;
  for (const { begin, end } of [...tensors.values()].sort((a, b) => a.begin - b.begin || a.end - b.end)) {
    if (begin !== at) refuse("E_TENSORS_LAYOUT", `a hole or an overlap at byte ${at}`);
    at = end;
  }
  if (at !== size) refuse("E_TENSORS_LAYOUT", `${size - at} bytes that belong to no tensor`);
}
