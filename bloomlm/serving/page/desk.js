/** The writing desk: continues, stops, branches, and walks through the versions of the text. */

import { Alternatives } from "./alternatives.js";
import { complete, countTokens } from "./api.js";
import { Columns } from "./columns.js";
import { Continuation } from "./continuation.js";
import { Editor } from "./editor.js";
import { byId } from "./elements.js";
import { pause } from "./notice.js";
import { Story } from "./story.js";
import { drawVersions, moveByArrows } from "./versions.js";

const DRAFT = "bloomlm.text";
const NUM_ALTERNATIVES = 5;
const COUNT_DELAY_MS = 400;
const SPACE_HINT = "The text ended with a space; most tokens begin with their own.";

export class Desk {
  /**
   * @param {{settings: import("./settings.js").Settings, notice: import("./notice.js").Notice, model: () => string,
   *   refused: (error: Error) => void}} page refused: called with an error that concerns more than this text
   */
  constructor({ settings, notice, model, refused }) {
    this._settings = settings;
    this._notice = notice;
    this._model = model;
    this._refused = refused;
    this._running = null;
    this.story = new Story(localStorage.getItem(DRAFT) ?? "");
    this.editor = new Editor(
      { input: byId("text"), layer: byId("layer") },
      {
        edited: () => this._edited(),
        pieceChosen: (piece) => this._running || this.alternatives.open(piece, { focus: false }),
      },
    );
    this.alternatives = new Alternatives(byId("alternatives"), {
      editor: this.editor,
      branch: (piece, tokenNumber, alternative) => this.branch(piece, tokenNumber, alternative),
    });
    this.columns = new Columns({ keep: (version) => this._keep(version) });
    moveByArrows(byId("versions"));
    this._draw();
  }

  /** Let the model, or several side by side, go on from the end of the text. */
  async continue() {
    // before the server has named its models, the notice says what is waited for
    if (this._running || !this._model() || !this._settings.check()) return;
    if (!this.editor.text) {
      this._notice.show("error", "There is nothing to continue yet: write some words first.");
      this.editor.input.focus();
      return;
    }
    this.story.write(this.editor.text);
    const first = this._model();
    const models = [first, ...this._settings.compared.filter((name) => name !== first)];
    await this._while(() => (models.length > 1 ? this._continueInColumns(models) : this._continueHere(first)));
  }

  /** Go on from another token at a place of the text. */
  async branch(piece, tokenNumber, alternative) {
    if (this._running || !this._settings.check()) return;
    this.story.write(this.editor.text);
    const continuation = piece.continuation.branch(tokenNumber, alternative);
    await this._while(() => this._grow(continuation, piece.version.parent, "branched", piece.start));
  }

  stop() {
    this._running?.abort();
  }

  undo() {
    this._walk(() => this.story.undo());
  }

  redo() {
    this._walk(() => this.story.redo());
  }

  visit(version) {
    this._walk(() => this.story.visit(version));
  }

  /** Begin with a given text, as a version of its own. */
  begin(text) {
    this.story.write(text);
    this._draw();
    this.editor.input.focus();
  }

  _keep(version) {
    this.visit(version);
    // the columns, which are gone, were below the text
    this.editor.showEnd();
  }

  get isEdited() {
    return this.editor.text !== this.story.current.text;
  }

  /** Show the number of tokens of the text. */
  async count() {
    this._counting?.abort();
    this._counting = new AbortController();
    const { signal } = this._counting;
    try {
      await pause(COUNT_DELAY_MS, signal);
      if (!this._model()) return;
      const { count, limit } = await countTokens(this._model(), this.editor.text, signal);
      byId("count").textContent = `${count.toLocaleString("en")} of ${limit.toLocaleString("en")} tokens`;
      byId("count").classList.toggle("over", count > limit);
    } catch {
      // the counter is a convenience; what is wrong with the server is said when text is asked for
      if (!signal.aborted) byId("count").textContent = "";
    }
  }

  async _continueHere(model) {
    const parent = this.story.current;
    const said = await this._grow(new Continuation(model, parent.text), parent, "continued");
    return said || (parent.text.endsWith(" ") ? SPACE_HINT : "");
  }

  async _grow(continuation, parent, kind, from) {
    const before = parent.pieces.filter((piece) => piece.end <= continuation.base.length);
    const draw = () => {
      this.editor.show(continuation.text, [...before, ...continuation.shownPieces]);
      this._follow();
    };
    draw();
    const end = await this._receive(continuation, draw);
    if (continuation.text !== parent.text) this.story.visit(this.story.add(continuation, { parent, kind, end, from }));
    return end === "stop" && continuation.text === parent.text ? "The model ends the text here." : "";
  }

  async _continueInColumns(models) {
    const parent = this.story.current;
    const columns = this.columns.open(models);
    const versions = await Promise.all(
      models.map(async (model, place) => {
        const continuation = new Continuation(model, parent.text);
        const draw = () => columns[place].draw(continuation);
        draw();
        const end = await this._receive(continuation, draw);
        draw();
        const notes = { stopped: "stopped", failed: "broken off", stop: "ended by the model" };
        columns[place].finish(notes[end] ?? `${continuation.tokens.length} tokens`);
        return continuation.text !== parent.text
          ? this.story.add(continuation, { parent, kind: "continued", end })
          : null;
      }),
    );
    versions.forEach((version, place) => columns[place].offer(version));
    return "";
  }

  /** Read a continuation to its end; returns why it ended. */
  async _receive(continuation, draw) {
    const { signal } = this._running;
    let end = "failed";
    let frame = 0;
    try {
      for await (const choice of this._choices(continuation, signal)) {
        continuation.add(choice);
        end = choice.finish_reason ?? end;
        cancelAnimationFrame(frame);
        frame = requestAnimationFrame(draw);
      }
    } catch (error) {
      end = error.name === "AbortError" ? "stopped" : "failed";
      if (end === "failed") this._fail(error);
    }
    cancelAnimationFrame(frame);
    continuation.finish();
    return end;
  }

  /** The choices of a stream; a server that is full is asked again after the time that it names. */
  async *_choices(continuation, signal) {
    const body = { model: continuation.model, prompt: continuation.prompt, ...this._settings.body };
    Object.assign(body, { logprobs: NUM_ALTERNATIVES, return_token_ids: true });
    for (;;) {
      try {
        yield* complete(body, signal);
        return;
      } catch (error) {
        if (error.status !== 429) throw error;
        await this._notice.countDown(error.retryAfterSeconds, error.message, signal);
      }
    }
  }

  /** Do work that can be stopped, while the text cannot be edited. It returns what to say at its end. */
  async _while(work) {
    this._running = new AbortController();
    this._notice.hide();
    this.alternatives.close();
    this.columns.close();
    this._say("The model is writing.");
    this._showRunning(true);
    let last = "";
    try {
      last = await work();
    } finally {
      const { aborted } = this._running.signal;
      this._running = null;
      if (aborted) this._notice.hide();
      this._showRunning(false);
      this._draw();
      this._say(aborted ? "Stopped." : last);
    }
  }

  _showRunning(running) {
    const hadFocus = [byId("continue"), byId("stop")].includes(document.activeElement);
    byId("continue").hidden = running;
    byId("stop").hidden = !running;
    if (hadFocus) byId(running ? "stop" : "continue").focus();
    this.editor.input.readOnly = running;
    document.body.classList.toggle("running", running);
    this._showButtons();
  }

  _fail(error) {
    this._notice.show("error", error.message);
    this._refused(error);
  }

  _edited() {
    this.alternatives.close();
    this.editor.show(this.editor.text, this.story.piecesOf(this.editor.text));
    this._changed();
  }

  _walk(step) {
    if (this._running) return;
    this.story.write(this.editor.text);
    step();
    this.alternatives.close();
    this.columns.close();
    this._draw();
    this.editor.input.focus();
  }

  _draw() {
    const { text, pieces } = this.story.current;
    this.editor.show(text, pieces);
    byId("no-versions").hidden = this.story.root.children.length > 0;
    drawVersions(byId("versions"), this.story, (version) => this.visit(version));
    this._changed();
  }

  _changed() {
    localStorage.setItem(DRAFT, this.editor.text);
    byId("starters").hidden = this.editor.text !== "";
    this._showButtons();
    this.count();
  }

  _showButtons() {
    const idle = !this._running;
    byId("undo").disabled = !(idle && (this.story.canUndo || this.isEdited));
    byId("redo").disabled = !(idle && this.story.canRedo && !this.isEdited);
    for (const id of ["copy", "download"]) byId(id).disabled = !this.editor.text;
  }

  _say(text) {
    byId("status").textContent = text;
  }

  /** Keep the end of the text in view while it grows, unless the reader has scrolled away. */
  _follow() {
    const page = document.scrollingElement;
    const isNearEnd = page.scrollHeight - page.scrollTop - page.clientHeight < 160;
    if (isNearEnd) page.scrollTop = page.scrollHeight;
  }
}
