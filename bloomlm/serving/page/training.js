/** The tab of training runs: which there are, their newest numbers, and their curves, while they go on. */

import { listRuns } from "./api.js";
import { CHARTS, Chart, number } from "./charts.js";
import { byId, element } from "./elements.js";
import { Notice } from "./notice.js";
import { RunLog } from "./run_log.js";

const REFRESH_MS = 3000;
const NUM_COLOURS = 6;
const SHOWN_AT_FIRST = 3;

export class Training {
  constructor() {
    this._notice = new Notice(byId("training-notice"));
    /** @type {Map<string, {log: RunLog, colour: number, isShown: boolean}>} */
    this._runs = new Map();
    this._charts = CHARTS.map((chart) => new Chart(chart));
    byId("charts").append(...this._charts.map((chart) => chart.root));
    byId("runs").addEventListener("change", (event) => {
      this._runs.get(event.target.value).isShown = event.target.checked;
      this._refresh();
    });
  }

  /** Follow the runs while the tab is shown. */
  setVisible(isVisible) {
    this._isVisible = isVisible;
    clearTimeout(this._timer);
    if (isVisible) this._refresh();
  }

  /** Draw the curves again, in the colours of the theme. */
  redraw() {
    const shown = [...this._runs.values()].filter((run) => run.isShown);
    for (const chart of this._charts) chart.draw(shown);
  }

  async _refresh() {
    clearTimeout(this._timer);
    try {
      await this._read();
      this._notice.hide();
    } catch (error) {
      this._notice.show("error", error.message);
    }
    if (this._isVisible) this._timer = setTimeout(() => this._refresh(), REFRESH_MS);
  }

  async _read() {
    const listed = await listRuns();
    for (const run of listed) {
      if (!this._runs.has(run.name)) this._add(run.name);
    }
    await Promise.all(
      listed.filter(({ name }) => this._runs.get(name).isShown).map((run) => this._runs.get(run.name).log.update(run)),
    );
    byId("no-runs").hidden = listed.length > 0;
    const state = this._state();
    if (state === this._drawn) return;
    this._drawn = state;
    this._drawList(listed);
    this._drawTable();
    this.redraw();
  }

  /** What a drawing depends on. */
  _state() {
    const states = [...this._runs].map(([name, { log, isShown }]) => [
      name,
      isShown,
      log.isLive,
      log.entries.length,
      log.latest("step"),
    ]);
    return JSON.stringify(states);
  }

  _add(name) {
    const place = this._runs.size;
    this._runs.set(name, { log: new RunLog(name), colour: place % NUM_COLOURS, isShown: place < SHOWN_AT_FIRST });
  }

  _drawList(listed) {
    const rows = listed.map(({ name }) => {
      const { colour, isShown, log } = this._runs.get(name);
      const box = element("input", { type: "checkbox", value: name });
      box.checked = isShown;
      const label = [box, element("span", { class: `swatch run${colour}` }), element("bdi", {}, [name])];
      if (isShown && log.isLive) label.push(element("span", { class: "live" }, ["live"]));
      return element("label", { class: "check" }, label);
    });
    const focused = document.activeElement?.value;
    byId("runs").replaceChildren(...rows);
    byId("runs")
      .querySelectorAll("input")
      .forEach((box) => box.value === focused && box.focus());
  }

  _drawTable() {
    const shown = [...this._runs.values()].filter(({ isShown, log }) => isShown && log.entries.length);
    const rows = shown.map(({ log }) =>
      element("tr", {}, [
        element("th", { scope: "row" }, [element("bdi", {}, [log.name])]),
        ...[
          number(log.latest("step")),
          number(log.latest("loss")),
          number(log.least("eval_loss")),
          number(log.latest("tokens_per_second")),
          duration(log.latest("eta_seconds")),
        ].map((text) => element("td", {}, [text])),
      ]),
    );
    byId("numbers")
      .querySelector("tbody")
      .replaceChildren(...rows);
    byId("numbers").hidden = !rows.length;
  }
}

function duration(seconds) {
  if (seconds === undefined) return "\u2013";
  const [minutes, rest] = [Math.floor(seconds / 60), Math.round(seconds % 60)];
  return `${Math.floor(minutes / 60)}:${String(minutes % 60).padStart(2, "0")}:${String(rest).padStart(2, "0")}`;
}
