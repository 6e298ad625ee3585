// The cluster map: hosts, with the workers on them.

import { byId, count, element, fill } from "./format.js";

const KIND = { SERVING: "good", READY: "good", LOST: "bad", DRAINED: "over" };

export function showWorkers(status) {
  const hosts = new Map();
  for (const worker of status.workers ?? []) {
    if (!hosts.has(worker.node)) hosts.set(worker.node, []);
    hosts.get(worker.node).push(worker);
  }
  fill(
    byId("workers"),
    [...hosts].map(([host, workers]) =>
      element(
        "div",
        { className: "node" },
        ...(host === undefined ? [] : [element("h3", {}, `host ${host}`)]), // a client's key shows no hosts
        ...workers.map(card),
      ),
    ),
  );
}

function card(worker) {
  const kind = KIND[worker.state] ?? "";
  return element(
    "div",
    { className: `worker ${kind}`, "data-worker": worker.name },
    element("b", {}, worker.name),
    ` ${worker.state}`,
    element("small", {}, details(worker)),
  );
}

function details(worker) {
  if (worker.state === "LOST" || worker.state === "DRAINED") return worker.reason || worker.role;
  const stats = worker.stats ?? {};
  const parts = worker.pid === undefined ? [worker.role] : [`process ${worker.pid}`];
  if (worker.total_bytes && worker.loaded_bytes < worker.total_bytes) {
    parts.push(`loaded ${Math.floor((100 * worker.loaded_bytes) / worker.total_bytes)}%`);
  }
  if (worker.slots != null) parts.push(`${count(worker.slots)} expert slots`);
  if (worker.kv_blocks_total) {
    parts.push(`${count(stats.num_requests_running ?? 0)} run, ${count(stats.num_requests_waiting ?? 0)} wait`);
    parts.push(`${count(worker.kv_blocks_free)} of ${count(worker.kv_blocks_total)} KV blocks free`);
  }
  return parts.join(" · ");
}
