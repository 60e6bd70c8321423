// The feature browser: reads the data files beside it as scripts, since a page of the file system may not fetch.
// All text from files reaches the page through textContent and setAttribute("title"), never as markup.
"use strict";
(() => {
const ROW = 42, FIRST = 3, SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);
const waiting = new Map(), asked = new Map();
let index, tokens, search, order = new Int32Array(0), state = {}, drawn = 0, sorted = new Map();

window.crosscoder = Object.freeze({ put(name, value) { waiting.get(name)?.(value); } });

function load(name) {
  if (!asked.has(name)) asked.set(name, new Promise((resolve, reject) => {
    const script = document.createElement("script");
    waiting.set(name, resolve);
    script.src = `data-${name}.js`;
    script.onload = () => { script.remove(); reject(new Error(`data-${name}.js holds no data`)); };
    script.onerror = () => { asked.delete(name); reject(new Error(`data-${name}.js cannot be read: is the folder whole?`)); };
    document.head.append(script);
  }));
  return asked.get(name);
}

function h(tag, set = {}, ...children) {
  const node = tag.startsWith("svg:") ? document.createElementNS(SVG, tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(set)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function decode({ type, data }) {
  const text = atob(data), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return new { f4: Float32Array, i4: Int32Array, u4: Uint32Array, u1: Uint8Array }[type](bytes.buffer);
}

// ---- numbers and tokens as text

function say(value, kind) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (kind === "share") return value === 0 ? "0" : value < 0.001 ? `${(value * 100).toPrecision(2)}%` : `${(value * 100).toFixed(value < 0.1 ? 2 : 1)}%`;
  if (kind === "whole") return value.toLocaleString("en");
  if (value !== 0 && (Math.abs(value) >= 10000 || Math.abs(value) < 0.001)) return value.toExponential(1);
  return value.toLocaleString("en", { maximumSignificantDigits: 3 });
}

const text = (id) => (id < 0 ? "" : tokens[id]);
// Spaces around a token are drawn as dots.
function spelled(id) {
  const [, before, middle, after] = /^( *)([\s\S]*?)( *)$/.exec(text(id)), dots = (spaces) => (spaces ? h("span", { class: "space" }, "·".repeat(spaces.length)) : null);
  return [dots(before), middle, dots(after)];
}
function chip(id) { return h("span", { class: "chip", title: `token ${index.ids[id]}` }, ...spelled(id)); }
function chipButton(id) {
  return h("button", { class: "chip", type: "button", title: `features that have to do with this token (${index.ids[id]})`,
    onclick: () => go({ q: `"${text(id)}"`, feature: null, map: null }) }, ...spelled(id));
}

// ---- the state, which is the link

const WORDS = ["q", "sort", "dir", "row"];
function read() {
  const given = new URLSearchParams(location.hash.slice(1)), found = { ranges: {} };
  for (const name of WORDS) if (given.get(name)) found[name] = given.get(name);
  const feature = given.get("feature");
  found.feature = feature !== null && /^\d+$/.test(feature) && +feature < index.n ? +feature : null;
  found.map = given.has("map") && found.feature === null;
  for (const column of index.columns) {
    const match = /^(-?[\d.e+-]*)\.\.(-?[\d.e+-]*)$/i.exec(given.get(column.key) ?? "");
    if (match) found.ranges[column.key] = [match[1], match[2]];
  }
  if (!index.columns.some((column) => column.key === found.sort)) found.sort = index.sort;
  if (found.dir !== "up") found.dir = "down";
  return found;
}
function link(change) {
  const next = { ...state, ...change }, out = new URLSearchParams();
  if (next.feature !== null && next.feature !== undefined) out.set("feature", next.feature);
  if (next.map) out.set("map", "");
  for (const name of WORDS) if (next[name] && !(name === "sort" && next[name] === index.sort) && !(name === "dir" && next[name] === "down")) out.set(name, next[name]);
  for (const [key, [low, high]] of Object.entries(next.ranges)) if (low !== "" || high !== "") out.set(key, `${low}..${high}`);
  return `#${out}`;
}
function go(change, replace = false) {
  const to = link(change);
  if (to === (location.hash || "#")) return;
  if (replace) { history.replaceState(null, "", to); follow(); } else location.hash = to;
}

// ---- which features, in which order

function byColumn(key, dir) {
  const name = `${key} ${dir}`;
  if (!sorted.has(name)) {
    const values = index.values[key], all = Int32Array.from({ length: index.n }, (_, i) => i), turn = dir === "up" ? 1 : -1;
    const known = all.filter((i) => !Number.isNaN(values[i])), rest = all.filter((i) => Number.isNaN(values[i]));
    known.sort((a, b) => turn * (values[a] - values[b]) || a - b);
    const both = new Int32Array(index.n);
    both.set(known); both.set(rest, known.length);
    if (sorted.size > 5) sorted.clear();
    sorted.set(name, both);
  }
  return sorted.get(name);
}

async function matches(query) {
  search ??= await load("search").then(({ starts, features }) => ({ starts: decode(starts), features: decode(features) }));
  const exact = /^"([\s\S]*)"$/.exec(query), want = (exact ? exact[1] : query).toLowerCase();
  const score = new Uint8Array(index.n);
  if (!exact && /^#?\d+$/.test(query.trim())) {
    const number = +query.trim().replace("#", "");
    if (number < index.n) score[number] = 3;
    if (query.trim().startsWith("#")) return score;
  }
  const trimmed = want.trim();
  for (let id = 0; id < tokens.length; id++) {
    const lower = tokens[id].toLowerCase();
    if (exact ? tokens[id] !== exact[1] : !lower.includes(want)) continue;
    const weight = exact || lower.trim() === trimmed ? 2 : 1;
    for (let i = search.starts[id]; i < search.starts[id + 1]; i++) if (score[search.features[i]] < weight) score[search.features[i]] = weight;
  }
  return score;
}

async function arrange() {
  const turn = ++drawn, query = state.q ?? "";
  const score = query ? await matches(query) : null;
  if (turn !== drawn) return;
  const bounds = Object.entries(state.ranges).map(([key, [low, high]]) => [index.values[key], low === "" ? -Infinity : +low, high === "" ? Infinity : +high]);
  const chosen = byColumn(state.sort, state.dir).filter((i) => (!score || score[i]) && bounds.every(([values, low, high]) => values[i] >= low && values[i] <= high));
  if (score) {
    const rank = chosen.map((i, place) => (3 - score[i]) * index.n + place).sort();
    order = rank.map((one) => chosen[one % index.n]);
  } else order = chosen;
  const limited = query || bounds.length;
  $("count").replaceChildren(`${order.length.toLocaleString("en")}${limited ? ` of ${index.n.toLocaleString("en")}` : ""} features`,
    query ? ` with “${query}”` : "", limited ? " · " : "", ...(limited ? [h("a", { href: link({ q: "", ranges: {} }) }, "show all")] : []));
  $("spacer").style.height = `${order.length * ROW}px`;
  reveal();
  rows();
}

function reveal() {
  const place = order.indexOf(state.feature ?? -1), list = $("list");
  if (place < 0) { if (!state.kept) list.scrollTop = 0; return; }
  if (place * ROW < list.scrollTop) list.scrollTop = place * ROW;
  else if ((place + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (place + 1) * ROW - list.clientHeight;
}

function rows() {
  const list = $("list"), first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4);
  const last = Math.min(order.length, first + Math.ceil(list.clientHeight / ROW) + 9), column = index.columns.find((one) => one.key === state.sort);
  const made = [];
  for (let place = first; place < last; place++) {
    const feature = order[place], chips = h("span", { class: "chips" });
    for (let i = 0; i < 3; i++) if (index.labels[3 * feature + i] >= 0) chips.append(chip(index.labels[3 * feature + i]));
    if (!chips.firstChild) chips.append(h("span", { class: "soft" }, index.values.rate[feature] ? "" : "never active here"));
    const row = h("div", { class: "row", role: "option", id: `row-${feature}`, "aria-selected": feature === state.feature ? "true" : "false",
      "aria-posinset": place + 1, "aria-setsize": order.length, onclick: () => go({ feature, map: null }) },
      h("span", { class: "number" }, String(feature)), chips, spark(feature), h("span", { class: "value", title: column.words }, say(index.values[column.key][feature], column.kind)));
    row.style.top = `${place * ROW}px`;
    made.push(row);
  }
  list.replaceChildren($("spacer"), ...made);
  if (state.feature !== null) list.setAttribute("aria-activedescendant", `row-${state.feature}`);
  else list.removeAttribute("aria-activedescendant");
}

function spark(feature) {
  const n = index.layers.length, bars = h("span", { class: n > 14 ? "spark many" : "spark", "aria-hidden": "true" });
  for (let layer = 0; layer < n; layer++) { const bar = h("i"); bar.style.height = `${index.profile[feature * n + layer] / 255 * 100}%`; bars.append(bar); }
  return bars;
}

function step(by) {
  if (!order.length) return;
  const place = order.indexOf(state.feature ?? -1);
  go({ feature: order[Math.min(order.length - 1, Math.max(0, place < 0 ? (by > 0 ? 0 : order.length - 1) : place + by))], map: null }, place >= 0);
}

// ---- charts

function svg(width, height, label, ...children) { return h("svg:svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, h("svg:title", {}, label), ...children); }
function note(x, y, words, anchor = "middle") { const node = h("svg:text", { x, y, "text-anchor": anchor }); node.textContent = words; return node; }
const thinned = (i, n) => n <= 16 || i % Math.ceil(n / 16) === 0;

function profile(one) {
  const n = index.layers.length, W = 340, H = 150, base = Math.min(...one.u) < 0 ? 100 : 122, wide = (W - 46) / n;
  const top = Math.max(...one.p, ...one.u.map(Math.abs), 0.01), tall = base - 12, parts = [h("svg:line", { class: "axis", x1: 40, x2: W, y1: base, y2: base })];
  for (let i = 0; i < n; i++) {
    const x = 42 + i * wide, each = Math.max(1, wide * 0.36);
    const bar = (name, value, at, said) => {
      const size = Math.max(0.5, Math.abs(value) / top * (value < 0 ? 132 - base : tall));
      return h("svg:rect", { class: name, x: at, y: value < 0 ? base : base - size, width: each, height: size, rx: 1 }, h("svg:title", {}, `layer ${index.layers[i]}: ${said} ${say(value, "share")}`));
    };
    parts.push(bar("norm", one.p[i], x + wide * 0.1, "written"), bar("use", one.u[i], x + wide * 0.1 + each, "read"));
    if (thinned(i, n)) parts.push(note(x + wide / 2, 146, index.layers[i]));
  }
  parts.push(note(36, 18, say(top, "share"), "end"), note(36, base + 3, "0", "end"));
  return svg(W, H, "share of the feature on each layer", ...parts);
}

function histogram(one) {
  const W = 340, H = 150, [first, counts] = one.h;
  if (!counts.length) return h("p", { class: "soft" }, "Never active on these tokens.");
  const top = Math.max(...counts), wide = Math.min(28, (W - 46) / counts.length), edge = (i) => 2 ** (index.bins.first + i / index.bins.each);
  const parts = [h("svg:line", { class: "axis", x1: 40, x2: W, y1: 122, y2: 122 }), note(36, 18, say(top, "whole"), "end"), note(36, 125, "0", "end")];
  counts.forEach((count, i) => {
    const size = count / top * 110, x = 42 + i * wide;
    parts.push(h("svg:rect", { class: "bar", x, y: 122 - size, width: Math.max(1, wide - 2), height: size, rx: 1 }, h("svg:title", {}, `${say(edge(first + i))} to ${say(edge(first + i + 1))}: ${say(count, "whole")} tokens`)));
    if (i % Math.max(2, Math.ceil(counts.length / 6)) === 0) parts.push(note(x, 138, say(edge(first + i))));
  });
  return svg(W, H, "tokens by activation, bins of half an octave", ...parts);
}

function lines(values, label, low, marks) {
  const n = values.length, W = 340, H = 150, x = (i) => 52 + (n < 2 ? 0.5 : i / (n - 1)) * (W - 68), y = (v) => 12 + (1 - (v - low) / (1 - low)) * 110;
  const known = values.map((v, i) => [v, i]).filter(([v]) => v !== null);
  const parts = [h("svg:line", { class: "axis", x1: 40, x2: W, y1: y(Math.max(low, 0)), y2: y(Math.max(low, 0)) }), note(36, y(1) + 4, "1", "end"), note(36, y(Math.max(low, 0)) + 4, "0", "end")];
  if (low < 0) parts.push(note(36, y(low) + 4, String(low), "end"));
  if (known.length > 1) parts.push(h("svg:path", { class: "path", d: known.map(([v, i], k) => `${k ? "L" : "M"}${x(i)} ${y(v)}`).join("") }));
  for (const [v, i] of known) parts.push(h("svg:circle", { class: "dot", cx: x(i), cy: y(v), r: n > 16 ? 2 : 3.5 }, h("svg:title", {}, `layer ${marks[i]}: ${say(v)}`)));
  marks.forEach((mark, i) => { if (thinned(i, n)) parts.push(note(x(i), 146, mark)); });
  return svg(W, H, label, ...parts);
}

function bars(values, label, marks) {
  const n = values.length, W = 340, H = 150, wide = (W - 46) / n, parts = [h("svg:line", { class: "axis", x1: 40, x2: W, y1: 122, y2: 122 }), note(36, 16, "1", "end"), note(36, 125, "0", "end")];
  values.forEach((value, i) => {
    const x = 42 + i * wide;
    if (value !== null) parts.push(h("svg:rect", { class: i === n - 1 && n > 1 ? "use" : "bar", x: x + wide * 0.15, y: 122 - value * 110, width: wide * 0.7, height: Math.max(0.5, value * 110), rx: 1 }, h("svg:title", {}, `${marks[i]}: ${say(value)}`)));
    if (thinned(i, n) || i === n - 1) parts.push(note(x + wide / 2, 138, marks[i]));
  });
  return svg(W, H, label, ...parts);
}

function figure(title, small, chart) { return h("figure", {}, h("figcaption", {}, title, h("small", {}, ...[].concat(small))), chart); }

// ---- a feature's page

function tile(column, value) { return h("div", { title: column.definition }, h("dt", {}, column.words), h("dd", {}, say(value, column.kind))); }

function effects(one) {
  const n = one.l.length, names = n === 1 ? [null] : [...index.layers.map((layer) => `layer ${layer}`), "sum"], row = Math.min(n - 1, Math.max(0, state.row ? +state.row || 0 : n - 1));
  const [up, gain, down, loss] = one.l[row], largest = Math.max(...gain.map(Math.abs), ...loss.map(Math.abs), 1e-9);
  const side = (ids, values, title, name) => h("div", { class: name }, h("h3", {}, title), ...ids.map((id, i) => h("div", { class: "effect" }, h("span", { class: "token" }, chipButton(id)),
    h("div", {}, h("div", { class: "length", "--part": Math.abs(values[i]) / largest })), h("span", { class: "amount" }, say(values[i])))));
  const tabs = n === 1 ? null : h("div", { class: "tabs", role: "group", "aria-label": "Whose effect" }, ...names.map((name, i) => h("button", { type: "button", "aria-pressed": i === row ? "true" : "false", onclick: () => { go({ row: i === n - 1 ? "" : String(i) }, true); } }, name)));
  if (!up.length) return [tabs, h("p", { class: "soft" }, "It writes nothing on this layer.")];
  return [tabs, h("div", { class: "effects" }, side(up, gain, "Promoted", "up"), side(down, loss, "Suppressed", "down"))];
}

function example([value, block, position, ids, levels, at], layered, largest) {
  const scale = value / largest;
  const words = h("p", { dir: "auto" }, ...ids.map((id, i) => h("span", { class: `tok${i === at ? " peak" : ""}${levels[i] < 0 ? " unread" : ""}`, "--heat": levels[i] > 0 ? Math.min(85, 10 + 75 * levels[i] / 250 * scale) : null,
    title: levels[i] < 0 ? "not read by the dictionary" : say(levels[i] / 250 * value) }, text(id))));
  const out = h("div", { class: "example" }, words, h("div", { class: "where" }, h("b", {}, say(value)), `block ${block}, token ${position}`));
  if (layered) out.append(grid(layered, ids, at));
  return out;
}

function grid(parts, ids, at) {
  const head = h("tr", {}, h("th", {}), ...ids.map((id, i) => h("th", { class: i === at ? "peak" : null, scope: "col" }, text(id))));
  const body = parts.map((row, k) => h("tr", {}, h("th", { scope: "row" }, `layer ${index.layers[k]}`), ...row.map((level) => h("td", { class: level === null ? "none" : level < 0 ? "less" : null, "--heat": level === null ? null : Math.abs(level), title: level === null ? "not read" : `${level}% of the largest part`}))));
  return h("div", { class: "grid", tabindex: 0 }, h("table", {}, h("thead", {}, head), h("tbody", {}, ...body)));
}

async function open(feature) {
  const size = index.block_size, block = Math.floor(feature / size), turn = state;
  const one = (await load(String(block).padStart(4, "0")))[feature % size];
  if (turn !== state) return;
  const layer = one.y === undefined ? "" : ` · layer ${index.layers[one.y]}`;
  const chips = [0, 1, 2].map((i) => index.labels[3 * feature + i]).filter((id) => id >= 0);
  const page = [
    h("div", { class: "title" }, h("button", { id: "back", type: "button", onclick: () => go({ feature: null, map: null }) }, "‹ List"), h("h1", {}, `Feature ${feature}`), h("span", { class: "soft" }, `${layer.slice(3)}`),
      h("span", {}, ...chips.map(chipButton)),
      h("div", { class: "moves" }, h("button", { type: "button", title: "Previous (k)", onclick: () => step(-1) }, "↑ Previous"), h("button", { type: "button", title: "Next (j)", onclick: () => step(1) }, "↓ Next"), h("button", { type: "button", id: "copy", title: "Copy the link to this page (c)", onclick: copy }, "Copy link"))),
    h("dl", { class: "tiles" }, ...index.columns.filter((column) => column.key !== "number").map((column) => tile(column, index.values[column.key][feature]))),
  ];
  const largest = one.t.length ? one.t[0][0] : 1, rest = one.t.slice(FIRST);
  page.push(h("div", { class: "heading" }, h("h2", {}, "Strongest examples"), one.g.length ? h("button", { type: "button", "aria-pressed": state.grid ? "true" : "false", id: "layers", title: "What each layer adds at each token (l)", onclick: turnGrid }, "Layer by layer") : null));
  page.push(...one.t.slice(0, FIRST).map((each, i) => example(each, state.grid ? one.g[i] : null, largest)));
  if (rest.length) page.push(h("details", { id: "more", open: state.more }, h("summary", {}, `${rest.length} more`), ...rest.map((each) => example(each, null, largest))));
  if (!one.t.length) page.push(h("p", { class: "soft" }, index.values.rate[feature] ? "No examples were kept." : "Never active on the tokens that were read."));
  page.push(charts(one), h("h2", {}, "Effect on the next token"), h("p", { class: "note" }, one.l.length ? index.notes.effects : index.notes.no_effects));
  if (one.l.length) page.push(...effects(one).filter(Boolean));
  if (one.q.some((band) => band.length)) page.push(h("h2", {}, "Examples of each quantile"), h("p", { class: "note" }, index.notes.quantiles));
  const named = ["Weakest quarter", "Second quarter", "Third quarter", "Strongest quarter"];
  one.q.slice().reverse().forEach((band, i) => { if (band.length) page.push(h("h3", {}, named[3 - i]), ...band.map((each) => example(each, null, largest))); });
  if (one.nb.length) page.push(h("h2", {}, "Nearest features"), h("p", { class: "note" }, index.notes.nearest), h("div", { class: "near" }, ...one.nb.map(near)));
  page.push(meaning());
  $("page").replaceChildren(...page);
  for (const peak of $("page").querySelectorAll(".grid .peak")) { const box = peak.closest(".grid"); box.scrollLeft = peak.offsetLeft - box.clientWidth * 0.6; }
  $("more")?.addEventListener("toggle", (event) => { state.more = event.target.open; });
}

function charts(one) {
  const out = h("div", { class: "charts" }), labels = index.layers;
  if (labels.length > 1 && one.p.some((share) => share > 0)) {
    out.append(figure("Layers", [h("span", { class: "key n" }), "written: share of the decoder’s norm²", h("span", { class: "key u" }), "read: share of what moves it"], profile(one)));
  }
  out.append(figure("Activation", "tokens on which it is active, by how strongly", histogram(one)));
  if (one.c) out.append(figure("Direction", "cosine with the row of its strongest layer", lines(one.c, "drift of the direction over layers", Math.min(...one.c.filter((v) => v !== null)) < 0 ? -1 : 0, labels)));
  if (one.r) out.append(figure("One layer’s reading", "precision at recall 0.9, by each layer alone and by all", bars(one.r, "precision of one layer's reading", one.r.length > 1 ? [...labels, "all"] : ["own"])));
  return out;
}

function near([which, found]) {
  const own = which < 0;
  return h("div", {}, h("h3", {}, own ? "In this dictionary" : index.others[which]), h("ol", {}, ...found.map(([feature, layer, cosine]) => h("li", {},
    own ? h("a", { href: link({ feature, map: null }) }, String(feature)) : h("span", {}, String(feature)), h("span", {}, say(cosine)),
    own ? h("span", {}, ...[0, 1, 2].map((i) => index.labels[3 * feature + i]).filter((id) => id >= 0).map((id) => chip(id))) : h("span", { class: "soft" }, layer < 0 ? "all layers together" : `on layer ${index.layers[layer]}`)))));
}

function meaning() {
  return h("details", {}, h("summary", {}, "What the numbers mean"), h("dl", { class: "facts" }, ...index.columns.flatMap((column) => [h("dt", {}, column.words), h("dd", {}, column.definition)]), ...index.notes.definitions.flatMap(([name, words]) => [h("dt", {}, name), h("dd", {}, words)])));
}

async function copy() {
  const url = location.href;
  try { await navigator.clipboard.writeText(url); } catch { window.prompt("The link to this page:", url); return; }
  $("copy").textContent = "Copied";
}
function turnGrid() { state.grid = !state.grid; if (state.feature !== null) open(state.feature); }

// ---- all features at a glance

let axes = { x: "rate", y: "spread" };
function overview() {
  const canvas = h("canvas", { role: "img", "aria-label": "every feature as a point" }), shown = h("output");
  const known = index.columns.filter((column) => column.key !== "number" && index.values[column.key].some((v) => !Number.isNaN(v)));
  if (!known.some((column) => column.key === axes.y)) axes.y = known[0].key;
  const choose = (axis) => h("select", { "aria-label": `${axis} axis`, onchange: (event) => { axes[axis] = event.target.value; paint(); } }, ...known.map((column) => h("option", { value: column.key, selected: axes[axis] === column.key }, column.words)));
  const layers = index.layers.length > 1 ? h("span", { class: "scale" }, `strongest layer ${index.layers[0]}`, ...Array.from({ length: Math.min(7, index.layers.length) }, (_, i, all = Math.min(7, index.layers.length)) => h("i", { "--tone": tone(i / (all - 1)) })), index.layers.at(-1)) : null;
  const page = [h("div", { class: "title" }, h("button", { id: "back", type: "button", onclick: () => go({ feature: null, map: null }) }, "‹ List"), h("h1", {}, index.title)), h("p", { class: "soft" }, index.lead),
    h("figure", { class: "map" }, h("div", { class: "choose" }, h("span", {}, "Across ", choose("x")), h("span", {}, "Up ", choose("y")), layers), canvas, shown),
    h("h2", {}, "What this is"), h("dl", { class: "facts" }, ...index.facts.flatMap(([name, words]) => [h("dt", {}, name), h("dd", {}, words)])), meaning()];
  $("page").replaceChildren(...page);
  let places = [];
  function paint() {
    const box = canvas.getBoundingClientRect(), ratio = window.devicePixelRatio || 1, W = box.width, H = box.height;
    if (!W) return;
    canvas.width = W * ratio; canvas.height = H * ratio;
    const draw = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    draw.scale(ratio, ratio);
    const scale = (key, from, to) => {
      const values = index.values[key], log = index.columns.find((one) => one.key === key).log, put = (v) => (log ? Math.log10(v) : v);
      let low = Infinity, high = -Infinity;
      for (const v of values) { const at = put(v); if (Number.isFinite(at)) { if (at < low) low = at; if (at > high) high = at; } }
      if (low > high) { low = 0; high = 1; }
      const room = high - low || 1;
      return { put: (v) => from + (put(v) - low) / room * (to - from), low, high, log };
    };
    const x = scale(axes.x, 46, W - 14), y = scale(axes.y, H - 30, 12);
    draw.font = "11px system-ui, sans-serif"; draw.fillStyle = style.getPropertyValue("--soft"); draw.strokeStyle = style.getPropertyValue("--line");
    for (let i = 0; i <= 4; i++) {
      const part = i / 4, label = (s, key) => say(s.log ? 10 ** (s.low + part * (s.high - s.low)) : s.low + part * (s.high - s.low), index.columns.find((one) => one.key === key).kind);
      const px = 46 + part * (W - 60), py = H - 30 - part * (H - 42);
      draw.beginPath(); draw.moveTo(px, 12); draw.lineTo(px, H - 30); draw.moveTo(46, py); draw.lineTo(W - 14, py); draw.stroke();
      draw.textAlign = i === 4 ? "right" : "center"; draw.fillText(label(x, axes.x), i === 4 ? W - 8 : px, H - 12); draw.textAlign = "right"; draw.fillText(label(y, axes.y), 42, py + 4);
    }
    const n = index.layers.length, dot = index.n > 20000 ? 1.6 : index.n > 3000 ? 2.4 : 3.4, tones = index.layers.map((_, i) => tone(n > 1 ? i / (n - 1) : 0));
    draw.globalAlpha = index.n > 20000 ? 0.35 : 0.6;
    places = [];
    for (let i = 0; i < index.n; i++) {
      const px = x.put(index.values[axes.x][i]), py = y.put(index.values[axes.y][i]);
      if (!Number.isFinite(px) || !Number.isFinite(py)) continue;
      places.push(px, py, i);
      draw.fillStyle = tones[index.strongest[i]] ?? tones[0];
      draw.beginPath(); draw.arc(px, py, dot, 0, 6.3); draw.fill();
    }
  }
  function nearest(event) {
    const box = canvas.getBoundingClientRect(), mx = event.clientX - box.left, my = event.clientY - box.top;
    let best = 144, found = null;
    for (let k = 0; k < places.length; k += 3) { const d = (places[k] - mx) ** 2 + (places[k + 1] - my) ** 2; if (d < best) { best = d; found = places[k + 2]; } }
    return [found, mx, my];
  }
  canvas.addEventListener("mousemove", (event) => {
    const [found, mx, my] = nearest(event);
    shown.replaceChildren(...(found === null ? [] : [`${found}  `, ...[0, 1].map((i) => index.labels[3 * found + i]).filter((id) => id >= 0).map((id) => chip(id))]));
    shown.style.left = `${Math.min(mx + 26, canvas.clientWidth - 150)}px`; shown.style.top = `${my + 46}px`;
  });
  canvas.addEventListener("mouseleave", () => shown.replaceChildren());
  canvas.addEventListener("click", (event) => { const [found] = nearest(event); if (found !== null) go({ feature: found, map: null }); });
  requestAnimationFrame(paint);
  new ResizeObserver(paint).observe(canvas.parentElement);
}
const tone = (part) => `hsl(${258 - 222 * part} ${62 + 20 * part}% ${52 + 4 * part}%)`;

// ---- controls

function controls() {
  $("home").textContent = index.name;
  document.title = index.title;
  $("sort").replaceChildren(...index.columns.map((column) => h("option", { value: column.key, title: column.definition }, column.words)));
  $("sort").addEventListener("change", (event) => go({ sort: event.target.value }));
  $("turn").addEventListener("click", () => go({ dir: state.dir === "up" ? "down" : "up" }));
  $("filters").addEventListener("click", turnFilters);
  $("keys").addEventListener("click", help);
  $("home").addEventListener("click", (event) => { event.preventDefault(); go({ feature: null, map: state.feature === null && !state.map }); });
  let timer;
  $("query").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(() => go({ q: $("query").value }, true), 120); });
  $("query").addEventListener("keydown", (event) => { if (event.key === "Enter") { clearTimeout(timer); go({ q: $("query").value }, true); setTimeout(() => { if (order.length) { go({ feature: order[0], map: null }); $("list").focus(); } }, 60); } });
  $("ranges").replaceChildren(...index.columns.filter((column) => column.key !== "number").map((column) => {
    const input = (end) => h("input", { type: "text", inputmode: "decimal", placeholder: end ? "most" : "least", "aria-label": `${column.words}, ${end ? "at most" : "at least"}`, "data-key": column.key, "data-end": end,
      onchange: (event) => { const given = event.target.value.trim(), number = given.endsWith("%") ? +given.slice(0, -1) / 100 : +given, pair = [...(state.ranges[column.key] ?? ["", ""])];
        pair[end] = given === "" || Number.isNaN(number) ? "" : String(number); go({ ranges: { ...state.ranges, [column.key]: pair } }); } });
    return h("fieldset", {}, h("legend", {}, column.words), input(0), input(1));
  }));
  $("ranges").addEventListener("submit", (event) => event.preventDefault());
  $("list").addEventListener("scroll", () => requestAnimationFrame(rows));
  window.addEventListener("resize", rows);
  window.addEventListener("hashchange", follow);
  document.addEventListener("keydown", keys);
}
function turnFilters() { $("ranges").hidden = !$("ranges").hidden; $("filters").setAttribute("aria-expanded", String(!$("ranges").hidden)); }

const KEYS = [["/", "search"], ["j ↓, k ↑", "next, previous feature"], ["[ ]", "whose effect on the next token"], ["l", "examples layer by layer"], ["s, r", "sort by the next number; turn the order"], ["f", "filter"], ["o", "all features at a glance"], ["c", "copy the link"], ["Esc", "close, clear, back"], ["?", "these keys"]];
function help() {
  $("help").replaceChildren(h("h2", {}, "Keys"), h("dl", {}, ...KEYS.flatMap(([key, words]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, words)])), h("button", { type: "button", onclick: () => $("help").close() }, "Close"));
  $("help").showModal();
}
function keys(event) {
  const typing = event.target.matches("input, select, textarea");
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  if (event.key === "Escape") {
    if (typing) { if (event.target.id === "query" && event.target.value) go({ q: "" }, true); event.target.blur(); $("list").focus(); }
    else if (state.feature !== null || state.map) go({ feature: null, map: null });
    else if (state.q || Object.keys(state.ranges).length) go({ q: "", ranges: {} });
    return;
  }
  if (typing) return;
  const rowsOf = index.layers.length + 1, row = state.row ? +state.row : rowsOf - 1, key = event.key;
  const act = {
    "/": () => { if (document.body.classList.contains("reading") && innerWidth <= 760) go({ feature: null, map: null }); $("query").focus(); $("query").select(); }, "?": help, j: () => step(1), k: () => step(-1), ArrowDown: () => step(1), ArrowUp: () => step(-1),
    l: turnGrid, f: turnFilters, o: () => go({ feature: null, map: true }), c: () => $("copy")?.click(), r: () => $("turn").click(),
    s: () => { const all = index.columns.map((one) => one.key); go({ sort: all[(all.indexOf(state.sort) + 1) % all.length] }); },
    "[": () => go({ row: String(Math.max(0, row - 1)) }, true), "]": () => go({ row: row + 1 >= rowsOf - 1 ? "" : String(row + 1) }, true),
  }[key];
  if (!act || ((key === "ArrowDown" || key === "ArrowUp") && event.target.closest?.("#page"))) return;
  event.preventDefault();
  act();
}

function follow() {
  const before = state;
  state = { ...read(), grid: before.grid ?? false, more: before.more ?? false };
  state.kept = before.q === state.q && before.sort === state.sort && before.dir === state.dir;
  document.title = state.feature === null ? index.title : `Feature ${state.feature} · ${index.title}`;
  document.body.classList.toggle("reading", state.feature !== null || state.map);
  if (document.activeElement !== $("query")) $("query").value = state.q ?? "";
  $("sort").value = state.sort;
  $("turn").textContent = state.dir === "up" ? "↑" : "↓";
  $("filters").classList.toggle("on", Object.keys(state.ranges).length > 0);
  for (const input of $("ranges").querySelectorAll("input")) input.value = state.ranges[input.dataset.key]?.[+input.dataset.end] ?? "";
  arrange().catch(failed);
  if (state.feature === null) { if (before.feature !== null || before.map === undefined) overview(); }
  else { if (before.feature !== state.feature) $("page").scrollTop = 0; open(state.feature).catch(failed); }
}
function failed(error) { $("page").replaceChildren(h("h1", {}, "This cannot be shown"), h("p", {}, error.message)); }

Promise.all([load("index"), load("tokens")]).then(([found, texts]) => {
  tokens = texts;
  index = found;
  index.values = Object.fromEntries(found.columns.map((column) => [column.key, column.key === "number" ? Float32Array.from({ length: found.n }, (_, i) => i) : decode(found.data[column.key])]));
  for (const name of ["labels", "profile", "strongest", "ids"]) index[name] = decode(found.data[name]);
  controls();
  follow();
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
}).catch(failed);
})();
