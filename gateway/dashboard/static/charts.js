// Time series of the last minutes, with the cluster's events on the same axis.

import { clock } from "./format.js";

const POINTS = 600;
const COLOURS = ["#3b82d6", "#e08a1e", "#2fa36b", "#c2479b", "#8a63d2", "#d64545", "#3aa6b9", "#93a01f"];
const SYNC = "expertmesh";

export class Chart {
  #place;
  #names;
  #unit;
  #plot = null;
  #times = [];
  #values = new Map();
  #marks = () => [];
  #frame = null;

  // marks: a function that gives [time, name of a colour's variable] of each event to draw.
  constructor(place, unit, marks) {
    this.#place = place;
    this.#unit = unit;
    this.#marks = marks;
    this.#names = [];
    new ResizeObserver(() => this.#resize()).observe(place);
  }

  // One value by name (null: none); names may come and go. At most POINTS are kept.
  add(time, values) {
    this.#times.push(time);
    for (const name of Object.keys(values)) {
      if (!this.#values.has(name)) this.#values.set(name, Array(this.#times.length - 1).fill(null));
    }
    for (const [name, kept] of this.#values) kept.push(values[name] ?? null);
    if (this.#times.length > POINTS) {
      this.#times.shift();
      for (const kept of this.#values.values()) kept.shift();
    }
    for (const [name, kept] of this.#values) {
      if (!(name in values) && kept.every((value) => value === null)) this.#values.delete(name);
    }
    this.#frame ??= requestAnimationFrame(() => this.#draw());
    const latest = Object.entries(values).map(([name, value]) => `${name} ${this.#text(value)}`);
    this.#place.setAttribute("role", "img");
    this.#place.setAttribute("aria-label", latest.join(", ") || "no data");
  }

  #text(value) {
    return value === null || value === undefined ? "none" : `${value.toFixed(1)}${this.#unit}`;
  }

  // At most once a frame, and not where nobody looks.
  #draw() {
    this.#frame = null;
    const names = [...this.#values.keys()];
    if (!this.#plot || names.join() !== this.#names.join()) {
      this.#plot?.destroy();
      this.#names = names;
      this.#plot = new uPlot(this.#options(names), this.#data(), this.#place);
    } else {
      this.#plot.setData(this.#data());
    }
  }

  #data() {
    return [this.#times, ...this.#values.values()];
  }

  #options(names) {
    const style = getComputedStyle(document.documentElement);
    const [dim, grid] = [style.getPropertyValue("--dim"), style.getPropertyValue("--grid")];
    const axis = { stroke: dim, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1 } };
    return {
      width: this.#width(),
      height: 180,
      cursor: { sync: { key: SYNC } },
      scales: { y: { range: (plot, low, high) => [0, Math.max(high ?? 0, 1) * 1.1] } },
      axes: [{ ...axis, space: 80, values: (plot, times) => times.map(clock) }, { ...axis, size: 55 }],
      series: [
        { label: "at", value: (plot, value) => (value === null ? "" : clock(value)) },
        ...names.map((name, place) => ({
          label: name,
          stroke: COLOURS[place % COLOURS.length],
          width: 1.5,
          spanGaps: true,
          value: (plot, value) => (value === null ? "–" : this.#text(value)),
        })),
      ],
      hooks: { draw: [(plot) => this.#drawMarks(plot)] },
    };
  }

  #drawMarks(plot) {
    const { left, top, width, height } = plot.bbox;
    const context = plot.ctx;
    const style = getComputedStyle(document.documentElement);
    context.save();
    for (const [time, variable] of this.#marks()) {
      const x = plot.valToPos(time, "x", true);
      if (x < left || x > left + width) continue;
      context.strokeStyle = style.getPropertyValue(variable);
      context.lineWidth = 1.5 * devicePixelRatio;
      context.setLineDash([4 * devicePixelRatio, 3 * devicePixelRatio]);
      context.beginPath();
      context.moveTo(x, top);
      context.lineTo(x, top + height);
      context.stroke();
    }
    context.restore();
  }

  #width() {
    return Math.max(this.#place.clientWidth, 200);
  }

  #resize() {
    this.#plot?.setSize({ width: this.#width(), height: 180 });
  }

  // The colours of the other theme.
  restyle() {
    this.#names = [""];
    if (this.#times.length) this.#draw();
  }
}
