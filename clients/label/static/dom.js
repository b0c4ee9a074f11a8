// Elements, and the little that all parts do with them.

export const byId = (id) => document.getElementById(id);

/** A new element with properties (`dataset` and `style` as maps) and content. */
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

/** Says a line to who listens to the page. */
export function announce(text) {
  const log = byId("announcements");
  log.append(element("p", {}, text));
  while (log.children.length > 5) log.firstChild.remove();
}

/** Seconds as 1:02:03.456. */
export function clock(seconds) {
  const ms = Math.round(seconds * 1000);
  const two = (number) => String(number).padStart(2, "0");
  const minutes = Math.floor(ms / 60000) % 60;
  const hours = Math.floor(ms / 3600000);
  const rest = `${two(Math.floor(ms / 1000) % 60)}.${String(ms % 1000).padStart(3, "0")}`;
  return hours ? `${hours}:${two(minutes)}:${rest}` : `${minutes}:${rest}`;
}

/** The style sheet's colour of a class, by its number. */
export const classColour = (number) => `var(--class-${number % 10})`;
