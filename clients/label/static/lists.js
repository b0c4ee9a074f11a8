// The classes with their keys, and the points by time, as lists of buttons.

import { classColour } from "./colours.js";
import { byId, element, setText } from "./dom.js";
import { clock } from "./format.js";

const keyOf = (number) => (number < 10 ? String((number + 1) % 10) : "");

function swatch(number) {
  return element("span", { className: "swatch", style: { color: classColour(number) }, ariaHidden: "true" });
}

const classRows = new Map(); // by label

/** `mark(number, moment)` is called for a class that is chosen, `remove(label)` for one to be taken away. */
export function showClasses(classes, points, mark, remove) {
  const counts = new Map(classes.map((label) => [label, 0]));
  for (const { label } of points) counts.set(label, (counts.get(label) ?? 0) + 1);
  const rows = classes.map((label, number) => {
    let known = classRows.get(label);
    if (known?.number !== number) {
      known = classRow(label, number, mark, remove);
      classRows.set(label, known);
    }
    const count = counts.get(label);
    setText(known.count, String(count));
    known.cross.hidden = count > 0;
    return known.row;
  });
  setRows(byId("classes"), rows);
}

function classRow(label, number, mark, remove) {
  const count = element("span", { className: "count", title: "points in this video" });
  const button = element(
    "button",
    { type: "button", className: "row", title: `a point of ${label} at the frame shown` },
    element("kbd", {}, keyOf(number)),
    swatch(number),
    element("span", { className: "name" }, label),
    count,
  );
  button.addEventListener("click", (event) => mark(number, event.timeStamp));
  const name = `Remove the class ${label}`;
  const cross = element(
    "button", { type: "button", className: "remove", title: name, ariaLabel: name }, "×",
  );
  cross.addEventListener("click", () => remove(label));
  return { number, count, cross, row: element("li", {}, button, cross) };
}

const rowOf = new WeakMap(); // points are never changed in place
let chosen = null; // the button of the chosen point

/** `select(point)` is called for the one that is chosen. */
export function showPoints(points, selected, numberOf, select) {
  const list = byId("points");
  setRows(list, points.map((point) => pointRow(point, numberOf(point.label), select)));
  const button = selected && rowOf.get(selected).row.firstChild;
  if (button !== chosen) {
    chosen?.removeAttribute("aria-current");
    button?.setAttribute("aria-current", "true");
    button?.scrollIntoView({ block: "nearest" });
    chosen = button;
  }
  setText(byId("points-count"), points.length ? String(points.length) : "");
  byId("points-none").hidden = points.length > 0;
}

function pointRow(point, number, select) {
  const known = rowOf.get(point);
  if (known && known.number === number) return known.row;
  const button = element(
    "button",
    { type: "button", className: "row" },
    element("span", {}, clock(point.seconds)),
    swatch(number),
    element("span", { className: "name" }, point.label),
    element("kbd", { ariaHidden: "true" }, keyOf(number)),
  );
  button.addEventListener("click", () => select(point));
  const row = element("li", {}, button);
  rowOf.set(point, { row, number });
  return row;
}

/** Touches those alone that come or go: of an hour there may be a thousand. */
function setRows(list, rows) {
  const wanted = new Set(rows);
  for (const row of [...list.children]) if (!wanted.has(row)) row.remove();
  let there = list.firstChild;
  for (const row of rows) {
    if (row === there) there = there.nextSibling;
    else list.insertBefore(row, there);
  }
}

/** What the dialog says of the keys. */
export function showKeys(table) {
  const entries = table.flatMap(({ shown, means }) => [
    element("dt", {}, ...shown.map((key) => element("kbd", {}, key))),
    element("dd", {}, means),
  ]);
  byId("keys-list").replaceChildren(...entries);
}
