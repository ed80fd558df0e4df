/**
 * The versions of a text: a tree of what was written, continued and branched, and the way taken through it.
 *
 * Undo and redo walk along that way as in a browser's history; the tree keeps every version, whatever was undone.
 */

/**
 * @typedef {{parent: Version | null, children: Version[], kind: "written" | "continued" | "branched",
 *   text: string, pieces: import("./continuation.js").Piece[], from: number, model: string, numTokens: number,
 *   end: string}} Version
 *   from: where what is new begins; end: why the continuation ended: "length", "stop", "stopped" by the user or "failed"
 */

export class Story {
  constructor(text = "") {
    /** @type {Version} */
    this.root = this._version(null, "written", text, [], 0);
    this._visits = [this.root];
    this._position = 0;
  }

  /** @returns {Version} */
  get current() {
    return this._visits[this._position];
  }

  get canUndo() {
    return this._position > 0;
  }

  get canRedo() {
    return this._position < this._visits.length - 1;
  }

  /** Keep the text as it stands as a version, if it was edited. */
  write(text) {
    if (text === this.current.text) return;
    const from = sameLength(text, this.current.text);
    this.visit(this._version(this.current, "written", text, this.piecesOf(text), from));
  }

  /**
   * Add a finished continuation without going there.
   *
   * @param {import("./continuation.js").Continuation} continuation
   * @param {{parent: Version, kind: "continued" | "branched", end: string, from: number}} how
   * @returns {Version}
   */
  add(continuation, { parent, kind, end, from = parent.text.length }) {
    const before = parent.pieces.filter((piece) => piece.end <= continuation.base.length);
    const version = this._version(parent, kind, continuation.text, [...before, ...continuation.pieces], from);
    Object.assign(version, { model: continuation.model, numTokens: continuation.tokens.length, end });
    for (const piece of continuation.pieces) piece.version = version;
    return version;
  }

  /** Go to a version; what could be redone is forgotten, though it stays in the tree. */
  visit(version) {
    if (version === this.current) return;
    this._visits = [...this._visits.slice(0, this._position + 1), version];
    this._position += 1;
  }

  undo() {
    if (this.canUndo) this._position -= 1;
  }

  redo() {
    if (this.canRedo) this._position += 1;
  }

  /** The pieces of the current version that an edited text still has: those before the first change. */
  piecesOf(text) {
    const same = sameLength(text, this.current.text);
    return this.current.pieces.filter((piece) => piece.end <= same);
  }

  _version(parent, kind, text, pieces, from) {
    const version = { parent, children: [], kind, text, pieces, from, model: "", numTokens: 0, end: "" };
    parent?.children.push(version);
    return version;
  }
}

/** Number of characters that two texts have in common at their beginnings. */
function sameLength(one, other) {
  const end = Math.min(one.length, other.length);
  let same = 0;
  while (same < end && one[same] === other[same]) same += 1;
  return same;
}
