// Recent events of all streams, newest first, filtered and searched.

import { classColour } from "./colours.js";
import { byId, element, setChildren, setText } from "./dom.js";
import { byName, score, stateOf, streamTime, timeOfDay } from "./format.js";
import { isOpen } from "./model.js";
import { thumbnail } from "./now.js";

const MOST = 200;

const KINDS = {
  open: isOpen,
  ended: (event) => event.type === "action" && event.state === "ended",
  retracted: (event) => event.type === "action" && ["retracted", "lost"].includes(event.state),
  notice: (event) => event.type === "notice",
};

export class Events {
  #rows = new Map(); // event's number -> { event, row }
  #model;
  #form = byId("events-filter");

  constructor(model, wake) {
    this.#model = model;
    this.#form.addEventListener("input", wake);
    this.#form.addEventListener("reset", () => setTimeout(wake));
    this.#form.addEventListener("submit", (event) => event.preventDefault());
  }

  draw() {
    const streams = new Set([...this.#model.events.values()].map((each) => each.stream));
    this.#offer("stream", "all streams", [...streams]);
    this.#offer("label", "all actions", [...this.#model.labels.keys()]);
    const wanted = this.#wanted();
    const found = [...this.#model.events.values()].filter(wanted).sort((a, b) => b.n - a.n);
    const shown = found.slice(0, MOST);
    const kept = new Set(shown.map((event) => event.n));
    for (const n of this.#rows.keys()) if (!kept.has(n)) this.#rows.delete(n);
    setChildren(byId("events-rows"), shown.map((event) => this.#row(event)));
    setText(
      byId("events-count"),
      found.length > MOST ? `newest ${MOST} of ${found.length}` : `${found.length}`,
    );
    byId("events-none").hidden = found.length > 0;
    setText(byId("events-none"), this.#model.events.size ? "No event is like that." : "Nothing yet.");
  }

  /** The choices of a filter; what is chosen stays. */
  #offer(name, all, choices) {
    const select = this.#form.elements[name];
    choices.sort(byName);
    if (select.dataset.choices === choices.join("\n") && select.options.length) return;
    select.dataset.choices = choices.join("\n");
    const chosen = select.value;
    const options = [["", all], ...choices.map((each) => [each, each])];
    select.replaceChildren(...options.map(([value, text]) => element("option", { value }, text)));
    if (choices.includes(chosen)) select.value = chosen;
  }

  #wanted() {
    const { text, stream, label, what, score: least } = this.#form.elements;
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const leastScore = Number(least.value) || 0;
    const isKind = KINDS[what.value] ?? (() => true);
    return (event) => {
      if (stream.value && event.stream !== stream.value) return false;
      if (label.value && event.label !== label.value) return false;
      if (leastScore && !(event.score >= leastScore)) return false;
      if (!isKind(event)) return false;
      if (!words.length) return true;
      const said = `${event.stream} ${event.label ?? ""} ${stateOf(event)}`.toLowerCase();
      return words.every((word) => said.includes(word));
    };
  }

  #row(event) {
    const known = this.#rows.get(event.n);
    if (known?.event === event) return known.row;
    const row = known?.row ?? element("tr");
    row.dataset.state = event.type === "notice" ? "notice" : event.state;
    row.replaceChildren(...(event.type === "notice" ? this.#notice(event) : this.#action(event)));
    this.#rows.set(event.n, { event, row });
    return row;
  }

  #action(event) {
    const label = element("strong", { className: "swatch" }, event.label);
    label.style.setProperty("--class", classColour(this.#model.labelNumber(event.label)));
    const what = element("td", {}, label, element("span", { className: "facts" }, stateOf(event)));
    const picture = thumbnail(this.#model, event);
    if (picture) what.prepend(picture);
    const end = event.end_s === null ? "" : streamTime(event.end_s);
    return [
      what,
      this.#where(event),
      number(`${streamTime(event.start_s)} – ${end}`),
      number(score(event.score)),
    ];
  }

  #notice(event) {
    const what = element("td", {}, stateOf(event));
    const snippetS = this.#model.snippetS;
    const time = (index) => (snippetS ? streamTime(index * snippetS) : `#${index}`);
    const from = event.state === "gap" ? `${time(event.first_index)} – ` : "";
    return [what, this.#where(event), number(`${from}${time(event.next_index)}`), number("")];
  }

  #where(event) {
    const at = element("time", { className: "facts", title: "when the dashboard heard of it" });
    at.dateTime = new Date(event.at * 1000).toISOString();
    at.textContent = timeOfDay(event.at);
    return element("td", {}, event.stream, at);
  }
}

const number = (text) => element("td", { className: "number" }, text);
