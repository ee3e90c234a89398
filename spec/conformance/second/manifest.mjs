// SPEC.md, sections 3.2, 4 and 9: the members of a manifest, and what each of them may be.

import { refuse } from "./errors.mjs";
import { MANIFEST, decode, parse } from "./json.mjs";
import { checkConfig, registry } from "./kinds.mjs";
import { expand } from "./targets.mjs";

const MAX_BYTES = 1048576;
const UNPRINTABLE = /[\p{C}\p{Zl}\p{Zp}]|(?! )\p{Zs}/u;
const DEVICE = /^(con|prn|aux|nul|com[1-9]|lpt[1-9])(\.|$)/i;
const HUB = /^(?!.*(--|\.\.))[A-Za-z0-9_]([A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?$/;
const STEP = /^[\p{XID_Start}][\p{XID_Continue}]*$/u; // an identifier that does not begin with _
const field = (where, why) => refuse("E_MANIFEST_FIELD", `${where}: ${why}`);

// Each check takes a value and the place where it stands.
const test = (holds, why) => (value, where) => (holds(value) ? value : field(where, why));
const text = test((v) => typeof v === "string" && v.length <= 8192 && !UNPRINTABLE.test(v), "no text that prints");
const name = test((v) => typeof v === "string" && v && [...v].length <= 1024 && !UNPRINTABLE.test(v), "no name");
const integer = test((v) => typeof v === "bigint", "no integer");
const natural = test((v) => typeof v === "bigint" && v >= 0n, "no natural number");
const digest = test((v) => typeof v === "string" && /^[0-9a-f]{64}$/.test(v), "no SHA-256 in lower case");
const matches = (pattern, why) => test((v) => typeof v === "string" && pattern.test(v), why);
const anything = (v) => v;
const open = test((v) => v instanceof Map, "no object");
const list = (check) => (value, where) =>
  Array.isArray(value) ? value.map((v, i) => check(v, `${where}/${i}`)) : field(where, "no array");
const table = (key, check) => (value, where) => {
  for (const [k, v] of open(value, where)) check(v, `${where}/${key(k, where)}`);
  return value;
};
const object = (needed, optional = {}) => (value, where) => {
  open(value, where);
  for (const member of Object.keys(needed)) if (!value.has(member)) field(`${where}/${member}`, "missing");
  for (const [member, check] of Object.entries({ ...needed, ...optional }))
    if (value.has(member)) check(value.get(member), `${where}/${member}`);
  return value;
};

function hub(value, where) {
  const names = text(value, where).split("/");
  return names.length <= 2 && names.every((n) => HUB.test(n)) ? value : field(where, "no name on a hub");
}

function subfolder(value, where) {
  const good = (n) => /^[A-Za-z0-9_]([A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?$/.test(n) && !n.includes("..");
  return text(value, where).split("/").every((n) => good(n) && !DEVICE.test(n)) ? value : field(where, "no folder");
}

function filePath(value, where) {
  if (typeof value !== "string") field(where, "no path");
  const bad = (n) => n === "" || n === "." || n === ".." || /[. ]$/.test(n) || DEVICE.test(n);
  if (value.length > 1024 || /[\\:]/.test(value) || UNPRINTABLE.test(value) || value.split("/").some(bad))
    refuse("E_MANIFEST_PATH", `${where}: ${JSON.stringify(value)}`);
  return value;
}

function extensionName(value) {
  const label = "[a-z0-9]([a-z0-9-]*[a-z0-9])?";
  if (!new RegExp(`^${label}(\\.${label})+$`).test(value) || value.startsWith("deltahub."))
    refuse("E_MANIFEST_EXTENSION", `the extension ${JSON.stringify(value)}`);
  return value;
}

const FILE = object({ path: filePath, size: natural, sha256: digest });
const IDENTITY = object(
  { algorithm: matches(/^sha256-tree-1$/, "another algorithm"), exact: digest, bf16: digest, structure: digest, tensors: natural },
  { tied: table(name, name), excluded: list(name) },
);
const SOURCE = object({}, {
  hub, subfolder, commit: matches(/^[0-9a-f]{40}$/, "no commit"),
  class: test((v) => typeof v === "string" && v.split(".").every((n) => /^[\p{XID_Start}_][\p{XID_Continue}]*$/u.test(n)), "no class"),
});
const BACKBONE = object({ identity: IDENTITY }, {
  source: SOURCE, files: list(FILE), leaves: table(name, digest), leaves_bf16: table(name, digest),
  compatible: list(object({ root: digest, relation: text }, { method: text })),
});
const NUMBERS = object({ start: natural, stop: natural, period: natural });
const ROWS = (value, where) => {
  NUMBERS(value, where);
  const [start, stop, period] = ["start", "stop", "period"].map((n) => value.get(n));
  if (!(start < stop && stop <= period)) field(where, "no rows of a period");
  return value;
};
const MODULE = object(
  {
    name: matches(/^[A-Za-z][A-Za-z0-9_-]{0,63}$/, "no name of a module"), kind: text, version: integer, config: open,
    targets: list(test((v) => typeof v === "string", "no text")),
  },
  { rows: ROWS, stack: test((v) => typeof v === "bigint" && v > 0n, "no count"), removes: list(name), inputs: list(test((v) => typeof v === "string", "no text")) },
);
const SETTING = object({
  on: matches(/^(config|processor|scheduler)$/, "not config, processor or scheduler"),
  path: test((v) => typeof v === "string" && v.split(".").every((n) => STEP.test(n)), "no dotted names"),
  was: anything, value: anything,
});
const positive = test((v) => (typeof v === "bigint" || typeof v === "number") && v > 0, "no number above 0");
const PROBE = object({
  file: filePath, tolerance: table((k, w) => (/^(float64|float32|bfloat16|float16)$/.test(k) ? k : field(w, k)), positive),
});
const ROOT = object(
  { spec_version: text, backbone: BACKBONE, modules: list(MODULE), files: list(FILE) },
  { requires: list(text), kinds: list(open), settings: list(SETTING), probe: PROBE, extensions: table(extensionName, anything) },
);

function unique(values, code, what) {
  const seen = new Set();
  for (const value of values) {
    if (seen.has(value)) refuse(code, `${what} twice: ${value}`);
    seen.add(value);
  }
}

/** A manifest from its bytes: `value` is what it holds, `modules` what each stands for. */
export async function parseManifest(bytes) {
  if (bytes.length > MAX_BYTES) refuse("E_MANIFEST_SIZE", `${bytes.length} bytes`);
  const root = parse(decode(bytes, MANIFEST), MANIFEST);
  open(root, "");
  version(root);
  ROOT(root, "");
  const [modules, files] = [root.get("modules"), root.get("files")];
  if (!modules.length) field("/modules", "empty");
  if (modules.some((m) => !m.get("targets").length)) field("/modules", "a module without targets");
  unique(modules.map((m) => m.get("name")), "E_MANIFEST_DUPLICATE", "a module");
  const paths = files.map((f) => f.get("path"));
  // Full case folding, as far as JavaScript has it: ß becomes SS, then ss.
  unique(paths.map((p) => p.normalize("NFC").toUpperCase().toLowerCase().normalize("NFC")), "E_MANIFEST_DUPLICATE", "a file");
  const odd = paths.find((p) => !/[^/]\.safetensors$/.test(p));
  if (odd !== undefined) refuse("E_MANIFEST_PATH", `${odd} is no tensor file`);
  unique((root.get("settings") ?? []).map((s) => `${s.get("on")} ${s.get("path")}`), "E_MANIFEST_DUPLICATE", "a setting");
  if (root.has("probe") && !paths.includes(root.get("probe").get("file"))) field("/probe/file", "not listed");
  const tied = root.get("backbone").get("identity").get("tied") ?? new Map();
  if ([...tied.values()].some((kept) => tied.has(kept))) field("/backbone/identity/tied", "a kept name is tied itself");

  const kinds = await registry(root.get("kinds") ?? []);
  const found = modules.map((module) => {
    const kind = kinds.get(module.get("kind"), module.get("version"));
    checkConfig(kind, module.get("config"));
    const targets = expand(module.get("targets"));
    if (module.has("inputs") && expand(module.get("inputs")).length !== targets.length) field("/modules", "inputs and targets differ");
    return {
      name: module.get("name"), kind: module.get("kind"), version: Number(module.get("version")),
      targets,
    };
  });
  return { value: root, modules: found };
}

function version(root) {
  const found = root.get("spec_version");
  if (typeof found !== "string") field("/spec_version", "missing or no text");
  const parts = /^(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)$/.exec(found);
  if (!parts || parts[1] !== "1") refuse("E_MANIFEST_VERSION", `version ${found}`);
  const requires = root.get("requires") ?? [];
  if (Array.isArray(requires) && requires.every((r) => typeof r === "string") && requires.length)
    refuse("E_MANIFEST_REQUIRES", `${requires[0]} is not known`);
}
