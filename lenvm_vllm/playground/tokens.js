// The text of an answer, a mark for each of its parts, coloured by the tokens that were expected
// behind it. Pointer and arrow keys choose one, and a line tells of it.

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
  clear(most = 0) {
    this.most = most;
    this.box.replaceChildren();
    this.line.textContent = "";
    this.parts = new Map(); // of each mark
    this.chosen = null;
  }

  // part: {text, tokens, expected, pEnd}. rest: expected behind it; null: not known. at: length of
  // the text with this part. Both are in the unit.
  add(part, rest, at) {
    if (!part.text) return;
    if (part.tokens === undefined) return this.box.append(part.text); // a whole answer
    const atEnd = this.box.scrollTop + this.box.clientHeight >= this.box.scrollHeight - 4;
    const mark = document.createElement("span");
    mark.textContent = part.text;
    if (rest !== null) {
      this.most = Math.max(this.most, rest);
      this.box.style.setProperty("--most", this.most);
      mark.className = "known";
      mark.style.setProperty("--expected", rest);
    }
    this.parts.set(mark, { ...part, at });
    this.box.append(mark);
    if (atEnd) this.box.scrollTop = this.box.scrollHeight;
  }

  #choose(mark) {
    this.chosen?.classList.remove("chosen");
    const part = this.parts.get(mark);
    this.chosen = part ? mark : null;
    this.chosen?.classList.add("chosen");
    this.line.textContent = part ? describe(part) : "";
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

function describe({ text, tokens, expected, pEnd }) {
  const said = [`Token ${tokens} ${JSON.stringify(text)}`];
  if (expected != null) said.push(`${expected.toFixed(1)} expected behind it`);
  if (pEnd === null) said.push("no end allowed here");
  if (pEnd != null) said.push(`an end here: ${percent(pEnd)}`);
  return said.join(" · ");
}

function percent(share) {
  if (share > 0 && share < 0.0001) return "below 0.01 %";
  return `${(100 * share).toPrecision(share < 0.1 ? 2 : 3)} %`;
}
