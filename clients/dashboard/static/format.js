// Times and counts for people.

const pad = (n) => String(n).padStart(2, "0");

/** A time of a stream: 62.4 is 1:02.4, and with hours 1:01:02. */
export function streamTime(seconds) {
  const tenths = Math.round(seconds * 10);
  const h = Math.floor(tenths / 36000), m = Math.floor(tenths / 600) % 60, s = (tenths % 600) / 10;
  if (h) return `${h}:${pad(m)}:${pad(Math.floor(s))}`;
  return `${m}:${s.toFixed(1).padStart(4, "0")}`;
}

/** How long something takes or took: 4.2 s, 3 min, 2 h. */
export function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return `${Math.round(seconds / 3600)} h`;
}

/** A time of day, of seconds since the epoch. */
export function timeOfDay(epochSeconds) {
  return new Date(epochSeconds * 1000).toLocaleTimeString([], { hour12: false });
}

/** 1234567 is 1.23 M. */
export function count(n) {
  if (n < 10_000) return String(n);
  if (n < 1_000_000) return `${(n / 1000).toFixed(n < 100_000 ? 1 : 0)} k`;
  return `${(n / 1_000_000).toFixed(2)} M`;
}

const collator = new Intl.Collator(undefined, { numeric: true });

/** cam2 comes before cam10. */
export const byName = (a, b) => collator.compare(a, b);

export const score = (value) => value.toFixed(2);

/** What is said of an event's state. */
export const STATES = {
  now: "going on",
  over: "over, unconfirmed",
  ended: "ended",
  retracted: "retracted",
  lost: "end was missed",
  opened: "stream opened",
  gap: "gap",
  idle: "stream idle",
  resumed: "stream resumed",
};

/** The state of an event in words; a notice `ended` is the stream's. */
export function stateOf(event) {
  if (event.type === "notice" && event.state === "ended") return "stream ended";
  return STATES[event.state] ?? event.state;
}
