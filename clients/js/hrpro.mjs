/**
 * A client of HR-Pro Stream in JavaScript, written from docs/PROTOCOL.md: `feed` sends the snippets
 * of a stream to an engine, `subscribe` receives what the engine publishes.
 */

import { decode, encode } from '@msgpack/msgpack';
import { randomBytes } from 'node:crypto';
import { Dealer, Subscriber } from 'zeromq';

const VERSION = 1;
const LONGEST_FRAME_BYTES = 4 << 20;
const TICK_MS = 250; // how often a quiet line is looked at
const REPEAT_MS = 2000; // without an answer, until a question is asked again
const DEAD_MS = 5000; // without a mark, until the events line is made anew

/** A final Error of the engine; `code` is one of section 7 of the protocol. */
export class EngineError extends Error {
  constructor(header) {
    super(`${header.code}: ${header.message}`);
    this.code = header.code;
  }
}

/**
 * The keys of a client as its key file has them, each in Z85; without any there is no encryption.
 * @typedef {{engine: string, public: string, secret: string}} Keys
 */

function socketOptions(keys) {
  const curve = keys && {
    curveServerKey: keys.engine, curvePublicKey: keys.public, curveSecretKey: keys.secret,
  };
  return { linger: 0, receiveTimeout: TICK_MS, maxMessageSize: LONGEST_FRAME_BYTES, ...curve };
}

const newToken = () => randomBytes(8).toString('hex');

const CLOCK = ['window_snippets', 'context_snippets', 'lookahead_snippets'];
const INTEGERS = {
  welcome: ['next_index', 'send_until', 'max_chunk_snippets', ...CLOCK],
  ack: ['next_index', 'send_until'], ended: ['next_index'], error: [],
  subscribed: [], mark: [], page: ['next', 'oldest', 'newest'],
  event: ['session', 'sequence'], final: ['session', 'sequence'], stream: ['session', 'sequence'],
};
const OPTIONAL_INTEGERS = ['needed_from', 'missing_until', 'number', 'previous'];

/** A header, whose integers that matter here are there. */
function readHeader(frame) {
  const most = { maxStrLength: frame.length, maxArrayLength: frame.length, maxMapLength: 1000 };
  const header = decode(frame, most);
  const isIndex = (name) => Number.isInteger(header[name]) && header[name] >= 0;
  const isFine = header?.v === VERSION && Object.hasOwn(INTEGERS, header.type) &&
    INTEGERS[header.type].every(isIndex) &&
    OPTIONAL_INTEGERS.every((name) => (header[name] ?? null) === null || isIndex(name));
  if (!isFine) throw new Error(`expected a message of the protocol, got ${JSON.stringify(header)}`);
  return header;
}

/** The next message's frames, or null if none comes within `TICK_MS`. */
async function receive(socket) {
  try {
    return await socket.receive();
  } catch (error) {
    if (error.code === 'EAGAIN') return null;
    throw error;
  }
}

/**
 * Feed one stream until its source ends, over lost connections and restarts of the engine.
 *
 * @param {string} address of the engine's feed socket
 * @param {string} stream
 * @param {number} featureDim D
 * @param {AsyncIterable<Float32Array> | Iterable<Float32Array>} source chunks of any size: n * D
 *     values, the snippets one after the other; the next one is asked for when all were sent
 * @param {object} [options]
 * @param {number} [options.framesPerS] frames of the video a second, as the engine has it
 * @param {number} [options.snippetFrames] frames of a snippet, as the engine has it
 * @param {number} [options.firstIndex] index of the source's first snippet
 * @param {number} [options.patienceS] without progress of the engine, until this gives up
 * @param {Keys} [options.keys]
 * @returns {Promise<object>} the Ended; its `next_index` is smaller than what was sent if the
 *     engine has ended the stream by itself
 * @throws {EngineError} if the engine refuses for good
 * @throws {Error} if the engine makes no progress for `patienceS`
 */
export async function feed(address, stream, featureDim, source, options = {}) {
  const { framesPerS = 25, snippetFrames = 16, firstIndex = 0, patienceS = 60, keys } = options;
  const routingId = newToken();
  const chunks = source[Symbol.asyncIterator]?.() ?? source[Symbol.iterator]();
  const kept = []; // one Buffer for each snippet, from keptFrom on
  let keptFrom = firstIndex;
  let socket = null;
  let [nextIndex, sendUntil, sent] = [0, 0, firstIndex]; // the engine's, its credit, and ours
  let [maxChunk, history, neededFrom] = [1, null, null];
  let [isWelcome, isSourceOver, isEndSent, resentAt] = [false, false, false, null];
  let [heardMs, movedMs] = [Date.now(), Date.now()];

  const top = () => keptFrom + kept.length;
  const isWaiting = () => !isWelcome || isEndSent || nextIndex < top();
  const say = (type, fields, ...frames) =>
    socket.send([encode({ v: VERSION, type, stream, ...fields }), ...frames]);

  async function hello() {
    [isWelcome, isEndSent, heardMs] = [false, false, Date.now()];
    await say('hello', {
      feature_dim: featureDim, frames_per_s: framesPerS, snippet_frames: snippetFrames,
      first_index: keptFrom,
    });
  }

  const sayEnd = () => say('end', { next_index: nextIndex });

  async function connect() {
    socket?.close();
    socket = new Dealer({ ...socketOptions(keys), routingId });
    socket.connect(address);
    heardMs = Date.now();
    await (isEndSent ? sayEnd() : hello());
  }

  async function sendRows(first, until) {
    for (let at = first; at < until; at += maxChunk) {
      const rows = kept.slice(at - keptFrom, Math.min(at + maxChunk, until) - keptFrom);
      const shape = [rows.length, featureDim];
      await say('chunk', { first_index: at, dtype: 'float32', shape }, Buffer.concat(rows));
    }
  }

  async function sendWhatMay() {
    if (!isWelcome) return;
    const until = Math.min(sendUntil, top());
    await sendRows(sent, until);
    sent = Math.max(sent, until);
    if (isSourceOver && nextIndex >= top() && !isEndSent) {
      isEndSent = true;
      await sayEnd();
    }
  }

  function keep(values) {
    if (values.length % featureDim) throw new Error(`expected n * ${featureDim} values`);
    const bytes = Buffer.from(Float32Array.from(values).buffer); // all platforms of Node: little
    const size = featureDim * 4;
    for (let at = 0; at < bytes.length; at += size) kept.push(bytes.subarray(at, at + size));
    forget();
  }

  function forget() {
    const until = Math.min(nextIndex, neededFrom ?? nextIndex - history, top());
    if (until > keptFrom) {
      kept.splice(0, until - keptFrom);
      keptFrom = until;
    }
  }

  function follow(header) {
    if (header.next_index > nextIndex || header.send_until > sendUntil) movedMs = Date.now();
    [nextIndex, sendUntil] = [header.next_index, header.send_until];
    neededFrom = header.needed_from ?? null;
    forget();
  }

  async function hear(header) {
    heardMs = Date.now();
    if (header.type === 'welcome') {
      const { window_snippets: window, context_snippets: context } = header;
      const credit = Math.max(header.send_until - header.next_index, 0);
      history ??= credit + window + context + header.lookahead_snippets;
      [isWelcome, isEndSent, resentAt, maxChunk] = [true, false, null, header.max_chunk_snippets];
      if (header.next_index < keptFrom) throw new Error(`snippet ${header.next_index} is forgotten`);
      follow(header);
      sent = nextIndex;
    } else if (header.type === 'ack' && isWelcome) {
      follow(header);
      sent = Math.max(sent, nextIndex);
      if (header.missing_until > nextIndex && resentAt !== nextIndex) {
        resentAt = nextIndex;
        await sendRows(Math.max(nextIndex, keptFrom), Math.min(header.missing_until, sent));
      }
    } else if (header.type === 'error') {
      if (['out_of_order', 'unknown_stream', 'no_credit'].includes(header.code)) {
        if (isWelcome) await hello(); // otherwise it speaks of what was before our Hello
      } else if (header.code !== 'too_fast') { // after that, the silence is waited for
        throw new EngineError(header);
      }
    }
  }

  async function look() {
    const nowMs = Date.now();
    if (!isWaiting()) [heardMs, movedMs] = [nowMs, nowMs];
    if (nowMs - movedMs > patienceS * 1000) {
      throw new Error(`stream ${stream}: no progress for ${patienceS} s at snippet ${nextIndex}`);
    }
    if (nowMs - heardMs > REPEAT_MS) await connect();
  }

  try {
    await connect();
    let [message, chunk, header] = [null, null, null]; // what is on its way, from the engine and the source
    for (;;) {
      await sendWhatMay();
      const isHungry = isWelcome && !isSourceOver && sent >= top();
      message ??= receive(socket).then((frames) => ({ frames }));
      if (isHungry) chunk ??= Promise.resolve(chunks.next()).then((result) => ({ result }));
      const { frames, result } = await Promise.race(isHungry ? [message, chunk] : [message]);
      if (result) {
        chunk = null;
        if (!isWaiting()) [heardMs, movedMs] = [Date.now(), Date.now()];
        if (result.done) isSourceOver = true;
        else keep(result.value);
        continue;
      }
      message = null;
      if (frames === null) await look();
      else if ((header = readHeader(frames[0])).type === 'ended') return header;
      else await hear(header);
    }
  } finally {
    socket?.close();
  }
}

/**
 * What an engine publishes, each as its header's map: once, and in order, over lost connections,
 * losses and, where the engine keeps a log, restarts of it.
 *
 * @param {string} address of the engine's events socket
 * @param {object} [options]
 * @param {string} [options.stream] one stream; all of them without it
 * @param {number} [options.since] first what has larger numbers in the log; without it, what is live
 * @param {(message: string) => void} [options.onLost] told what cannot be had any more
 * @param {Keys} [options.keys]
 * @yields {object} an `event`, `final` or `stream`
 */
export async function* subscribe(address, options = {}) {
  const { stream = null, since = null, onLost = console.warn, keys } = options;
  const topics = ['event/', 'final/', 'stream/'].map((topic) => topic + (stream ? `${stream}/` : ''));
  let [socket, instance, last] = [null, null, since]; // last: the number up to which all is given
  let [welcome, replay] = [null, null]; // the topics of the questions that are not answered yet
  let [heardMs, askedMs, isQuiet] = [0, 0, true];
  const sequences = new Map(); // the newest of each session, where there are no numbers

  function connect() {
    socket?.close();
    socket = new Subscriber(socketOptions(keys));
    socket.connect(address);
    socket.subscribe(...topics, 'mark/');
    [welcome, replay] = [`welcome/${newToken()}/`, null];
    socket.subscribe(welcome);
    heardMs = Date.now();
  }

  function ask() {
    if (replay) socket.unsubscribe(replay);
    replay = `replay/${newToken()}/${last}/${stream ?? '*'}/`;
    socket.subscribe(replay);
    askedMs = Date.now();
  }

  /** Another log, or another run of an engine without one, counts from the beginning. */
  function checkInstance(header) {
    if (instance !== null && header.instance !== instance) {
      onLost(`instance ${instance} is gone, here is ${header.instance}`);
      sequences.clear();
      last = last === null ? null : 0;
    }
    instance = header.instance;
  }

  function hearEcho(header) {
    checkInstance(header);
    welcome = null;
    if (header.number == null) last = null; // no log: nothing to ask
    else if (last === null) last = header.number;
    else ask();
  }

  function* hearPage(page, frames) {
    socket.unsubscribe(replay);
    replay = null;
    if (last > page.newest) throw new Error(`number ${last} is of another log`);
    if (page.oldest > last + 1) onLost(`numbers ${last + 1} to ${page.oldest - 1} are gone`);
    yield* frames.map(readHeader);
    last = page.next;
    if (page.next < page.newest) ask();
  }

  function* hearLive(header) {
    if (header.number == null) {
      const session = `${header.stream}/${header.session}`;
      const lost = header.sequence - 1 - (sequences.get(session) ?? header.sequence - 1);
      if (lost > 0) onLost(`stream ${session}: ${lost} messages are lost`);
      sequences.set(session, header.sequence);
      if (header.kind === 'ended') sequences.delete(session);
      yield header;
    } else if (header.number > last) {
      isQuiet = false;
      const before = stream ? header.previous : header.number - 1;
      if (before > last) return ask();
      last = header.number;
      yield header;
    }
  }

  function hearMark(mark) {
    if (welcome || replay) return;
    checkInstance(mark);
    if (mark.number > last && last !== null && (isQuiet || !stream)) ask();
    isQuiet = true;
  }

  try {
    connect();
    for (;;) {
      const received = await receive(socket);
      const nowMs = Date.now();
      if (received === null) {
        if (nowMs - heardMs > DEAD_MS) connect();
        else if (replay && nowMs - askedMs > REPEAT_MS) ask();
        continue;
      }
      const [topic, header, frames] = [`${received[0]}`, readHeader(received[1]), received.slice(2)];
      if (!welcome || topic === welcome) heardMs = nowMs;
      if (header.type === 'subscribed') hearEcho(header);
      else if (header.type === 'mark') hearMark(header);
      else if (header.type === 'page') { if (topic === replay) yield* hearPage(header, frames); }
      else if (!welcome && !replay) yield* hearLive(header); // else a page will have it
    }
  } finally {
    socket?.close();
  }
}
