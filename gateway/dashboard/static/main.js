// The page: asks for the state every second, and shows it.

import { get, KeyNeededError, setKey } from "./api.js";
import { Chart } from "./charts.js";
import { eventMarks, showEvents } from "./events.js";
import { byId, element, fill } from "./format.js";
import { Heatmap } from "./heatmap.js";
import { setUpOrders, showChoices } from "./orders.js";
import { Playground } from "./playground.js";
import { Rates } from "./rates.js";
import { showWorkers } from "./workers.js";

const PERIOD_MS = 1000;
const HIDDEN_PERIOD_MS = 10000;
const LOAD_EVERY = 3; // states
const STATES = { SERVING: "good", STOPPED: "bad" };

const isAdmin = document.documentElement.dataset.port === "admin";
const rates = new Rates();
const heatmap = new Heatmap();
const playground = new Playground();
const charts = Object.fromEntries(
  [["tokens", ""], ["ttft", " ms"], ["itl", " ms"], ["queue", ""], ["kv", "%"], ["balance", "%"], ["moves", ""]].map(
    ([name, unit]) => [name, new Chart(byId(`chart-${name}`), unit, eventMarks)],
  ),
);
let numStates = 0;

function show(state) {
  const { status } = state;
  showHead(status);
  showWorkers(status);
  showEvents(status.history ?? []);
  if (isAdmin) showChoices(status);
  const found = rates.since(state);
  if (found !== null) {
    charts.tokens.add(state.time, { output: found.output, prompts: found.prompt });
    charts.ttft.add(state.time, { median: found.ttft[0], "95%": found.ttft[1] });
    charts.itl.add(state.time, { median: found.itl[0], "99%": found.itl[1] });
  }
  charts.moves.add(state.time, { "with their KV": found?.moved ?? 0, "computed again": found?.again ?? 0 });
  const attention = (status.workers ?? []).filter((w) => w.kv_blocks_total && w.state !== "LOST");
  const each = (value) => Object.fromEntries(attention.map((w) => [w.name, value(w)]));
  charts.queue.add(state.time, each((w) => w.stats?.num_requests_waiting ?? 0));
  charts.kv.add(state.time, each((w) => 100 * (w.kv_usage ?? 0)));
  const both = heatmap.balancedness;
  const share = (value) => (value === null || value === undefined ? null : 100 * value);
  charts.balance.add(state.time, { achieved: share(both.achieved), predicted: share(both.predicted) });
}

function showHead(status) {
  const model = status.model ?? {};
  byId("model").textContent = model.name ?? "";
  const text = byId("state");
  text.textContent = status.state;
  text.className = `state ${STATES[status.state] ?? ""}`;
  const facts = [
    ["generation", status.generation],
    ["placement epoch", status.placement_epoch],
    ["mode", status.mode],
    ["type", model.dtype],
    ["gateways", (status.gateway ?? []).length],
  ];
  const shown = facts.filter(([, value]) => value !== null && value !== undefined);
  fill(
    byId("facts"),
    shown.map(([name, value]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, String(value))),
    ),
  );
  const problems = [status.error, ...(status.problems ?? [])].filter(Boolean);
  fill(byId("problems"), problems.map((problem) => element("li", {}, problem)));
}

// A client's key shows nothing by expert, and no events: say so in place of empty panels.
function showOperatorOnly(isOperator) {
  for (const part of document.querySelectorAll(".operator-only")) part.hidden = !isOperator;
  for (const part of document.querySelectorAll(".needs-admin-key")) part.hidden = isOperator;
  playground.seesPlacement = isOperator;
}

async function update() {
  const state = await get("dashboard/api/state");
  show(state);
  showOperatorOnly(state.sees_experts);
  if (state.sees_experts && numStates++ % LOAD_EVERY === 0) {
    await heatmap.refresh().catch(() => {}); // none yet, or the placement changes
    playground.setNames(heatmap.workers);
  }
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
        setKey(byId("key").value);
        byId("key").value = "";
        resolve();
      },
      { once: true },
    );
  });
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const chart of Object.values(charts)) chart.restyle();
  heatmap.restyle();
});
if (isAdmin) setUpOrders();
run();
