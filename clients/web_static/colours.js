// Colours of classes, as the style sheet has them in the theme of the moment, for the canvas.

const CLASS_COLOURS = 10;
const resolved = new Map();
const probe = document.createElement("span");

/** The style sheet's variable of a class, by its number. */
export const classColour = (number) => `var(--class-${number % CLASS_COLOURS})`;

/** What a colour of the style sheet is now: a canvas knows no variables. */
export function resolve(colour) {
  if (!resolved.has(colour)) {
    if (!probe.isConnected) {
      probe.hidden = true;
      document.body.append(probe);
    }
    probe.style.color = colour;
    resolved.set(colour, getComputedStyle(probe).color);
  }
  return resolved.get(colour);
}

/** Another theme has come. */
export const forgetColours = () => resolved.clear();
