// All that keys do, in one table: they are looked up in it, and it is what the page shows of them.

const IN_TEXT = "input, select, textarea, dialog";

/** `actions` by name; each is called with its digit from 0, or its key, and the event. */
export function keyTable(actions) {
  const row = (shown, means, keys, action) => ({ shown, means, keys, call: actions[action] });
  return [
    row(["Space"], "play, pause", [" "], "play"),
    row(["1", "…", "0"], "point of this class here", ["digit"], "mark"),
    row(["C"], "point of a class by name", ["c"], "byName"),
    row(["Shift", "1…0"], "class of the chosen point", ["Shift+digit"], "reclass"),
    row(["←"], "frame back", ["ArrowLeft"], "stepBack"),
    row(["→"], "frame on", ["ArrowRight"], "stepOn"),
    row(["Shift", "←"], "second back", ["Shift+ArrowLeft"], "secondBack"),
    row(["Shift", "→"], "second on", ["Shift+ArrowRight"], "secondOn"),
    row(["J"], "5 seconds back", ["j"], "back"),
    row(["L"], "5 seconds on", ["l"], "on"),
    row(["↑"], "point before", ["ArrowUp"], "pointBefore"),
    row(["↓"], "next point", ["ArrowDown"], "pointAfter"),
    row(["A"], "point a frame earlier", ["a"], "earlier"),
    row(["D"], "point a frame later", ["d"], "later"),
    row(["M"], "point to the frame shown", ["m"], "moveHere"),
    row(["Del", "X"], "delete the point", ["Delete", "Backspace", "x"], "remove"),
    row(["Z"], "undo", ["z", "Ctrl+z"], "undo"),
    row(["Shift", "Z"], "redo", ["Shift+z", "Ctrl+Shift+z", "Ctrl+y"], "redo"),
    row(["S"], "slower", ["s"], "slower"),
    row(["F"], "faster", ["f"], "faster"),
    row(["R"], "speed 1", ["r"], "speedOne"),
    row(["+", "-"], "timeline closer, further", ["+", "=", "-", "Shift++"], "zoom"),
    row(["P"], "previous video", ["p"], "previousVideo"),
    row(["N"], "next video", ["n"], "nextVideo"),
    row(["Home", "End"], "first, last frame", ["Home", "End"], "toBorder"),
    row(["Esc"], "choose no point", ["Escape"], "chooseNone"),
    row(["H"], "these keys", ["h", "?", "Shift+?"], "help"),
  ];
}

/** Calls what the table has for the keys that are pressed anywhere but in fields. */
export function listen(table) {
  const calls = new Map(table.flatMap(({ keys, call }) => keys.map((key) => [key, call])));
  document.addEventListener("keydown", (event) => {
    if (event.target.closest(IN_TEXT) || event.altKey) return;
    // A button that has the focus is pressed by them.
    if ([" ", "Enter"].includes(event.key) && event.target.closest("button")) return;
    const digit = digitOf(event);
    const call = calls.get(nameOf(event, digit));
    if (!call) return;
    event.preventDefault();
    call(digit ?? event.key, event);
  });
}

/** By the key's place, so that Shift does not make it another character; 0 is the tenth. */
function digitOf(event) {
  const place = /^(?:Digit|Numpad)(\d)$/.exec(event.code)?.[1];
  return place === undefined || (event.code[0] === "N" && !/\d/.test(event.key))
    ? null
    : (Number(place) + 9) % 10;
}

function nameOf(event, digit) {
  const control = event.ctrlKey || event.metaKey ? "Ctrl+" : "";
  const shift = event.shiftKey ? "Shift+" : "";
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  return `${control}${shift}${digit === null ? key : "digit"}`;
}
