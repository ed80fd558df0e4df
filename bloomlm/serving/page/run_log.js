/** The numbers of a training run, read from its metrics.jsonl while it grows. */

import { readMetrics } from "./api.js";

/** Seconds after its last line for which a run counts as going on. */
const LIVE_SECONDS = 120;

export class RunLog {
  constructor(name) {
    this.name = name;
    this._forget();
  }

  /** Read what is new; a file that became shorter belongs to a run that was resumed, and is read anew. */
  async update({ size, modified }) {
    this.modified = modified;
    if (size < this._offset) this._forget();
    if (size === this._offset) return;
    const { text, next } = await readMetrics(this.name, this._offset);
    this._offset = next;
    try {
      for (const line of text.split("\n")) if (line.trim()) this._add(JSON.parse(line));
    } catch {
      // a resumed run has made its file longer again since, and this begins within a line: read it anew
      this._forget();
    }
  }

  get isLive() {
    return Date.now() / 1000 - this.modified < LIVE_SECONDS && !(this.latest("eta_seconds") === 0);
  }

  /** The last known value of a number; undefined if the run has none. */
  latest(name) {
    return this.entries.findLast((entry) => Number.isFinite(entry[name]))?.[name];
  }

  /** The least value of a number; undefined if the run has none. */
  least(name) {
    const values = this.entries.map((entry) => entry[name]).filter(Number.isFinite);
    return values.length ? Math.min(...values) : undefined;
  }

  /** Steps and values of a number: [steps, values]. */
  points(name) {
    const entries = this.entries.filter((entry) => Number.isFinite(entry[name]));
    return [entries.map((entry) => entry.step), entries.map((entry) => entry[name])];
  }

  _add(entry) {
    // a resumed run does some steps again
    while (this.entries.length && this.entries.at(-1).step > entry.step) this.entries.pop();
    this.entries.push(entry);
  }

  _forget() {
    this.entries = [];
    this._offset = 0;
  }
}
