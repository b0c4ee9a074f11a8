// The field for classes by name: for those without a number key, and for new ones.

import { byId } from "./dom.js";

/**
 * `mark(label)` makes a point of a class, known or new; `add(label)` makes the class alone. `close`
 * is called when the field is left either way.
 */
export class ClassField {
  #classes;
  #input = byId("class-name");
  #hint = byId("class-hint");

  constructor({ classes, mark, add, close }) {
    this.#classes = classes;
    this.#input.addEventListener("input", () => this.#tell());
    this.#input.addEventListener("focus", () => this.#tell());
    this.#input.addEventListener("blur", () => { this.#hint.textContent = ""; });
    this.#input.addEventListener("keydown", (event) => {
      const name = this.#input.value.trim();
      if (event.key === "Escape") this.#leave(close);
      if (event.key !== "Enter") return;
      event.preventDefault();
      if (name && event.shiftKey) add(name);
      else if (name) mark(this.#match(name) ?? name);
      this.#leave(close);
    });
    byId("class-form").addEventListener("submit", (event) => event.preventDefault());
  }

  focus() { this.#input.focus(); }

  #leave(close) {
    this.#input.value = "";
    this.#input.blur();
    close();
  }

  /** The class of this name, or the only one that begins with it. */
  #match(name) {
    const lower = name.toLowerCase();
    const begin = this.#classes().filter((each) => each.toLowerCase().startsWith(lower));
    const same = begin.find((each) => each.toLowerCase() === lower);
    return same ?? (begin.length === 1 ? begin[0] : undefined);
  }

  #tell() {
    const name = this.#input.value.trim();
    const match = this.#match(name);
    if (!name) this.#hint.textContent = "";
    else if (match === undefined) this.#hint.textContent = "Enter: new class and a point; Shift+Enter: the class alone";
    else if (match.toLowerCase() === name.toLowerCase()) this.#hint.textContent = `Enter: a point of ${match}`;
    else this.#hint.textContent = `Enter: a point of ${match}; Shift+Enter: new class ${name}`;
  }
}
