/**
 * A client of HR-Pro Stream in JavaScript, written from docs/PROTOCOL.md: `feed` sends the snippets
 * of a stream to an engine, `subscribe` receives what the engine publishes.
 */

import { decode, encode } from '@msgpack/msgpack';
import { randomBytes } from 'node:crypto';
import { Dealer, Subscriber } from 'zeromq';

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
  return { linger: 0, receiveTimeout: TICK_MS, maxMessageSize: 4 << 20, ...curve };
}

function checkStream(stream) {
  if (!/^[A-Za-z0-9._:-]{1,64}$/.test(stream)) {
    throw new Error(`expected a stream of 1 to 64 of A-Z a-z 0-9 . _ : -, got '${stream}'`);
  }
}

const newToken = () => randomBytes(8).toString('hex');

// Of each type the integers that must be there, and of all those that may be nil or left out.
const INTEGERS = {
  welcome: ['next_index', 'send_until', 'max_chunk_snippets'], ack: ['next_index', 'send_until'],
  ended: ['next_index'], error: [], subscribed: [], mark: [], page: ['next', 'oldest', 'newest'],
  event: ['session', 'sequence'], final: ['session', 'sequence'], stream: ['session', 'sequence'],
};
const OPTIONAL_INTEGERS = ['needed_from', 'missing_until', 'number', 'previous'];

function readHeader(frame) {
  const most = { maxStrLength: frame.length, maxArrayLength: frame.length, maxMapLength: 1000 };
  const header = decode(frame, most);
  const isIndex = (value) => Number.isInteger(value) && value >= 0;
  const isFine = header?.v === 1 && Object.hasOwn(INTEGERS, header.type) &&
    INTEGERS[header.type].every((name) => isIndex(header[name])) &&
    OPTIONAL_INTEGERS.every((name) => isIndex(header[name] ?? 0));
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
 * Feed one stream until its source ends, over lost connections and restarts of the engine. It waits
 * for an engine as long as there is none.
 *
 * @param {string} address of the engine's feed socket
 * @param {string} stream
 * @param {number} featureDim D
 * @param {AsyncIterator<Float32Array>} source chunks of any size: n * D values, the snippets one
 *     after the other; the next one is asked for when all were sent
 * @param {object} [options]
 * @param {number} [options.framesPerS] frames of the video a second, as the engine has it
 * @param {number} [options.snippetFrames] frames of a snippet, as the engine has it
 * @param {number} [options.firstIndex] snippet index of the source's first snippet
 * @param {Keys} [options.keys]
 * @returns {Promise<object>} the Ended; its `next_index` is smaller than what was sent if the
 *     engine has ended the stream by itself
 * @throws {EngineError} if the engine refuses for good
 * @throws what the source throws, when the stream is ended with what came before
 */
export async function feed(address, stream, featureDim, source, options = {}) {
  const { framesPerS = 25, snippetFrames = 16, firstIndex = 0, keys } = options;
  checkStream(stream);
  const routingId = newToken();
  const kept = []; // one Buffer for each snippet, from keptFrom on
  let keptFrom = firstIndex;
  let socket = null;
  let [nextIndex, sendUntil, sent, maxChunk] = [0, 0, 0, 1]; // the engine's, its credit, and ours
  let [isWelcome, isSourceOver, isEndSent] = [false, false, false];
  let [resentAt, heardMs] = [null, 0];
  let [hellos, strays] = [0, 0]; // that are not answered, over this line and over those before it

  const top = () => keptFrom + kept.length;
  const isWaiting = () => !isWelcome || isEndSent || nextIndex < top();
  const say = (type, fields, ...frames) =>
    socket.send([encode({ v: 1, type, stream, ...fields }), ...frames]);
  const sayEnd = () => say('end', { next_index: nextIndex });

  function sayHello() {
    [isWelcome, isEndSent, hellos] = [false, false, hellos + 1];
    const clock = { frames_per_s: framesPerS, snippet_frames: snippetFrames };
    return say('hello', { feature_dim: featureDim, ...clock, first_index: keptFrom });
  }

  async function connect() {
    socket?.close();
    socket = new Dealer({ ...socketOptions(keys), routingId });
    socket.connect(address);
    heardMs = Date.now();
    [strays, hellos] = [strays + hellos, 0];
    await (isEndSent ? sayEnd() : sayHello());
  }

  async function sendRows(first, until) {
    for (let at = first; at < until; at += maxChunk) {
      const rows = kept.slice(at - keptFrom, Math.min(at + maxChunk, until) - keptFrom);
      const shape = [rows.length, featureDim];
      await say('chunk', { first_index: at, dtype: 'float32', shape }, Buffer.concat(rows));
    }
  }

  async function sendWhatMay() {
    const until = Math.min(sendUntil, top());
    await sendRows(sent, until);
    sent = Math.max(sent, until);
    if (isSourceOver && nextIndex >= top() && !isEndSent) {
      isEndSent = true;
      await sayEnd();
    }
  }

  function keep(values) {
    if (values.length % featureDim) {
      throw new Error(`expected n * ${featureDim} values, got ${values.length}`);
    }
    const bytes = Buffer.from(Float32Array.from(values).buffer); // Node runs on little-endian alone
    const size = featureDim * 4;
    for (let at = 0; at < bytes.length; at += size) kept.push(bytes.subarray(at, at + size));
  }

  function follow(header) {
    [nextIndex, sendUntil] = [header.next_index, header.send_until];
    // What lies before our first snippet we never had, whatever the engine may need.
    const needed = Math.max(keptFrom, Math.min(nextIndex, header.needed_from ?? nextIndex, top()));
    kept.splice(0, needed - keptFrom);
    keptFrom = needed;
  }

  async function hear(header) {
    if (header.type === 'welcome') {
      if (header.next_index < keptFrom) throw new Error(`snippet ${header.next_index} is gone`);
      [isWelcome, isEndSent, resentAt, maxChunk] = [true, false, null, header.max_chunk_snippets];
      hellos = Math.max(0, hellos - 1);
      follow(header);
      sent = nextIndex;
    } else if (header.type === 'ack' && isWelcome) {
      follow(header);
      sent = Math.max(sent, nextIndex);
      if (header.missing_until > nextIndex && resentAt !== nextIndex) {
        resentAt = nextIndex;
        await sendRows(nextIndex, Math.min(header.missing_until, sent));
      }
    } else if (['out_of_order', 'unknown_stream', 'no_credit'].includes(header.code)) {
      if (isWelcome) await sayHello(); // otherwise it speaks of what was before our Hello
    } else if (header.code === 'not_owner' && (!isWelcome || strays > 0)) {
      if (!isWelcome) return;
      strays -= 1; // an engine that stood still has read a Hello of the old line after the new one's
      await sayHello();
    } else if (header.type === 'error' && header.code !== 'too_fast') {
      throw new EngineError(header); // after too_fast, Hello comes again when nothing else does
    }
  }

  try {
    await connect();
    let [message, chunk] = [null, null]; // what is on its way, from the engine and the source
    let failure = null; // of the source
    for (;;) {
      if (isWelcome) await sendWhatMay();
      const isHungry = isWelcome && !isSourceOver && sent >= top();
      message ??= receive(socket).then((frames) => ({ frames }));
      if (isHungry) {
        chunk ??= source.next().then((result) => ({ result }), (thrown) => {
          failure = { thrown };
          return { result: { done: true } };
        });
      }
      const { frames, result } = await Promise.race(isHungry ? [message, chunk] : [message]);
      if (frames || !isWaiting()) heardMs = Date.now();
      if (result) {
        chunk = null;
        isSourceOver = result.done;
        if (!result.done) keep(result.value);
        continue;
      }
      message = null;
      const header = frames && readHeader(frames[0]);
      if (header?.type === 'ended') {
        if (failure) throw failure.thrown;
        return header;
      }
      if (header) await hear(header);
      else if (Date.now() - heardMs > REPEAT_MS) {
        if (failure) throw failure.thrown; // there is no engine to end the stream
        await connect();
      }
    }
  } finally {
    socket?.close();
  }
}

/**
 * What an engine publishes, each as its header's map: once, and in order, over lost connections
 * and, where the engine keeps a log, losses and restarts of it.
 *
 * @param {string} address of the engine's events socket
 * @param {object} [options]
 * @param {string} [options.stream] one stream; all of them without it
 * @param {number} [options.since] first what the log has behind this number; else what is live
 * @param {(message: string) => void} [options.onLost] told what cannot be had any more
 * @param {Keys} [options.keys]
 * @throws {Error} for a stream or a number that is none, or a number of another log
 * @yields {object} an `event`, `final` or `stream`
 */
export async function* subscribe(address, options = {}) {
  const { stream = null, since = null, onLost = console.warn, keys } = options;
  if (stream !== null) checkStream(stream);
  if (since !== null && !(Number.isSafeInteger(since) && since >= 0)) {
    throw new Error(`expected since to be an integer of at least 0, got ${since}`);
  }
  const part = stream ? `${stream}/` : '';
  let [socket, instance, last] = [null, null, since]; // last: the number up to which all is given
  let [welcome, replay] = [null, null]; // the topics of the questions that are not answered yet
  let [heardMs, askedMs, isQuiet] = [0, 0, true];

  function connect() {
    socket?.close();
    socket = new Subscriber(socketOptions(keys));
    socket.connect(address);
    [welcome, replay, heardMs] = [`welcome/${newToken()}/`, null, Date.now()];
    socket.subscribe(`event/${part}`, `final/${part}`, `stream/${part}`, 'mark/', welcome);
  }

  function ask() {
    if (replay) socket.unsubscribe(replay);
    [replay, askedMs] = [`replay/${newToken()}/${last}/${stream ?? '*'}/`, Date.now()];
    socket.subscribe(replay);
  }

  /** An echo or a mark: another log, or run of an engine without one, counts from 1 again. */
  function checkInstance(header) {
    if (instance !== null && header.instance !== instance) {
      onLost(`instance ${instance} is gone, here is ${header.instance}`);
      last = last === null ? null : 0;
    }
    instance = header.instance;
  }

  function hearEcho(header) {
    checkInstance(header);
    welcome = null;
    if (header.number == null) {
      if (last !== null) onLost(`there is no log: what followed number ${last} is gone`);
      last = null;
    } else if (last === null) last = header.number;
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
    if (header.number == null) return yield header;
    isQuiet = false;
    if (header.number <= last) return;
    if ((stream ? header.previous : header.number - 1) > last) return ask();
    last = header.number;
    yield header;
  }

  function hearMark(mark) {
    checkInstance(mark);
    if (last !== null && mark.number > last && (isQuiet || !stream)) ask();
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
      const [topic, header] = [`${received[0]}`, readHeader(received[1])];
      if (!welcome || topic === welcome) heardMs = nowMs; // an echo that was lost is asked for anew
      if (topic === replay) yield* hearPage(header, received.slice(2));
      else if (header.type === 'subscribed') hearEcho(header);
      else if (welcome || replay || header.type === 'page') continue; // a page will have it
      else if (header.type === 'mark') hearMark(header);
      else yield* hearLive(header);
    }
  } finally {
    socket?.close();
  }
}
