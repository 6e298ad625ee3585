// The field's words on the page, each with a tooltip: by pointer, by keyboard and by touch.

import { element } from "./format.js";

const TERMS = {
  ttft: "Time to first token (TTFT): from a request's arrival to its first token. It includes the queue and the prefill.",
  itl: "Inter-token latency (ITL): the time between two tokens of one answer.",
  kv: "KV cache: keys and values of all earlier tokens of a sequence. An attention worker keeps them in blocks of fixed size; if no block is free, new requests wait.",
  balancedness: "Mean load over the highest load of the expert workers: at 100% all have the same work. Predicted: by the planner for this placement. Achieved: measured.",
  phases: "Prefill computes all tokens of a prompt at once; decode then computes one token of each sequence in a step.",
  waiting: "Sequences that have no seat in the running batch yet, by attention worker.",
  moves: "Requests that another attention worker continued, after a failure or a drain: with their KV blocks, or computed again from the prompt.",
  generation: "Number of the membership of the cluster: it grows whenever workers are lost, join or leave.",
  epoch: "Number of the placement of experts on workers: it grows with each rebalance and each recovery.",
  mode: "local: one worker does everything. disaggregated: attention workers and expert workers are separate processes.",
  expert: "A feed-forward network of a layer. A router sends each token to a few of the experts.",
  copies: "Busy experts have copies on several workers, which share their tokens.",
  uptime: "Since the first gateway of this cluster started; the totals count from there, through restarts.",
  share: "Tokens of the expert, over the mean of all experts of the layer.",
};

export function term(name, text) {
  const id = `term-${name}`;
  const tip = element("span", { role: "tooltip", id }, TERMS[name]);
  return element("span", { className: "term", tabindex: "0", "aria-describedby": id }, text, tip);
}

// Gives every element with data-term its tooltip.
export function setUpTerms() {
  for (const place of document.querySelectorAll("[data-term]")) {
    place.replaceChildren(term(place.dataset.term, place.textContent));
  }
  const turn = ({ target }) => {
    const word = target.closest?.(".term");
    word?.classList.toggle("from-right", word.getBoundingClientRect().left > innerWidth / 2);
  };
  document.addEventListener("pointerover", turn);
  document.addEventListener("focusin", turn);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") document.activeElement?.closest(".term")?.blur();
  });
}
