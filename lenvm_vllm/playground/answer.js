// One of the two answers as it comes: its count against what was asked for, the expected rest as
// a bar, the text, and how it ended.

import { TokenText } from "./tokens.js";

const KINDS = {
  natural: "natural end",
  whole: "whole: behind a sentence",
  cut: "cut: within a sentence",
};
// Ends that no target had a part in.
const REASONS = { stop: "its own end", length: "stopped at the limit of this page" };

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
    this.text = new TokenText(this.box, find("token"), chose);
    this.wait({ low: null, high: null }, { first: 1, last: null });
  }

  // A new answer is awaited. aim: {low, high}, rails: {first, last}.
  wait(aim, rails) {
    Object.assign(this, { aim, rails, tokens: 0, rest: null, first: null, since: null });
    this.text.clear();
    this.section.dataset.end = "";
    this.error.hidden = true;
    for (const part of [this.verdict, this.time, this.badge, this.account]) part.textContent = "";
    this.goal.textContent = goalOf(aim);
    this.draw(1);
  }

  begin() {
    this.since = performance.now();
    this.box.setAttribute("aria-busy", "true");
  }

  add(part) {
    this.tokens = part.result?.tokens ?? part.tokens ?? this.tokens;
    if (part.finish) this.rest = 0;
    else if (part.expected !== undefined) this.rest = part.expected;
    this.first ??= part.expected;
    this.text.add(part, this.aim.high ?? this.aim.low ?? this.first);
    if (part.finish) this.#end(part);
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

  // Tokens that it has, or will have as far as anybody knows.
  get reach() {
    return this.tokens + (this.rest ?? 0);
  }

  // most: tokens at the end of the bar.
  draw(most) {
    const share = (tokens) => `${Math.min(100, (100 * tokens) / most)}%`;
    const { low, high } = this.aim;
    const mark = high ?? low;
    const set = (name, value) => this.bar.style.setProperty(name, value);
    set("--done", share(this.tokens));
    set("--rest", share(this.rest ?? 0));
    set("--mark", share(mark ?? 0));
    set("--first", share(this.rails.first - 1));
    set("--last", share(this.rails.last ?? (this.rails.first > 1 ? most : 0)));
    this.bar.classList.toggle("aimed", mark !== null);
    this.bar.setAttribute("aria-valuemax", Math.round(most));
    this.bar.setAttribute("aria-valuenow", this.tokens);
    this.bar.setAttribute("aria-valuetext", this.said);
    this.count.textContent = this.tokens;
    if (this.since !== null) this.#tell();
  }

  // In words.
  get said() {
    const rest = this.rest ? `, ${Math.round(this.rest)} expected still` : "";
    return `${this.name}: ${this.tokens} tokens${rest}. ${this.badge.textContent}`;
  }

  #tell() {
    const seconds = (performance.now() - this.since) / 1000;
    this.time.textContent = `${seconds.toFixed(1)} s`;
  }

  #end({ finish, result }) {
    const kind = result ? (result.end ?? "unknown") : finish;
    this.section.dataset.end = result?.forced ? "forced" : kind;
    const said = result ? (KINDS[kind] ?? "end not known") : (REASONS[finish] ?? finish);
    this.badge.textContent = said + (result?.forced ? ", forced by the target" : "");
    const { text, good } = verdictOf(this.tokens, this.aim);
    this.verdict.textContent = text;
    this.verdict.classList.toggle("good", good);
    this.account.textContent = result ? accountOf(result) : "";
  }
}

function goalOf({ low, high }) {
  if (low === null && high === null) return "tokens";
  if (low === high) return `of ${high} tokens`;
  if (low === null) return `of at most ${high} tokens`;
  if (high === null) return `of at least ${low} tokens`;
  return `of ${low} to ${high} tokens`;
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
  if (result.predicted_tokens !== null) said.push(`${result.predicted_tokens} forecast`);
  return said.join(" · ");
}
