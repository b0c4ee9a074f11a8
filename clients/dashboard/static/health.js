// How the engine is, in figures, and what is wrong, in words.

import { byId, element, setText } from "./dom.js";
import { count, duration, timeOfDay } from "./format.js";

export class Health {
  #figures = new Map(); // name -> its <dd>
  #model;

  constructor(model) {
    this.#model = model;
  }

  /** `lostSince` is when this page has lost the dashboard's server, or null. */
  draw(lostSince) {
    const { engine } = this.#model;
    const status = engine.status;
    const problems = this.#problems(lostSince);
    const problem = byId("problem");
    problem.hidden = problems.length === 0;
    setText(problem, problems.join(" "));
    const isStale = lostSince !== null || engine.away_since || engine.events_problem;
    document.body.classList.toggle("stale", Boolean(isStale));
    const [level, said] = this.#state(lostSince, status);
    byId("engine-state").dataset.level = level;
    setText(byId("engine-state"), said);
    byId("logout").hidden = !this.#model.needsToken;
    if (status) this.#drawFigures(status, engine);
  }

  #state(lostSince, status) {
    if (lostSince !== null) return ["bad", "dashboard away"];
    if (this.#model.engine.away_since) return ["bad", "engine away"];
    if (!status && this.#model.engine.problem) return ["waiting", "health unknown"];
    if (!status) return ["waiting", "waiting for the engine"];
    if (!this.#model.engine.hears.includes("events")) return ["waiting", "waiting for events"];
    return [status.state === "serving" ? "good" : "waiting", status.state];
  }

  #problems(lostSince) {
    const { engine } = this.#model;
    if (lostSince !== null) {
      const at = timeOfDay(lostSince);
      return [`The dashboard's server is away since ${at}: what is shown is from then. Trying again.`];
    }
    const problems = [];
    if (engine.away_since && engine.answered_at) {
      problems.push(`Engine away since ${timeOfDay(engine.away_since)}: what is shown is from then.`);
    }
    if (engine.problem) problems.push(`${sentence(engine.problem)}.`);
    if (engine.events_problem && !engine.away_since) {
      problems.push(`Events: ${engine.events_problem}; none are shown from then on.`);
    }
    if (engine.status?.waits_for) problems.push(`The engine waits for: ${engine.status.waits_for}.`);
    return problems;
  }

  #drawFigures(status, engine) {
    const { counters } = status;
    const rows = [...this.#model.rows.values()].filter((row) => row.lag_ms !== undefined);
    const live = rows.filter((row) => row.state === "live" || row.state === "idle");
    const worst = live.reduce((a, b) => (a && a.lag_ms >= b.lag_ms ? a : b), null);
    const dropped = counters.snippets_dropped_oldest + counters.snippets_dropped_newest;
    const refused = Object.entries(counters).filter(([name]) => name.startsWith("refused_"));
    const refusals = refused.reduce((sum, [, n]) => sum + n, 0);
    const codes = refused.map(([name, n]) => `${name.slice(8)} ${n}`).join(", ");
    this.#figure("bundle", status.bundle_id, bundles(status));
    this.#figure("provider", status.provider ?? "not told");
    this.#figure("streams", `${live.length}`, `${counters.ended_streams} ended`);
    const lag = worst ? duration(worst.lag_ms / 1000) : "none";
    this.#figure("worst lag", lag, worst ? worst.stream : "", worst && worst.lag_ms > 2000);
    this.#figure("dropped", count(dropped), "snippets without room", dropped > 0);
    this.#figure("missing", count(counters.snippets_missing), `snippets in ${counters.gaps} gaps`);
    this.#figure("refused", count(refusals), codes || "messages", refusals > 0);
    this.#figure("snippets", count(counters.snippets_processed), "processed");
    this.#figure("events", count(counters.events), `${count(counters.proposals)} final proposals`);
    if (engine.restarts) this.#figure("other logs", `${engine.restarts}`, "engines seen without the log");
  }

  #figure(name, value, more = "", isBad = false) {
    if (!this.#figures.has(name)) {
      const term = element("dt", {}, name);
      const figure = element("dd");
      byId("health").append(element("div", { dataset: { figure: name } }, term, figure));
      this.#figures.set(name, figure);
    }
    const figure = this.#figures.get(name);
    setText(figure, value);
    figure.parentElement.title = more;
    figure.classList.toggle("bad", Boolean(isBad));
  }
}

function bundles(status) {
  const others = [];
  if (status.canary_bundle_id) others.push(`canary ${status.canary_bundle_id}`);
  if (status.previous_bundle_id) others.push(`previous ${status.previous_bundle_id}`);
  return others.join(", ") || "works for all streams";
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);
