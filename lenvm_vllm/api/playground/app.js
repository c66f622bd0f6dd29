// The page: a wish goes out as two requests, and their answers stream side by side.

import { AnswerPanel } from "./answer.js";
import * as api from "./api.js";
import { Chart } from "./chart.js";
import { bindCopies } from "./copy.js";
import { aimOf, bindForm, wishOf } from "./form.js";
import * as requests from "./request.js";
import { phrase } from "./units.js";

const PAUSE_MS = 150; // between the last change of the form and the question where its rails are
const MARGIN = 1.1; // of the bars, beyond what they show
const NO_RAILS = { first: 1, last: null, landing: null };

const find = (id) => document.getElementById(id);
const form = find("wish");
const chart = new Chart(find("chart"));
const guided = new AnswerPanel(find("guided"), (part) => chart.choose(part?.amount ?? null));
const unguided = new AnswerPanel(find("unguided"));
const panels = [guided, unguided];
const limitLengths = bindForm(form, changed);

const state = {
  rails: NO_RAILS,
  asked: null, // the latest question where the rails are, to give up
  running: null, // the answers that are being written, to stop
  timer: 0,
  isDue: false, // a drawing is
};

const key = () => find("key").value.trim(); // in memory only, and nowhere else

async function loadModels() {
  const notice = find("notice");
  notice.hidden = true;
  try {
    const models = await api.models(key());
    form.elements.model.replaceChildren(...models.map(({ id }) => new Option(id, id)));
    const longest = Math.min(...models.map((model) => model.max_model_len ?? Infinity));
    limitLengths(Math.floor(longest / 2));
  } catch (error) {
    const isLocked = error.status === 401;
    if (isLocked) find("key-field").hidden = false;
    notice.textContent = isLocked ? "This server asks for its API key." : wordsOf(error);
    notice.hidden = false;
  }
  showRequests();
}

function showRequests() {
  const wish = wishOf(form);
  find("curl").textContent = requests.asCurl(wish, api.BASE, Boolean(key()));
  find("python").textContent = requests.asPython(wish, api.BASE, Boolean(key()));
}

function changed() {
  showRequests();
  clearTimeout(state.timer);
  state.timer = setTimeout(showRails, PAUSE_MS);
}

// Where the guided text may end, or what is wrong with the wish, in the server's words.
async function showRails() {
  clearTimeout(state.timer);
  state.asked?.abort();
  const asked = (state.asked = new AbortController());
  const wish = wishOf(form);
  const line = find("bounds");
  try {
    state.rails = await api.railsOf(wish.target, asked.signal);
    line.textContent = boundsOf(state.rails, wish);
  } catch (error) {
    if (asked.signal.aborted) return;
    state.rails = NO_RAILS;
    line.textContent = wordsOf(error);
  }
  line.classList.toggle("error", state.rails === NO_RAILS);
  if (state.running || state.rails === NO_RAILS) return;
  if (chart.end !== null) chart.clear();
  const aim = aimOf(wish);
  chart.plan(aim, state.rails, wish.unit);
  for (const panel of panels) if (panel.isFresh) panel.wait(aim, railsFor(panel), wish.unit);
  draw();
}

// Only the guided answer has any.
function railsFor(panel) {
  return panel === guided ? state.rails : NO_RAILS;
}


function boundsOf({ first, last, landing }, { target: { mode, beta }, unit }) {
  if (mode === "tilt") {
    return beta < 0 ? "Shorter answers." : beta > 0 ? "Longer answers." : "Changes nothing.";
  }
  const ends =
    first > 1 && first === last ? `at ${phrase(last, unit)}`
    : first > 1 && last !== null ? `from ${first} to ${phrase(last, unit)}`
    : first > 1 ? `from ${phrase(first, unit)} on`
    : last !== null ? `up to ${phrase(last, unit)}`
    : "anywhere";
  const aimed = landing ? `; brought about from ${Math.max(1, Math.round(landing[0]))} on` : "";
  return `An end is allowed ${ends}${aimed}.`;
}

async function run() {
  state.running?.abort();
  const running = (state.running = new AbortController());
  find("stop").disabled = false;
  await showRails();
  const wish = wishOf(form);
  const aim = aimOf(wish);
  chart.clear();
  chart.plan(aim, state.rails, wish.unit);
  for (const panel of panels) panel.wait(aim, railsFor(panel), wish.unit);
  find("said").textContent = "Both answers are being written.";
  await Promise.all([
    follow(guided, requests.guided(wish, state.rails), running.signal),
    follow(unguided, requests.unguided(wish), running.signal),
  ]);
  if (state.running !== running) return;
  draw();
  state.running = null;
  find("stop").disabled = true;
  find("said").textContent = panels.map((panel) => panel.said).join(" ");
}

async function follow(panel, request, signal) {
  panel.begin();
  try {
    for await (const part of api.answer(request, key(), signal)) {
      panel.add(part);
      if (panel === guided) {
        if (part.finish) chart.finish(panel.amount);
        else if (part.told.expected != null) chart.add(panel.amount, panel.rest);
      }
      drawSoon();
    }
    panel.stop();
  } catch (error) {
    if (signal.aborted) panel.stop("stopped");
    else panel.fail(wordsOf(error));
  }
}

// Once a frame at most.
function drawSoon() {
  if (state.isDue) return;
  state.isDue = true;
  requestAnimationFrame(draw);
}

// Both bars to the same scale.
function draw() {
  state.isDue = false;
  const { aim, rails } = guided;
  const wanted = Math.max(rails.last ?? 0, aim.high ?? 0, aim.low ?? 0);
  const most = MARGIN * Math.max(1, wanted, ...panels.map((panel) => panel.reach));
  for (const panel of panels) panel.draw(most);
  chart.draw();
}

function wordsOf(error) {
  return error instanceof api.Refused ? error.message : `The server does not answer (${error.message}).`;
}

bindCopies();
find("key").addEventListener("change", loadModels);
find("key").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault(); // it would ask before it knows the model
  loadModels();
});
find("stop").addEventListener("click", () => state.running?.abort());
find("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
form.addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
loadModels();
showRails();
