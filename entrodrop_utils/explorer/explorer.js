// The explorer's page. Python owns the state (traits); this file draws it and sends what a person does (`do` and its arguments).
// Plain DOM and SVG: no framework, no build step, nothing from the network.

const SVG = "http://www.w3.org/2000/svg";
const KINDS = ["attention", "mlp", "block"];
const ROWS = { attention: "attention", mlp: "MLP", block: "block" };

function element(tag, attributes = {}, ...children) {
  const made = attributes.svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "svg" || value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}
const draw = (tag, attributes = {}, ...children) => element(tag, { svg: true, ...attributes }, ...children);
const key = ([layer, kind]) => `${kind} ${layer}`;
const spoken = (layer, kind) => `${ROWS[kind]} ${layer}`;

function labelled(text, control, extra = {}) {
  return element("label", { class: "ed-field", ...extra }, element("span", {}, text), control);
}

/** A control whose value is a setting: it sends its value when changed, and shows what Python says the setting is. */
function setting(page, name, control) {
  control.dataset.setting = name;
  control.addEventListener("change", () => {
    const value = control.type === "checkbox" ? control.checked : control.value;
    if (name !== "model") page.send({ do: "set", [name]: value });
  });
  return control;
}

function select(values, names = {}) {
  return element("select", {}, ...values.map((value) => element("option", { value }, names[value] ?? value.replace("_", " "))));
}

function build(page) {
  const lists = page.get("lists");
  const id = `ed-${Math.random().toString(36).slice(2)}`;
  const part = (page.part = {});
  const field = (name, control) => (part[name] = setting(page, name, control));
  const number = (name) => field(name, element("input", { type: "text", inputmode: "decimal", size: 5, autocomplete: "off" }));
  const button = (text, action, more = {}) => element("button", { type: "button", onclick: action, ...more }, text);
  const datalist = (name, values) => element("datalist", { id: `${id}-${name}` }, ...values.map((value) => element("option", { value })));

  field("model", element("input", { type: "text", list: `${id}-models`, size: 22, spellcheck: "false", autocomplete: "off" }));
  part.open = button("Open", () => page.send({ do: "set", model: part.model.value }), { hidden: true });
  part.about = element("span", { class: "ed-note", role: "status" });
  part.model.addEventListener("input", () => page.describe());
  part.model.addEventListener("keydown", (event) => {
    if (event.key === "Enter") page.send({ do: "set", model: part.model.value });
    if (event.key === "Escape") page.fields();
  });
  field("kind", select(lists.kinds, ROWS));
  field("metric", select(Object.keys(lists.metrics)));
  for (const name of Object.keys(lists.limits)) part[`${name} label`] = labelled(name, number(name), { hidden: true });
  field("first", element("input", { type: "checkbox" }));
  field("text", element("input", { type: "text", list: `${id}-texts`, size: 10, spellcheck: "false", autocomplete: "off" }));
  const settings = element("div", { class: "ed-row ed-settings", role: "group", "aria-label": "settings" },
    labelled("model", part.model), part.open, labelled("drop", part.kind), labelled("by", part.metric),
    ...Object.keys(lists.limits).map((name) => part[`${name} label`]),
    labelled("first token", part.first, { class: "ed-field ed-check", title: "count the first token of each window, the attention sink" }),
    labelled("ranked on", part.text), part.about, datalist("models", lists.models), datalist("texts", lists.texts));

  part.what = element("span", { class: "ed-what", role: "status", "aria-live": "polite" });
  part.bar = element("progress", { max: 1, "aria-label": "progress" });
  part.cancel = button("Cancel", () => page.send({ do: "cancel" }), { class: "ed-cancel" });
  const status = element("div", { class: "ed-row ed-status" }, part.bar, part.what, part.cancel);
  part.error = element("div", { class: "ed-error", role: "alert", hidden: true });

  part.title = element("div", { class: "ed-title" });
  part.map = draw("svg", { class: "ed-map", role: "grid", "aria-label": "map of all sub-blocks" });
  part.tip = element("div", { class: "ed-tip", hidden: true, "aria-hidden": "true" });
  part.ghosts = element("select", {}, element("option", { value: "" }, "none"),
    ...lists.ghosts.map((ghost, i) => element("option", { value: i }, ghost.name)));
  part.ghosts.addEventListener("change", () => page.map());
  const swatch = (name) => draw("svg", { class: "ed-swatch", viewBox: "0 0 14 14", "aria-hidden": "true" }, draw("use", { href: `#${id}-${name}` }));
  page.id = id;
  const legend = element("div", { class: "ed-row ed-legend" },
    element("span", { class: "ed-ramp", "aria-hidden": "true" }), element("span", { title: "logarithmic in both directions from zero" }, "below zero, zero, above"),
    ...[["gone", "dropped"], ["hand", "by hand"], ["lock", "protected by the rule"]].map(([name, text]) => element("span", { class: "ed-entry" }, swatch(name), text)),
    labelled("published lists", part.ghosts, { class: "ed-field", title: "layers that were dropped from other models, at their relative depth" }));

  part.slider = element("input", { type: "range", min: 0, max: 1, step: 1, "aria-label": "number dropped" });
  part.slider.addEventListener("input", () => page.send({ do: "slide", n: Number(part.slider.value) }));
  part.counted = element("output", { class: "ed-counted" });
  part.follow = button("Follow the ranking", () => page.send({ do: "follow" }), { title: "forget what was kept or dropped by hand" });
  part.pin = button("Pin", () => page.send({ do: "pin" }), { title: "keep this choice in the table" });
  const preset = (name, text, title) => button(text, () => page.send({ do: "preset", name }), { class: "ed-preset", title });
  const choose = element("div", { class: "ed-row ed-choose" }, part.slider, part.counted, part.follow, part.pin);
  const presets = element("div", { class: "ed-row ed-presets", role: "group", "aria-label": "presets" }, element("span", {}, "presets"),
    preset("paper", "the paper's 37.5%", "37.5% of the attention layers by bucket entropy"),
    preset("cosine", "cosine's 37.5%", "37.5% of the attention layers by cosine similarity"),
    preset("sink", "the sink's layer", "the branch at which bucket entropy falls most: it makes the first token the attention sink"),
    preset("random", "random", "as many at random, from those that the rule does not protect"));

  part.table = element("table", { class: "ed-table" });
  part.entropy = draw("svg", { class: "ed-chart", role: "img" });
  part.costs = draw("svg", { class: "ed-chart", role: "img" });
  const charts = element("div", { class: "ed-charts" }, part.entropy, part.costs);

  field("prompt", element("input", { type: "text", autocomplete: "off" }));
  field("pasted", element("textarea", { rows: 2, placeholder: "paste a text of your own" }));
  field("role", select(lists.roles, { reading: "to be read only", ranking: "also to rank on", evaluation: "also to evaluate on" }));
  part.tokens = element("div", { class: "ed-tokens", role: "listbox", "aria-label": "tokens, coloured by loss increase", tabindex: 0 });
  part.tokens.addEventListener("keydown", (event) => page.step(event));
  part.nexts = element("div", { class: "ed-nexts" });
  part.said = element("div", { class: "ed-said" });
  const feel = element("section", { class: "ed-feel", "aria-label": "text" },
    labelled("prompt", part.prompt, { class: "ed-field ed-wide" }), part.said,
    element("div", { class: "ed-row" }, labelled("your text", part.pasted, { class: "ed-field ed-wide" }), labelled("it is", part.role)),
    element("div", { class: "ed-reading" }, part.tokens, part.nexts));

  const menu = [button("Save…", () => page.dialog("")), ...lists.exports.map((name) => button(`Export to ${name}…`, () => page.dialog(name)))];
  part.code = element("textarea", { rows: 8, readonly: true, hidden: true, "aria-label": "code of this choice" });
  part.line = element("code", { class: "ed-line" });
  const copy = button("Copy", () => navigator.clipboard?.writeText(part.line.textContent), { title: "copy the line that recreates this page" });
  part.saved = element("div", { class: "ed-saved", role: "status" });
  const share = element("section", { class: "ed-share", "aria-label": "share" },
    element("div", { class: "ed-row" }, part.line, copy),
    element("div", { class: "ed-row" }, ...menu, button("PNG", () => page.picture()),
      button("Code", () => (part.code.hidden = !part.code.hidden))),
    part.saved, part.code);

  part.path = element("input", { type: "text", size: 48 });
  part.repaired = element("input", { type: "checkbox" });
  part.card = element("p", {});
  part.dialog = element("dialog", { class: "ed-dialog", "aria-label": "save" }, part.card, labelled("folder", part.path, { class: "ed-field ed-wide" }),
    labelled("with a linear repair", part.repaired, { class: "ed-field ed-check" }),
    element("div", { class: "ed-row" }, button("Save", () => page.save(), { class: "ed-ok" }), button("Cancel", () => part.dialog.close())));

  part.drawn = element("div", { class: "ed-drawn" }, part.title, part.map, legend, choose, presets, part.table, charts, feel, share);
  part.defs = draw("svg", { width: 0, height: 0, class: "ed-defs", "aria-hidden": "true" }, draw("defs", {},
    draw("pattern", { id: `${id}-hatch`, width: 4, height: 4, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
      draw("rect", { width: 4, height: 4, class: "ed-hatch-ground" }), draw("rect", { width: 1.8, height: 4, class: "ed-hatch-line" })),
    draw("g", { id: `${id}-gone` }, draw("rect", { x: 1, y: 1, width: 12, height: 12, rx: 2, fill: `url(#${id}-hatch)`, class: "ed-gone-edge" })),
    draw("g", { id: `${id}-hand` }, draw("circle", { cx: 7, cy: 7, r: 3.2, class: "ed-hand" })),
    draw("g", { id: `${id}-lock` }, draw("path", { d: "M4 6.5V5a3 3 0 0 1 6 0v1.5", class: "ed-lock-bow" }),
      draw("rect", { x: 2.5, y: 6.5, width: 9, height: 6, rx: 1, class: "ed-lock" }))));
  // Lab's own shortcuts do not act on keys pressed in here
  page.root = element("div", { class: "ed", "data-lm-suppress-shortcuts": "true" }, part.defs, settings, status, part.error, part.drawn, part.tip, part.dialog);
  page.root.style.setProperty("--ed-chosen-colour", lists.colours.chosen);
  page.root.addEventListener("keydown", (event) => event.stopPropagation());
}

class Page {
  constructor(model, el) {
    this.model = model;
    this.focus = { layer: 0, kind: "attention" };
    this.token = null;
    this.hover = null;
    build(this);
    el.append(this.root);
    const drawers = { fields: "fields", status: "status", map: "map", choice: "marks", curves: "charts", table: "table", reading: "text", said: "said", share: "share" };
    this.listeners = Object.entries(drawers).map(([trait, method]) => [`change:${trait}`, () => this[method]()]);
    for (const [event, method] of this.listeners) model.on(event, method);
    for (const method of Object.values(drawers)) this[method]();
    this.resize = new ResizeObserver(() => { if (this.width !== this.part.map.clientWidth) { this.map(); this.charts(); } });
    this.resize.observe(this.root);
    this.stay();
  }

  get(name) { return this.model.get(name); }
  /** What was drawn for other settings is dimmed at once; the status that Python answers with, `waiting` or not, decides. */
  send(message) {
    if (message.do === "set") this.part.drawn.classList.add("ed-stale");
    this.model.send(message);
  }

  /** After Run All, Lab shows the last cell: come back into sight, until a person does something or a minute is over. */
  stay() {
    const events = ["wheel", "pointerdown", "keydown", "touchstart"], until = Date.now() + 90000;
    const stop = () => { clearInterval(this.timer); events.forEach((name) => document.removeEventListener(name, stop, true)); };
    events.forEach((name) => document.addEventListener(name, stop, true));
    this.timer = setInterval(() => {
      if (Date.now() > until) return stop();
      const box = this.root.getBoundingClientRect();
      if (this.root.isConnected && box.height && (box.top < 0 || box.top > innerHeight * 0.6)) this.root.scrollIntoView({ block: "start" });
    }, 600);
    this.stop = stop;
  }

  fields() {
    const values = this.get("fields"), { part } = this;
    for (const [name, value] of Object.entries(values)) {
      const control = part[name];
      if (!control?.dataset?.setting) continue;
      if (control.type === "checkbox") control.checked = value;
      else control.value = value;
    }
    for (const name of Object.keys(this.get("lists").limits)) part[`${name} label`].hidden = !values.options?.includes(name);
    this.describe();
  }

  /** What opening the model that is typed would take; asked of Python, shown before anything is loaded. */
  describe() {
    const { part } = this, typed = part.model.value.trim(), known = this.get("status").about ?? {};
    const other = typed !== this.get("fields").model;
    part.open.hidden = !other || !typed;
    part.about.textContent = other && known.model === typed ? known.about : "";
    if (other && typed && known.model !== typed) {
      clearTimeout(this.typing);
      this.typing = setTimeout(() => this.send({ do: "about", model: typed }), 250);
    }
  }

  status() {
    const { phase, what, fraction, waiting, error, heard } = this.get("status"), { part } = this;
    const ahead = phase === "ahead", busy = Boolean(phase) && !ahead;
    part.what.textContent = ahead ? "ready; measuring ahead for moves to come" : busy ? what || `${phase} …` : "ready";
    part.what.classList.toggle("ed-quiet", !busy);
    part.bar.style.visibility = busy ? "visible" : "hidden";
    if (fraction === null || fraction === undefined) part.bar.removeAttribute("value");
    else part.bar.value = fraction;
    part.cancel.style.visibility = phase ? "visible" : "hidden";
    part.cancel.textContent = ahead ? "Pause" : "Cancel";
    part.drawn.classList.toggle("ed-stale", Boolean(waiting));
    part.drawn.setAttribute("aria-busy", String(Boolean(waiting)));
    this.root.dataset.phase = phase || "";
    part.error.hidden = !error;
    if (part.error.textContent !== (error || "")) part.error.textContent = error || "";
    this.describe();
    if (error && heard !== this.heard) this.fields();  // once: what is typed after a refused value stays
    this.heard = heard;
  }

  // --- the map

  map() {
    const data = this.get("map"), { part } = this;
    if (!data.rows) return;
    part.title.textContent = data.title;
    const width = (this.width = part.map.clientWidth || 700), left = 66, n = data.layers;
    const column = (this.column = Math.max(2, (width - left) / n)), height = 22, top = 14;
    this.place = (layer) => left + layer * column;
    part.map.setAttribute("viewBox", `0 0 ${width} ${top + 3 * (height + 2) + 26}`);
    const every = column < 8 ? 10 : column < 13 ? 5 : column < 18 ? 2 : 1;
    this.cells = {};
    const rows = KINDS.map((kind, r) => {
      const y = top + r * (height + 2);
      const cells = data.rows[kind].map((cell) => {
        const label = this.described(cell, kind);
        const box = { x: this.place(cell.layer) + 0.5, y, width: Math.max(1, column - 1), height, rx: 2 };
        const group = draw("g", { class: "ed-cell", role: "gridcell", tabindex: -1, "aria-label": label, "data-layer": cell.layer, "data-kind": kind },
          draw("rect", { ...box, fill: shade(cell.shade), class: "ed-box" }),
          draw("rect", { ...box, fill: `url(#${this.id}-hatch)`, class: "ed-gone" }),
          draw("circle", { cx: box.x + box.width / 2, cy: y + height / 2, r: Math.min(3, column / 3), class: "ed-hand ed-hand-mark" }));
        this.cells[key([cell.layer, kind])] = { group, cell, kind };
        return group;
      });
      const name = draw("text", { x: left - 6, y: y + height / 2 + 4, "text-anchor": "end", class: data.kind === kind ? "ed-row-name ed-chosen" : "ed-row-name" }, ROWS[kind]);
      return draw("g", { role: "row" }, name, ...cells);
    });
    const bottom = top + 3 * (height + 2);
    const numbers = [...Array(n).keys()].filter((i) => i % every === 0).map((i) =>
      draw("text", { x: this.place(i) + column / 2, y: bottom + 11, "text-anchor": "middle", class: "ed-axis" }, String(i)));
    const size = Math.min(12, column);
    const locks = data.protected.map((i) => draw("use", { href: `#${this.id}-lock`, transform: `translate(${this.place(i) + column / 2 - size / 2} 0) scale(${size / 14})` }));
    const ghost = this.get("lists").ghosts[part.ghosts.value];
    const marks = (ghost?.depths ?? []).map((depth) =>
      draw("path", { d: "M0 0l4 7h-8z", class: "ed-ghost", transform: `translate(${left + depth * n * column} ${top + KINDS.indexOf(ghost.kind) * (height + 2) + height - 5})` }));
    const name = draw("text", { x: left - 6, y: bottom + 11, "text-anchor": "end", class: "ed-axis" }, "layer");
    this.line = draw("rect", { y: top - 1, height: 3 * (height + 2), width: Math.max(2, column), class: "ed-column", visibility: "hidden" });
    part.map.replaceChildren(...rows, ...numbers, name, ...locks, ...marks, this.line);
    this.hands();
    this.marks();
  }

  described(cell, kind) {
    const ranks = Object.entries(cell.ranks).map(([metric, rank]) => `${metric} ${rank}`).join(", ");
    return `${spoken(cell.layer, kind)}: score ${cell.score}` + (ranks ? `; rank by ${ranks}` : "") +
      (cell.alone ? `; dropped alone: ${cell.alone}` : "; dropped alone: not measured yet");
  }

  hands() {
    const { map } = this.part, cell = (event) => event.target.closest?.(".ed-cell");
    if (this.bound) return;
    this.bound = true;
    const of = (group) => [Number(group.dataset.layer), group.dataset.kind];
    map.addEventListener("pointerdown", (event) => {
      const group = cell(event);
      if (!group || event.button) return;
      event.preventDefault();
      this.drag = { from: of(group), to: of(group), block: event.shiftKey };
      this.enter(group);
    });
    map.addEventListener("pointermove", (event) => {
      const group = cell(event);
      if (!group) return;
      if (!this.drag) return this.show(group);
      const [layer] = of(group);
      this.drag.to = [layer, this.drag.from[1]];
      this.selection();
    });
    map.addEventListener("pointerleave", () => this.show(null));
    const release = () => {
      const { drag } = this;
      this.drag = null;
      for (const { group } of Object.values(this.cells)) group.classList.remove("ed-picked");
      if (drag) this.choose(drag.from, drag.to, drag.block);
    };
    this.release = release;
    window.addEventListener("pointerup", release);
    map.addEventListener("focusin", (event) => { const group = cell(event); if (group) this.show(group); });
    map.addEventListener("focusout", () => this.show(null));
    map.addEventListener("keydown", (event) => {
      const group = cell(event);
      if (!group) return;
      const [layer, kind] = of(group), row = KINDS.indexOf(kind), last = this.get("map").layers - 1;
      const to = { ArrowLeft: [layer - 1, row], ArrowRight: [layer + 1, row], ArrowUp: [layer, row - 1], ArrowDown: [layer, row + 1], Home: [0, row], End: [last, row] }[event.key];
      if (to) this.enter(this.cells[key([Math.min(Math.max(to[0], 0), last), KINDS[Math.min(Math.max(to[1], 0), 2)]])]?.group);
      else if (event.key === "Enter" || event.key === " ") this.choose([layer, kind], [layer, kind], event.shiftKey);
      else return;
      event.preventDefault();
    });
  }

  selection() {
    const { from, to } = this.drag, [low, high] = [Math.min(from[0], to[0]), Math.max(from[0], to[0])];
    for (const { group, cell, kind } of Object.values(this.cells))
      group.classList.toggle("ed-picked", kind === from[1] && cell.layer >= low && cell.layer <= high);
  }

  /** A click toggles a sub-block, with shift its block; a drag drops a range, or keeps it where its first was dropped. */
  choose(from, to, block) {
    const kind = block ? "block" : from[1];
    if (from[0] === to[0]) return this.send({ do: "mark", sub_blocks: [[from[0], kind]] });
    const [low, high] = [Math.min(from[0], to[0]), Math.max(from[0], to[0])];
    const range = Object.values(this.cells).filter((one) => one.kind === kind && one.cell.layer >= low && one.cell.layer <= high);
    const gone = !(this.get("choice").dropped ?? []).map(key).includes(key([from[0], kind]));
    this.send({ do: "mark", sub_blocks: range.map((one) => [one.cell.layer, kind]), gone });
  }

  enter(group) {
    if (!group) return;
    for (const one of Object.values(this.cells)) one.group.setAttribute("tabindex", -1);
    group.setAttribute("tabindex", 0);
    this.focus = { layer: Number(group.dataset.layer), kind: group.dataset.kind };
    group.focus();
  }

  marks() {
    const choice = this.get("choice"), { part } = this;
    if (!choice.dropped || !this.cells) return;
    const gone = new Set(choice.dropped.map(key)), hand = new Set(choice.hand.map(key));
    const inside = new Set(choice.dropped.filter(([, kind]) => kind === "block").map(([layer]) => layer));
    for (const [name, { group, cell, kind }] of Object.entries(this.cells)) {
      const out = gone.has(name);
      group.classList.toggle("ed-out", out);
      group.classList.toggle("ed-inside", !out && kind !== "block" && inside.has(cell.layer));
      group.classList.toggle("ed-by-hand", hand.has(name));
      group.setAttribute("aria-selected", String(out));
      group.setAttribute("aria-label", `${this.described(cell, kind)}; ${out ? "dropped" : "kept"}${hand.has(name) ? " by hand" : ""}`);
    }
    const at = this.cells[key([this.focus.layer, this.focus.kind])] ?? Object.values(this.cells)[0];
    at.group.setAttribute("tabindex", 0);
    part.slider.min = choice.least;
    part.slider.max = choice.most;
    if (document.activeElement !== part.slider || Math.abs(part.slider.value - choice.n) > 0) part.slider.value = choice.n;
    part.counted.textContent = choice.counted;
    part.slider.setAttribute("aria-valuetext", choice.counted);
    part.follow.disabled = !choice.hand.length;
    this.charts();
  }

  /** Hover or focus: the details of a sub-block, and its layer marked in every view. */
  show(group) {
    const { tip } = this.part;
    const layer = group ? Number(group.dataset.layer) : null;
    if (layer !== this.hover) { this.hover = layer; this.pointer(); }
    tip.hidden = !group;
    if (!group) return;
    const { cell, kind } = this.cells[key([layer, group.dataset.kind])];
    const ranks = Object.entries(cell.ranks).map(([metric, rank]) => element("span", {}, `${metric} ${rank}`));
    tip.replaceChildren(element("b", {}, spoken(layer, kind)), element("span", {}, `score ${cell.score}`),
      element("span", {}, `alone ${cell.alone || "not measured yet"}`), ...(ranks.length ? [element("i", {}, "rank by"), ...ranks] : []));
    const box = group.getBoundingClientRect(), home = this.root.getBoundingClientRect();
    const x = Math.min(Math.max(box.left + box.width / 2 - home.left, 90), home.width - 90);
    tip.style.left = `${x}px`;
    tip.style.top = `${box.bottom - home.top + 6}px`;
  }

  pointer() {
    const shown = this.hover !== null ? "visible" : "hidden";
    this.line?.setAttribute("visibility", shown);
    this.line?.setAttribute("x", this.place(this.hover ?? 0));
    for (const mark of this.root.querySelectorAll(".ed-layer-mark")) {
      mark.setAttribute("visibility", shown);
      if (this.hover !== null) mark.setAttribute("transform", `translate(${this.layerAt(this.hover)} 0)`);
    }
    const order = (this.get("choice").dropped ?? []).findIndex(([layer]) => layer === this.hover);
    for (const mark of this.root.querySelectorAll(".ed-order-mark")) {
      mark.setAttribute("visibility", order >= 0 ? "visible" : "hidden");
      if (order >= 0) mark.setAttribute("transform", `translate(${this.countAt(order + 1)} 0)`);
    }
  }

  // --- curves

  charts() {
    const data = this.get("curves"), { part } = this;
    if (!data.dense) return;
    this.entropyChart(data, part.entropy);
    this.costChart(data, part.costs);
    this.pointer();
  }

  /** An empty chart under its title and the keys of its lines. */
  frame(svg, title, xName, yName, keys) {
    const width = svg.clientWidth || 420, top = 32 + 13 * keys.length, height = top + 128;
    const box = { left: 50, right: width - 14, top, bottom: height - 30 };
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("aria-label", title);
    svg.replaceChildren(
      draw("text", { x: 4, y: 13, class: "ed-chart-title" }, title),
      ...keys.flatMap(([name, text, style], i) => [draw("path", { d: `M4 ${22 + i * 13}h16`, class: `ed-curve ed-${name}`, style }),
        draw("text", { x: 25, y: 25.5 + i * 13, class: "ed-axis" }, text)]),
      draw("text", { x: 4, y: top - 6, class: "ed-axis" }, yName),
      draw("text", { x: box.right, y: height - 3, "text-anchor": "end", class: "ed-axis" }, xName),
      draw("path", { d: `M${box.left} ${box.top}V${box.bottom}H${box.right}`, class: "ed-frame" }));
    return box;
  }

  entropyChart(data, svg) {
    const n = (data.dense.length - 1) / 2;
    const box = this.frame(svg, `${data.entropy} entropy of the residual stream`, "layers passed", "nats",
      [["dense", "dense"], ...(data.pruned ? [["pruned", "without what is dropped"]] : [])]);
    const values = [...data.dense, ...(data.pruned ?? [])], [low, high] = [Math.min(...values), Math.max(...values)];
    const x = (i) => box.left + (i / 2 / n) * (box.right - box.left);
    const y = (value) => box.bottom - ((value - low) / (high - low || 1)) * (box.bottom - box.top - 8);
    this.layerAt = (layer) => x(2 * layer);
    this.ticks(svg, box, x, [0, n / 2, n].map((l) => [2 * l, String(Math.round(l))]), y, nice(low, high));
    const line = (points, name) => draw("path", { class: `ed-curve ed-${name}`, d: points.map((v, i) => `${i ? "L" : "M"}${x(i).toFixed(1)} ${y(v).toFixed(1)}`).join("") });
    svg.append(draw("rect", { class: "ed-layer-mark", x: 0, y: box.top, width: x(2) - x(0), height: box.bottom - box.top, visibility: "hidden" }),
      line(data.dense, "dense"), ...(data.pruned ? [line(data.pruned, "pruned")] : []));
  }

  costChart(data, svg) {
    const box = this.frame(svg, `cost on ${data.evaluation}`, "number dropped", "loss increase, nats per token (square-root scale)",
      [...data.lines.map((line, i) => [`cost ed-cost-${i % 5}`, line.name, this.tone(line)]), ...(data.random.length ? [["random-key", "random choices: range and median"]] : [])]);
    const all = [...data.lines.flatMap((line) => line.points.map((p) => p[1])), ...data.random.flatMap((r) => [r[1], r[3]])];
    const most = Math.max(0.1, ...all.filter((v) => v !== null)), count = Math.max(1, data.most, ...data.lines.flatMap((l) => l.points.map((p) => p[0])));
    const x = (n) => box.left + (n / (count + 0.5)) * (box.right - box.left);
    const root = (value) => Math.sign(value) * Math.sqrt(Math.abs(value)), low = root(Math.min(0, ...all.filter((v) => v !== null)));
    const y = (value) => box.bottom - ((root(value) - low) / (root(most) - low)) * (box.bottom - box.top - 8);
    this.countAt = (n) => x(n);
    const steps = [0, 0.1, 0.5, 1, 2, 5, 10, 20, 50].filter((v) => v <= most).filter((v, i, some) => i === 0 || y(some[i - 1]) - y(v) > 9 || v > most / 3);
    const every = count > 12 ? 5 : 1;
    this.ticks(svg, box, x, [...Array(Math.floor(count / every) + 1).keys()].map((i) => [i * every, String(i * every)]), y, steps);
    for (const [n, low, middle, high] of data.random)
      svg.append(draw("path", { class: "ed-random", d: `M${x(n)} ${y(low)}V${y(high)}` }), draw("path", { class: "ed-random-middle", d: `M${x(n) - 5} ${y(middle)}h10` }));
    data.lines.forEach((line, i) => {
      const path = line.points.map(([n, v], j) => `${j && line.points[j - 1][0] === n - 1 ? "L" : "M"}${x(n).toFixed(1)} ${y(v).toFixed(1)}`).join("");
      const style = this.tone(line);
      svg.append(draw("path", { class: `ed-curve ed-cost ed-cost-${i % 5}`, d: path, style }), ...line.points.map(([n, v]) => draw("circle", { cx: x(n), cy: y(v), r: 2, class: "ed-dot", style })));
    });
    const n = this.get("choice").n, here = data.lines[0].points.find((p) => p[0] === n);
    if (here) svg.append(draw("rect", { x: x(n) - 4.5, y: y(here[1]) - 4.5, width: 9, height: 9, class: "ed-here" }));
    svg.append(draw("path", { class: "ed-order-mark", d: `M0 ${box.top}V${box.bottom}`, visibility: "hidden" }));
  }

  /** A pinned line has its metric's colour, lighter on a dark ground; the choice has its own. */
  tone({ metric }) {
    const colour = this.get("lists").colours[metric];
    return `--ed-line: ${colour ? `color-mix(in srgb, ${colour} 65%, var(--ed-text))` : "var(--ed-chosen)"}`;
  }

  ticks(svg, box, x, columns, y, rows) {
    for (const [at, name] of columns) svg.append(draw("text", { x: x(at), y: box.bottom + 12, "text-anchor": "middle", class: "ed-axis" }, name));
    for (const value of rows)
      svg.append(draw("path", { d: `M${box.left} ${y(value)}H${box.right}`, class: "ed-grid" }),
        draw("text", { x: box.left - 5, y: y(value) + 3.5, "text-anchor": "end", class: "ed-axis" }, String(value)));
  }

  // --- table

  table() {
    const rows = this.get("table"), columns = Object.entries(this.get("lists").columns);
    const head = element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "choice"),
      ...columns.map(([, name]) => element("th", { scope: "col" }, name)), element("td", {})));
    const body = rows.map((row, i) => element("tr", { class: i === 1 ? "ed-now" : "" },
      element("th", { scope: "row", title: `${row.set}; ${row.ranked}` }, row.name, element("small", {}, [row.set, row.ranked].filter(Boolean).join(", "))),
      ...columns.map(([name, label]) => element("td", { "data-label": label, class: row.cells[name] === null ? "ed-missing" : "" },
        row.cells[name] ?? (this.get("status").phase ? "…" : "not measured"))),
      element("td", { class: "ed-remove" }, i > 1 ? element("button", { type: "button", "aria-label": `unpin ${row.name}`, title: "unpin", onclick: () => this.send({ do: "unpin", number: i - 2 }) }, "×") : null)));
    this.part.table.replaceChildren(head, element("tbody", {}, ...body));
  }

  // --- text

  text() {
    const { tokens } = this.get("reading"), { part } = this;
    if (!tokens) return;
    if (this.token === null || !tokens[this.token]) this.token = tokens.length - 1;
    part.tokens.replaceChildren(...tokens.map(([text, dense, pruned], i) => {
      const more = pruned - dense, known = dense !== null && pruned !== null;
      const tone = known ? Math.min(1, Math.abs(more) / 4) : 0;
      const title = known ? `loss ${dense.toFixed(2)} → ${pruned.toFixed(2)} nats` : "first token: it has no loss";
      return element("span", { class: "ed-token", role: "option", "aria-selected": i === this.token, "aria-label": `${text}: ${title}`, title,
        style: `background: color-mix(in srgb, var(${more > 0 ? "--ed-chosen" : "--ed-better"}) ${Math.round(60 * tone)}%, transparent)`,
        onclick: () => { this.token = i; this.text(); } }, text);
    }));
    this.nexts();
  }

  step(event) {
    const last = (this.get("reading").tokens?.length ?? 1) - 1;
    const to = { ArrowLeft: this.token - 1, ArrowRight: this.token + 1, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    this.token = Math.min(Math.max(to, 0), last);
    this.text();
    event.preventDefault();
  }

  nexts() {
    const { tokens, dense, pruned } = this.get("reading");
    const column = (name, rows) => element("table", {}, element("caption", {}, name), ...(rows?.[this.token] ?? []).map(([token, p]) =>
      element("tr", {}, element("td", {}, JSON.stringify(token).slice(1, -1)), element("td", {},
        element("span", { class: "ed-p", style: `width: ${Math.round(60 * p)}px` }), ` ${(100 * p).toFixed(0)}%`))));
    this.part.nexts.replaceChildren(element("div", { class: "ed-after" }, tokens[this.token] ? `after “${tokens[this.token][0].trim()}”` : ""),
      column("dense", dense), column("pruned", pruned));
  }

  said() {
    const { dense, pruned } = this.get("said"), { part } = this;
    const line = (name, text) => element("div", {}, element("b", {}, name), " ", element("span", {}, text === undefined ? "…" : text));
    part.said.replaceChildren(line("dense", dense), line("pruned", pruned));
  }

  // --- sharing

  share() {
    const { line, code, saved, failed } = this.get("share"), { part } = this;
    part.line.textContent = line ?? "";
    part.code.value = code ?? "";
    part.saved.textContent = failed ?? saved ?? "";
    part.saved.classList.toggle("ed-error", Boolean(failed));
  }

  dialog(runtime) {
    const { part } = this, { folder, model } = this.get("share"), choice = this.get("choice");
    this.runtime = runtime;
    part.card.textContent = `${model} ${choice.counted}, chosen by ${choice.said}. The card says so, and on which text, and what it costs.`;
    part.path.value = { "": folder, gguf: `${folder}.gguf` }[runtime] ?? `${folder}-${runtime}`;
    part.repaired.parentElement.hidden = Boolean(runtime);
    part.dialog.showModal();
    part.path.select();
  }

  save() {
    const { part } = this;
    part.dialog.close();
    this.send({ do: "save", path: part.path.value, runtime: this.runtime, repaired: part.repaired.checked && !this.runtime });
  }

  /** The map and the curves as one PNG, with their titles; styles are written into the copy. */
  async picture() {
    const scale = 2, head = 50, home = this.part.map.getBoundingClientRect();
    const parts = [this.part.map, this.part.entropy, this.part.costs].map((svg) => ({ svg, at: svg.getBoundingClientRect() }));
    const low = this.part.table.getBoundingClientRect(), gone = low.bottom - home.bottom;  // charts move up to the map
    const top = ({ svg, at }) => head + at.top - home.top - (svg === this.part.map ? 0 : gone);
    const height = Math.max(...parts.map((one) => top(one) + one.at.height)) + 8;
    const canvas = element("canvas", { width: home.width * scale, height: height * scale });
    const pen = canvas.getContext("2d"), style = getComputedStyle(this.root);
    pen.scale(scale, scale);
    pen.fillStyle = style.backgroundColor;
    pen.fillRect(0, 0, home.width, height);
    pen.fillStyle = style.color;
    pen.font = "bold 13px sans-serif";
    pen.fillText(`${this.get("share").model} ${this.get("choice").counted}`, 6, 20);
    pen.font = "12px sans-serif";
    pen.fillText(this.get("map").title, 6, 40);
    for (const one of parts)
      pen.drawImage(await image(one.svg, this.part.defs), one.at.left - home.left, top(one), one.at.width, one.at.height);
    const link = element("a", { href: canvas.toDataURL("image/png"), download: "entrodrop.png" });
    link.click();
  }

  close() {
    this.stop();
    this.resize.disconnect();
    window.removeEventListener("pointerup", this.release);
    for (const [event, method] of this.listeners) this.model.off(event, method);
  }
}

/** The colour of a score: pale where redundant, dark where large; below zero in another hue. */
function shade(value) {
  const hue = value < 0 ? "--ed-below" : "--ed-score";
  return `color-mix(in srgb, var(${hue}) ${Math.round(8 + 82 * Math.abs(value))}%, var(--ed-ground))`;
}

function nice(low, high) {
  const step = 10 ** Math.floor(Math.log10((high - low) / 2 || 1)), by = [1, 2, 5].map((f) => f * step).find((s) => (high - low) / s <= 5) ?? 10 * step;
  const rows = [];
  for (let v = Math.ceil(low / by) * by; v <= high; v += by) rows.push(Number(v.toPrecision(6)));
  return rows;
}

async function image(svg, defs) {
  const copy = svg.cloneNode(true), from = [svg, ...svg.querySelectorAll("*")], to = [copy, ...copy.querySelectorAll("*")];
  const looks = ["fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "font-family", "font-size", "font-weight", "visibility", "display"];
  from.forEach((one, i) => { const style = getComputedStyle(one); looks.forEach((look) => to[i].style.setProperty(look, style.getPropertyValue(look))); });
  const own = defs.firstChild.cloneNode(true), made = [...own.querySelectorAll("*")];
  [...defs.firstChild.querySelectorAll("*")].forEach((one, i) => { const style = getComputedStyle(one); looks.slice(0, 4).forEach((look) => made[i].style.setProperty(look, style.getPropertyValue(look))); });
  copy.prepend(own);
  copy.setAttribute("xmlns", SVG);
  copy.setAttribute("width", svg.clientWidth);
  copy.setAttribute("height", svg.clientHeight);
  const picture = new Image();
  picture.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(copy))}`;
  await picture.decode();
  return picture;
}

function render({ model, el }) {
  const page = new Page(model, el);
  return () => page.close();
}

export default { render };
