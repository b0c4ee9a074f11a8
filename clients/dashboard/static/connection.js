// The WebSocket to the dashboard's server: opened again whenever it is lost.

const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 10_000;
// The server says something every 5 s at least.
const SILENT_MS = 15_000;

/** Calls `onMessage` with each message, `onState` with whether the server is there. */
export function connect(onMessage, onState) {
  let pauseMs = FIRST_PAUSE_MS;

  function open() {
    const url = new URL("/live", location.href);
    url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
    const socket = new WebSocket(url);
    let silence = setTimeout(() => socket.close(), SILENT_MS);
    let heard = false;

    socket.addEventListener("message", ({ data }) => {
      clearTimeout(silence);
      silence = setTimeout(() => socket.close(), SILENT_MS);
      heard = true;
      pauseMs = FIRST_PAUSE_MS;
      onState(true);
      onMessage(JSON.parse(data));
    });
    socket.addEventListener("close", () => {
      clearTimeout(silence);
      onState(false);
      if (!heard) goToLoginIfAsked();
      setTimeout(open, pauseMs);
      pauseMs = Math.min(2 * pauseMs, LONGEST_PAUSE_MS);
    });
  }
  open();
}

/** A refused WebSocket does not say why: the page itself would lead to the form for the token. */
async function goToLoginIfAsked() {
  try {
    const answer = await fetch("/", { redirect: "manual", cache: "no-store" });
    if (answer.type === "opaqueredirect") location.assign("/login");
  } catch {
    // The server is away.
  }
}
