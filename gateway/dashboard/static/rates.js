// Rates and percentiles between two states of the server.

export class Rates {
  #before = null;

  // What happened since the last state: tokens a second, requests that went on at another worker with
  // their KV or were computed again there, and percentiles in ms (null: no sample).
  since(state) {
    const before = this.#before;
    this.#before = state;
    if (before === null || state.time <= before.time) return null;
    const seconds = state.time - before.time;
    const rate = (name) => Math.max(0, state.counters[name] - before.counters[name]) / seconds;
    const histogram = (name) => difference(state.histograms[name], before.histograms[name]);
    const replays = (causes) =>
      causes.reduce((sum, cause) => sum + Math.max(0, state.replayed[cause] - before.replayed[cause]), 0);
    const ttft = histogram("time_to_first_token_seconds");
    const itl = histogram("inter_token_latency_seconds");
    return {
      output: rate("generation_tokens_total"),
      prompt: rate("prompt_tokens_total"),
      moved: replays(["moved"]),
      again: replays(["attention_worker", "handed_back"]),
      ttft: [percentile(ttft, 0.5), percentile(ttft, 0.95)],
      itl: [percentile(itl, 0.5), percentile(itl, 0.99)],
    };
  }
}

function difference(now, before) {
  const old = new Map(before.map(([bound, value]) => [bound, value]));
  return now.map(([bound, value]) => [bound, Math.max(0, value - (old.get(bound) ?? 0))]);
}

// In ms, straight within a bucket, as Prometheus' histogram_quantile.
export function percentile(buckets, share) {
  const total = buckets.at(-1)?.[1] ?? 0;
  if (!total) return null;
  let low = 0;
  let below = 0;
  for (const [bound, value] of buckets) {
    if (value >= share * total) {
      if (bound === null) return 1000 * low;
      return 1000 * (low + ((bound - low) * (share * total - below)) / Math.max(value - below, 1e-9));
    }
    [low, below] = [bound, value];
  }
  return 1000 * low;
}
