// Main module: fetches the state every second and shows it.

import { get, KeyNeededError, setKey } from "./api.js";
import { eventMarks, showEvents } from "./events.js";
import { byId, count, duration, element, fill } from "./format.js";
import { Heatmap } from "./heatmap.js";
import { History } from "./history.js";
import { pageLinks } from "./links.js";
import { setUpOperations, showChoices } from "./operations.js";
import { Playground } from "./playground.js";
import { setUpTerms, term } from "./terms.js";
import { showWorkers } from "./workers.js";

const PERIOD_MS = 1000;
const HIDDEN_PERIOD_MS = 10000;
const HISTORY_EVERY = 2; // state updates
const LOAD_EVERY = 3;
const STATES = { SERVING: "good", STOPPED: "bad" };

const isAdmin = document.documentElement.dataset.port === "admin";
const heatmap = new Heatmap();
const playground = new Playground();
const history = new History(eventMarks);
let numStates = 0;

function show(state) {
  const { status } = state;
  showHead(state);
  showWorkers(status);
  showEvents(status.history ?? []);
  playground.allow(status.state);
  if (isAdmin) showChoices(status);
}

function showHead({ status, scheme, counters, time, started }) {
  const model = status.model ?? {};
  byId("model").textContent = model.name ?? "";
  const text = byId("state");
  text.textContent = status.state;
  text.className = `state ${STATES[status.state] ?? ""}`;
  const facts = [
    [term("uptime", "up"), duration(Math.max(0, time - started))],
    ["requests", count(counters.request_success_total)],
    ["prompt tokens", count(counters.prompt_tokens_total)],
    ["output tokens", count(counters.generation_tokens_total)],
    [term("generation", "generation"), status.generation],
    [term("epoch", "placement epoch"), status.placement_epoch],
    [term("mode", "mode"), status.mode],
    [term("dtype", "dtype"), model.dtype],
    ["gateways", (status.gateway ?? []).length],
  ];
  const shown = facts.filter(([name, value]) => value != null && !(name === "gateways" && value < 2));
  showFacts(shown);
  fill(byId("links"), pageLinks(status, scheme, isAdmin));
  const problems = [status.error, ...(status.problems ?? [])].filter(Boolean);
  fill(byId("problems"), problems.map((problem) => element("li", {}, problem)));
}

// Replaces only the values, so that a term keeps the focus and its tooltip.
function showFacts(facts) {
  const place = byId("facts");
  const names = facts.map(([name]) => name.textContent ?? name).join();
  if (place.dataset.names !== names) {
    place.dataset.names = names;
    place.replaceChildren(...facts.map(([name]) => element("div", {}, element("dt", {}, name), element("dd"))));
  }
  facts.forEach(([, value], number) => {
    const text = place.children[number].lastChild;
    if (text.textContent !== String(value)) text.textContent = value;
  });
}

// A client's key shows no expert load and no events: replaces empty panels by a note.
function showOperatorOnly(isOperator) {
  for (const part of document.querySelectorAll(".operator-only")) part.hidden = !isOperator;
  for (const part of document.querySelectorAll(".needs-admin-key")) part.hidden = isOperator;
  playground.seesPlacement = isOperator;
}

async function update() {
  const state = await get("dashboard/api/state");
  show(state);
  showOperatorOnly(state.sees_experts);
  if (numStates % HISTORY_EVERY === 0) await history.refresh();
  if (state.sees_experts && numStates % LOAD_EVERY === 0) {
    await heatmap.refresh().catch(() => {}); // no load yet, or the placement is changing
    playground.setNames(heatmap.workers);
  }
  numStates += 1;
  byId("main").classList.remove("loading"); // reveals all parts together, to avoid layout shifts
}

async function run() {
  for (;;) {
    try {
      await update();
      byId("key-form").hidden = true;
    } catch (error) {
      byId("state").textContent = error instanceof KeyNeededError ? "key needed" : "not reachable";
      byId("state").className = "state bad";
      if (error instanceof KeyNeededError) await askForKey(error.message);
    }
    const pause = document.hidden ? HIDDEN_PERIOD_MS : PERIOD_MS;
    await new Promise((resolve) => setTimeout(resolve, pause));
  }
}

function askForKey(message) {
  const form = byId("key-form");
  byId("key-problem").textContent = form.hidden ? "" : message;
  form.hidden = false;
  byId("key").focus();
  return new Promise((resolve) => {
    form.addEventListener(
      "submit",
      (event) => {
        event.preventDefault();
        setKey(byId("key").value.trim());
        byId("key").value = "";
        resolve();
      },
      { once: true },
    );
  });
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  history.restyle();
  heatmap.restyle();
});
setUpTerms();
if (isAdmin) setUpOperations();
run();
