// SPEC.md, section 8: leaves, the tree over them, and the comparison with what a manifest declares.

import { createHash } from "node:crypto";
import { refuse } from "./errors.mjs";

const sha256 = (...parts) => parts.reduce((hash, part) => hash.update(part), createHash("sha256")).digest();
const hex = (bytes) => bytes.toString("hex");
const WIDER = new Set(["F64", "F32", "F16"]);

function u64(value) {
  const out = Buffer.alloc(8);
  out.writeBigUInt64LE(BigInt(value));
  return out;
}

function leaf(dtype, shape, data) {
  return sha256("deltahub:tensor:1\0", dtype, Buffer.from([0, shape.length]), ...shape.map(u64), data);
}

function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const [exponent, fraction] = [(bits >> 10) & 31, bits & 1023];
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}

/** The elements as BF16: through F32, to the nearest, ties to even, every NaN to 7FC0. */
function toBf16(dtype, data) {
  const width = { F64: 8, F32: 4, F16: 2 }[dtype];
  const out = Buffer.alloc((data.length / width) * 2);
  const single = Buffer.alloc(4);
  for (let i = 0; i * width < data.length; i += 1) {
    const value =
      width === 8 ? data.readDoubleLE(i * 8) : width === 4 ? data.readFloatLE(i * 4) : half(data.readUInt16LE(i * 2));
    let bits = 0x7fc00000;
    if (!Number.isNaN(value)) {
      single.writeFloatLE(Math.fround(value));
      bits = single.readUInt32LE();
      bits = bits + 0x7fff + ((bits >>> 16) & 1);
    }
    out.writeUInt16LE((bits >>> 16) & 0xffff, i * 2);
  }
  return out;
}

/** RFC 6962, section 2.1, over hashes of leaves. */
export function tree(hashes) {
  if (hashes.length === 0) return sha256("");
  if (hashes.length === 1) return hashes[0];
  let split = 1;
  while (split * 2 < hashes.length) split *= 2;
  return sha256(Buffer.from([1]), tree(hashes.slice(0, split)), tree(hashes.slice(split)));
}

function root(names, leaves) {
  const entries = names.map((name) => {
    const raw = Buffer.from(name);
    const length = Buffer.alloc(4);
    length.writeUInt32LE(raw.length);
    return sha256(Buffer.from([0]), length, raw, leaves.get(name));
  });
  return hex(tree(entries));
}

export function identity(tensors, tied = {}, excluded = []) {
  const [exact, bf16] = [new Map(), new Map()];
  for (const { name, dtype, shape, data } of tensors) {
    exact.set(name, leaf(dtype, shape, data));
    bf16.set(name, WIDER.has(dtype) ? leaf("BF16", shape, toBf16(dtype, data)) : exact.get(name));
  }
  for (const [name, kept] of Object.entries(tied)) {
    if (Object.hasOwn(tied, kept)) refuse("E_BACKBONE_TIED", `${kept} is kept and tied away`);
    if (exact.has(name) && !(exact.has(kept) && exact.get(name).equals(exact.get(kept))))
      refuse("E_BACKBONE_TIED", `${name} is not equal to ${kept}`);
  }
  const left = tensors.filter(({ name }) => !Object.hasOwn(tied, name) && !excluded.includes(name));
  left.sort((a, b) => Buffer.compare(Buffer.from(a.name), Buffer.from(b.name)));
  const names = left.map(({ name }) => name);
  const lines = left.map(({ name, dtype, shape }) => `${name}\0${dtype}\0${shape.join(",")}\n`);
  return {
    exact: root(names, exact), bf16: root(names, bf16), structure: hex(sha256(lines.join(""))), tensors: left.length,
    leaves: Object.fromEntries([...exact].map(([name, value]) => [name, hex(value)])),
    bf16Leaves: Object.fromEntries([...bf16].map(([name, value]) => [name, hex(value)])),
  };
}

/** Section 8.4: in what the backbone is equal to the declared one, or a refusal that names the tensors. */
export function compare(declared, tensors, level) {
  const asked = declared.identity;
  const found = identity(tensors, asked.tied, asked.excluded);
  if (found.exact === asked.exact) return "exact";
  // A copy in another precision has another structure; in the same one, a bit that bf16 does not hold still counts.
  const recast = found.structure !== asked.structure;
  if (recast && found.bf16 === asked.bf16) return "bf16";
  const roots = new Set((declared.compatible ?? []).map((entry) => entry.root));
  if (roots.has(found.exact) || roots.has(found.bf16)) return "compatible";
  const differing = (wanted, has) => Object.keys(wanted).filter((name) => has[name] !== wanted[name]);
  const leaves = declared.leaves ?? {};
  const exact = differing(leaves, found.leaves);
  const bf16 = recast && declared.leaves_bf16 ? differing({ ...leaves, ...declared.leaves_bf16 }, found.bf16Leaves) : exact;
  const touched = bf16.length < exact.length ? bf16 : exact;
  const full = level === "L4" || (level === "L3" && !declared.leaves);
  if (full) refuse("E_BACKBONE_MISMATCH", "another backbone", { tensors: touched });
  if (level === "L3" && touched.length) refuse("E_BACKBONE_MISMATCH", "touched tensors differ", { tensors: touched });
  if (!recast) return "exact";
  if (level === "L3" && declared.leaves_bf16 && !bf16.length) return "bf16";
  return refuse("E_BACKBONE_MISMATCH", "another structure", { tensors: touched });
}
