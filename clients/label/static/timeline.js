// The timeline: what is around the frame shown, with its points, above all of the video.

import { clock } from "./format.js";

const CLOSE_PX = 7; // a press so near to a point is for it
const SPANS_S = [5, 10, 20, 30, 60, 120, 300, 600];
const TICKS_S = [0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800];
const TICK_PX = 80;
const ALL_HEIGHT = 26;
const RULER_HEIGHT = 16;

export class Timeline {
  #canvas;
  #state; // () => { seconds, end, points, selected, number(label) }
  #span = 3;
  #from = 0; // of the upper part, seconds
  #asked = false;

  /** `go(seconds)` is called where it is pressed, `select(point)` on a point. */
  constructor(canvas, state, go, select) {
    this.#canvas = canvas;
    this.#state = state;
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      const point = this.#pointAt(event);
      if (point) select(point);
      else go(this.#secondsAt(event));
    });
    canvas.addEventListener("pointermove", (event) => {
      if (canvas.hasPointerCapture(event.pointerId)) go(this.#secondsAt(event));
    });
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoom(event.deltaY > 0 ? -1 : 1);
    }, { passive: false });
  }

  /** Closer (1) or further (-1). */
  zoom(direction) {
    this.#span = Math.max(0, Math.min(this.#span - direction, SPANS_S.length - 1));
    this.draw();
  }

  /** Draws with the next frame of the screen. */
  draw() {
    if (this.#asked) return;
    this.#asked = true;
    requestAnimationFrame(() => {
      this.#asked = false;
      this.#draw();
    });
  }

  #spanS(end) { return Math.min(SPANS_S[this.#span], Math.max(end, 1)); }

  #secondsAt(event) {
    const { end } = this.#state();
    const box = this.#canvas.getBoundingClientRect();
    const share = Math.max(0, Math.min((event.clientX - box.left) / box.width, 1));
    const isAll = event.clientY - box.top > box.height - ALL_HEIGHT;
    return isAll ? share * end : this.#from + share * this.#spanS(end);
  }

  #pointAt(event) {
    const { points, end } = this.#state();
    const box = this.#canvas.getBoundingClientRect();
    if (event.clientY - box.top > box.height - ALL_HEIGHT) return undefined;
    const perPx = this.#spanS(end) / box.width;
    const seconds = this.#secondsAt(event);
    const away = (point) => Math.abs(point.seconds - seconds);
    const close = points.filter((each) => away(each) < CLOSE_PX * perPx);
    return close.sort((a, b) => away(a) - away(b))[0];
  }

  #draw() {
    const { width, height } = this.#canvas.getBoundingClientRect();
    const ratio = window.devicePixelRatio;
    this.#canvas.width = Math.round(width * ratio);
    this.#canvas.height = Math.round(height * ratio);
    const draw = this.#canvas.getContext("2d");
    draw.scale(ratio, ratio);
    const state = this.#state();
    const colours = new Colours(this.#canvas);
    const top = height - ALL_HEIGHT;
    const span = this.#spanS(state.end);
    this.#from = Math.max(0, Math.min(state.seconds - span / 2, state.end - span));
    this.#around(draw, state, colours, width, top, span);
    this.#all(draw, state, colours, width, top, span);
  }

  #around(draw, state, colours, width, height, span) {
    const x = (seconds) => ((seconds - this.#from) / span) * width;
    draw.font = "10.5px system-ui, sans-serif";
    draw.textBaseline = "middle";
    const tick = TICKS_S.find((each) => (each / span) * width >= TICK_PX) ?? TICKS_S.at(-1);
    for (let n = Math.ceil(this.#from / tick); n * tick <= this.#from + span; n += 1) {
      draw.fillStyle = colours.of("--line");
      draw.fillRect(x(n * tick), 0, 1, height);
      draw.fillStyle = colours.of("--quiet");
      draw.fillText(shortClock(n * tick), x(n * tick) + 4, RULER_HEIGHT / 2);
    }
    draw.fillStyle = colours.of("--text");
    draw.fillRect(x(state.seconds) - 1, 0, 2, height);
    for (const point of state.points) {
      const at = x(point.seconds);
      if (at > -20 && at < width + 20) this.#point(draw, state, colours, point, at, height);
    }
  }

  /** A line with a disc that has the key of its class: not by colour alone. */
  #point(draw, state, colours, point, at, height) {
    const number = state.number(point.label);
    const isSelected = point === state.selected;
    const middle = RULER_HEIGHT + (height - RULER_HEIGHT) / 2;
    draw.fillStyle = colours.of(`--class-${number % 10}`);
    draw.fillRect(at - (isSelected ? 1.5 : 0.5), RULER_HEIGHT, isSelected ? 3 : 1, height - RULER_HEIGHT);
    draw.beginPath();
    draw.arc(at, middle, isSelected ? 11 : 9, 0, 2 * Math.PI);
    draw.fill();
    if (isSelected) {
      draw.strokeStyle = colours.of("--text");
      draw.lineWidth = 2;
      draw.stroke();
    }
    draw.fillStyle = colours.of("--panel");
    draw.textAlign = "center";
    draw.fillText(String(number + 1), at, middle + 0.5);
    draw.textAlign = "start";
  }

  #all(draw, state, colours, width, top, span) {
    const end = Math.max(state.end, 1e-3);
    const x = (seconds) => (seconds / end) * width;
    draw.fillStyle = colours.of("--inset");
    draw.fillRect(0, top, width, ALL_HEIGHT);
    draw.fillStyle = colours.of("--line");
    draw.fillRect(0, top, width, 1);
    draw.fillRect(x(this.#from), top, Math.max(2, x(span)), ALL_HEIGHT);
    for (const point of state.points) {
      draw.fillStyle = colours.of(`--class-${state.number(point.label) % 10}`);
      draw.fillRect(x(point.seconds) - 0.75, top + 5, 1.5, ALL_HEIGHT - 10);
    }
    draw.fillStyle = colours.of("--text");
    draw.fillRect(Math.min(x(state.seconds), width - 2), top, 2, ALL_HEIGHT);
  }
}

/** What the style sheet's colours are now: a canvas knows no variables. */
class Colours {
  #probe;
  #known = new Map();

  constructor(canvas) {
    this.#probe = canvas.parentElement;
  }

  of(name) {
    if (!this.#known.has(name)) {
      this.#probe.style.caretColor = `var(${name})`; // a colour that nothing shows here
      this.#known.set(name, getComputedStyle(this.#probe).caretColor);
    }
    return this.#known.get(name);
  }
}

const shortClock = (seconds) => clock(seconds).replace(/\.000$/, "").replace(/(\.\d)00$/, "$1");
