/** One text continued by several models, in columns below the sheet. */

import { coloured } from "./editor.js";
import { byId, element } from "./elements.js";

const SHARED_LENGTH = 80;

export class Columns {
  /** @param {{keep: (version) => void}} desk what is called with the version of the column that is kept */
  constructor({ keep }) {
    this._box = byId("columns");
    this._grid = byId("columns-grid");
    this._keep = keep;
    byId("columns-close").addEventListener("click", () => this.close());
  }

  /** Open a column for each model; returns them in the same order. */
  open(models) {
    const columns = models.map((model) => new Column(model, this._keep));
    this._grid.replaceChildren(...columns.map((column) => column.root));
    this._box.hidden = false;
    document.body.classList.add("comparing");
    this._box.scrollIntoView({ block: "nearest" });
    return columns;
  }

  close() {
    this._box.hidden = true;
    document.body.classList.remove("comparing");
    this._grid.replaceChildren();
  }
}

/** The end of the text that the columns share, so that they can be read without looking up. */
function lastWords(text) {
  const paragraph = text.slice(text.lastIndexOf("\n", text.length - 1) + 1);
  if (paragraph.length <= SHARED_LENGTH) return paragraph;
  return `\u2026${paragraph.slice(-SHARED_LENGTH).replace(/^\S*(?=\s)/u, "")}`;
}

class Column {
  constructor(model, keep) {
    this._text = element("div", { class: "text" });
    this._state = element("span", { class: "state" }, ["\u2026"]);
    this._button = element("button", { type: "button", disabled: "" }, ["Keep this"]);
    this._button.addEventListener("click", () => keep(this._version));
    const heading = element("h3", {}, [element("bdi", {}, [model])]);
    const foot = element("footer", {}, [this._state, this._button]);
    this.root = element("article", { class: "column", "aria-label": `Continuation by ${model}` }, [
      heading,
      this._text,
      foot,
    ]);
  }

  draw(continuation) {
    const text = continuation.text;
    const shared = element("span", { class: "shared" }, [lastWords(continuation.base)]);
    this._text.replaceChildren(shared, coloured(text, continuation.shownPieces, continuation.base.length));
    this._state.textContent = `${continuation.tokens.length} tokens`;
  }

  finish(note) {
    this._state.textContent = note;
  }

  /** Let the user keep a version; null where the model wrote nothing. */
  offer(version) {
    this._version = version;
    this._button.disabled = !version;
  }
}
