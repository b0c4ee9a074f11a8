// Elements, and the little that all parts do with them.

export const byId = (id) => document.getElementById(id);

/** A new element with properties (a class as `className`, `dataset` and `style` as maps) and content. */
export function element(tag, properties = {}, ...content) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "dataset" || name === "style") Object.assign(made[name], value);
    else if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...content);
  return made;
}

/** Sets a text only where it is another one, so that nothing is laid out or read aloud again. */
export function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

/** Sets the children only where they are others or in another order. */
export function setChildren(target, children) {
  const same =
    target.children.length === children.length &&
    children.every((child, n) => target.children[n] === child);
  if (!same) target.replaceChildren(...children);
}

const ANNOUNCEMENTS_KEPT = 5;

/** Says a line to who listens to the page. */
export function announce(text) {
  const log = byId("announcements");
  log.append(element("p", {}, text));
  while (log.children.length > ANNOUNCEMENTS_KEPT) log.firstChild.remove();
}
