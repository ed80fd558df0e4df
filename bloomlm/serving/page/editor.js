/**
 * The sheet: a textarea, which edits, above a layer that has the same text and colours its pieces.
 *
 * Both break their lines in the same way, since they have the same font and width. The layer gives the sheet its height.
 */

import { percent, probability, probabilityClass } from "./continuation.js";

/** Text with coloured pieces as nodes; pieces are in order and their places are those of the text. */
export function coloured(text, pieces, from = 0) {
  const fragment = document.createDocumentFragment();
  let place = from;
  for (const piece of pieces) {
    if (piece.start < from) continue;
    if (piece.start > place) fragment.append(text.slice(place, piece.start));
    const span = document.createElement("span");
    const value = probability(piece);
    span.className = `piece p${probabilityClass(value)}`;
    span.title = percent(value);
    span.textContent = piece.text;
    fragment.append(span);
    place = piece.end;
  }
  fragment.append(text.slice(place));
  return fragment;
}

export class Editor {
  /**
   * @param {{input: HTMLTextAreaElement, layer: HTMLElement}} elements
   * @param {{edited: () => void, pieceChosen: (piece) => void}} listeners
   */
  constructor({ input, layer }, listeners) {
    this.input = input;
    this._layer = layer;
    this._pieces = [];
    input.addEventListener("input", () => listeners.edited());
    input.addEventListener("click", (event) => {
      if (input.selectionStart !== input.selectionEnd) return;
      const under = document
        .elementsFromPoint(event.clientX, event.clientY)
        .find((node) => node.matches(".sheet .piece"));
      if (under) listeners.pieceChosen(this._pieces[this._spans().indexOf(under)]);
    });
  }

  get text() {
    return this.input.value;
  }

  /** Show a text with coloured pieces. The cursor goes to the end if the text is another one. */
  show(text, pieces) {
    if (text !== this.input.value) {
      this.input.value = text;
      this.input.setSelectionRange(text.length, text.length);
    }
    this._pieces = pieces;
    // a line break at the end takes a line in a textarea, and in the layer only with something behind it
    this._layer.replaceChildren(coloured(text, pieces), "\u200b");
  }

  /** Scroll to the last coloured piece. */
  showEnd() {
    this._spans().at(-1)?.scrollIntoView({ block: "nearest" });
  }

  /** The piece before or at the cursor, or else the last one. */
  pieceAtCursor() {
    const cursor = this.input.selectionStart;
    return this._pieces.find((piece) => piece.start < cursor && cursor <= piece.end) ?? this._pieces.at(-1);
  }

  /** The piece that lies a number of pieces further on. */
  neighbour(piece, distance) {
    return this._pieces[this._pieces.indexOf(piece) + distance];
  }

  rectangleOf(piece) {
    return this._spans()[this._pieces.indexOf(piece)].getClientRects()[0];
  }

  /** Mark the piece whose alternatives are shown; null marks none. */
  mark(piece) {
    this._layer.querySelector(".marked")?.classList.remove("marked");
    if (piece) this._spans()[this._pieces.indexOf(piece)]?.classList.add("marked");
  }

  _spans() {
    return [...this._layer.querySelectorAll(".piece")];
  }
}
