// Buttons of the admin port.

import { get, post } from "./api.js";
import { byId, element } from "./format.js";

const POLL_MS = 500;

export function setUpOrders() {
  byId("rebalance-dry").addEventListener("click", () => order("admin/v1/rebalance", { dry_run: true }));
  byId("rebalance").addEventListener("click", () => {
    if (confirm("Move experts to where the load is?")) order("admin/v1/rebalance", {});
  });
  byId("drain-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const worker = byId("drain-worker").value;
    if (confirm(`Drain ${worker}? Another worker starts in its place.`)) order("admin/v1/drain", { worker });
  });
  byId("scale-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const [attention, expert] = ["attention", "expert"].map((role) => Number(byId(`scale-${role}`).value));
    if (confirm(`Scale to ${attention} attention and ${expert} expert workers?`)) {
      order("admin/v1/scale", { attention, expert });
    }
  });
}

// Workers that may be drained, and the numbers of today where nothing was typed.
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
}

async function order(path, body) {
  const result = byId("order-result");
  try {
    let operation = await post(path, body);
    while (operation.state === "RUNNING") {
      result.textContent = `${operation.id}: ${operation.phase}`;
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
      operation = await get(`admin/v1/operations/${operation.id}`);
    }
    result.textContent = `${operation.id} ${operation.state}: ${operation.message}`;
  } catch (error) {
    result.textContent = error.message;
  }
}
