// Time series of the last ten minutes, with the cluster's events on the same axis.

import { clock, element, fill, short } from "./format.js";

const SPAN_S = 600;
const HEIGHT = 160;
const COLOURS = ["#3b82d6", "#e08a1e", "#2fa36b", "#c2479b", "#8a63d2", "#d64545", "#3aa6b9", "#93a01f"];
const SYNC = "expertmesh";
const NOTHING = "no data yet";
const STEPS = [0.5, ...Array.from({ length: 12 }, (_, power) => [1, 2, 5].map((n) => n * 10 ** power)).flat()];

export class Chart {
  #place;
  #latest = element("ul", { className: "latest" });
  #values;
  #unit;
  #digits;
  #marks;
  #plot = null;
  #names = [];
  #data = [[]];

  // unit: of the values; digits: decimals of values below 100.
  // values: function from a sample to its values by name (null: none); names may change.
  // marks: a function that gives [time, name of a colour's variable] of each event to draw.
  constructor(place, unit, digits, values, marks) {
    [this.#place, this.#unit, this.#digits] = [place, unit, digits];
    [this.#values, this.#marks] = [values, marks];
    place.setAttribute("role", "img");
    place.after(this.#latest);
    new ResizeObserver(() => this.#plot?.setSize({ width: this.#width(), height: HEIGHT })).observe(place);
  }

  show(samples) {
    const rows = samples.map(this.#values);
    const names = [...new Set(rows.flatMap(Object.keys))];
    const last = samples.at(-1)?.time;
    // a name without a value in the last ten minutes is removed with its samples
    this.#data = [samples.map((s) => s.time), ...names.map((name) => rows.map((row) => row[name] ?? null))];
    if (!this.#plot || names.join() !== this.#names.join()) {
      this.#plot?.destroy();
      this.#names = names;
      this.#plot = new uPlot(this.#options(names), this.#data, this.#place);
    } else {
      this.#plot.setData(this.#data);
    }
    this.#place.dataset.samples = samples.length;
    this.#showValues(this.#plot.cursor.idx);
    const at = this.#newest();
    const values = names.map((name, i) => `${name} ${this.#text(this.#data[i + 1][at])}`);
    const when = at >= 0 && this.#data[0][at] !== last ? [`at ${clock(this.#data[0][at])}`] : [];
    this.#place.setAttribute("aria-label", at < 0 ? NOTHING : [...values, ...when].join(", "));
  }

  // Index of the latest sample with a value: latencies are measured only during generation.
  #newest() {
    const [times, ...series] = this.#data;
    return times.findLastIndex((_, at) => series.some((values) => values[at] !== null));
  }

  // The latest values, or the values under the cursor; with the time unless it is the last sample.
  #showValues(index) {
    const last = this.#data[0].length - 1;
    const pointed = index !== null && index !== undefined && index < last;
    const at = pointed ? index : this.#newest();
    const lines = this.#names.map((name, i) => {
      const mark = element("span", { className: `mark c${i % COLOURS.length}` });
      return element("li", {}, mark, ` ${name} `, element("b", {}, this.#text(this.#data[i + 1][at])));
    });
    if (at < 0) lines.splice(0, lines.length, element("li", {}, NOTHING));
    else if (at < last) lines.push(element("li", { className: "at" }, clock(this.#data[0][at])));
    fill(this.#latest, lines);
  }

  #text(value) {
    if (value === null || value === undefined) return "–";
    const digits = value >= 100 ? 0 : this.#digits;
    return `${value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits })}${this.#unit}`;
  }

  #options(names) {
    const style = getComputedStyle(document.documentElement);
    const [dim, grid] = [style.getPropertyValue("--dim"), style.getPropertyValue("--grid")];
    const axis = { stroke: dim, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1 } };
    const newest = () => this.#data[0].at(-1) ?? Date.now() / 1000;
    return {
      width: this.#width(),
      height: HEIGHT,
      cursor: { sync: { key: SYNC }, y: false },
      legend: { show: false },
      scales: {
        x: { range: () => [newest() - SPAN_S, newest()] },
        y: { range: (plot, low, high) => [0, Math.max(high ?? 0, 1) * 1.1] },
      },
      axes: [
        { ...axis, space: 60, size: 30, values: (plot, times) => times.map((time) => clock(time).slice(0, 5)) },
        { ...axis, size: 45, incrs: STEPS, values: (plot, values) => values.map(short) },
      ],
      series: [
        {},
        ...names.map((name, i) => ({ label: name, stroke: COLOURS[i % COLOURS.length], width: 1.5, spanGaps: true })),
      ],
      hooks: {
        draw: [(plot) => this.#drawMarks(plot)],
        setCursor: [(plot) => this.#showValues(plot.cursor.idx)],
      },
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

  // Redraws in the colours of the other theme with the next samples.
  restyle() {
    this.#names = [""];
  }
}
