// The last ten minutes from the server: all samples when the page loads, then new ones.

import { get } from "./api.js";
import { Chart } from "./charts.js";
import { byId } from "./format.js";

const KEPT = 300; // samples

const CHARTS = {
  tokens: ["/s", 1, (s) => ({ output: s.output / s.seconds, prompts: s.prompt / s.seconds })],
  ttft: [" ms", 1, (s) => ({ median: percentile(s.ttft, 0.5), "95%": percentile(s.ttft, 0.95) })],
  itl: [" ms", 1, (s) => ({ median: percentile(s.itl, 0.5), "99%": percentile(s.itl, 0.99) })],
  queue: [" sequences", 0, (s) => s.waiting],
  kv: ["%", 1, (s) => mapValues(s.kv, (share) => 100 * share)],
  balance: ["%", 1, (s) => mapValues(s.balancedness ?? {}, (share) => (share === null ? null : 100 * share))],
  moves: [" requests", 0, (s) => ({ "with KV": s.moved, recomputed: s.again })],
};

export class History {
  #samples = [];
  #charts;
  #frame = null;

  // marks: see ``Chart``.
  constructor(marks) {
    this.#charts = Object.entries(CHARTS).map(
      ([name, [unit, digits, values]]) => new Chart(byId(`chart-${name}`), unit, digits, values, marks),
    );
  }

  async refresh() {
    const after = this.#samples.at(-1)?.time ?? 0;
    const found = await get(`dashboard/api/history?after=${after}`);
    this.#samples = [...this.#samples, ...found.samples].slice(-KEPT);
    this.#show();
  }

  restyle() {
    for (const chart of this.#charts) chart.restyle();
    this.#show();
  }

  // Draws at most once per frame, and not in a hidden tab.
  #show() {
    this.#frame ??= requestAnimationFrame(() => {
      this.#frame = null;
      for (const chart of this.#charts) chart.show(this.#samples);
    });
  }
}

function mapValues(values, change) {
  return Object.fromEntries(Object.entries(values).map(([name, value]) => [name, change(value)]));
}

// Percentile in ms, linear within a bucket as in Prometheus' histogram_quantile; null if empty.
export function percentile(rows, share) {
  const total = rows.reduce((sum, [, , count]) => sum + count, 0);
  let below = 0;
  for (const [low, high, count] of rows) {
    if (below + count >= share * total) {
      return 1000 * (high === null ? low : low + ((high - low) * (share * total - below)) / count);
    }
    below += count;
  }
  return null;
}
