// Playground for a prompt: its tokens, and for each token its experts and their workers.

import { get, post, stream } from "./api.js";
import { allow, byId, element } from "./format.js";

const SIGNS = { "\n": "↵", "\t": "⇥", "\r": "␍", "\x7f": "␡" };

// Makes invisible characters visible: single spaces, control characters, joiners, direction marks.
export function visible(word) {
  if (/^\s+$/u.test(word)) word = word.replaceAll(" ", "␣");
  return word.replace(/[\p{C}\p{Zl}\p{Zp}]|(?! )\p{Zs}/gu, (sign) => {
    const code = sign.codePointAt(0);
    return SIGNS[sign] ?? (code < 32 ? String.fromCodePoint(0x2400 + code) : `⟨${code.toString(16).toUpperCase()}⟩`);
  });
}

export class Playground {
  #names = [];
  #state = "STARTING";
  #running = null; // AbortController of the running generation
  seesPlacement = true; // false with a client's key

  constructor() {
    byId("try-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#run();
    });
    byId("prompt").addEventListener("input", () => this.allow());
    byId("stop").addEventListener("click", () => this.#running?.abort());
  }

  // Names of the workers that hold experts, by device.
  setNames(names) {
    this.#names = names;
  }

  // Enables or disables the button. state: new state of the cluster, if known.
  allow(state = this.#state) {
    this.#state = state;
    const busy = this.#running ? "the answer is being generated" : "";
    const down = state === "STARTING" || state === "STOPPED" ? `the cluster is ${state}` : "";
    allow(byId("generate"), busy || down || (byId("prompt").value ? "" : "type a prompt first"));
  }

  async #run() {
    const problem = byId("try-problem");
    problem.textContent = "";
    byId("visited").replaceChildren();
    byId("tokens").replaceChildren();
    this.#running = new AbortController();
    byId("stop").hidden = false;
    this.allow();
    try {
      await this.#inspect(await this.#generate(this.#running.signal));
    } catch (error) {
      problem.textContent = error.message;
    } finally {
      this.#running = null;
      byId("stop").hidden = true;
      this.allow();
    }
  }

  // The generated text, even if generation was stopped early.
  async #generate(signal) {
    const body = {
      prompt: byId("prompt").value,
      max_tokens: Number(byId("max-tokens").value),
      temperature: Number(byId("temperature").value),
      return_token_ids: true,
      logprobs: 0,
      echo: true,
      stream: true,
    };
    let prompt = [];
    const output = [];
    const words = [];
    const chances = [];
    try {
      for await (const event of stream("v1/completions", body, signal)) {
        if (event.error) throw new Error(event.error.message);
        for (const choice of event.choices) {
          prompt = choice.prompt_token_ids ?? prompt;
          output.push(...(choice.token_ids ?? []));
          words.push(...(choice.logprobs?.tokens ?? []));
          chances.push(...(choice.logprobs?.token_logprobs ?? []));
          byId("tokens").append(choice.text);
        }
      }
    } catch (error) {
      if (!signal.aborted) throw error;
    }
    return { ids: [...prompt, ...output], numPrompt: prompt.length, words, chances };
  }

  async #inspect({ ids, numPrompt, words, chances }) {
    if (!ids.length) return; // stopped before the first token
    const [seen, placement] = await Promise.all([
      post("v1/inspect", { token_ids: ids, outputs: ["routes"] }),
      this.seesPlacement ? get("cluster/v1/placement") : null,
    ]);
    const routes = seen.data[0].routes ?? [];
    const buttons = ids.map((id, place) => {
      const word = words[place] || `#${id}`;
      const known = chances[place] !== null && chances[place] !== undefined;
      const chance = known ? `, log-probability ${chances[place].toFixed(2)}` : "";
      const button = element("button", {
        type: "button",
        className: place < numPrompt ? "prompt" : "",
        title: `token ${id}${chance}`,
        "aria-pressed": "false",
      });
      button.textContent = visible(word);
      button.addEventListener("click", () => {
        for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
        this.#show(word, chance, place, routes, placement?.banks);
      });
      return button;
    });
    const breaks = (button, place) => ((words[place] ?? "").endsWith("\n") ? [button, element("br")] : [button]);
    byId("tokens").replaceChildren(...buttons.flatMap(breaks));
    buttons[numPrompt]?.click();
  }

  #show(word, chance, place, routes, banks) {
    const rows = routes.map((route) => {
      const bank = banks?.find((b) => b.layer === route.layer && b.bank === route.bank);
      const experts = route.topk_ids[place].map((expert, rank) => {
        const weight = route.topk_weights[place][rank];
        return `${expert} (${[weight.toFixed(2), ...(banks ? [this.#holders(bank, expert)] : [])].join(", ")})`;
      });
      return element(
        "tr",
        {},
        element("th", { scope: "row" }, `${route.layer} (${route.bank})`),
        element("td", {}, experts.join(" · ")),
      );
    });
    const table = element("table", {}, element("caption", {}, `“${visible(word)}”${chance}`));
    const head = element("tr", {}, element("th", { scope: "col" }, "Layer"));
    const shown = banks ? "weight, workers with a copy" : "weight";
    head.append(element("th", { scope: "col" }, `Experts (${shown})`));
    table.append(element("thead", {}, head), element("tbody", {}, ...rows));
    byId("visited").replaceChildren(table);
  }

  #holders(bank, expert) {
    const found = [];
    bank?.physical_to_logical.forEach((slots, device) => {
      if (slots.includes(expert)) found.push(this.#names[device] ?? `device ${device}`);
    });
    return found.join(" or ") || "no worker";
  }
}
