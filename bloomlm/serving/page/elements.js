/** Makes elements. Children are nodes or texts, never HTML: a model can write a script element. */

/**
 * @param {string} name
 * @param {Record<string, unknown>} attributes
 * @param {(Node | string)[]} children
 */
export function element(name, attributes = {}, children = []) {
  const made = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, String(value));
  made.append(...children);
  return made;
}

/** The element of the page with an id. */
export const byId = (id) => document.getElementById(id);
