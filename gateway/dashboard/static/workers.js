// The workers as cards in a row; ended workers are separate, until the controller drops them.

import { byId, count, element, fill, percent } from "./format.js";

const KIND = { SERVING: "good", READY: "good", LOST: "bad", DRAINED: "over" };
const GONE = ["LOST", "DRAINED"];
const LARGE = 16; // workers above which most of them have no card
const FULLEST = 8;

export function showWorkers(status) {
  const workers = status.workers ?? [];
  const gone = workers.filter((worker) => GONE.includes(worker.state));
  const living = workers.filter((worker) => !gone.includes(worker));
  const cards = living.length > LARGE ? [...roles(living).map(summary), ...notable(living).map(card)] : living.map(card);
  fill(byId("workers"), cards);
  fill(byId("gone"), gone.map(card));
  byId("gone-part").hidden = !gone.length;
}

// [role, its workers] of each role.
function roles(workers) {
  const names = [...new Set(workers.map((worker) => worker.role))];
  return names.map((role) => [role, workers.filter((worker) => worker.role === role)]);
}

// All workers of a role in a large cluster.
function summary([role, workers]) {
  const serving = workers.filter((worker) => worker.state === "SERVING").length;
  const sum = (value) => count(workers.reduce((total, worker) => total + (value(worker) ?? 0), 0));
  const used = sum((worker) => worker.kv_blocks_total - worker.kv_blocks_free);
  const blocks = `${used} of ${sum((worker) => worker.kv_blocks_total)} KV blocks`;
  const [running, waiting] = ["running", "waiting"].map((kind) => sum((one) => one.stats?.[`num_requests_${kind}`]));
  return element(
    "li",
    { className: `worker ${serving === workers.length ? "good" : ""}`, "data-role": role },
    element("b", {}, `${workers.length} ${role} workers`),
    element("span", { className: "badge" }, `${serving} SERVING`),
    element("small", {}, role === "expert" ? role : `${blocks}, ${running} running, ${waiting} waiting`),
  );
}

// Workers of a large cluster that are not serving, then those with the fullest KV cache.
function notable(workers) {
  const isServing = (worker) => worker.state === "SERVING";
  const fullest = workers.filter((worker) => isServing(worker) && worker.kv_usage);
  fullest.sort((one, other) => other.kv_usage - one.kv_usage);
  return [...workers.filter((worker) => !isServing(worker)).slice(0, LARGE), ...fullest.slice(0, FULLEST)];
}

function card(worker) {
  const usage = worker.kv_blocks_total ? [meter(worker)] : [];
  return element(
    "li",
    { className: `worker ${KIND[worker.state] ?? ""}`, "data-worker": worker.name },
    element("b", {}, worker.name),
    element("span", { className: "badge" }, worker.state),
    ...details(worker).map((line) => element("small", {}, line)),
    ...usage,
  );
}

function meter(worker) {
  const used = worker.kv_blocks_total - worker.kv_blocks_free;
  const text = `KV ${percent(worker.kv_usage)} of ${count(worker.kv_blocks_total)} blocks`;
  const label = `KV blocks of ${worker.name} in use`;
  return element(
    "label",
    { className: "kv" },
    text,
    element("meter", { min: "0", max: String(worker.kv_blocks_total), value: String(used), "aria-label": label }),
  );
}

// A client's key shows no hosts and no processes.
function details(worker) {
  if (GONE.includes(worker.state)) return [worker.reason || worker.role];
  const stats = worker.stats ?? {};
  const place = [worker.node && `host ${worker.node}`, worker.pid && `pid ${worker.pid}`].filter(Boolean);
  const lines = place.length ? [place.join(" · ")] : [];
  const parts = [];
  if (worker.total_bytes && worker.loaded_bytes < worker.total_bytes) {
    parts.push(`loaded ${Math.floor((100 * worker.loaded_bytes) / worker.total_bytes)}%`);
  }
  if (worker.slots != null) parts.push(`${count(worker.slots)} expert slots a layer`);
  if (worker.kv_blocks_total) {
    parts.push(`${count(stats.num_requests_running ?? 0)} running, ${count(stats.num_requests_waiting ?? 0)} waiting`);
  }
  return [...lines, parts.join(" · ") || worker.role];
}
