// The actions that are going on, of all streams, and pictures of what happens.

import { classColour } from "./colours.js";
import { byId, element, setChildren, setText } from "./dom.js";
import { duration, score, streamTime } from "./format.js";

const MOST = 60;

export class Now {
  #items = new Map(); // event's number -> its elements
  #model;

  constructor(model) {
    this.#model = model;
  }

  draw() {
    const open = this.#model.openActions().filter((action) => action.state === "now");
    open.sort((a, b) => b.n - a.n);
    const shown = open.slice(0, MOST);
    const kept = new Set(shown.map((action) => action.n));
    for (const n of this.#items.keys()) if (!kept.has(n)) this.#items.delete(n);
    setChildren(byId("now"), shown.map((action) => this.#item(action)));
    setText(byId("now-count"), open.length ? `${open.length}` : "");
    byId("now-none").hidden = open.length > 0;
  }

  #item(action) {
    if (!this.#items.has(action.n)) this.#items.set(action.n, newItem(this.#model, action));
    const { item, facts } = this.#items.get(action.n);
    const row = this.#model.rows.get(action.stream);
    const parts = [action.stream, `since ${streamTime(action.start_s)}`];
    if (row && this.#model.snippetS) {
      parts.push(duration(Math.max(0, row.head * this.#model.snippetS - action.start_s)));
    }
    parts.push(score(action.score));
    setText(facts, parts.join(" · "));
    return item;
  }
}

function newItem(model, action) {
  const facts = element("span", { className: "facts" });
  const label = element("strong", {}, action.label);
  const item = element("li", { className: "now-item" }, element("div", {}, label, facts));
  item.style.setProperty("--class", classColour(model.labelNumber(action.label)));
  const picture = thumbnail(model, action);
  if (picture) item.prepend(picture);
  return { item, facts };
}

/** The picture of an action's beginning, where a camera client has one; it is no loss without. */
export function thumbnail(model, action) {
  if (!model.thumbnails.has(action.stream) || !model.snippetS) return null;
  const middleS = action.end_s === null ? action.start_s : (action.start_s + action.end_s) / 2;
  const index = Math.max(0, Math.floor(middleS / model.snippetS));
  const picture = element("img", {
    className: "thumbnail",
    src: `/thumbnail/${encodeURIComponent(action.stream)}/${index}.jpg`,
    alt: `${action.stream} at ${streamTime(middleS)}`,
    loading: "lazy",
    decoding: "async",
    width: 64,
    height: 36,
  });
  picture.addEventListener("error", () => picture.remove());
  return picture;
}
