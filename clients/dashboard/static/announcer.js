// Says which actions have started, for who does not see them: not more often than can be heard.

import { announce, byId } from "./dom.js";

const EVERY_MS = 5000;
const MOST_NAMED = 3;

export class Announcer {
  #waiting = [];
  #timer = null;
  #isOn = true;

  constructor() {
    const button = byId("announce");
    button.addEventListener("click", () => {
      this.#isOn = !this.#isOn;
      button.setAttribute("aria-pressed", String(this.#isOn));
      this.#waiting = [];
    });
  }

  take(started) {
    if (!this.#isOn) return;
    this.#waiting.push(...started.map((each) => `${each.label} in ${each.stream}`));
    if (this.#waiting.length && this.#timer === null) this.#say();
  }

  #say() {
    const named = this.#waiting.splice(0, MOST_NAMED);
    const more = this.#waiting.length;
    this.#waiting = [];
    this.#timer = null;
    if (!named.length) return;
    announce(`Started: ${named.join(", ")}${more ? ` and ${more} more` : ""}`);
    this.#timer = setTimeout(() => this.#say(), EVERY_MS);
  }
}
