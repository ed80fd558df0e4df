/** The settings of a continuation, kept in the browser. */

import { apiKey, setApiKey } from "./api.js";
import { byId, element } from "./elements.js";

const STORED = "bloomlm.settings";
const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "repetition_penalty"];

/** Reads and keeps the form; keyChanged is called after a change of the API key. */
export class Settings {
  constructor(form, { keyChanged }) {
    this._form = form;
    this._restore();
    form.addEventListener("input", () => this._keep());
    form.addEventListener("submit", (event) => event.preventDefault());
    byId("defaults").addEventListener("click", () => {
      const compared = this.compared;
      form.reset();
      this._compare(compared);
      this._keep();
    });
    const key = byId("api-key");
    key.value = apiKey();
    key.addEventListener("change", () => {
      setApiKey(key.value);
      keyChanged();
    });
  }

  /** Whether every number is one that the server can take; shows the browser's message where not. */
  check() {
    return this._form.reportValidity();
  }

  /** Members of the body of a request. */
  get body() {
    const fields = this._form.elements;
    const body = Object.fromEntries(NUMBERS.map((name) => [name, fields[name].valueAsNumber]));
    const stop = fields.stop.value.split("\n").filter(Boolean).map(unescaped);
    if (stop.length) body.stop = stop;
    if (fields.seed.value !== "") body.seed = fields.seed.valueAsNumber;
    return body;
  }

  /** Names of the models that continue side by side with the chosen one. */
  get compared() {
    return [...this._form.querySelectorAll("[name=compare]:checked")].map((box) => box.value);
  }

  /** Offer the other models for columns. */
  offerModels(names) {
    const chosen = this.compared;
    const rows = names.map((name) => {
      const box = element("input", { type: "checkbox", name: "compare", value: name });
      return element("label", { class: "check" }, [box, element("bdi", {}, [name])]);
    });
    byId("compare-list").replaceChildren(...rows);
    byId("compare").hidden = !names.length;
    this._compare(chosen);
  }

  _compare(names) {
    for (const box of this._form.querySelectorAll("[name=compare]")) box.checked = names.includes(box.value);
  }

  _keep() {
    const values = Object.fromEntries(
      [...NUMBERS, "stop", "seed"].map((name) => [name, this._form.elements[name].value]),
    );
    localStorage.setItem(STORED, JSON.stringify(values));
  }

  _restore() {
    const values = JSON.parse(localStorage.getItem(STORED) ?? "{}");
    for (const [name, value] of Object.entries(values))
      if (this._form.elements[name]) this._form.elements[name].value = value;
  }
}

/** \n and \t as people write them in a field. */
const unescaped = (text) => text.replaceAll("\\n", "\n").replaceAll("\\t", "\t");
