// Tooltips of technical terms on the page, shown by pointer, keyboard and touch.

import { element } from "./format.js";

const EDGE = 8; // px between a tooltip and the edge of the window

const TERMS = {
  ttft: "Time to first token (TTFT): from a request's arrival to its first token. It includes the queue and the prefill. Median: half of the requests of two seconds were faster; 95%: this share of them.",
  itl: "Inter-token latency (ITL): the time between two tokens of one output. Median: half of the times of two seconds are shorter; 99%: this share of them.",
  kv: "KV cache: keys and values of all earlier tokens of a sequence. An attention worker keeps them in blocks of fixed size; if no block is free, new requests wait. By attention worker (32 workers at most).",
  balancedness: "Mean load over the highest load of the expert workers: at 100% all have the same work. Predicted: by the planner for this placement. Achieved: measured.",
  phases: "Prefill computes all tokens of a prompt at once; decode then computes one token of each sequence in a step.",
  waiting: "Sequences that have no seat in the running batch yet, by attention worker (32 workers at most).",
  moves: "Requests that another attention worker continued, after a failure or a drain: with their KV blocks, or computed again from the prompt.",
  generation: "Number of the membership of the cluster: it grows whenever workers are lost, join or leave.",
  epoch: "Number of the placement of experts on workers: it grows with each rebalance and each recovery.",
  mode: "local: one worker does everything. disaggregated: attention workers and expert workers are separate processes.",
  expert: "A feed-forward network of a layer. A router sends each token to a few of the experts.",
  copies: "Busy experts have copies on several workers, which share their tokens.",
  uptime: "Time since the first gateway of this cluster started; the totals include restarts since then.",
  share: "Tokens of the expert, over the mean of all experts of the layer.",
  dtype: "Data type in which the model computes.",
  token: "A piece of text, often a part of a word, that the model reads and writes as one.",
  temperature: "0: always the token with the highest probability. Higher: chosen at random, the more evenly the higher.",
  workers: "Attention workers keep the sequences and their KV cache; expert workers compute the experts. A worker is DRAINED after its work has moved to other workers, and LOST if it fails.",
  layer: "The model's layers run in sequence; each bank of experts of a layer has a router of its own.",
  rebalance: "Moves copies of experts between workers, so that all have the same work. A dry run only shows the plan.",
  drain: "Moves the work of a worker to the others, then ends it; a new worker starts in its place.",
  scale: "Changes the number of workers while requests run.",
};

// place: identifies this use of the term, so that ids are unique.
export function term(name, text, place = "fact") {
  const id = `term-${name}-${place}`;
  const tip = element("span", { role: "tooltip", id }, TERMS[name]);
  return element("span", { className: "term", tabindex: "0", "aria-describedby": id }, text, tip);
}

// Adds a tooltip to every element with data-term.
export function setUpTerms() {
  [...document.querySelectorAll("[data-term]")].forEach((place, number) =>
    place.replaceChildren(term(place.dataset.term, place.textContent, number)),
  );
  const show = ({ target }) => {
    const word = target.closest?.(".term");
    word?.classList.remove("dismissed");
    if (word) put(word.lastChild, word.getBoundingClientRect());
  };
  document.addEventListener("pointerover", show);
  document.addEventListener("focusin", show);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    for (const word of document.querySelectorAll(".term:is(:hover, :focus)")) word.classList.add("dismissed");
  });
}

// Places a tooltip under its term, or above if it does not fit; fixed, so that it is not clipped.
function put(tip, word) {
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.max(EDGE, Math.min(word.left, document.documentElement.clientWidth - width - EDGE));
  const below = word.bottom + height + EDGE <= innerHeight;
  tip.style.left = `${left}px`;
  tip.style.top = `${below ? word.bottom : Math.max(EDGE, word.top - height)}px`;
}
