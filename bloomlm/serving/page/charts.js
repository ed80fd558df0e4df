/** Curves over the steps of several runs, drawn by uPlot (vendor/). */

import { element } from "./elements.js";

/* global uPlot */

/** The charts. A run's second number is drawn as points on the same axis. */
export const CHARTS = [
  { title: "Loss (line: training, points: evaluation)", names: ["loss", "eval_loss"], logarithmic: true },
  { title: "Learning rate", names: ["learning_rate"] },
  { title: "Tokens per second", names: ["tokens_per_second"] },
  { title: "Gradient norm", names: ["grad_norm"] },
];

const HEIGHT_PX = 240;

/** Numbers as people read them: 0.0123, 12,345, 3e-4. */
export function number(value) {
  if (value === undefined || value === null) return "\u2013";
  if (value !== 0 && Math.abs(value) < 0.001) return value.toExponential(2).replace(/\.?0+e/, "e");
  if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}

export class Chart {
  constructor({ title, names, logarithmic = false }) {
    this._names = names;
    this._logarithmic = logarithmic;
    this._place = element("div", { class: "plot", tabindex: "0", role: "img" });
    this._tip = element("div", { class: "tip", hidden: "" });
    this.root = element("section", { class: "chart" }, [element("h3", {}, [title]), this._place, this._tip]);
    this._title = title;
    this._place.addEventListener("keydown", (event) => this._onKey(event));
    new ResizeObserver(() => this._plot?.setSize({ width: this._place.clientWidth, height: HEIGHT_PX })).observe(
      this._place,
    );
  }

  /** @param {{name: string, colour: string, log: import("./run_log.js").RunLog}[]} runs */
  draw(runs) {
    const series = runs.flatMap((run) =>
      this._names.map((name, place) => ({ ...run, name, label: run.log.name, isPoints: place > 0 })),
    );
    this._series = series.filter(({ name, log }) => log.latest(name) !== undefined);
    const summary = this._series.map(({ name, log }) => `${log.name}: ${name} ${number(log.latest(name))}`);
    this._place.setAttribute("aria-label", `${this._title}. ${summary.join("; ") || "No values yet"}`);
    this.root.classList.toggle("empty", !this._series.length);
    this._plot?.destroy();
    this._plot = null;
    if (!this._series.length) return;
    const data = uPlot.join(this._series.map(({ name, log }) => log.points(name)));
    this._plot = new uPlot(this._options(data), data, this._place);
  }

  _options(data) {
    const style = getComputedStyle(document.documentElement);
    const [ink, line] = ["--muted", "--line"].map((name) => style.getPropertyValue(name));
    const axis = {
      stroke: resolved(ink),
      grid: { stroke: resolved(line), width: 1 },
      ticks: { show: false },
      font: "12px system-ui",
    };
    const labels = (_, ticks) => ticks.map((tick) => (tick === null ? "" : number(tick)));
    const values = { ...axis, size: 60, values: labels };
    // a scale of powers of ten needs values above zero
    const isLogarithmic =
      this._logarithmic && data.slice(1).every((values) => values.every((value) => value == null || value > 0));
    return {
      width: this._place.clientWidth,
      height: HEIGHT_PX,
      legend: { show: false },
      cursor: { sync: { key: "steps" }, points: { size: 7 } },
      scales: { x: { time: false }, y: isLogarithmic ? { distr: 3 } : {} },
      axes: [{ ...axis, size: 28 }, isLogarithmic ? powersOfTen(values) : values],
      series: [{}, ...this._series.map((one) => curve(one))],
      hooks: { setCursor: [(plot) => this._showTip(plot)] },
    };
  }

  _showTip(plot) {
    const { idx, left } = plot.cursor;
    this._tip.hidden = idx === null || idx === undefined || left < 0;
    if (this._tip.hidden) return;
    const rows = this._series.map(({ name, label, colour }, place) => {
      const value = nearest(plot.data[place + 1], idx);
      const swatch = element("span", { class: `swatch run${colour}` });
      const kind = name.startsWith("eval_") ? " (eval)" : "";
      return element("div", {}, [swatch, element("bdi", {}, [label + kind]), element("b", {}, [number(value)])]);
    });
    this._tip.replaceChildren(element("div", { class: "step" }, [`step ${plot.data[0][idx]}`]), ...rows);
    const width = this._place.clientWidth;
    this._tip.classList.toggle("left", left + 60 > width / 2);
  }

  _onKey(event) {
    const distance = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!distance || !this._plot) return;
    event.preventDefault();
    const steps = this._plot.data[0];
    const here = this._plot.cursor.idx ?? (distance > 0 ? -1 : steps.length);
    const next = Math.min(Math.max(here + distance, 0), steps.length - 1);
    this._plot.setCursor({ left: this._plot.valToPos(steps[next], "x"), top: 10 });
  }
}

/** An axis with a label and a line at powers of ten only. */
function powersOfTen(axis) {
  const filter = (_, ticks) =>
    ticks.map((tick) => (Number.isInteger(Math.round(1e6 * Math.log10(tick)) / 1e6) ? tick : null));
  return { ...axis, filter, grid: { ...axis.grid, filter } };
}

function curve({ colour, isPoints }) {
  const stroke = resolved(getComputedStyle(document.documentElement).getPropertyValue(`--run${colour}`));
  if (!isPoints) return { stroke, width: 1.75, spanGaps: true, points: { show: false } };
  return { stroke, width: 1, dash: [4, 4], spanGaps: true, points: { show: true, size: 7, fill: stroke } };
}

/** The value at an index, or the last one before it: not every run has every step. */
function nearest(values, index) {
  for (let place = index; place >= 0; place -= 1)
    if (values[place] !== null && values[place] !== undefined) return values[place];
  return undefined;
}

/** A colour of the style sheet for a canvas, which does not know light-dark(). */
function resolved(colour) {
  const probe = element("span");
  probe.style.color = colour;
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}
