// What a person wishes for: the form, its dials, and the length_target that they make.

import { UNITS, unitOf } from "./units.js";

const SHORTEST = 10; // of a dial; the number beside it takes any
const LONGEST = 1000;
const DEFAULT_TOLERANCE = "0.1"; // as on the server: nothing to say

// Ties each dial to its number, shows the fields of the mode, and calls back on every change.
export function bindForm(form, changed) {
  for (const dial of form.querySelectorAll(".dial")) bindDial(dial);
  fillUnits(form);
  form.addEventListener("input", () => {
    showFields(form);
    changed();
  });
  showFields(form);
}

// Bounds the dials, and answers that nothing else bounds, by what the model can write.
export function limitLengths(form, most) {
  form.elements.most.value = Math.min(form.elements.most.value, most);
  for (const range of form.querySelectorAll("[data-dial]:not([data-dial=beta]) [type=range]")) {
    range.max = Math.min(LONGEST, most);
    range.value = range.parentElement.querySelector("[type=number]").value;
  }
}

// {prompt, model, temperature, seed, most, stated, endings, unit, target}
export function wishOf(form) {
  const field = form.elements;
  const unit = unitOf(field.unit.value);
  return {
    prompt: field.prompt.value,
    model: field.model.value,
    temperature: field.temperature.valueAsNumber,
    seed: field.seed.valueAsNumber,
    most: field.most.valueAsNumber,
    stated: field.stated.checked,
    endings: field.endings.checked,
    unit,
    target: targetOf(field, unit.key),
  };
}

// The length that is wanted, {low, high}: null where there is no such bound.
export function aimOf({ target, unit }) {
  const n = target[unit.key] ?? null;
  const low = target[`min_${unit.key}`] ?? n;
  const high = target[`max_${unit.key}`] ?? n;
  return {
    low: target.mode === "at_most" ? null : low,
    high: target.mode === "at_least" ? null : high,
  };
}

function targetOf(field, unit) {
  const mode = field.mode.value;
  if (mode === "tilt") return { mode, beta: field.beta.valueAsNumber };
  if (mode === "range") {
    const [low, high] = [field.shortest.valueAsNumber, field.longest.valueAsNumber];
    return { mode, [`min_${unit}`]: low, [`max_${unit}`]: high };
  }
  const target = { [unit]: field.goal.valueAsNumber };
  if (mode !== "equal_to") return { mode, ...target };
  const tolerance = field.tolerance.value;
  return tolerance === DEFAULT_TOLERANCE ? target : { ...target, tolerance: JSON.parse(tolerance) };
}

function bindDial(dial) {
  const range = dial.querySelector("[type=range]");
  const number = dial.querySelector("[type=number]");
  range.value = number.value;
  range.addEventListener("input", () => (number.value = range.value));
  number.addEventListener("input", () => (range.value = number.value || SHORTEST));
}

function fillUnits(form) {
  for (const unit of UNITS) form.elements.unit.add(new Option(unit.name, unit.key));
  form.querySelector("#unit-field").hidden = UNITS.length < 2;
}

function showFields(form) {
  const mode = form.elements.mode.value;
  const { name } = unitOf(form.elements.unit.value);
  for (const unit of form.querySelectorAll(".unit")) unit.textContent = name;
  for (const field of form.querySelectorAll("[data-modes]")) {
    field.hidden = !field.dataset.modes.split(" ").includes(mode);
    for (const input of field.querySelectorAll("input, select")) input.disabled = field.hidden;
  }
}
