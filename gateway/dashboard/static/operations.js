// Buttons of the admin port.

import { get, post } from "./api.js";
import { allow, byId, element } from "./format.js";

const POLL_MS = 500;

let running = ""; // id of the operation that this page started
let latest = {};

export function setUpOperations() {
  byId("rebalance-dry").addEventListener("click", () => startOperation("admin/v1/rebalance", { dry_run: true }));
  byId("rebalance").addEventListener("click", () => {
    if (confirm("Rebalance the experts according to their load?")) startOperation("admin/v1/rebalance", {});
  });
  byId("scale-form").addEventListener("input", () => updateButtons(latest));
  byId("drain-worker").addEventListener("change", () => updateButtons(latest));
  byId("drain-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const worker = byId("drain-worker").value;
    if (confirm(`Drain ${worker}? Another worker starts in its place.`)) startOperation("admin/v1/drain", { worker });
  });
  byId("scale-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const [attention, expert] = ["attention", "expert"].map((role) => Number(byId(`scale-${role}`).value));
    if (confirm(`Scale to ${attention} attention and ${expert} expert workers?`)) {
      startOperation("admin/v1/scale", { attention, expert });
    }
  });
}

// Lists the workers that may be drained, and fills empty inputs with the present pool sizes.
export function showChoices(status) {
  const serving = (status.workers ?? []).filter((w) => w.state === "SERVING");
  const select = byId("drain-worker");
  const names = serving.map((w) => w.name);
  if ([...select.options].map((o) => o.value).join() !== names.join()) {
    select.replaceChildren(...names.map((name) => element("option", { value: name }, name)));
  }
  for (const role of ["attention", "expert"]) {
    const input = byId(`scale-${role}`);
    if (!input.value) input.value = String(serving.filter((w) => w.role === role).length || "");
  }
  updateButtons(status);
}

// Disables buttons of operations that the controller would reject, and shows the reason.
function updateButtons(status) {
  latest = status;
  const workers = status.workers ?? [];
  const num = (role) => workers.filter((w) => w.role === role && w.state === "SERVING").length;
  const busy = running && `${running} is running`;
  const starting = ["SERVING", "RECOVERING", "DEGRADED"].includes(status.state) ? "" : `the cluster is ${status.state}`;
  const local = status.mode === "local" ? "one worker holds everything (--mode local)" : "";
  const rebalance = busy || starting || (status.rebalance?.possible === false ? status.rebalance.reason : "");
  allow(byId("rebalance-dry"), rebalance);
  allow(byId("rebalance"), rebalance);
  const chosen = workers.find((w) => w.name === byId("drain-worker").value);
  const last = chosen?.role === "attention" && num("attention") < 2 ? "it is the last attention worker" : "";
  allow(byId("drain"), busy || starting || local || (chosen ? last : "no worker is serving"));
  const same = ["attention", "expert"].every((role) => Number(byId(`scale-${role}`).value) === num(role));
  allow(byId("scale"), busy || starting || local || (same ? "the cluster has this size: change a number" : ""));
}

async function startOperation(path, body) {
  const result = byId("operation-result");
  try {
    let operation = await post(path, body);
    running = operation.id;
    while (operation.state === "RUNNING") {
      result.textContent = `${operation.id}: ${operation.phase}`;
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
      operation = await get(`admin/v1/operations/${operation.id}`);
    }
    result.textContent = `${operation.id} ${operation.state}: ${operation.message}`;
  } catch (error) {
    result.textContent = error.message;
  } finally {
    running = "";
    updateButtons(latest);
  }
}
