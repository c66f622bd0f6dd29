// The dials of lengths: a slider each, and a number beside it that takes any, in a unit.

import { UNITS, convert, phrase } from "./units.js";

export class Dials {
  // boxes: of a dial each; their numbers are in the first unit.
  constructor(boxes) {
    this.unit = UNITS[0];
    this.most = Infinity;
    this.dials = [...boxes].map((box) => {
      const [range, number] = box.querySelectorAll("input");
      const dial = { range, number, name: box.querySelector(".unit") };
      bindDial(range, number);
      for (const input of [range, number]) input.addEventListener("input", () => this.#said(dial));
      this.#said(dial);
      return dial;
    });
    this.#show();
  }

  // most: tokens that a text can have.
  limit(most) {
    this.most = most;
    this.#show();
  }

  // About the same lengths, in another unit. From one to the next and back they are the same.
  measure(unit) {
    if (unit === this.unit) return;
    this.unit = unit;
    for (const { number, said } of this.dials) {
      if (said.amount) number.value = convert(said.amount, said.unit, unit);
    }
    this.#show();
  }

  // What a person chose.
  #said(dial) {
    dial.said = { amount: dial.number.valueAsNumber, unit: this.unit };
    this.#tell(dial);
  }

  #show() {
    const { dial: ends, tokens, key } = this.unit;
    const max = Math.min(ends.max, Math.floor(this.most / tokens));
    for (const dial of this.dials) {
      Object.assign(dial.range, { ...ends, max });
      dial.range.value = dial.number.value;
      dial.name.textContent = key;
      this.#tell(dial);
    }
  }

  // A slider has steps, and its number may be between them.
  #tell({ range, number }) {
    const amount = number.valueAsNumber || range.valueAsNumber;
    range.setAttribute("aria-valuetext", phrase(amount, this.unit));
  }
}

export function bindDial(range, number) {
  range.value = number.value;
  range.addEventListener("input", () => (number.value = range.value));
  number.addEventListener("input", () => (range.value = number.value || range.min));
}
