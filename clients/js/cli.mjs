/** The command line of the client; what it hears goes to stdout as lines of JSON. */

import { createReadStream, readFileSync } from 'node:fs';
import { parseArgs } from 'node:util';
import { feed, subscribe } from './hrpro.mjs';

const USAGE = `node cli.mjs feed ADDRESS STREAM FILE.f32 DIM
    [--frames-per-s 25] [--snippet-frames 16]
node cli.mjs subscribe ADDRESS [--stream STREAM] [--since NUMBER]
  FILE.f32: little-endian float32, DIM for each snippet; - is stdin
  --key FILE: the client's key, where the engine has keys`;

/** Whole snippets of a file as they can be read: Float32Arrays of n * featureDim values. */
async function* snippets(file, featureDim) {
  let rest = Buffer.alloc(0);
  for await (const part of file === '-' ? process.stdin : createReadStream(file)) {
    const bytes = Buffer.concat([rest, part]);
    const whole = bytes.length - (bytes.length % (featureDim * 4));
    // A copy: a view of floats must begin at a multiple of 4 bytes.
    if (whole) yield new Float32Array(new Uint8Array(bytes.subarray(0, whole)).buffer);
    rest = bytes.subarray(whole);
  }
  if (rest.length) throw new Error(`${file}: ${rest.length} bytes are left of a snippet`);
}

// Who reads may have enough of it.
process.stdout.on('error', (error) => process.exit(error.code === 'EPIPE' ? 0 : 1));

const print = ({ v, ...message }) => process.stdout.write(`${JSON.stringify(message)}\n`);

async function main() {
  const text = { type: 'string' };
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      'frames-per-s': text, 'snippet-frames': text, stream: text, since: text, key: text,
    },
  });
  const [command, address, stream, file, dim] = positionals;
  const number = (name) => (values[name] === undefined ? undefined : Number(values[name]));
  const keys = values.key && JSON.parse(readFileSync(values.key, 'utf-8'));
  if (command === 'feed' && positionals.length === 5) {
    const clock = { framesPerS: number('frames-per-s'), snippetFrames: number('snippet-frames') };
    const source = snippets(file, Number(dim));
    print(await feed(address, stream, Number(dim), source, { ...clock, keys }));
  } else if (command === 'subscribe' && positionals.length === 2) {
    const options = { stream: values.stream, since: number('since'), keys };
    for await (const message of subscribe(address, options)) print(message);
  } else {
    throw new Error(`expected:\n${USAGE}`);
  }
}

main().then(() => process.exit(0), (error) => {
  console.error(error.message);
  process.exit(1);
});
