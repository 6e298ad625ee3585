// Events of the cluster, as a table and as marks on the charts.

import { byId, clock, element, fill } from "./format.js";

const KINDS = [
  ["failure", /^(lost|.* failed|.* is gone|.*poison)/],
  ["rebalance", /^rebalance/],
  ["drain", /^(drain|.*is drained)/],
  ["scale", /^(scale|scaled|autoscaling)/],
];
const VARIABLES = { failure: "--bad", rebalance: "--accent", drain: "--warn", scale: "--good", other: "--dim" };
const SHOWN = 100;

let marks = [];
let shown = "";

export function kindOf(cause) {
  return KINDS.find(([, pattern]) => pattern.test(cause))?.[0] ?? "other";
}

export function showEvents(history) {
  const newest = history.slice(-SHOWN).reverse();
  const now = JSON.stringify(newest[0] ?? null) + newest.length;
  if (now === shown) return;
  shown = now;
  const rows = newest.map((event) =>
    element(
      "tr",
      {},
      element("td", {}, clock(event.time)),
      element("td", { className: "number" }, String(event.generation)),
      element("td", {}, element("span", { className: `mark ${kindOf(event.cause)}` }), ` ${event.cause}`),
      element("td", {}, event.effect),
    ),
  );
  fill(byId("events").tBodies[0], rows);
  marks = newest.map((event) => [event.time, VARIABLES[kindOf(event.cause)]]);
}

// [time, name of the colour's CSS variable] of each event.
export function eventMarks() {
  return marks;
}
