// The text of an answer, a mark for each of its parts, coloured by the tokens that were expected
// behind it. Pointer and arrow keys choose one, and a line tells of it.

import { phrase } from "./units.js";

export class TokenText {
  // box: where the text goes. line: tells of the chosen part. chose(part or null) is called.
  constructor(box, line, chose = () => {}) {
    Object.assign(this, { box, line, chose });
    this.clear();
    box.addEventListener("pointerover", (event) => this.#choose(event.target));
    box.addEventListener("pointerleave", () => this.#choose(null));
    box.addEventListener("focus", () => this.#choose(this.chosen ?? box.firstElementChild));
    box.addEventListener("blur", () => this.#choose(null));
    box.addEventListener("keydown", (event) => this.#move(event));
  }

  // most: expected rest that has the full colour, or more where more is expected.
  clear(unit = null, most = 0) {
    Object.assign(this, { unit, most });
    this.box.replaceChildren();
    this.line.textContent = "";
    this.parts = new Map(); // of each mark
    this.chosen = null;
  }

  // part: {text, whole, tokens, amount, rest, pEnd}. whole: it has no parts to tell of. tokens,
  // amount: those of the text with it. rest: expected behind it. amount and rest are in the unit,
  // rest and pEnd null or undefined where they are not known.
  add(part) {
    const { text, whole, rest } = part;
    if (!text) return;
    if (whole) return this.box.append(text);
    const atEnd = this.box.scrollTop + this.box.clientHeight >= this.box.scrollHeight - 4;
    const mark = document.createElement("span");
    mark.textContent = text;
    if (rest != null) {
      this.most = Math.max(this.most, rest);
      this.box.style.setProperty("--most", this.most);
      mark.className = "known";
      mark.style.setProperty("--expected", rest);
    }
    this.parts.set(mark, part);
    this.box.append(mark);
    if (atEnd) this.box.scrollTop = this.box.scrollHeight;
  }

  #choose(mark) {
    this.chosen?.classList.remove("chosen");
    const part = this.parts.get(mark);
    this.chosen = part ? mark : null;
    this.chosen?.classList.add("chosen");
    this.line.textContent = part ? describe(part, this.unit) : "";
    this.chose(part ?? null);
  }

  #move(event) {
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    const ends = { Home: this.box.firstElementChild, End: this.box.lastElementChild };
    const step = steps[event.key];
    const next = step === 1 ? this.chosen?.nextElementSibling : this.chosen?.previousElementSibling;
    const mark = ends[event.key] ?? (step && next);
    if (!(event.key in steps || event.key in ends)) return;
    event.preventDefault();
    if (!mark) return;
    this.#choose(mark);
    mark.scrollIntoView({ block: "nearest" });
  }
}

function describe({ text, tokens, amount, rest, pEnd }, unit) {
  const said = [`Token ${tokens} ${JSON.stringify(text)}`];
  if (unit.key !== "tokens") said.push(`${phrase(amount, unit)} so far`);
  if (rest != null) said.push(`${rest.toFixed(1)} expected behind it`);
  if (pEnd === null) said.push("no end allowed here");
  if (pEnd != null) said.push(`an end here: ${percent(pEnd)}`);
  return said.join(" · ");
}

function percent(share) {
  if (share > 0 && share < 0.0001) return "below 0.01 %";
  return `${(100 * share).toPrecision(share < 0.1 ? 2 : 3)} %`;
}
