// What the page asks of `hrpro label`. Addresses are relative: the page's own has the token.

/** It answered, but no. `status` 412: another page or program has changed the file. */
export class Refusal extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

async function ask(path, options = {}) {
  const answer = await fetch(path, { cache: "no-store", ...options });
  if (!answer.ok) throw new Refusal(answer.status, await answer.text());
  return answer;
}

export const session = async () => (await ask("api/session")).json();
export const video = async (number) => (await ask(`api/videos/${number}`)).json();
export const mediaPath = (number) => `api/videos/${number}/media`;

/** When each frame is shown, in seconds from the first. */
export async function times(number) {
  return new Float64Array(await (await ask(`api/videos/${number}/times`)).arrayBuffer());
}

/** The points of a video by time, and the version of the file that they are from. */
export async function points(number) {
  const answer = await ask(`api/videos/${number}/points`);
  return { points: (await answer.json()).points, version: answer.headers.get("ETag") };
}

/** Have a video just these points; returns the file's new version when they are on the disk. */
export async function putPoints(number, points, version) {
  const body = JSON.stringify(points.map(({ label, seconds }) => [label, seconds]));
  const options = { method: "PUT", body, headers: { "If-Match": version } };
  return (await ask(`api/videos/${number}/points`, options)).headers.get("ETag");
}

export async function putClasses(labels) {
  const answer = await ask("api/classes", { method: "PUT", body: JSON.stringify(labels) });
  return (await answer.json()).classes;
}
