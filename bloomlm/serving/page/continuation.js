/**
 * A continuation of a text by a model, token by token.
 *
 * A character of many scripts consists of several tokens, each with some of its bytes. The bytes are joined here, so that
 * only whole characters are shown; a piece is the text of one token, or a character with all its tokens.
 */

/**
 * @typedef {{id: number, token: string, bytes: number[], logprob: number}} Choice
 * @typedef {Choice & {top_logprobs: Choice[]}} Token
 * @typedef {{text: string, start: number, end: number, first: number, count: number, continuation: Continuation}} Piece
 *   start and end are places in the whole text, first and count are tokens of the continuation
 */

export class Continuation {
  /**
   * @param {string} model the model's name
   * @param {string} base the text before
   * @param {number[] | null} promptIds tokens of the text before; null until the server has said them
   * @param {Token[]} tokens the beginning, where a branch starts behind known tokens
   */
  constructor(model, base, promptIds = null, tokens = []) {
    this.model = model;
    this.base = base;
    this.promptIds = promptIds;
    /** @type {Token[]} */
    this.tokens = [];
    /** @type {Piece[]} */
    this.pieces = [];
    this._decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    this._end = base.length;
    for (const token of tokens) this._addToken(token);
    const beginsInCharacter = tokens.length > 0 && this._firstPending() < tokens.length;
    /**
     * The text may be shown up to here, for the server holds back what may be cut off as a stop text. It cannot count the
     * characters of a text that begins within one, so there everything is shown.
     */
    this._shownEnd = beginsInCharacter ? Infinity : this._end;
  }

  /** The continuation that takes an alternative at a token's place, with the same tokens before it. */
  branch(tokenNumber, alternative) {
    const { top_logprobs } = this.tokens[tokenNumber];
    const tokens = [...this.tokens.slice(0, tokenNumber), { ...alternative, top_logprobs }];
    return new Continuation(this.model, this.base, this.promptIds, tokens);
  }

  /** What the model reads: the text where the server has not divided it yet, else exact tokens. */
  get prompt() {
    return this.promptIds ? [...this.promptIds, ...this.tokens.map((token) => token.id)] : this.base;
  }

  /** The whole text so far. */
  get text() {
    return this.base + this.shownPieces.map((piece) => piece.text).join("");
  }

  /** Whole pieces, without what the server holds back. */
  get shownPieces() {
    return this.pieces.filter((piece) => piece.end <= this._shownEnd);
  }

  /** Add a choice of the stream. */
  add(choice) {
    if (choice.prompt_token_ids && !this.promptIds) this.promptIds = choice.prompt_token_ids;
    this._shownEnd += withoutReturns(choice.text).length;
    for (const token of choice.logprobs?.content ?? []) this._addToken(token);
  }

  /** End at the last character that may be shown; what remains of an incomplete one is dropped. */
  finish() {
    const last = this.pieces.findLast((piece) => piece.start < this._shownEnd);
    this.pieces = this.pieces.filter((piece) => piece.start < this._shownEnd);
    if (last && last.end > this._shownEnd) {
      // a stop text began within a token
      last.text = last.text.slice(0, this._shownEnd - last.start);
      last.end = this._shownEnd;
    }
    this.tokens.length = last ? last.first + last.count : 0;
  }

  _addToken(token) {
    const first = this._firstPending();
    this.tokens.push(token);
    const text = withoutReturns(this._decoder.decode(new Uint8Array(token.bytes), { stream: true }));
    if (!text) return;
    const start = this._end;
    this._end += text.length;
    this.pieces.push({ text, start, end: this._end, first, count: this.tokens.length - first, continuation: this });
  }

  /** The first token whose bytes do not belong to a piece yet. */
  _firstPending() {
    const last = this.pieces.at(-1);
    return last ? last.first + last.count : 0;
  }
}

/** A text as a textarea keeps it, which knows line feeds only. */
const withoutReturns = (text) => text.replaceAll("\r", "");

/** The probability of a piece, which is that of all its tokens, in [0, 1]. */
export function probability(piece) {
  const tokens = piece.continuation.tokens.slice(piece.first, piece.first + piece.count);
  return Math.exp(tokens.reduce((sum, token) => sum + token.logprob, 0));
}

/** Lower bounds of the classes of probability, from class 0, the least likely, on. */
export const PROBABILITY_CLASSES = [0, 0.05, 0.2, 0.5, 0.8];
export const probabilityClass = (value) => PROBABILITY_CLASSES.findLastIndex((bound) => value >= bound);

/** How a token is shown by itself: spaces and line breaks visible, parts of a character as bytes. */
export function tokenLabel(token) {
  // the only special token that a trained model finds likely
  if (!token.bytes.length) return "end of text";
  try {
    const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(new Uint8Array(token.bytes));
    return text.replaceAll(" ", "\u00b7").replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5");
  } catch {
    return `bytes ${token.bytes.map((byte) => byte.toString(16).toUpperCase().padStart(2, "0")).join(" ")}`;
  }
}

/** A probability as a person reads it: 93 %, 4.2 %, < 0.1 %. */
export function percent(value) {
  if (value < 0.001) return "< 0.1 %";
  return `${value < 0.1 ? (100 * value).toFixed(1) : Math.round(100 * value)} %`;
}
