// The streams as rows. Only those that can be seen have a canvas and are drawn; the others are kept
// up to date in words, for who does not see them, and less often.

import { byId, element, setChildren, setText } from "./dom.js";
import { byName, duration, score, stateOf, streamTime } from "./format.js";
import { Timeline } from "./timeline.js";

// A stream that sends nothing for so long is said to.
const QUIET_S = 5;
const TELL_EVERY_MS = 2000;
const MOST_IN_TABLE = 100;

const ROW_STATES = {
  live: "live",
  quiet: "quiet",
  idle: "idle",
  ended: "ended",
  gone: "not in the engine",
};

export class Rows {
  #rows = new Map(); // stream -> Row
  #visible = new Set(); // streams
  #observer = new IntersectionObserver((seen) => this.#see(seen), { rootMargin: "120px 0px" });
  #model;
  #wake;
  spanS = 120;

  constructor(model, wake) {
    this.#model = model;
    this.#wake = wake;
    this.filter = byId("streams-filter");
    this.filter.addEventListener("input", wake);
    byId("span").addEventListener("change", ({ target }) => {
      this.spanS = Number(target.value);
      this.#drawRuler();
      wake();
    });
    new ResizeObserver(wake).observe(byId("rows"));
    this.#drawRuler();
  }

  draw() {
    const wanted = this.filter.value.trim().toLowerCase();
    const streams = [...this.#model.rows.keys()]
      .filter((stream) => stream.toLowerCase().includes(wanted))
      .sort(byName);
    for (const stream of this.#rows.keys()) if (!this.#model.rows.has(stream)) this.#drop(stream);
    setChildren(byId("rows"), streams.map((stream) => this.#row(stream).item));
    const all = this.#model.rows.size;
    setText(byId("streams-count"), streams.length === all ? `${all}` : `${streams.length} of ${all}`);
    byId("rows-none").hidden = streams.length > 0;
    setText(byId("rows-none"), all ? "No stream has this name." : "No stream yet. Feeders open streams.");
    const events = this.#model.byStream();
    for (const [stream, row] of this.#rows) {
      const own = events.get(stream) ?? [];
      if (this.#visible.has(stream)) row.draw(this.#model, own, this.spanS);
      else row.tell(this.#model, own, this.spanS);
    }
  }

  /** Another theme: a canvas keeps the colours that it was drawn with. */
  restyle() {
    for (const row of this.#rows.values()) row.timeline.restyle();
  }

  #row(stream) {
    if (!this.#rows.has(stream)) {
      const row = new Row(stream, this.#wake);
      this.#rows.set(stream, row);
      this.#observer.observe(row.item);
    }
    return this.#rows.get(stream);
  }

  #drop(stream) {
    const row = this.#rows.get(stream);
    this.#observer.unobserve(row.item);
    row.timeline.release();
    this.#rows.delete(stream);
    this.#visible.delete(stream);
  }

  #see(seen) {
    for (const { target, isIntersecting } of seen) {
      const stream = target.dataset.stream;
      if (isIntersecting) this.#visible.add(stream);
      else if (this.#visible.delete(stream)) this.#rows.get(stream)?.timeline.release();
    }
    this.#wake();
  }

  #drawRuler() {
    const marks = [1, 0.75, 0.5, 0.25, 0].map((share) => {
      const agoS = share * this.spanS;
      return element("span", {}, agoS ? `−${streamTime(agoS).replace(/\.0$/, "")}` : "newest");
    });
    byId("ruler").replaceChildren(...marks);
  }
}

/** One stream: its name and state, its timeline, and the same as a table. */
class Row {
  #state = element("span", { className: "chip" });
  #facts = element("p", { className: "facts" });
  #body = element("tbody");
  #table;
  #toldMs = -Infinity;

  constructor(stream, wake) {
    this.timeline = new Timeline();
    const id = `table-of-${stream}`;
    const button = element("button", {
      type: "button", className: "small", "aria-expanded": "false", "aria-controls": id,
      "aria-label": `Table of ${stream}`,
    }, "Table");
    const head = element("tr");
    for (const name of ["Action", "From", "To", "Score", "State"]) {
      head.append(element("th", { scope: "col" }, name));
    }
    const caption = element("caption", { className: "hidden" }, `Actions of ${stream}`);
    const table = element("table", {}, caption, element("thead", {}, head), this.#body);
    this.#table = element("div", { id, className: "row-table", hidden: true }, table);
    button.addEventListener("click", () => {
      this.#table.hidden = !this.#table.hidden;
      button.setAttribute("aria-expanded", String(!this.#table.hidden));
      wake();
    });
    const name = element("h3", { title: stream }, stream);
    const line = element("div", { className: "facts-line" }, this.#facts, button);
    this.item = element(
      "li",
      { className: "row", dataset: { stream } },
      element("div", { className: "row-head" }, name, this.#state, line, this.timeline.legend),
      this.timeline.figure,
      this.#table,
    );
  }

  draw(model, events, spanS) {
    const row = model.rows.get(this.item.dataset.stream);
    this.#tell(model, row, events, spanS);
    this.timeline.draw(model, row, events, spanS);
    if (!this.#table.hidden) this.#drawTable(events);
  }

  /** What is said of the row, if that was some time ago. */
  tell(model, events, spanS) {
    if (performance.now() - this.#toldMs < TELL_EVERY_MS) return;
    this.#tell(model, model.rows.get(this.item.dataset.stream), events, spanS);
  }

  #tell(model, row, events, spanS) {
    this.#toldMs = performance.now();
    const quietS = model.now - row.moved_at;
    const state = row.state === "live" && quietS > QUIET_S ? "quiet" : row.state;
    this.#state.dataset.state = state;
    setText(this.#state, state === "quiet" ? `quiet ${duration(quietS)}` : ROW_STATES[state]);
    this.#state.title = state === "quiet" ? "no new snippet for so long" : "";
    setText(this.#facts, facts(model, row));
    this.item.classList.toggle("lagging", (row.lag_ms ?? 0) > 2000);
    this.timeline.tell(model, row, events, spanS);
  }

  #drawTable(events) {
    const actions = events.filter((event) => event.type === "action");
    actions.sort((a, b) => b.start_s - a.start_s);
    const rows = actions.slice(0, MOST_IN_TABLE).map((action) => {
      const end = action.end_s === null ? "" : streamTime(action.end_s);
      const cells = [
        action.label, streamTime(action.start_s), end, score(action.score), stateOf(action),
      ];
      return element("tr", {}, ...cells.map((text) => element("td", {}, text)));
    });
    const none = element("tr", {}, element("td", { colSpan: 5 }, "No action yet."));
    this.#body.replaceChildren(...(rows.length ? rows : [none]));
  }
}

/** Its own time, lag and losses. */
function facts(model, row) {
  const parts = [model.snippetS ? streamTime(row.head * model.snippetS) : `#${row.head}`];
  if (row.state === "ended" || row.state === "gone") return parts[0];
  if (row.lag_ms) parts.push(`lag ${duration(row.lag_ms / 1000)}`);
  if (row.dropped) parts.push(`${row.dropped} dropped`);
  if (row.missing) parts.push(`${row.missing} missing`);
  if (row.fed_by === false && row.state === "live") parts.push("feeder gone");
  return parts.join(" · ");
}
