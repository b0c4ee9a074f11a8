// Puts the page together: what comes is taken at once and drawn once a frame.

import { Announcer } from "./announcer.js";
import { forgetColours } from "./colours.js";
import { connect } from "./connection.js";
import { byId, setText } from "./dom.js";
import { Events } from "./events.js";
import { Health } from "./health.js";
import { Model } from "./model.js";
import { Now } from "./now.js";
import { Rows } from "./rows.js";

const THEMES = ["auto", "light", "dark"];

// Also for whoever asks the page from outside, as the tests do.
export const model = new Model();

const announcer = new Announcer();
const health = new Health(model);
const rows = new Rows(model, wake);
const now = new Now(model);
const events = new Events(model, wake);
let lostSince = null; // seconds since the epoch
let isPaused = false;
let isWoken = false;

/** Draws with the next frame; a page that is not seen has none. */
function wake() {
  if (isWoken) return;
  isWoken = true;
  requestAnimationFrame(() => {
    isWoken = false;
    health.draw(lostSince);
    if (isPaused) return;
    rows.draw();
    now.draw();
    events.draw();
  });
}

connect(
  (message) => {
    announcer.take(model.apply(message));
    wake();
  },
  (isThere) => {
    if (isThere) lostSince = null;
    else lostSince ??= Date.now() / 1000;
    wake();
  },
);
setInterval(wake, 1000); // how long a stream has been quiet

byId("pause").addEventListener("click", ({ currentTarget }) => {
  isPaused = !isPaused;
  currentTarget.setAttribute("aria-pressed", String(isPaused));
  setText(currentTarget, isPaused ? "Paused" : "Pause");
  document.body.classList.toggle("paused", isPaused);
  wake();
});

function restyle() {
  forgetColours();
  rows.restyle();
  wake();
}

function showTheme() {
  setText(byId("theme"), `Theme: ${document.documentElement.dataset.theme ?? "auto"}`);
}

byId("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const next = THEMES[(THEMES.indexOf(root.dataset.theme ?? "auto") + 1) % THEMES.length];
  if (next === "auto") delete root.dataset.theme;
  else root.dataset.theme = next;
  localStorage.setItem("hrpro-theme", next);
  showTheme();
  restyle();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", restyle);
showTheme();
