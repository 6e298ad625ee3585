// The workers as cards in a row; ended workers are separate, until the controller drops them.

import { byId, count, element, fill, percent } from "./format.js";

const KIND = { SERVING: "good", READY: "good", LOST: "bad", DRAINED: "over" };
const GONE = ["LOST", "DRAINED"];

export function showWorkers(status) {
  const workers = status.workers ?? [];
  const gone = workers.filter((worker) => GONE.includes(worker.state));
  fill(byId("workers"), workers.filter((worker) => !gone.includes(worker)).map(card));
  fill(byId("gone"), gone.map(card));
  byId("gone-part").hidden = !gone.length;
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
