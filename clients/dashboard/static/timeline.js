// One stream's timeline: curves on a canvas, drawn by uPlot, and actions as bars above a baseline.
//
// The right edge is the stream's newest snippet. It moves as the stream moves: where nothing comes,
// nothing scrolls.

/* global uPlot */
import { classColour, resolve } from "./colours.js";
import { element, setChildren, setText } from "./dom.js";
import { score, stateOf, streamTime } from "./format.js";

const CURVES = 3;
const CURVES_HEIGHT = 46;
const LANE_HEIGHT = 19;
const MOST_LANES = 4;

export class Timeline {
  #bars = new Map(); // event's number -> its element
  #plot = null;
  #classes = []; // numbers of those that are drawn
  #span = [0, 1];

  constructor() {
    this.legend = element("p", { className: "legend" });
    this.canvas = element("div", { className: "curves" });
    this.lanes = element("div", { className: "lanes" });
    this.figure = element("figure", { className: "timeline", role: "img" }, this.canvas, this.lanes);
  }

  /** Draws `row` with its `events`; `spanS` is how much of its time fits. */
  draw(model, row, events, spanS) {
    const snippetS = model.snippetS;
    if (!snippetS) return;
    const headS = row.head * snippetS;
    this.#span = [headS - spanS, headS];
    const shown = events.filter((event) => isWithin(event, this.#span, snippetS));
    this.#drawBars(model, shown, snippetS);
    this.#drawCurves(model, row, snippetS);
  }

  /** Says the same in words. */
  tell(model, row, events, spanS) {
    const headS = row.head * (model.snippetS ?? 0);
    const shown = events.filter(
      (event) => event.type === "action" && (event.end_s ?? headS) > headS - spanS,
    );
    const text = summary(row, shown, spanS);
    if (this.figure.getAttribute("aria-label") !== text) {
      this.figure.setAttribute("aria-label", text);
    }
  }

  /** Gives up the canvas of a row that is out of sight. */
  release() {
    this.#plot?.destroy();
    this.#plot = null;
  }

  /** The canvas has its colours and its width from the page. */
  restyle() {
    this.release();
  }

  #drawBars(model, events, snippetS) {
    const actions = events.filter((event) => event.type === "action");
    const gaps = events.filter((event) => event.state === "gap");
    actions.sort((a, b) => a.start_s - b.start_s || a.n - b.n);
    const ends = [];
    const bars = actions.map((action) => {
      const stopS = action.end_s ?? this.#span[1];
      let lane = ends.findIndex((endS) => endS <= action.start_s + 1e-6);
      if (lane < 0) lane = Math.min(ends.length, MOST_LANES - 1);
      ends[lane] = Math.max(ends[lane] ?? 0, stopS);
      return this.#place(this.#bar(model, action), action.start_s, stopS, lane);
    });
    const holes = gaps.map((gap) =>
      this.#place(this.#gap(gap), gap.first_index * snippetS, gap.next_index * snippetS, null),
    );
    this.lanes.style.height = `${Math.max(1, ends.length) * LANE_HEIGHT}px`;
    setChildren(this.lanes, [...holes, ...bars]);
    const kept = new Set(events.map((event) => event.n));
    for (const n of this.#bars.keys()) if (!kept.has(n)) this.#bars.delete(n);
  }

  #bar(model, action) {
    let bar = this.#bars.get(action.n);
    if (!bar) {
      bar = element("div", { className: "bar-of-action" }, element("span"));
      this.#bars.set(action.n, bar);
    }
    bar.dataset.state = action.state;
    bar.dataset.label = action.label;
    bar.dataset.start = action.start_s;
    bar.dataset.end = action.end_s ?? "";
    bar.style.setProperty("--class", classColour(model.labelNumber(action.label)));
    bar.title = describe(action);
    setText(bar.firstChild, action.label);
    return bar;
  }

  #gap(notice) {
    let gap = this.#bars.get(notice.n);
    if (!gap) {
      gap = element("div", { className: "gap" });
      gap.title = `gap: ${notice.next_index - notice.first_index} snippets are missing`;
      this.#bars.set(notice.n, gap);
    }
    return gap;
  }

  #place(target, startS, stopS, lane) {
    const [fromS, toS] = this.#span;
    const share = (s) => (Math.min(Math.max(s, fromS), toS) - fromS) / (toS - fromS);
    target.style.left = `${(share(startS) * 100).toFixed(3)}%`;
    target.style.width = `${((share(stopS) - share(startS)) * 100).toFixed(3)}%`;
    if (lane !== null) target.style.top = `${lane * LANE_HEIGHT}px`;
    target.classList.toggle("cut", startS < fromS);
    return target;
  }

  #drawCurves(model, row, snippetS) {
    const scores = model.scores.get(row.stream);
    this.figure.classList.toggle("no-curves", !scores?.size);
    this.legend.hidden = !scores?.size;
    if (!scores?.size) return this.release();
    const first = Math.max(0, Math.floor(this.#span[0] / snippetS));
    const names = model.engine.classes;
    this.#classes = scores.strongest(first, row.head, CURVES).sort((a, b) => a - b);
    const columns = scores.columns(first, row.head, this.#classes);
    this.#tellCurves(model, names, columns);
    while (columns.length <= CURVES) columns.push(columns[0].map(() => null));
    const times = columns[0].map((_, n) => (first + n + 0.5) * snippetS);
    const width = this.canvas.clientWidth;
    if (!width) return;
    if (!this.#plot) this.#plot = this.#newPlot(model, names, width);
    else if (this.#plot.width !== width) this.#plot.setSize({ width, height: CURVES_HEIGHT });
    this.#plot.setData([times, ...columns]);
  }

  /** The newest values in words, which is also the curves' legend. */
  #tellCurves(model, names, columns) {
    const newest = (column) => column.findLast((value) => value !== null);
    const entries = [["attention", "var(--attention)", newest(columns[0])]];
    this.#classes.forEach((k, n) => {
      entries.push([names[k], classColour(model.labelNumber(names[k])), newest(columns[n + 1])]);
    });
    const items = entries.filter(([, , value]) => value !== undefined);
    while (this.legend.children.length > items.length) this.legend.lastChild.remove();
    items.forEach(([name, colour, value], n) => {
      const item = this.legend.children[n] ?? this.legend.appendChild(element("span"));
      item.style.setProperty("--class", colour);
      item.dataset.curve = name;
      item.dataset.value = value;
      if (!item.firstChild) item.append(element("span"), " ", element("b"));
      setText(item.children[0], name);
      setText(item.children[1], score(value));
    });
  }

  #newPlot(model, names, width) {
    const colourOf = (_plot, n) => {
      const k = this.#classes[n - 2];
      return resolve(k === undefined ? "transparent" : classColour(model.labelNumber(names[k])));
    };
    const curve = { stroke: colourOf, width: 1.5, points: { show: false } };
    const attention = {
      stroke: () => resolve("var(--attention)"),
      fill: () => resolve("var(--attention-area)"),
      width: 1,
      points: { show: false },
    };
    const options = {
      width,
      height: CURVES_HEIGHT,
      padding: [3, 0, 0, 0],
      cursor: { show: false },
      legend: { show: false },
      axes: [{ show: false }, { show: false }],
      scales: { x: { time: false, range: () => this.#span }, y: { range: [0, 1] } },
      series: [{}, attention, ...Array.from({ length: CURVES }, () => curve)],
    };
    return new uPlot(options, [[], ...Array.from({ length: CURVES + 1 }, () => [])], this.canvas);
  }
}

function isWithin(event, [fromS, toS], snippetS) {
  if (event.type === "action") return event.start_s < toS && (event.end_s ?? toS) > fromS;
  return event.state === "gap" && event.next_index * snippetS > fromS;
}

/** An action in words. */
function describe(action) {
  const end = action.end_s === null ? "" : ` to ${streamTime(action.end_s)}`;
  const since = action.end_s === null ? "since " : "";
  return (
    `${action.label}, ${since}${streamTime(action.start_s)}${end}, ` +
    `score ${score(action.score)}, ${stateOf(action)}`
  );
}

/** What somebody hears who does not see the timeline. */
function summary(row, actions, spanS) {
  const open = actions.filter((action) => action.state === "now").map((action) => action.label);
  const ended = actions.filter((action) => action.state === "ended").length;
  const now = open.length ? `${open.join(", ")} going on` : "no action going on";
  return `Timeline of ${row.stream}, the last ${spanS / 60} min: ${now}, ${ended} ended`;
}
