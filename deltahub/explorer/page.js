"use strict";
(() => {
  const DATA = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const BYTES = { float32: 4, bfloat16: 2, float16: 2, int8: 1, uint8: 1, int16: 2, int32: 4, int64: 8, bool: 1 };

  // ---- text
  const el = (tag, attributes = {}, ...inside) => {
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) if (value !== undefined) made.setAttribute(key, value);
    made.append(...inside);
    return made;
  };
  const short = (n) => {
    for (const unit of ["", " k", " M"]) { if (n < 1000) return unit ? n.toFixed(1) + unit : String(n); n /= 1000; }
    return n.toFixed(1) + " G";
  };
  const size = (n) => (n < 1000 ? n + " B" : short(n) + "B");
  const percent = (x) => (x ? Number((100 * x).toPrecision(3)) : 0) + " %";
  const whole = (n) => n.toLocaleString("en-US");

  // ---- folding: equal siblings that stand next to each other are one row
  const numbers = new Map();
  const known = new Map();
  const signature = (node) => {
    if (known.has(node)) return known.get(node);
    const own = (node.p || []).map((p) => [p[0], p[1], p[2], p[3], Boolean(p[5])]);
    const what = JSON.stringify([node.t, node.s, own, node.d, node.c.map((c) => [c.n, signature(c)]), Boolean(node.same)]);
    if (!numbers.has(what)) numbers.set(what, numbers.size);
    known.set(node, numbers.get(what));
    return numbers.get(what);
  };
  const label = (names) => {
    if (names.length === 1) return names[0];
    const given = names.map(Number);
    if (names.every((n) => /^\d+$/.test(n)) && given.every((n, i) => n === given[0] + i)) return `${given[0]}-${given[given.length - 1]}`;
    return names.length <= 6 ? names.join(", ") : `${names.slice(0, 3).join(", ")}, … ${names[names.length - 1]}`;
  };
  const total = (node) => (node.p || []).reduce((sum, p) => sum + p[4], 0) + node.c.reduce((sum, c) => sum + total(c), 0);

  /** A row: the nodes that it stands for, the first of which is shown, and the paths of all of them. */
  const row = (nodes, paths, depth, parent) => ({ nodes, paths, depth, parent, node: nodes[0], open: depth < 3, below: null, many: nodes.length });
  const below = (at) => {
    if (at.below) return at.below;
    const groups = [];
    at.node.c.forEach((child, i) => {
      const last = groups[groups.length - 1];
      if (last && !at.apart && signature(last.first) === signature(child)) last.indices.push(i);
      else groups.push({ first: child, indices: [i] });
    });
    // The row stands for alike modules in every one of its paths; the names are the same in all of them.
    at.below = groups.map((g) => {
      const children = g.indices.map((i) => at.node.c[i]);
      const paths = at.paths.flatMap((path) => children.map((c) => (path ? `${path}.${c.n}` : c.n)));
      return row(children, paths, at.depth + 1, at);
    });
    return at.below;
  };
  const top = row([DATA.root], [""], 0, null);
  top.open = true;

  // ---- state
  const picked = new Set();
  let anchor = null;
  let wanted = "";
  let shown = [];

  const matches = (at) => {
    if (!wanted) return false;
    const text = wanted.toLowerCase();
    return at.node.n.toLowerCase().includes(text) || (at.node.t || "").toLowerCase() === text || at.paths.some((p) => p.toLowerCase().includes(text) && p.toLowerCase().lastIndexOf(text) + text.length > p.length - at.node.n.length - 1);
  };
  const anyBelow = (at, found = matches) => below(at).some((b) => found(b) || anyBelow(b, found));

  // ---- kinds
  const kindNow = () => DATA.kinds.find((k) => k.kind === $("kind").value);
  const fits = (node, kind) => Boolean(node.f) && kind.hosts.includes(node.f);
  const facts = (node, config) => ({ ...config, family: node.f, bias: Boolean((node.h || {}).bias), grouped: Boolean((node.h || {}).grouped), channels_first: Boolean((node.h || {}).channels_first) });
  const holds = (when, values) => Object.entries(when || {}).every(([name, allowed]) => (Array.isArray(allowed) ? allowed : [allowed]).some((a) => a === values[name]));

  /** The arithmetic of shapes: numbers, names, + - * / // ** and brackets. */
  const arithmetic = (text, values) => {
    const tokens = String(text).match(/\d+(?:\.\d+)?|[A-Za-z_]\w*|\/\/|\*\*|[-+*/()%]/g) || [];
    let at = 0;
    const LEVELS = [["+", "-"], ["*", "/", "//", "%"]];
    const APPLY = { "+": (a, b) => a + b, "-": (a, b) => a - b, "*": (a, b) => a * b, "/": (a, b) => a / b, "//": (a, b) => Math.floor(a / b), "%": (a, b) => a - b * Math.floor(a / b) };
    const atom = () => {
      const token = tokens[at++];
      if (token === "(") { const value = level(0); at += 1; return value; }
      if (token === "-") return -power();
      if (/^\d/.test(token)) return Number(token);
      const value = values[token];
      if (typeof value !== "number") throw new Error(token === "in" || token === "out" ? "this module does not say how wide it is" : `${token} is not known`);
      return value;
    };
    const power = () => { const base = atom(); if (tokens[at] === "**") { at += 1; return base ** power(); } return base; };
    const level = (n) => {
      const next = () => (n + 1 < LEVELS.length ? level(n + 1) : power());
      let value = next();
      while (LEVELS[n].includes(tokens[at])) { const sign = tokens[at++]; value = APPLY[sign](value, next()); }
      return value;
    };
    return level(0);
  };
  const tensorsOf = (node, kind, config) => {
    const host = node.h || {};
    const values = { ...config, in: host.in, out: host.out };
    const found = [];
    for (const [name, tensor] of Object.entries(kind.tensors || {})) {
      if (!holds(tensor.when, facts(node, config))) continue;
      const shape = tensor.shape.flatMap((dim) => {
        if (dim === "*kernel") return host.kernel || [];
        if (dim === "*weight") return node.s || [];
        const length = typeof dim === "number" ? dim : arithmetic(dim, values);
        if (!Number.isInteger(length) || length < 1) throw new Error(`${kind.kind}: ${dim} is ${length} here`);
        return [length];
      });
      const dtype = tensor.dtype || "float";
      found.push({ name, shape, dtype, trainable: tensor.trainable !== false && dtype === "float", count: shape.reduce((a, b) => a * b, 1) });
    }
    return found;
  };

  // ---- config
  const PRESETS = { rank: 8, bottleneck: 64, length: 16 };
  const drawConfig = () => {
    const kind = kindNow();
    $("about").textContent = [kind.title, kind.reference].filter(Boolean).join(" · ");
    $("config").replaceChildren(...Object.entries(kind.config || {}).map(([name, field]) => {
      const id = `config-${name}`;
      let input;
      if (field.enum) input = el("select", { id }, ...field.enum.map((v) => { const o = el("option", {}, String(v)); o.selected = v === field.default; return o; }));
      else if (field.type === "boolean") { input = el("input", { id, type: "checkbox" }); input.checked = field.default === true; }
      else {
        input = el("input", { id, type: field.type === "string" ? "text" : "number", min: field.minimum, max: field.maximum, step: field.type === "integer" ? 1 : "any" });
        input.value = field.default ?? PRESETS[name] ?? field.minimum ?? 1;
      }
      input.dataset.type = field.type;
      input.dataset.field = name;
      input.addEventListener("input", update);
      return el("div", { class: "row", title: field.description }, el("label", { for: id }, name), input);
    }));
    $("equations").replaceChildren(...kind.equations.map(equation));
  };
  const configNow = () => Object.fromEntries([...$("config").querySelectorAll("[data-field]")].map((input) => {
    const type = input.dataset.type;
    const value = type === "boolean" ? input.checked : type === "string" ? input.value : Number(input.value);
    return [input.dataset.field, value];
  }));
  const equation = (entry) => {
    const box = el("div", { class: "equation" }, el("span", { class: "port" }, entry.port + (entry.when ? ` where ${entry.when}` : "")));
    const math = el("div", {});
    math.innerHTML = entry.math; // made by DeltaHub, every name in it escaped
    box.append(math);
    return box;
  };

  // ---- targets: exact paths, abbreviated; the product of the braces is exactly what was picked
  const braces = (names) => {
    const isNumber = (n) => /^(0|[1-9]\d*)$/.test(n);
    const given = [...new Set(names)];
    const runs = [];
    for (const n of given.filter(isNumber).map(Number).sort((a, b) => a - b)) {
      const last = runs[runs.length - 1];
      if (last && last[1] === n - 1) last[1] = n; else runs.push([n, n]);
    }
    const items = [...runs.flatMap(([a, b]) => (a === b ? [String(a)] : [`${a}..${b}`])), ...given.filter((n) => !isNumber(n))];
    return given.length === 1 ? given[0] : `{${items.join(",")}}`;
  };
  const abbreviate = (paths) => {
    let patterns = [...new Set(paths)].map((p) => p.split(".").map((part) => [part]));
    const depth = Math.max(0, ...patterns.map((p) => p.length));
    for (let position = depth - 1; position >= 0; position -= 1) {
      const merged = new Map();
      for (const pattern of patterns) {
        if (position >= pattern.length) { merged.set(JSON.stringify(pattern) + "=", pattern); continue; }
        const key = JSON.stringify(pattern.map((part, i) => (i === position ? 0 : part)));
        const there = merged.get(key);
        if (there) there[position] = [...there[position], ...pattern[position]];
        else merged.set(key, pattern.map((part) => [...part]));
      }
      patterns = [...merged.values()];
    }
    return patterns.map((pattern) => pattern.map(braces).join("."));
  };

  // ---- what it costs
  const nodes = new Map();
  const walk = (node, path) => { nodes.set(path, node); node.c.forEach((c) => walk(c, path ? `${path}.${c.n}` : c.n)); };
  walk(DATA.root, "");
  const backbone = total(DATA.root);
  const order = new Map([...nodes.keys()].map((path, i) => [path, i]));

  const python = (value) => {
    if (typeof value === "boolean") return value ? "True" : "False";
    if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
    return JSON.stringify(value);
  };
  const update = () => {
    const kind = kindNow();
    const config = configNow();
    const paths = [...picked].filter((p) => nodes.has(p) && fits(nodes.get(p), kind)).sort((a, b) => order.get(a) - order.get(b));
    let trainable = 0; let bytes = 0; let problem = ""; let tensors = 0;
    const float = BYTES[$("dtype").value];
    for (const path of paths) {
      try {
        for (const tensor of tensorsOf(nodes.get(path), kind, config)) {
          trainable += tensor.trainable ? tensor.count : 0;
          bytes += tensor.count * (tensor.dtype === "float" ? float : BYTES[tensor.dtype] || 1);
          tensors += 1;
        }
      } catch (error) { problem = `${path}: ${error.message}`; break; }
    }
    const left = picked.size - paths.length;
    if (!problem && left) problem = `${left} picked place(s) cannot host ${kind.kind}`;
    const targets = abbreviate(paths);
    $("places").value = whole(paths.length);
    $("trainable").value = whole(trainable);
    $("share").value = percent(backbone ? trainable / backbone : 0);
    // The header names every tensor; the manifest is small beside it.
    $("size").value = size(bytes + (tensors ? 8 + 130 * tensors : 0));
    $("problem").textContent = problem;
    const given = Object.entries(config).filter(([name, value]) => (kind.config[name] || {}).default !== value);
    const options = given.map(([name, value]) => `, ${name}=${python(value)}`).join("");
    $("python").textContent = paths.length ? `delta = deltahub.attach(model, ${python(kind.kind)}, ${targets.length === 1 ? python(targets[0]) : python(targets)}${options})` : "pick modules on the left";
    $("manifest").textContent = paths.length ? JSON.stringify({ name: kind.kind, kind: kind.kind, version: kind.version, config, targets }, null, 2) : "";
    for (const { line, at } of shown) {
      const mine = at.paths.filter((p) => picked.has(p)).length;
      line.classList.toggle("picked", mine > 0);
      line.classList.toggle("unfit", !fits(at.node, kind));
      line.setAttribute("aria-selected", String(mine > 0));
    }
  };

  // ---- the tree
  const drawLine = (at) => {
    const node = at.node;
    const inside = node.c.length > 0;
    const line = el("div", { class: "line", role: "treeitem", "aria-level": String(at.depth + 1), "data-path": at.paths[0] });
    line.style.paddingLeft = `${10 + 16 * at.depth}px`;
    const twist = el("span", { class: "twist" }, inside ? (at.open ? "▾" : "▸") : "");
    line.append(twist, el("span", { class: "name" }, label(at.nodes.map((n) => n.n)) || DATA.class || DATA.source));
    if (node.t && at.depth) line.append(el("span", { class: "type" }, `(${node.t})`));
    if (at.many > 1) {
      line.append(el("span", { class: "many" }, `${at.many} ×`));
      const each = el("button", { class: "each", type: "button", title: "Show them one by one" }, "each");
      each.addEventListener("click", (event) => { event.stopPropagation(); at.parent.apart = true; at.parent.below = null; draw(); });
      line.append(each);
    }
    if (node.same) line.append(el("span", { class: "type" }, `is ${node.same}`));
    if (node.s) line.append(el("span", { class: "shape" }, `[${node.s.join(", ")}]`));
    const count = total(node);
    if (count) line.append(el("span", { class: "count" }, short(count)));
    for (const site of node.d || []) {
      const shapes = Object.entries(site.tensors).map(([name, shape]) => `${name} [${shape.join(", ")}]`).join(", ");
      const config = Object.entries(site.config).map(([name, value]) => `${name}=${value}`).join(" ");
      line.append(el("span", { class: "badge", title: `${site.kind} ${config}\n${shapes}\n${whole(site.count)} numbers` }, `${site.module} ${short(site.count)}${site.share ? ` (${percent(site.share)})` : ""}`));
    }
    if (matches(at)) line.classList.add("hit");
    twist.addEventListener("click", (event) => { if (!inside) return; event.stopPropagation(); at.open = !at.open; draw(); });
    line.addEventListener("click", (event) => pick(at, event));
    return line;
  };
  const draw = () => {
    shown = [];
    const visit = (at) => {
      const hit = wanted && anyBelow(at);
      if (wanted && at !== top && !matches(at) && !hit && !at.kept) return;
      shown.push({ at, line: drawLine(at) });
      if (at.open || hit) below(at).forEach((b) => { b.kept = wanted && (matches(at) || at.kept) && at.open; visit(b); });
    };
    visit(top);
    $("tree").replaceChildren(...shown.map((s) => s.line));
    update();
  };
  const pick = (at, event) => {
    const kind = kindNow();
    const here = shown.findIndex((s) => s.at === at);
    let rows = [at];
    if (event.shiftKey && anchor !== null) {
      const from = shown.findIndex((s) => s.at === anchor);
      if (from >= 0) rows = shown.slice(Math.min(from, here), Math.max(from, here) + 1).map((s) => s.at).filter((r) => fits(r.node, kind) && r.node.f !== "block");
    } else anchor = at;
    const paths = rows.flatMap((r) => r.paths);
    const all = paths.length > 0 && paths.every((p) => picked.has(p));
    if (!event.shiftKey && !event.ctrlKey && !event.metaKey) { const alone = all && picked.size === paths.length; picked.clear(); if (!alone) paths.forEach((p) => picked.add(p)); }
    else if (all && !event.shiftKey) paths.forEach((p) => picked.delete(p));
    else paths.forEach((p) => picked.add(p));
    window.getSelection().removeAllRanges();
    update();
  };
  const openAll = (at, open) => { at.open = open || at === top; below(at).forEach((b) => openAll(b, open)); };

  // ---- a package: its modules, equations and numbers
  const histogram = (h) => {
    const high = Math.max(1, ...h.bins);
    const ns = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(ns, "svg");
    svg.setAttribute("viewBox", `0 0 ${h.bins.length} 100`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `Histogram of ${h.module}/${h.tensor}`);
    h.bins.forEach((n, i) => {
      const bar = document.createElementNS(ns, "rect");
      const tall = (100 * n) / high;
      for (const [key, value] of Object.entries({ x: i + 0.08, y: 100 - tall, width: 0.84, height: tall })) bar.setAttribute(key, value);
      svg.append(bar);
    });
    const text = `${h.module}/…/${h.tensor}: ${whole(h.count)} numbers, ${h.low.toPrecision(3)} to ${h.high.toPrecision(3)}, mean ${h.mean.toPrecision(3)}, deviation ${h.std.toPrecision(3)}, ${whole(h.zeros)} are zero`;
    return el("figure", {}, svg, el("figcaption", {}, text));
  };
  const drawPackage = () => {
    const parts = [];
    if (DATA.equations.length) {
      parts.push(el("div", { class: "head" }, el("h2", {}, "In this package")));
      for (const entry of DATA.equations) {
        const config = Object.entries(entry.config).map(([name, value]) => `${name} = ${value}`).join(", ");
        parts.push(el("h3", {}, `${entry.module}: ${entry.kind}${config ? `, ${config}` : ""}`), ...entry.rows.map(equation));
      }
    }
    if (DATA.histograms.length) parts.push(el("div", { class: "head" }, el("h3", {}, "How the numbers are spread")), ...DATA.histograms.map(histogram));
    $("package").replaceChildren(...parts);
  };

  // ---- beginning
  $("source").textContent = DATA.source || DATA.class;
  const dtypes = Object.keys(DATA.dtypes || {}).join(", ");
  $("facts").textContent = [DATA.what, DATA.class, DATA.backbone && `for ${DATA.backbone}`, `${whole(DATA.parameters)} parameters`, DATA.size && size(DATA.size), dtypes, ...DATA.notes].filter(Boolean).join(" · ");
  for (const kind of DATA.kinds) $("kind").append(el("option", { value: kind.kind }, kind.kind));
  $("kind").value = "lora";
  $("kind").addEventListener("change", () => { drawConfig(); update(); });
  $("dtype").addEventListener("change", update);
  $("search").addEventListener("input", () => { wanted = $("search").value.trim(); draw(); });
  $("search").addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    for (const { at } of shown) if (matches(at) && fits(at.node, kindNow())) at.paths.forEach((p) => picked.add(p));
    update();
  });
  $("expand").addEventListener("click", () => { openAll(top, true); draw(); });
  $("collapse").addEventListener("click", () => { openAll(top, false); draw(); });
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", async () => {
      try { await navigator.clipboard.writeText($(button.dataset.copy).textContent); button.textContent = "Copied"; } catch { button.textContent = "Select and copy"; }
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }
  // Of a package alone only names are known: there is nothing to plan with.
  $("plan").hidden = ![...nodes.values()].some((node) => node.f);
  drawConfig();
  drawPackage();
  draw();
})();
