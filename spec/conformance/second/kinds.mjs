// SPEC.md, section 5: kind documents, as far as a loader of packages that were made well needs them. What makes a
// document invalid in its programs is told when they are run; the vectors of `kind` are for a reader that checks more.

import { readFile, readdir } from "node:fs/promises";
import { parse as parseToml } from "smol-toml";
import { refuse } from "./errors.mjs";

const FOLDER = new URL("../../kinds/", import.meta.url);
const LABEL = /^[a-z][a-z0-9_-]{0,63}$/;
const FACTS = new Set(["bias", "grouped", "channels_first", "family"]);
const MEMBERS = {
  kind: "string", version: "bigint", hosts: "object", equations: "object", title: "string", description: "string",
  reference: "string", identity: null, strength: "string", targets: "object", inputs: "object", context: "object", config: "object",
  tensors: "object", fold: "object", also: "object",
};

/** Maps of the JSON reader as plain objects, which is what the TOML reader gives. */
export function plain(value) {
  if (value instanceof Map) return Object.fromEntries([...value].map(([k, v]) => [k, plain(v)]));
  return Array.isArray(value) ? value.map(plain) : value;
}

function checkDocument(document, own) {
  const bad = (why) => refuse("E_KIND_DOCUMENT", `${document.kind}: ${why}`);
  for (const needed of ["kind", "version", "hosts", "equations"]) if (!(needed in document)) bad(`no ${needed}`);
  for (const [member, value] of Object.entries(document)) {
    if (!(member in MEMBERS)) bad(`the member ${member}`);
    if (MEMBERS[member] && typeof value !== MEMBERS[member]) bad(`the type of ${member}`);
  }
  const labels = document.kind.split(".");
  if (!labels.every((label) => LABEL.test(label)) || (own && labels.length < 2))
    refuse("E_KIND_NAME", `the name ${JSON.stringify(document.kind)}`);
  if (document.version < 1n || !Array.isArray(document.hosts) || !document.hosts.length) bad("version or hosts");
  if (!Object.keys(document.equations).length) bad("no equations");
  return document;
}

let builtIn; // name to document, read once

async function builtIns() {
  if (builtIn) return builtIn;
  builtIn = new Map();
  for (const file of (await readdir(FOLDER)).filter((f) => f.endsWith(".toml"))) {
    const document = parseToml(await readFile(new URL(file, FOLDER), "utf8"), { integersAsBigInt: true });
    builtIn.set(document.kind, checkDocument(document, false));
  }
  return builtIn;
}

/** The built-in kinds and those of a package. */
export async function registry(documents) {
  const known = await builtIns();
  const own = new Map();
  for (const raw of documents) {
    const document = checkDocument(plain(raw), true);
    if (known.has(document.kind)) refuse("E_KIND_NAME", `${document.kind} is built in`);
    const key = `${document.kind} ${document.version}`;
    if (own.has(key)) refuse("E_MANIFEST_DUPLICATE", `${key} twice`);
    own.set(key, document);
  }
  return {
    get(name, version) {
      const found = own.get(`${name} ${version}`) ?? known.get(name);
      return found?.version === BigInt(version) ? found : refuse("E_KIND_UNKNOWN", `${name} ${version} is not known`);
    },
  };
}

/** A config with its defaults: every value checked against type, bounds and enum. */
export function checkConfig(document, config) {
  const given = plain(config);
  const rules = document.config ?? {};
  const bad = (why) => refuse("E_KIND_CONFIG", `${document.kind}: ${why}`);
  for (const name of Object.keys(given)) if (!Object.hasOwn(rules, name)) bad(`${name} is not defined`);
  const out = {};
  for (const [name, rule] of Object.entries(rules)) {
    if (!Object.hasOwn(given, name) && !("default" in rule)) bad(`${name} is missing`);
    const value = Object.hasOwn(given, name) ? given[name] : rule.default;
    const type = typeof value;
    const fits = {
      integer: type === "bigint", number: type === "bigint" || type === "number", boolean: type === "boolean",
      string: type === "string" && value.length <= 256,
    }[rule.type];
    if (!fits) bad(`${name} is no ${rule.type}`);
    if (type === "bigint" && (value > 2147483647n || value < -2147483647n)) bad(`${name} is too large`);
    if (rule.enum && !rule.enum.some((choice) => choice === value || (type !== "string" && choice == value))) bad(`${name} is not one of its choices`);
    if ("minimum" in rule && value < rule.minimum) bad(`${name} is below ${rule.minimum}`);
    if ("maximum" in rule && value > rule.maximum) bad(`${name} is above ${rule.maximum}`);
    if ("exclusiveMinimum" in rule && value <= rule.exclusiveMinimum) bad(`${name} is not above ${rule.exclusiveMinimum}`);
    if ("exclusiveMaximum" in rule && value >= rule.exclusiveMaximum) bad(`${name} is not below ${rule.exclusiveMaximum}`);
    out[name] = type === "bigint" ? Number(value) : value;
  }
  return out;
}

/** Whether a condition holds, on config values and the facts of a host. */
export function holds(condition, config, host) {
  const facts = {
    bias: Boolean(host.bias), grouped: (host.groups ?? 1) > 1, channels_first: host.family === "conv", family: host.family,
  };
  return Object.entries(condition ?? {}).every(([name, wanted]) => {
    const value = FACTS.has(name) ? facts[name] : config[name];
    return [wanted].flat().some((w) => (typeof w === "bigint" ? Number(w) : w) === value);
  });
}

/** The program of a port under a config, or undefined. */
export function program(document, port, config, host) {
  const equation = document.equations[port];
  if (equation === undefined || typeof equation === "string") return equation;
  return [equation].flat().find((entry) => holds(entry.when, config, host))?.expr;
}
