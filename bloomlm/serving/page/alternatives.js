/** The list of likely tokens at a place of the text, from which another one can be chosen. */

import { percent, tokenLabel } from "./continuation.js";
import { element } from "./elements.js";

export class Alternatives {
  /**
   * @param {HTMLElement} box the list's element
   * @param {{editor: import("./editor.js").Editor, branch: (piece, tokenNumber: number, alternative) => void}} desk
   */
  constructor(box, { editor, branch }) {
    this._box = box;
    this._editor = editor;
    this._branch = branch;
    box.addEventListener("keydown", (event) => this._onKey(event));
    document.addEventListener("pointerdown", (event) => {
      if (!box.contains(event.target) && event.target !== editor.input) this.close();
    });
    window.addEventListener("resize", () => this.close());
  }

  get isOpen() {
    return !this._box.hidden;
  }

  /** Show the alternatives of a piece's token: the first one, or the last one if going backwards. */
  open(piece, { focus, tokenNumber = piece.first }) {
    this._piece = piece;
    this._tokenNumber = tokenNumber;
    this._editor.mark(piece);
    const token = piece.continuation.tokens[tokenNumber];
    this._box.replaceChildren(this._heading(piece, token), this._list(token), this._rest(token));
    this._box.hidden = false;
    this._place(this._editor.rectangleOf(piece));
    if (focus) this._box.querySelector("[aria-selected=true]").focus();
  }

  close() {
    if (!this.isOpen) return;
    const hadFocus = this._box.contains(document.activeElement);
    this._box.hidden = true;
    this._editor.mark(null);
    if (hadFocus) this._editor.input.focus();
  }

  _heading(piece, token) {
    const part = this._tokenNumber - piece.first + 1;
    const note = piece.count > 1 ? `token ${part} of ${piece.count} of \u201c${piece.text}\u201d` : "instead of";
    return element("p", { class: "heading" }, [
      element("span", {}, [note]),
      " ",
      element("bdi", {}, [tokenLabel(token)]),
    ]);
  }

  _list(token) {
    const others = token.top_logprobs.some((other) => other.id === token.id)
      ? token.top_logprobs
      : [...token.top_logprobs, token];
    const options = others.map((other) => this._option(other, other.id === token.id));
    return element("div", { role: "listbox", "aria-label": `Alternatives of ${tokenLabel(token)}` }, options);
  }

  _option(choice, isChosen) {
    const value = Math.exp(choice.logprob);
    const label = element("bdi", { class: "token" }, [tokenLabel(choice)]);
    const bar = element("meter", { min: 0, max: 1, value, "aria-hidden": "true" });
    const option = element("button", { role: "option", "aria-selected": isChosen, type: "button" }, [
      label,
      bar,
      element("span", { class: "percent" }, [percent(value)]),
    ]);
    // a token without bytes ends the text, so nothing can follow it
    option.disabled = !choice.bytes.length && !isChosen;
    option.addEventListener("click", () => {
      const [piece, tokenNumber] = [this._piece, this._tokenNumber];
      this.close();
      if (!isChosen) this._branch(piece, tokenNumber, choice);
    });
    return option;
  }

  _rest(token) {
    const sum = token.top_logprobs.reduce((total, other) => total + Math.exp(other.logprob), 0);
    return element("p", { class: "rest" }, [`all others ${percent(Math.max(0, 1 - sum))}`]);
  }

  _place(rectangle) {
    const frame = this._box.offsetParent.getBoundingClientRect();
    const left = Math.min(rectangle.left - frame.left, frame.width - this._box.offsetWidth);
    this._box.style.left = `${Math.max(0, left)}px`;
    this._box.style.top = `${rectangle.bottom - frame.top + 6}px`;
    this._box.scrollIntoView({ block: "nearest" });
  }

  _onKey(event) {
    const options = [...this._box.querySelectorAll("[role=option]:enabled")];
    const here = options.indexOf(document.activeElement);
    const actions = {
      ArrowDown: () => options[Math.min(here + 1, options.length - 1)].focus(),
      ArrowUp: () => options[Math.max(here - 1, 0)].focus(),
      ArrowRight: () => this._move(1),
      ArrowLeft: () => this._move(-1),
      Escape: () => this.close(),
      Tab: () => this.close(),
    };
    if (!actions[event.key]) return;
    if (event.key !== "Tab") event.preventDefault();
    event.stopPropagation();
    actions[event.key]();
  }

  /** Go to the next or the previous token of the text. */
  _move(distance) {
    const next = this._tokenNumber + distance;
    const piece = this._piece;
    if (next >= piece.first && next < piece.first + piece.count)
      return this.open(piece, { focus: true, tokenNumber: next });
    const neighbour = this._editor.neighbour(piece, distance);
    if (!neighbour) return undefined;
    const tokenNumber = distance < 0 ? neighbour.first + neighbour.count - 1 : neighbour.first;
    return this.open(neighbour, { focus: true, tokenNumber });
  }
}
