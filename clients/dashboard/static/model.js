// What the page knows: kept as the server tells it, bounded as the server's own board.

const OPEN = new Set(["now", "over"]);

export const isOpen = (event) => event.type === "action" && OPEN.has(event.state);

/** Attention and class scores of a stream's last snippets, in thousandths. */
class Scores {
  #snippets = new Map(); // index -> { attention, scores: [[class, score], ...] }

  take({ first, attention, scores }) {
    attention.forEach((value, n) => {
      this.#snippets.set(first + n, { attention: value, scores: scores[n] });
    });
  }

  trim(fromIndex) {
    for (const index of this.#snippets.keys()) {
      if (index >= fromIndex) break;
      this.#snippets.delete(index);
    }
  }

  clear() {
    this.#snippets.clear();
  }

  get size() {
    return this.#snippets.size;
  }

  /** Of the snippets from `first` to before `stop`: the `most` classes that come highest. */
  strongest(first, stop, most) {
    const peaks = new Map();
    for (let index = first; index < stop; index++) {
      for (const [k, value] of this.#snippets.get(index)?.scores ?? []) {
        if (value > (peaks.get(k) ?? 0)) peaks.set(k, value);
      }
    }
    return [...peaks].sort((a, b) => b[1] - a[1]).slice(0, most).map(([k]) => k);
  }

  /** Attention, then each of `classes`, from 0 to 1: null where nothing is known of a snippet. */
  columns(first, stop, classes) {
    const columns = [[], ...classes.map(() => [])];
    for (let index = first; index < stop; index++) {
      const of = this.#snippets.get(index);
      columns[0].push(of ? of.attention / 1000 : null);
      classes.forEach((k, n) => {
        columns[n + 1].push(of ? (of.scores.find(([each]) => each === k)?.[1] ?? 0) / 1000 : null);
      });
    }
    return columns;
  }
}

export class Model {
  engine = {};
  rows = new Map(); // stream -> what the server says of it
  scores = new Map(); // stream -> Scores
  events = new Map(); // number -> action or notice; the newest change last
  thumbnails = new Set(); // streams
  needsToken = false;
  labels = new Map(); // label -> its number, for its colour
  #historyS = 600;
  #eventsKept = 5000;
  #clockAheadS = 0; // the server's clock before ours

  /** Takes a message; returns the actions that have started since the one before. */
  apply(message) {
    if (message.is_snapshot) {
      this.rows.clear();
      this.scores.clear();
      this.events.clear();
      this.#historyS = message.history_s;
      this.#eventsKept = message.events_kept;
    }
    this.#clockAheadS = message.now - Date.now() / 1000;
    this.needsToken = message.needs_token;
    if (message.engine) this.#takeEngine(message.engine);
    if (message.thumbnails) this.thumbnails = new Set(message.thumbnails);
    for (const row of message.rows) this.#takeRow(row);
    for (const chunk of message.scores) this.#takeScores(chunk);
    const started = message.events.filter((each) => isOpen(each) && !this.events.has(each.n));
    for (const event of message.events) this.#takeEvent(event);
    if (message.streams) this.#keepStreams(new Set(message.streams));
    return message.is_snapshot ? [] : started;
  }

  /** The server's time, in seconds since the epoch. */
  get now() {
    return Date.now() / 1000 + this.#clockAheadS;
  }

  get snippetS() {
    return this.engine.snippet_s ?? null;
  }

  openActions() {
    return [...this.events.values()].filter(isOpen);
  }

  /** The events of a stream's present timeline, and those of all streams by stream. */
  byStream() {
    const found = new Map();
    for (const event of this.events.values()) {
      const row = this.rows.get(event.stream);
      if (!row || event.session < row.from_session || event.session > row.session) continue;
      if (!found.has(event.stream)) found.set(event.stream, []);
      found.get(event.stream).push(event);
    }
    return found;
  }

  labelNumber(label) {
    if (!this.labels.has(label)) this.labels.set(label, this.labels.size);
    return this.labels.get(label);
  }

  #takeEngine(engine) {
    this.engine = engine;
    engine.classes.forEach((label) => this.labelNumber(label));
  }

  #takeRow(row) {
    const before = this.rows.get(row.stream);
    if (before && before.from_session !== row.from_session) this.scores.get(row.stream)?.clear();
    this.rows.set(row.stream, row);
  }

  #takeScores(chunk) {
    if (!this.scores.has(chunk.stream)) this.scores.set(chunk.stream, new Scores());
    const scores = this.scores.get(chunk.stream);
    scores.take(chunk);
    const head = this.rows.get(chunk.stream)?.head ?? chunk.first;
    scores.trim(head - this.#historyS / (this.snippetS ?? 1));
  }

  #takeEvent(event) {
    this.events.delete(event.n);
    this.events.set(event.n, event);
    if (event.label) this.labelNumber(event.label);
    if (this.events.size <= this.#eventsKept) return;
    for (const [n, each] of this.events) {
      if (isOpen(each)) continue;
      this.events.delete(n);
      return;
    }
  }

  #keepStreams(streams) {
    for (const stream of this.rows.keys()) {
      if (streams.has(stream)) continue;
      this.rows.delete(stream);
      this.scores.delete(stream);
    }
  }
}
