// What a person wishes for: the form, and the length_target that it makes.

import { Dials, bindDial } from "./dials.js";
import { UNITS, unitOf } from "./units.js";

const DEFAULT_TOLERANCE = "0.1"; // as on the server: nothing to say

// Ties the fields together, and calls back on every change. Gives a function that bounds them by
// the tokens that the model can write.
export function bindForm(form, changed) {
  for (const { key } of UNITS) form.elements.unit.add(new Option(key, key));
  const beta = form.querySelector("[data-dial=beta]");
  bindDial(...beta.querySelectorAll("input"));
  const dials = new Dials(form.querySelectorAll(".dial:not([data-dial=beta])"));
  form.addEventListener("input", () => {
    showFields(form);
    dials.measure(unitOf(form.elements.unit.value));
    changed();
  });
  showFields(form);
  return (tokens) => {
    form.elements.most.value = Math.min(form.elements.most.value, tokens);
    dials.limit(tokens);
  };
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

function showFields(form) {
  const mode = form.elements.mode.value;
  for (const field of form.querySelectorAll("[data-modes]")) {
    field.hidden = !field.dataset.modes.split(" ").includes(mode);
    for (const input of field.querySelectorAll("input, select")) input.disabled = field.hidden;
  }
}
