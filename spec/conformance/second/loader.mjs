#!/usr/bin/env node
// A second loader of the DeltaHub format, as the runner of the vectors asks it: one request in, one verdict out.
//   node loader.mjs --stream

import { createHash } from "node:crypto";
import { createInterface } from "node:readline";
import { Refused, Unsupported, refuse } from "./errors.mjs";
import { compare, identity, tree } from "./identity.mjs";
import { write } from "./json.mjs";
import { checkConfig, holds, program, registry } from "./kinds.mjs";
import { parse, run } from "./language.mjs";
import { parseManifest } from "./manifest.mjs";
import { applied } from "./ops.mjs";
import { read } from "./safetensors.mjs";
import { expand } from "./targets.mjs";
import { Tensor, add, map, reshape } from "./tensor.mjs";

const bytes = (text) => Buffer.from(text, "base64");
const given = (value) => value && new Tensor(value.shape, Float64Array.from(value.data));
const backbone = (tensors) => tensors.map((t) => ({ ...t, data: bytes(t.base64) }));

/** JSON of a request as a TOML reader would give it: integers as BigInt. */
function exact(value) {
  if (Array.isArray(value)) return value.map(exact);
  if (value && typeof value === "object") return new Map(Object.entries(value).map(([k, v]) => [k, exact(v)]));
  return Number.isInteger(value) ? BigInt(value) : value;
}

function hostOf(request) {
  const found = { stride: 1, padding: 0, dilation: 1, groups: 1, ...request.host };
  found.spatial = found.family === "conv" ? found.kernel.length : 0;
  const [W, b] = [given(request.W), given(request.b)];
  found.weightRank = W?.rank ?? 2;
  found.base = (x) => {
    const y = applied(found, x, W);
    return b ? add(y, reshape(b, found.family === "conv" ? [-1, ...Array(found.spatial).fill(1)] : [-1])) : y;
  };
  return { host: found, W, b };
}

async function apply(request) {
  const kinds = await registry(request.document ? [exact(request.document)] : []);
  const kind = kinds.get(request.kind ?? request.document.kind, request.version ?? request.document.version);
  const config = checkConfig(kind, exact(request.config));
  const { host, W, b } = hostOf(request);
  if (!kind.hosts.includes(host.family)) refuse("E_KIND_HOST", `${kind.kind} does not fit ${host.family}`);
  const text = program(kind, request.port, config, host);
  if (text === undefined) refuse("E_KIND_HOST", `${kind.kind} has no ${request.port} here`);
  const tensors = {};
  for (const [name, spec] of Object.entries(kind.tensors ?? {})) {
    const found = given(request.tensors[name]);
    if (holds(spec.when, config, host) !== Boolean(found)) refuse("E_KIND_TENSOR", `${name} is there or absent against the document`);
    tensors[name] = found ?? null;
  }
  const zeros = request.port === "bias" && !b && host.out ? map(new Tensor([host.out]), () => 0) : null;
  const sizes = { d_in: host.in, d_out: host.out, spatial: host.spatial };
  const names = {
    ...config, ...tensors, ...sizes, ...request.context, x: given(request.x), y: given(request.y), W, b: b ?? zeros,
    ...(request.scores && { scores: given(request.scores) }),
  };
  const value = run(parse(text), names, host);
  return { value: { shape: value.shape, data: [...value.data] } };
}

const OPERATIONS = {
  manifest: async ({ data }) => ({ modules: (await parseManifest(bytes(data))).modules }),
  rewrite: async ({ data }) => ({ manifest: (await parseManifest(bytes(data))).value }),
  targets: ({ patterns }) => {
    const paths = expand(patterns);
    return { paths, count: paths.length, first: paths[0], last: paths.at(-1) };
  },
  safetensors: ({ data }) => {
    const { metadata, tensors } = read(bytes(data));
    const shown = [...tensors].map(([name, t]) => [
      name, { dtype: t.dtype, shape: t.shape, sha256: createHash("sha256").update(t.data).digest("hex") },
    ]);
    return { metadata, tensors: Object.fromEntries(shown) };
  },
  identity: ({ tensors, tied, excluded }) => identity(backbone(tensors), tied, excluded),
  tree: ({ hashes }) => ({ root: tree(hashes.map((h) => Buffer.from(h, "hex"))).toString("hex") }),
  backbone: ({ declared, tensors, level }) => ({ equal: compare(declared, backbone(tensors), level) }),
  apply,
};

async function answer(request) {
  const operation = OPERATIONS[request.op];
  if (!operation) return { skipped: `${request.op} is not done here` };
  try {
    return { valid: true, result: await operation(request) };
  } catch (error) {
    if (error instanceof Unsupported) return { skipped: error.message };
    if (!(error instanceof Refused)) throw error;
    return { valid: false, error_code: error.code, message: error.message, ...(error.result && { result: error.result }) };
  }
}

/** A verdict as JSON: values of a manifest keep the spelling of their numbers, all others are plain. */
const shown = (verdict) => JSON.stringify(verdict, (_, value) =>
  value instanceof Map ? JSON.rawJSON?.(write(value)) ?? Object.fromEntries(value) : typeof value === "bigint" ? Number(value) : value);

for await (const line of createInterface({ input: process.stdin })) {
  if (!line.trim()) continue;
  const verdict = await answer(JSON.parse(line));
  console.log(shown(verdict));
  if (!process.argv.includes("--stream")) process.exitCode = "skipped" in verdict ? 2 : verdict.valid ? 0 : 1;
}
