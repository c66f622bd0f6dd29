// The curve of expected length: what is written on the x axis, that and the expected rest on the
// y axis, both in the unit that was chosen. A text ends where the curve meets the diagonal.

import { UNITS, phrase } from "./units.js";

const SPACE = { top: 12, right: 16, bottom: 36, left: 48 };
const HEIGHT = 260;
const MARGIN = 1.2; // times what has to be seen
const EMPTY = 100; // of the axes while there is nothing to see

export class Chart {
  constructor(svg) {
    Object.assign(this, { svg, aim: { low: null, high: null }, rails: {}, unit: UNITS[0] });
    this.chosen = null;
    this.clear();
    new ResizeObserver(() => this.draw()).observe(svg);
  }

  clear() {
    this.points = []; // [length, expected length]
    this.end = null;
    this.draw();
  }

  // aim: {low, high}, rails: {first, last, landing}, both in the unit.
  plan(aim, rails, unit) {
    Object.assign(this, { aim, rails, unit });
    this.draw();
  }

  add(length, rest) {
    this.points.push([length, length + rest]);
  }

  finish(length) {
    this.end = length;
    if (this.points.length) this.points.push([length, length]);
  }

  // length: up to the part that is chosen in the text; null: none is.
  choose(length) {
    this.chosen = length;
    this.draw();
  }

  draw() {
    const width = this.svg.clientWidth || 600;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const { first, last, landing } = this.rails;
    const wanted = Math.max(this.aim.high ?? 0, this.aim.low ?? 0, last ?? 0, landing?.[1] ?? 0);
    const reached = Math.max(this.end ?? 0, ...this.points.slice(-1).map(([x]) => x));
    const highest = Math.max(wanted, reached, ...this.points.map(([, y]) => y));
    const xMost = MARGIN * Math.max(wanted, reached) || EMPTY;
    const yMost = MARGIN * highest || EMPTY;
    const right = width - SPACE.right;
    const bottom = HEIGHT - SPACE.bottom;
    const x = (length) => SPACE.left + ((right - SPACE.left) * length) / xMost;
    const y = (length) => bottom - ((bottom - SPACE.top) * length) / yMost;
    const parts = [];
    const add = (name, attributes, text) => parts.push(element(name, attributes, text));
    const vertical = (at, kind) =>
      add("line", { class: kind, x1: x(at), x2: x(at), y1: SPACE.top, y2: bottom });
    const horizontal = (at, kind) =>
      add("line", { class: kind, x1: SPACE.left, x2: right, y1: y(at), y2: y(at) });

    if (landing) {
      const from = Math.max(0, landing[0]);
      const size = { width: Math.max(1, x(landing[1]) - x(from)), height: bottom - SPACE.top };
      add("rect", { class: "landing", x: x(from), y: SPACE.top, ...size });
    }
    for (const at of ticks(yMost, 4)) {
      horizontal(at, "grid");
      add("text", { class: "tick left", x: SPACE.left - 8, y: y(at) + 4 }, at);
    }
    for (const at of ticks(xMost, Math.max(3, width / 120))) {
      add("text", { class: "tick", x: x(at), y: bottom + 16 }, at);
    }
    add("text", { class: "axis", x: (SPACE.left + right) / 2, y: HEIGHT - 4 }, `${this.unit.key} so far`);
    const corner = Math.min(xMost, yMost);
    add("line", { class: "ends", x1: x(0), y1: y(0), x2: x(corner), y2: y(corner) });
    for (const at of new Set([this.aim.low, this.aim.high])) if (at !== null) horizontal(at, "aim");
    if (first > 1) vertical(first, "rail");
    if (last != null) vertical(last, "rail");
    if (this.chosen !== null && this.points.length) vertical(this.chosen, "here");
    const path = this.points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ");
    add("polyline", { class: "expected", points: path });
    if (this.end !== null) add("circle", { class: "end", cx: x(this.end), cy: y(this.end), r: 5 });
    this.svg.replaceChildren(...parts);
    this.svg.setAttribute("aria-label", this.#said());
  }

  #said() {
    if (!this.points.length) return "Expected length: nothing yet";
    const round = ([, length]) => Math.round(length);
    const end = this.end === null ? "" : `; the text ended at ${phrase(this.end, this.unit)}`;
    const now = this.points.findLast(([at, length]) => at < length) ?? this.points.at(-1);
    return `Expected length: ${phrase(round(this.points[0]), this.unit)} at first, ${round(now)} last${end}`;
  }
}

// About `count` round numbers from 0 to `most`.
function ticks(most, count) {
  const rough = most / count;
  const ten = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * ten).find((n) => n >= rough);
  return Array.from({ length: Math.floor(most / step) + 1 }, (_, i) => i * step);
}

function element(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}
