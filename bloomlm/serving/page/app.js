/** Starts the page: models, tabs, theme, keys. */

import { listModels } from "./api.js";
import { Desk } from "./desk.js";
import { byId, element } from "./elements.js";
import { Notice, pause } from "./notice.js";
import { Settings } from "./settings.js";
import { Training } from "./training.js";

const MODEL = "bloomlm.model";
const THEME = "bloomlm.theme";
const COLOURS = "bloomlm.colours";
const RETRY_MS = 1500;

const notice = new Notice(byId("notice"));
const modelField = byId("model");
const settings = new Settings(byId("settings"), { keyChanged: () => connect() });
const training = new Training();
const desk = new Desk({ settings, notice, model: () => modelField.value, refused });

/** Wait for the server and list its models. */
async function connect() {
  for (;;) {
    try {
      showModels(await listModels());
      notice.hide();
      await desk.count();
      return;
    } catch (error) {
      notice.show(error.status === 503 ? "wait" : "error", error.message);
      if (error.status === 401) return askForKey();
      await pause(RETRY_MS);
    }
  }
}

function refused(error) {
  if (error.status === 401) askForKey();
  if (error.status === 503) connect();
}

function askForKey() {
  byId("connection").open = true;
  byId("api-key").focus();
}

function showModels(models) {
  const options = models.map(({ id, parent }) => element("option", { value: id }, [parent ? `${id} (adapter)` : id]));
  const chosen = modelField.value || localStorage.getItem(MODEL);
  modelField.replaceChildren(...options);
  if (models.some(({ id }) => id === chosen)) modelField.value = chosen;
  offerOthers();
}

function offerOthers() {
  const names = [...modelField.options].map((option) => option.value);
  settings.offerModels(names.filter((name) => name !== modelField.value));
}

modelField.addEventListener("change", () => {
  localStorage.setItem(MODEL, modelField.value);
  offerOthers();
  desk.count();
});

for (const [id, action] of Object.entries({ continue: "continue", stop: "stop", undo: "undo", redo: "redo" })) {
  byId(id).addEventListener("click", () => desk[action]());
}

for (const starter of document.querySelectorAll("#starters button")) {
  starter.addEventListener("click", () => desk.begin(starter.value));
}

byId("copy").addEventListener("click", async () => {
  // a page that was not loaded by https or from this machine has no clipboard
  if (navigator.clipboard) await navigator.clipboard.writeText(desk.editor.text);
  else {
    desk.editor.input.select();
    document.execCommand("copy");
  }
  byId("status").textContent = "Copied.";
});

byId("download").addEventListener("click", () => {
  const link = element("a", { download: "text.txt" });
  link.href = URL.createObjectURL(new Blob([desk.editor.text], { type: "text/plain" }));
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});

document.addEventListener("keydown", (event) => {
  if (byId("write").hidden) return;
  const control = event.ctrlKey || event.metaKey;
  const inText = event.target === desk.editor.input;
  const key = event.key.toLowerCase();
  if (control && event.key === "Enter") desk.continue();
  else if (event.key === "Escape") {
    if (desk.alternatives.isOpen) desk.alternatives.close();
    else desk.stop();
  } else if (inText && event.altKey && event.key === "ArrowDown") openAlternatives();
  // an edited text is undone by the browser, letter by letter, until it is the version again
  else if (inText && control && !desk.isEdited && key === "z") desk[event.shiftKey ? "redo" : "undo"]();
  else if (inText && control && !desk.isEdited && key === "y") desk.redo();
  else return;
  event.preventDefault();
});

function openAlternatives() {
  const piece = desk.editor.pieceAtCursor();
  if (piece) desk.alternatives.open(piece, { focus: true });
}

const colours = byId("colours");
colours.checked = localStorage.getItem(COLOURS) !== "off";
colours.addEventListener("change", showColours);
function showColours() {
  localStorage.setItem(COLOURS, colours.checked ? "on" : "off");
  document.body.classList.toggle("plain", !colours.checked);
}
showColours();

const theme = byId("theme");
theme.value = localStorage.getItem(THEME) ?? "auto";
theme.addEventListener("change", showTheme);
function showTheme() {
  localStorage.setItem(THEME, theme.value);
  document.documentElement.dataset.theme = theme.value;
  training.redraw();
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => training.redraw());

const tabs = [...document.querySelectorAll("[role=tab]")];
function showTab() {
  const chosen = tabs.find((tab) => location.hash === `#${tab.getAttribute("aria-controls")}`) ?? tabs[0];
  for (const tab of tabs) {
    tab.setAttribute("aria-selected", String(tab === chosen));
    tab.tabIndex = tab === chosen ? 0 : -1;
    byId(tab.getAttribute("aria-controls")).hidden = tab !== chosen;
  }
  training.setVisible(chosen.id === "tab-training");
}
for (const [place, tab] of tabs.entries()) {
  tab.addEventListener("click", () => {
    // not location.hash, which would move the focus to the panel
    history.replaceState(null, "", `#${tab.getAttribute("aria-controls")}`);
    showTab();
  });
  tab.addEventListener("keydown", (event) => {
    const distance = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!distance) return;
    const next = tabs[(place + distance + tabs.length) % tabs.length];
    next.focus();
    next.click();
  });
}
addEventListener("hashchange", showTab);

showTheme();
showTab();
connect();
