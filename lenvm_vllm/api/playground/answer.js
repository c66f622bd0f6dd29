// One of the two answers as it comes: its count against what was asked for, the expected rest as
// a bar, the text, and how it ended.

import { TokenText } from "./tokens.js";
import { UNITS, expectedOf, phrase } from "./units.js";

const KINDS = {
  natural: "natural end",
  whole: "whole: behind a sentence",
  cut: "cut: within a sentence",
};
// Ends that no target had a part in.
const REASONS = { stop: "its own end", length: "stopped by the limit of the form" };

export class AnswerPanel {
  // chose(part or null): of the text, by the pointer or the keyboard.
  constructor(section, chose) {
    section.append(document.getElementById("answer").content.cloneNode(true));
    this.section = section;
    this.name = section.querySelector("h2").textContent;
    const find = (name) => section.querySelector(`.${name}`);
    for (const part of ["count", "goal", "verdict", "time", "bar", "error", "badge", "account"]) {
      this[part] = find(part);
    }
    this.box = find("text");
    this.box.setAttribute("aria-label", `${this.name} text; arrow keys go through its tokens`);
    this.bar.setAttribute("aria-label", `${this.name} length`);
    this.marks = new TokenText(this.box, find("token"), chose);
    this.wait({ low: null, high: null }, { first: 1, last: null }, UNITS[0]);
  }

  // A new answer is awaited. aim: {low, high}, rails: {first, last}, both in the unit.
  wait(aim, rails, unit) {
    Object.assign(this, { aim, rails, unit, amount: 0, rest: null, since: null, isFresh: true });
    this.counter = unit.counter();
    this.marks.clear(unit, aim.high ?? aim.low ?? 0);
    this.section.dataset.end = "";
    this.error.hidden = true;
    for (const part of [this.verdict, this.time, this.badge, this.account]) part.textContent = "";
    this.goal.textContent = goalOf(aim, unit);
    this.draw(1);
  }

  begin() {
    this.since = performance.now();
    this.isFresh = false;
    this.box.setAttribute("aria-busy", "true");
  }

  // The server's own count, where it tells one, is the count.
  add({ text, answer, whole, told, finish, result }) {
    const counted = this.counter(answer);
    this.amount = told[this.unit.key] ?? counted ?? this.amount;
    const rest = expectedOf(told, this.unit, this.amount);
    if (finish) this.rest = 0;
    else if (rest !== undefined) this.rest = rest;
    const { tokens, p_end: pEnd } = told;
    this.marks.add({ text, whole, tokens, amount: this.amount, rest, pEnd });
    if (finish) this.#end(finish, result);
  }

  fail(message) {
    this.error.textContent = message;
    this.error.hidden = false;
    this.stop();
  }

  // It goes on no more, for whatever reason.
  stop(why = "") {
    if (this.since === null) return;
    this.#tell();
    this.since = null;
    this.rest = 0;
    this.box.removeAttribute("aria-busy");
    if (why && !this.section.dataset.end) this.badge.textContent = why;
  }

  // What it has, or will have as far as anybody knows.
  get reach() {
    return this.amount + (this.rest ?? 0);
  }

  // most: at the end of the bar.
  draw(most) {
    const share = (amount) => `${Math.min(100, (100 * amount) / most)}%`;
    const { low, high } = this.aim;
    const mark = high ?? low;
    const set = (name, value) => this.bar.style.setProperty(name, value);
    set("--done", share(this.amount));
    set("--rest", share(this.rest ?? 0));
    set("--mark", share(mark ?? 0));
    const { first, last } = this.rails;
    set("--first", share(first > 1 ? first : 0));
    set("--last", share(last ?? (first > 1 ? most : 0)));
    this.bar.classList.toggle("aimed", mark !== null);
    this.bar.setAttribute("aria-valuemax", Math.round(most));
    this.bar.setAttribute("aria-valuenow", this.amount);
    this.bar.setAttribute("aria-valuetext", this.said);
    this.count.textContent = this.amount;
    if (this.since !== null) this.#tell();
  }

  // In words.
  get said() {
    const rest = this.rest ? `, ${Math.round(this.rest)} expected still` : "";
    return `${this.name}: ${phrase(this.amount, this.unit)}${rest}. ${this.badge.textContent}`;
  }

  #tell() {
    const seconds = (performance.now() - this.since) / 1000;
    this.time.textContent = `${seconds.toFixed(1)} s`;
  }

  #end(finish, result) {
    const kind = result ? (result.end ?? "unknown") : finish;
    this.section.dataset.end = result?.forced ? "forced" : kind;
    const said = result ? (KINDS[kind] ?? "end not known") : (REASONS[finish] ?? finish);
    this.badge.textContent = said + (result?.forced ? ", forced by the target" : "");
    const { text, good } = verdictOf(this.amount, this.aim);
    this.verdict.textContent = text;
    this.verdict.classList.toggle("good", good);
    this.account.textContent = result ? accountOf(result) : "";
  }
}

function goalOf({ low, high }, unit) {
  if (low === null && high === null) return unit.key;
  if (low === high) return `of ${phrase(high, unit)}`;
  if (low === null) return `of at most ${phrase(high, unit)}`;
  if (high === null) return `of at least ${phrase(low, unit)}`;
  return `of ${low} to ${phrase(high, unit)}`;
}

// What the count says of the aim.
function verdictOf(count, { low, high }) {
  if (low === null && high === null) return { text: "", good: true };
  const by = high !== null && count > high ? count - high : low !== null ? Math.min(0, count - low) : 0;
  if (by === 0) return { text: low === high ? "exact" : "as asked", good: true };
  const share = Math.round((100 * Math.abs(by)) / (by > 0 ? high : low));
  return { text: `${Math.abs(by)} too ${by > 0 ? "many" : "few"} (${share} %)`, good: share <= 10 };
}

function accountOf(result) {
  const said = [];
  if (result.steps !== null) said.push(`${result.steered_steps} of ${result.steps} steps steered`);
  said.push(result.endings === 1 ? "1 ending" : `${result.endings} endings`);
  said.push(`${result.sampled_tokens} tokens sampled`);
  if (result.predicted_tokens !== null) said.push(`${result.predicted_tokens} tokens forecast`);
  return said.join(" · ");
}
