// The points of one video: changed one step at a time, each saved, each can be undone.
//
// Points are never changed in place: a list takes the place of another, and history is lists.

import * as api from "./api.js";

const AGAIN_MS = 1000;

const byTime = (a, b) => a.seconds - b.seconds;

export class Points {
  list = [];
  selected = null;
  state = "saved"; // saved, saving, unsaved (it is tried again), refused
  problem = "";
  #video = null;
  #version = null;
  #past = [];
  #future = [];
  #unsaved = false;
  #saving = null;
  #onChange;

  constructor(onChange) {
    this.#onChange = onChange;
  }

  get canUndo() { return this.#past.length > 0; }
  get canRedo() { return this.#future.length > 0; }

  /** Whether points may be changed: while one is not saved, no other is taken. */
  get isOpen() { return this.#video !== null && ["saved", "saving"].includes(this.state); }

  /** The points of a video as the file has them now; nothing before it can be undone. */
  async load(video) {
    this.close();
    const { points, version } = await api.points(video);
    this.list = points;
    this.#version = version;
    this.#video = video;
    this.#become("saved");
  }

  /** No video and no points. */
  close() {
    this.#video = null;
    this.list = [];
    this.selected = null;
    this.#past = [];
    this.#future = [];
    this.#unsaved = false;
    this.#become("saved");
  }

  /** Adds a point, and selects it; one that is there is selected alone. Returns whether it is new. */
  add(label, seconds) {
    const same = (each) => each.label === label && Math.abs(each.seconds - seconds) < 1e-4;
    const there = this.list.find(same);
    if (there) this.select(there);
    else this.#replace(null, { label, seconds });
    return !there;
  }

  remove(point) { this.#replace(point, null); }

  /** Puts another one in a point's place. */
  change(point, changes) { this.#replace(point, { ...point, ...changes }); }

  #replace(old, point) {
    this.#past.push({ list: this.list, selected: this.selected });
    this.#future = [];
    const others = this.list.filter((each) => each !== old);
    this.list = point ? [...others, point].sort(byTime) : others;
    this.selected = point;
    this.#save();
  }

  undo() { this.#travel(this.#past, this.#future); }
  redo() { this.#travel(this.#future, this.#past); }

  #travel(from, to) {
    const then = from.pop();
    if (!then) return;
    to.push({ list: this.list, selected: this.selected });
    ({ list: this.list, selected: this.selected } = then);
    this.#save();
  }

  select(point) {
    this.selected = point;
    this.#onChange();
  }

  /** The first point after a time (1), or the last before it (-1); undefined if there is none. */
  next(seconds, direction) {
    return direction > 0
      ? this.list.find((each) => each.seconds > seconds + 1e-4)
      : this.list.findLast((each) => each.seconds < seconds - 1e-4);
  }

  /** Resolves to whether all is saved, once what is under way has ended. */
  async settled() {
    await this.#saving;
    return !this.#unsaved;
  }

  #become(state, problem = "") {
    this.state = state;
    this.problem = problem;
    this.#onChange();
  }

  #save() {
    this.#unsaved = true;
    if (this.#saving === null) this.#saving = this.#saveAll().finally(() => { this.#saving = null; });
    this.#onChange();
  }

  /** Until nothing is unsaved, or it cannot be. */
  async #saveAll() {
    if (this.state === "saved") this.#become("saving");
    while (this.#unsaved) {
      this.#unsaved = false;
      try {
        this.#version = await api.putPoints(this.#video, this.list, this.#version);
      } catch (error) {
        this.#unsaved = true;
        // A full disk, or a program that does not answer, may be mended.
        const isAnswer = error instanceof api.Refusal;
        const isFinal = isAnswer && error.status < 500;
        this.#become(isFinal ? "refused" : "unsaved", isAnswer ? error.message : "");
        if (!isFinal) setTimeout(() => this.#save(), AGAIN_MS);
        return;
      }
    }
    this.#become("saved");
  }
}
