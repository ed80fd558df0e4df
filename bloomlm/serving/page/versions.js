/** The list of all versions of the text, indented where the tree has forks. */

import { element } from "./elements.js";

const MARKS = { written: "\u270e", continued: "\u2192", branched: "\u21b3" };
const ENDS = { stopped: "stopped", failed: "broken off", stop: "ended" };
const DEEPEST = 5;

/** Draw the versions of a story; `visit` is called with the one that is chosen. */
export function drawVersions(list, story, visit) {
  const rows = [];
  collect(story.root, 0, rows);
  // the empty sheet is no version worth returning to
  const shown = rows.filter(({ version }) => version.text);
  list.replaceChildren(...shown.map(({ version, depth }) => row(version, depth, story.current, visit)));
}

function collect(version, depth, rows) {
  rows.push({ version, depth: Math.min(depth, DEEPEST) });
  const forks = version.children.length > 1;
  for (const child of version.children) collect(child, depth + (forks ? 1 : 0), rows);
}

function row(version, depth, current, visit) {
  const details = [version.model, version.numTokens && `${version.numTokens} tokens`, ENDS[version.end]];
  const button = element("button", { type: "button", class: `version depth${depth}`, title: version.kind }, [
    element("span", { class: "mark", "aria-label": version.kind }, [MARKS[version.kind]]),
    element("span", { class: "snippet", dir: "auto" }, [snippet(version)]),
    element("small", {}, [element("bdi", {}, [details.filter(Boolean).join(" \u00b7 ")])]),
  ]);
  if (version === current) button.setAttribute("aria-current", "true");
  button.addEventListener("click", () => visit(version));
  return element("li", {}, [button]);
}

/** The beginning of what is new in a version. */
function snippet({ kind, text, from }) {
  // what was written may begin within a word
  const wordStart = text.slice(0, from).search(/\S{1,12}$/u);
  const start = kind === "written" && wordStart >= 0 && /^\S/u.test(text.slice(from)) ? wordStart : from;
  return [...text.slice(start).trim().replace(/\s+/gu, " ")].slice(0, 60).join("") || "(shortened)";
}

/** Arrow keys move within the list. */
export function moveByArrows(list) {
  list.addEventListener("keydown", (event) => {
    const distance = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!distance) return;
    const buttons = [...list.querySelectorAll("button")];
    buttons[buttons.indexOf(document.activeElement) + distance]?.focus();
    event.preventDefault();
  });
}
