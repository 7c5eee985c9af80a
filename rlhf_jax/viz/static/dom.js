// Elements, numbers and charts. Text only ever enters the page through textContent.

export function h(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

export function s(tag, props = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);
}

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("aria-") && typeof value === "boolean") element.setAttribute(name, value);
    if (value === null || value === undefined || typeof value === "boolean" && (!value || name.startsWith("aria-"))) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "text") element.textContent = value;
    else if (name === "value" && "value" in element) element.value = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

// A number in about three digits; a dash where there is none.
export function fmt(x, sign = "") {
  if (x === null || x === undefined || !Number.isFinite(x)) return "–";
  const size = Math.abs(x);
  let text;
  if (size === 0) text = "0";
  else if (size >= 1e5 || size < 0.001) text = size.toExponential(1).replace("e+", "e").replace("e-", "e−");
  else text = size.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3);
  const before = x < 0 && Number(size) !== 0 ? "−" : sign;
  return before + text;
}
export const signed = (x) => fmt(x, x > 0 ? "+" : "");
export const percent = (x) => (!Number.isFinite(x) ? "–" : x !== 0 && Math.abs(x) < 5e-4 ? `${fmt(100 * x)}%` : `${(100 * x).toFixed(1)}%`);
// A log-prob in a formula: with three decimals, the exponential of a difference can be done again by hand.
export const nats = (x) => (Number.isFinite(x) ? x.toFixed(3).replace("-", "−") : "–");
// In a formula: a negative number stands in brackets.
export const par = (x, write = fmt) => (x < 0 ? `(${write(x)})` : write(x));

export const scale = (lo, hi, from, to) => {
  const span = hi - lo || 1;
  return (x) => from + ((x - lo) / span) * (to - from);
};

// Round values between lo and hi, about n of them.
function ticks(lo, hi, n = 5) {
  const raw = (hi - lo) / n || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((k) => k * power).find((k) => k >= raw);
  const out = [];
  for (let x = Math.ceil(lo / step) * step; x <= hi + step * 1e-9; x += step) out.push(Math.abs(x) < step * 1e-9 ? 0 : x);
  return out;
}

function atLeastTwo(lo, hi, n) {
  const few = ticks(lo, hi, n);
  return few.length > 1 ? few : ticks(lo, hi, 2 * n);
}

// The least and the largest finite number of some arrays, widened by a share.
export function extent(arrays, share = 0.05, ...also) {
  let lo = Infinity, hi = -Infinity;
  for (const array of [...arrays, also]) {
    for (const x of array) {
      if (Number.isFinite(x)) {
        lo = Math.min(lo, x);
        hi = Math.max(hi, x);
      }
    }
  }
  if (lo > hi) [lo, hi] = [0, 1];
  const more = (hi - lo || Math.abs(hi) || 1) * share;
  return [lo - more, hi + more];
}

// A chart that is drawn at its real width, and again when that changes: `draw(svg, width)`. Its width is only read when
// the browser has laid the page out anyway: reading it after a change would make it do so again.
export function chart(label, height, draw) {
  const svg = s("svg", { role: "img", "aria-label": label, height, width: "100%" });
  let width = 0;
  const redraw = () => {
    if (!width) return;
    svg.replaceChildren();
    draw(svg, width);
  };
  new ResizeObserver(([entry]) => {
    const now = Math.round(entry.contentRect.width);
    if (now === width) return;
    width = now;
    redraw();
  }).observe(svg);
  return { svg, redraw, label: (text) => svg.setAttribute("aria-label", text) };
}

// Axes of a chart: ticks with numbers, titles; returns the scales.
export function axes(svg, width, height, [x0, x1], [y0, y1], { xt = "", yt = "", left = 46, bottom = 36, top = 22, right = 18, xn, yn = 5, yticks, xf = tick, yf = tick } = {}) {
  const x = scale(x0, x1, left, width - right), y = scale(y0, y1, height - bottom, top);
  for (const v of yticks ?? atLeastTwo(y0, y1, yn)) {
    svg.append(s("line", { class: v === 0 ? "zero" : "axis", x1: left, x2: width - right, y1: y(v), y2: y(v) }));
    svg.append(s("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end", text: yf(v) }));
  }
  for (const v of atLeastTwo(x0, x1, xn ?? Math.max(2, Math.floor(width / 90)))) {
    svg.append(s("line", { class: "axis", x1: x(v), x2: x(v), y1: height - bottom, y2: height - bottom + 4 }));
    svg.append(s("text", { x: x(v), y: height - bottom + 17, "text-anchor": "middle", text: xf(v) }));
  }
  if (xt) svg.append(s("text", { x: width - right, y: height - 3, "text-anchor": "end", text: xt }));
  if (yt) svg.append(s("text", { x: 2, y: 12, text: yt }));
  return { x, y };
}

// The number at a tick: no more digits than it needs.
const tick = (v) => String(Number(v.toPrecision(4))).replace("-", "−");

export const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

// A bar in a cell, with its number: bars of one column share a scale, and zero is where both signs meet.
export function barCell(full = 70) {
  const width = barWidth(full);
  const rect = s("rect", { height: 10, y: 2, rx: 1.5 });
  const zero = s("line", { class: "zero", y1: 0, y2: 14 });
  const number = h("span", { class: "n" });
  const cell = h("td", {}, h("span", { class: "cell" }, s("svg", { width, height: 14, "aria-hidden": "true" }, rect, zero), number));
  return {
    cell,
    set(value, [lo, hi], cls, text = fmt(value)) {
      const at = scale(lo, hi, 1, width - 1), base = at(0), end = Number.isFinite(value) ? at(Math.max(lo, Math.min(hi, value))) : base;
      rect.setAttribute("x", Math.min(base, end));
      rect.setAttribute("width", Math.max(Math.abs(end - base), value ? 1 : 0));
      rect.setAttribute("class", cls);
      zero.setAttribute("x1", base);
      zero.setAttribute("x2", base);
      if (number.textContent !== text) number.textContent = text;
    },
  };
}

// Narrow screens have shorter bars.
export const barWidth = (full) => (innerWidth < 600 ? Math.round(full * 0.55) : full);

// The scale of a column of bars.
export function barRange(values) {
  let lo = 0, hi = 0;
  for (const x of values) {
    if (x < lo) lo = x;
    if (x > hi) hi = x;
  }
  return lo === 0 && hi === 0 ? [0, 1] : [lo, hi];
}

// A labelled slider: {element, input}.
export function slider(label, { min, max, step, value, digits = 2 }, changed) {
  const output = h("output", { text: value.toFixed(digits) });
  const input = h("input", { type: "range", min, max, step, value });
  input.value = value;
  input.addEventListener("input", () => {
    output.textContent = Number(input.value).toFixed(digits);
    changed(Number(input.value));
  });
  const element = h("label", {}, label, input, output);
  return {
    element, input,
    set(v) {
      if (Number(input.value) !== v) input.value = v;
      output.textContent = v.toFixed(digits);
    },
  };
}

export function select(label, options, value, changed) {
  const element = h("select", {}, options.map(([v, text]) => h("option", { value: v, text })));
  element.value = value;
  element.addEventListener("change", () => changed(element.value));
  return { element: h("label", {}, label, element), input: element, set: (v) => (element.value = v) };
}

export function check(label, changed, value = false) {
  const input = h("input", { type: "checkbox" });
  input.checked = value;
  input.addEventListener("change", () => changed(input.checked));
  return { element: h("label", {}, input, label), input };
}

export const button = (text, clicked, props = {}) => h("button", { type: "button", text, onclick: clicked, ...props });

// The twin of a chart for who does not see it: a table that opens on request and is filled when it does.
export function dataTable(title, head, rows) {
  const body = h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": title });
  const details = h("details", { class: "data" }, h("summary", { text: `Data: ${title}` }), body);
  const refill = () => {
    if (!details.open) return;
    const line = (cells, tag) => h("tr", {}, cells.map((c) => h(tag, typeof c === "number" ? { class: "n", text: fmt(c) } : { class: "text", text: c ?? "–", ...(tag === "th" ? { scope: "col" } : {}) })));
    body.replaceChildren(h("table", {}, h("thead", {}, line(head, "th")), h("tbody", {}, rows().map((row) => line(row, "td")))));
  };
  details.addEventListener("toggle", refill);
  return { element: details, refill };
}

export const heading = (id, title, code) => h("h2", { id: `${id}-title` }, title, code ? h("small", { text: code }) : null);
export const p = (...text) => h("p", {}, ...text);
export const code = (text) => h("code", { text });
