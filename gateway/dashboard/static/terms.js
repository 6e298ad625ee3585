// The field's words on the page, each with a tooltip: by pointer, by keyboard and by touch.

import { element } from "./format.js";

const EDGE = 8; // px between a tooltip and the edge of the window

const TERMS = {
  ttft: "Time to first token (TTFT): from a request's arrival to its first token. It includes the queue and the prefill. Median: half of the requests of two seconds were faster; 95%: this share of them.",
  itl: "Inter-token latency (ITL): the time between two tokens of one answer. Median: half of the times of two seconds are shorter; 99%: this share of them.",
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
  uptime: "Since the first gateway of this cluster started; the totals count from there, through restarts.",
  share: "Tokens of the expert, over the mean of all experts of the layer.",
  dtype: "Type of the numbers that the model is computed in.",
  token: "A piece of text, often a part of a word, that the model reads and writes as one.",
  temperature: "0: always the token with the highest probability. Higher: chosen at random, the more evenly the higher.",
  workers: "Attention workers keep the sequences and their KV cache; expert workers compute the experts. A worker is DRAINED once its work has moved elsewhere, and LOST if it fails.",
  layer: "The model's layers come one after another; each bank of experts of a layer has a router of its own.",
  rebalance: "Moves copies of experts between workers, so that all have the same work. A dry run shows the plan alone.",
  drain: "Moves the work of a worker to the others, then ends it; a new worker starts in its place.",
  scale: "Changes the number of workers while requests run.",
};

// place: of this use of the word, so that ids are unique.
export function term(name, text, place = "fact") {
  const id = `term-${name}-${place}`;
  const tip = element("span", { role: "tooltip", id }, TERMS[name]);
  return element("span", { className: "term", tabindex: "0", "aria-describedby": id }, text, tip);
}

// Gives every element with data-term its tooltip.
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

// Puts a tooltip under its word, or above where there is no room; it is fixed, so that nothing cuts it off.
function put(tip, word) {
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.max(EDGE, Math.min(word.left, document.documentElement.clientWidth - width - EDGE));
  const below = word.bottom + height + EDGE <= innerHeight;
  tip.style.left = `${left}px`;
  tip.style.top = `${below ? word.bottom : Math.max(EDGE, word.top - height)}px`;
}
