// The page: what keys and buttons do, and what is shown of it.

import * as api from "./api.js";
import { ClassField } from "./class_field.js";
import { announce, byId, element, setText } from "./dom.js";
import { clock } from "./format.js";
import { keyTable, listen } from "./keys.js";
import { showClasses, showKeys, showPoints } from "./lists.js";
import { Player } from "./player.js";
import { Points } from "./points.js";
import { Timeline } from "./timeline.js";

const ASK_MS = 300; // how far a video is made ready
const UNREACHABLE = "hrpro label does not answer";

const session = await api.session();
const SAID = {
  saved: `saved in ${session.points_file}`,
  saving: "saving",
  unsaved: "not saved",
  refused: "not saved",
};
let classes = session.classes;
let number = 0; // of the video
let opening = 0; // counts, so that one that was left again is given up
let problem = "";
let fieldFrame = 0; // the frame at which the field for classes was opened
let goesOn = false; // the video, when that field is left

const player = new Player(byId("video"), showFrame);
const points = new Points(showPointsAndState);
const numberOf = (label) => classes.indexOf(label);
const timeline = new Timeline(
  byId("timeline-canvas"),
  () => ({
    seconds: player.seconds,
    end: player.end,
    points: points.list,
    selected: points.selected,
    number: numberOf,
  }),
  (seconds) => player.seek(player.at(seconds)),
  choose,
);

// ---- points ----

/** Does it if points may be changed now, and says so if not. */
function changing(change) {
  if (!player.isReady) return;
  if (points.isOpen) change();
  else announce("The last point is not saved; nothing else is taken until it is.");
}

const mark = (index, moment) => markAt(classes[index], player.frameAt(moment));

function markAt(label, frame) {
  if (label === undefined) announce("There is no class of this number.");
  else {
    changing(() => {
      const isNew = points.add(label, player.times[frame]);
      announce(`${label} at ${clock(player.times[frame])}${isNew ? "" : " is there already"}`);
    });
  }
}

/** Another class or time for the chosen point. */
function changePoint(changes, said) {
  changing(() => {
    if (!points.selected) announce("No point is chosen.");
    else {
      points.change(points.selected, changes);
      announce(said);
    }
  });
}

function movePoint(frame) {
  const at = Math.max(0, Math.min(frame, player.times.length - 1));
  changePoint({ seconds: player.times[at] }, `moved to ${clock(player.times[at])}`);
  if (!player.isPlaying) player.seek(at);
}

function nudge(frames) {
  if (points.selected) movePoint(player.nearest(points.selected.seconds) + frames);
  else announce("No point is chosen.");
}

function removePoint() {
  changing(() => {
    const point = points.selected;
    if (!point) announce("No point is chosen.");
    else {
      points.remove(point);
      announce(`deleted ${point.label} at ${clock(point.seconds)}`);
    }
  });
}

function travel(back) {
  changing(() => {
    const can = back ? points.canUndo : points.canRedo;
    if (back) points.undo();
    else points.redo();
    announce(can ? `${back ? "undone" : "done again"}: ${points.list.length} points` : "nothing to do");
  });
}

function choose(point) {
  if (!point) return;
  player.pause();
  points.select(point);
  player.seek(player.at(point.seconds));
  announce(`${point.label} at ${clock(point.seconds)}`);
}

/** From the frame shown; among the points of one frame, from the chosen one. */
function chooseNext(direction) {
  const chosen = points.selected;
  const isHere = chosen && player.at(chosen.seconds) === player.frame;
  const next = isHere
    ? points.list[points.list.indexOf(chosen) + direction]
    : points.next(player.seconds, direction);
  choose(next);
}

// ---- classes ----

async function setClasses(labels) {
  try {
    classes = await api.putClasses(labels);
    problem = "";
    return true;
  } catch (error) {
    problem = error instanceof api.Refusal ? error.message : UNREACHABLE;
    return false;
  } finally {
    showPointsAndState();
  }
}

async function markByName(label) {
  const frame = fieldFrame;
  const known = classes.includes(label) || (await setClasses([...classes, label]));
  if (known) markAt(label, frame);
}

const field = new ClassField({
  classes: () => classes,
  mark: markByName,
  add: (label) => setClasses([...classes, label]),
  close: () => goesOn && player.play(),
});

byId("class-name").addEventListener("focus", () => {
  fieldFrame = player.frame;
  goesOn = player.isPlaying;
  player.pause();
});

// ---- videos ----

async function open(index) {
  if (index < 0 || index >= session.videos.length) return;
  if (!(await points.settled())) {
    announce("The last point is not saved.");
    showVideo();
    return;
  }
  number = index;
  const turn = (opening += 1);
  player.unload();
  points.close();
  showFrame();
  showVideo();
  try {
    await prepared(index, turn);
    if (turn !== opening) return;
    const [times] = await Promise.all([api.times(index), points.load(index)]);
    if (turn !== opening) return;
    await player.load(api.mediaPath(index), times);
    byId("preparing").hidden = true;
    player.seek(player.at(points.list.at(-1)?.seconds ?? 0)); // where one has stopped
    announce(`${session.videos[index].name}: ${points.list.length} points`);
    if (index + 1 < session.videos.length) api.video(index + 1).catch(() => {}); // for later
  } catch (error) {
    if (turn === opening) showPreparing(`${session.videos[index].file}: ${error.message}`, null);
  }
  showPointsAndState();
}

async function prepared(index, turn) {
  const { file } = session.videos[index];
  for (;;) {
    const said = await api.video(index);
    if (turn !== opening || said.state === "ready") return;
    if (said.state === "failed") throw new Error(said.problem);
    const doing = said.state === "converting" ? "is made playable in a browser, once" : "is read";
    showPreparing(`${file} ${doing}`, said.share);
    await new Promise((resolve) => setTimeout(resolve, ASK_MS));
  }
}

// ---- what is shown ----

function showFrame() {
  setText(byId("time"), clock(player.seconds));
  const all = player.times.length;
  setText(byId("frame"), all ? `frame ${player.frame} of 0 to ${all - 1}` : "");
  setText(byId("play"), player.isPlaying ? "Pause" : "Play");
  byId("speed").value = String(player.speed);
  const slider = byId("timeline");
  slider.ariaValueMax = player.end.toFixed(3);
  slider.ariaValueNow = player.seconds.toFixed(3);
  slider.ariaValueText = clock(player.seconds);
  timeline.draw();
}

function showPointsAndState() {
  showClasses(classes, points.list, mark, (label) => setClasses(classes.filter((each) => each !== label)));
  showPoints(points.list, points.selected, numberOf, choose);
  const isBad = ["unsaved", "refused"].includes(points.state);
  setText(byId("saved"), SAID[points.state]);
  byId("saved").dataset.level = isBad ? "bad" : "quiet";
  const wrong =
    points.state === "unsaved"
      ? `the last change is not saved: ${points.problem || UNREACHABLE}`
      : points.problem || problem;
  byId("problem").hidden = !wrong;
  setText(byId("problem-text"), wrong);
  byId("reload").hidden = points.state !== "refused";
  byId("undo").disabled = !points.canUndo;
  byId("redo").disabled = !points.canRedo;
  timeline.draw();
}

function showVideo() {
  byId("videos").value = String(number);
  byId("previous").disabled = number === 0;
  byId("next").disabled = number === session.videos.length - 1;
  document.title = `${session.videos[number].name} - Label - HR-Pro Stream`;
  showPreparing(`${session.videos[number].file} is read`, 0);
}

/** `share` null: it has failed. */
function showPreparing(text, share) {
  byId("preparing").hidden = false;
  setText(byId("preparing-text"), text);
  byId("preparing-share").hidden = share === null;
  byId("preparing-share").value = share ?? 0;
}

// ---- keys and buttons ----

const table = keyTable({
  play: (_, event) => event.repeat || player.toggle(),
  mark: (index, event) => event.repeat || mark(index, event.timeStamp),
  byName: () => field.focus(),
  reclass: (index) => classes[index] && changePoint({ label: classes[index] }, `now ${classes[index]}`),
  stepBack: () => player.step(-1),
  stepOn: () => player.step(1),
  secondBack: () => player.skip(-1),
  secondOn: () => player.skip(1),
  back: () => player.skip(-5),
  on: () => player.skip(5),
  pointBefore: () => chooseNext(-1),
  pointAfter: () => chooseNext(1),
  earlier: () => nudge(-1),
  later: () => nudge(1),
  moveHere: () => movePoint(player.frame),
  remove: removePoint,
  undo: () => travel(true),
  redo: () => travel(false),
  slower: () => player.changeSpeed(-1),
  faster: () => player.changeSpeed(1),
  speedOne: () => player.setSpeed(1),
  zoom: (key) => timeline.zoom(key === "-" ? -1 : 1),
  previousVideo: () => open(number - 1),
  nextVideo: () => open(number + 1),
  toBorder: (key) => player.seek(key === "Home" ? 0 : player.times.length - 1),
  chooseNone: () => points.select(null),
  help: () => byId("keys").showModal(),
});
listen(table);
showKeys(table);

const buttons = {
  previous: () => open(number - 1),
  next: () => open(number + 1),
  undo: () => travel(true),
  redo: () => travel(false),
  help: () => byId("keys").showModal(),
  play: () => player.toggle(),
  "step-back": () => player.step(-1),
  "step-on": () => player.step(1),
  reload: () => points.load(number).catch((error) => { problem = error.message; showPointsAndState(); }),
  video: () => player.toggle(),
};
for (const [id, call] of Object.entries(buttons)) byId(id).addEventListener("click", call);
document.addEventListener("click", (event) => {
  // A button that was pressed by the pointer must not take the space bar from the video.
  if (event.detail) event.target.closest("button")?.blur();
});

byId("videos").append(
  ...session.videos.map(({ name }, n) =>
    element("option", { value: String(n) }, `${name} (${n + 1} of ${session.videos.length})`)),
);
byId("videos").addEventListener("change", (event) => {
  event.target.blur();
  open(Number(event.target.value));
});
byId("speed").append(
  ...player.speeds.map((speed) => element("option", { value: String(speed) }, `${speed} ×`)),
);
byId("speed").addEventListener("change", (event) => {
  event.target.blur();
  player.setSpeed(Number(event.target.value));
});
window.addEventListener("beforeunload", (event) => {
  if (points.state !== "saved") event.preventDefault();
});

await open(0);
