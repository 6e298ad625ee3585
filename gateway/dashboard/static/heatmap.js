// Experts and workers of one layer: which worker computed how many tokens of which expert.

import { get } from "./api.js";
import { byId, count, element, fill, percent } from "./format.js";

const HOTTEST = 8;
const HOT = 2; // multiple of an even share

export class Heatmap {
  #load = null;
  #at = { row: 0, column: 0 };
  #pointed = false; // by the pointer or the keyboard focus
  #canvas = byId("heatmap");
  #select = byId("bank");

  constructor() {
    this.#select.addEventListener("change", () => this.refresh());
    this.#canvas.addEventListener("keydown", (event) => this.#move(event));
    this.#canvas.addEventListener("mousemove", (event) => this.#point(event));
    for (const [event, pointed] of [["focus", true], ["blur", false], ["mouseleave", false]]) {
      this.#canvas.addEventListener(event, () => {
        this.#pointed = pointed || document.activeElement === this.#canvas;
        this.#draw();
      });
    }
    new ResizeObserver(() => this.#draw()).observe(this.#canvas.parentElement);
  }

  async refresh() {
    const number = this.#select.value || "0";
    this.#load = await get(`dashboard/api/load?bank=${number}`);
    this.#fillSelect();
    const both = this.#load.banks[this.#load.number].balancedness;
    byId("bank-facts").textContent =
      `balancedness ${percent(both.achieved)}, of the load profile of the start ${percent(both.predicted)}`;
    this.#draw();
    this.#showHottest();
  }

  // Names of the workers that hold experts, by device.
  get workers() {
    return this.#load?.workers ?? [];
  }

  get balancedness() {
    return this.#load?.balancedness ?? {};
  }

  #fillSelect() {
    const banks = this.#load.banks;
    if (this.#select.options.length === banks.length) return;
    const text = (bank) => `${bank.layer} (${bank.bank})`;
    this.#select.replaceChildren(...banks.map((b, i) => element("option", { value: String(i) }, text(b))));
  }

  #geometry() {
    const experts = this.#load.counts.length;
    const label = 90;
    const room = this.#canvas.parentElement.clientWidth - label;
    const size = Math.max(7, Math.min(22, Math.floor(room / experts)));
    return { experts, rows: this.#load.cells.length, label, size, top: 16 };
  }

  #draw() {
    if (!this.#load) return;
    const { experts, rows, label, size, top } = this.#geometry();
    const canvas = this.#canvas;
    const [width, height] = [label + experts * size, top + rows * (size + 4) + 4];
    const ratio = devicePixelRatio || 1;
    [canvas.width, canvas.height] = [width * ratio, height * ratio];
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const style = getComputedStyle(document.documentElement);
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    const heat = style.getPropertyValue("--heat");
    const most = Math.max(1, ...this.#load.cells.flat().map(([, tokens]) => tokens));
    this.#load.cells.forEach((cells, row) => {
      const y = top + row * (size + 4);
      context.fillStyle = style.getPropertyValue("--text");
      context.fillText(this.#name(row), 0, y + size / 2);
      for (const [expert, tokens] of cells) {
        const x = label + expert * size;
        context.fillStyle = `rgba(${heat}, ${0.08 + (0.92 * tokens) / most})`;
        context.fillRect(x, y, size - 1, size);
        if (this.#load.copies[expert] > 1) {
          const dot = Math.max(3, size / 4);
          context.fillStyle = style.getPropertyValue("--warn");
          context.fillRect(x + size - 1 - dot, y, dot, dot);
        }
      }
    });
    context.fillStyle = style.getPropertyValue("--bad");
    const even = this.#even();
    this.#load.counts.forEach((tokens, expert) => {
      if (even && tokens >= HOT * even) context.fillRect(label + expert * size, 4, size - 1, 4);
    });
    const { row, column } = this.#at;
    if (this.#pointed) {
      context.strokeStyle = style.getPropertyValue("--text");
      context.lineWidth = 2;
      context.strokeRect(label + column * size - 2, top + row * (size + 4) - 1.5, size + 3, size + 3);
    }
    canvas.setAttribute("aria-label", `Expert load of layer ${this.#load.layer}: ${rows} workers, ${experts} experts`);
  }

  #name(row) {
    return this.#load.workers[row] || `device ${row}`;
  }

  #even() {
    return this.#load.counts.reduce((sum, tokens) => sum + tokens, 0) / this.#load.counts.length;
  }

  #move(event) {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (!this.#load || !(event.key in steps)) return;
    event.preventDefault();
    const [down, right] = steps[event.key];
    this.#go(this.#at.row + down, this.#at.column + right);
    this.#scroll();
  }

  // Scrolls the cell into view.
  #scroll() {
    const { label, size, top } = this.#geometry();
    const [x, y] = [label + this.#at.column * size, top + this.#at.row * (size + 4)];
    const view = this.#canvas.parentElement;
    const near = (now, room, at) => Math.min(Math.max(now, at + 2 * size - room), Math.max(0, at - size));
    view.scrollTo(near(view.scrollLeft, view.clientWidth, x), near(view.scrollTop, view.clientHeight, y));
  }

  #point(event) {
    if (!this.#load) return;
    const { label, size, top } = this.#geometry();
    this.#pointed = true;
    this.#go(Math.floor((event.offsetY - top) / (size + 4)), Math.floor((event.offsetX - label) / size));
  }

  #go(row, column) {
    const { rows, experts } = this.#geometry();
    if (row < 0 || column < 0 || row >= rows || column >= experts) return;
    this.#at = { row, column };
    this.#draw();
    const found = this.#load.cells[row].filter(([expert]) => expert === column);
    const here = found.length ? `${count(found.reduce((s, [, t]) => s + t, 0))} tokens in this epoch` : "no copy";
    const copies = this.#load.copies[column];
    byId("cell").textContent =
      `Expert ${column} on ${this.#name(row)}: ${here}; ` +
      `${count(this.#load.counts[column])} tokens since the start, ${copies} ${copies === 1 ? "copy" : "copies"}`;
  }

  #showHottest() {
    const even = this.#even() || 1;
    const order = this.#load.counts.map((tokens, expert) => [tokens, expert]);
    order.sort(([a], [b]) => b - a);
    const rows = order.slice(0, HOTTEST).map(([tokens, expert]) =>
      element(
        "tr",
        {},
        element("th", { scope: "row" }, String(expert)),
        element("td", { className: "number" }, count(tokens)),
        element("td", { className: "number" }, `${(tokens / even).toFixed(2)}×`),
        element("td", { className: "number" }, String(this.#load.copies[expert])),
        element("td", {}, this.holders(expert).join(", ")),
      ),
    );
    fill(byId("hottest").tBodies[0], rows);
  }

  // Names of the workers that hold an expert of the shown layer.
  holders(expert) {
    return this.#load.cells
      .map((cells, row) => (cells.some(([e]) => e === expert) ? this.#name(row) : null))
      .filter((name) => name !== null);
  }

  restyle() {
    this.#draw();
  }
}
