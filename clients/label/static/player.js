// The video by its frames: which one is shown, and how to show another one.
//
// `times` says when each frame is shown. The browser says which one it has put on the screen
// (requestVideoFrameCallback), and is sent to the middle of a frame, where no rounding matters.

const SPEEDS = [0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4];

export class Player {
  times = new Float64Array(0);
  #video;
  #onFrame;
  #origin = 0; // the browser's time of the first frame
  #load = 0;
  #shown = 0;
  #target = null; // the frame that is to be shown, and is not yet
  #sought = null;
  #seen = null; // { moment, mediaTime } of the newest frame that was put on the screen

  constructor(video, onFrame) {
    this.#video = video;
    this.#onFrame = onFrame;
    video.addEventListener("seeked", () => this.#seeked());
    for (const name of ["play", "pause", "ended", "ratechange"]) {
      video.addEventListener(name, () => this.#onFrame());
    }
  }

  get isPlaying() { return !this.#video.paused && !this.#video.ended; }
  get isReady() { return this.times.length > 0; }
  get speeds() { return SPEEDS; }
  get speed() { return this.#video.playbackRate; }
  get end() { return this.times[this.times.length - 1] ?? 0; }
  get seconds() { return this.times[this.frame] ?? 0; }

  /** The frame that is shown; after a step or a jump, the one that it leads to. */
  get frame() { return this.#target ?? this.#shown; }

  /**
   * The frame that was shown at a moment, in ms as events have it. While it plays, a busy page hears
   * of frames and of keys late, but from both with their moments.
   */
  frameAt(moment) {
    if (this.#target !== null || !this.isPlaying || this.#seen === null) return this.frame;
    const passed = ((moment - this.#seen.moment) / 1000) * this.speed;
    const now = this.#video.currentTime; // which stands still where the video waits for data
    return this.at(Math.min(this.#seen.mediaTime + passed, now) - this.#origin);
  }

  /** Another video; ready when its first frame is there. Raises what the browser says. */
  async load(path, times) {
    const speed = this.speed;
    this.unload();
    const load = this.#load;
    await new Promise((resolve, reject) => {
      const first = { once: true };
      const fail = () => reject(new Error(this.#video.error?.message || "it does not play it"));
      this.#video.addEventListener("error", fail, first);
      const begin = (mediaTime) => {
        if (load !== this.#load) return;
        this.#origin = mediaTime;
        this.#video.removeEventListener("error", fail);
        resolve();
      };
      if ("requestVideoFrameCallback" in this.#video) {
        this.#video.requestVideoFrameCallback((_, frame) => begin(frame.mediaTime));
      } else {
        this.#video.addEventListener("loadeddata", () => begin(this.#video.currentTime), first);
      }
      this.#video.src = path;
    });
    this.#video.defaultPlaybackRate = this.#video.playbackRate = speed;
    this.times = times;
    this.#watch(load);
    this.#onFrame();
  }

  unload() {
    this.#load += 1;
    this.#video.pause();
    this.times = new Float64Array(0);
    this.#shown = 0;
    this.#target = this.#sought = this.#seen = null;
  }

  #watch(load) {
    const see = (mediaTime, moment) => {
      if (load !== this.#load) return;
      if (this.#target === null) {
        this.#seen = { mediaTime, moment };
        this.#show(this.nearest(mediaTime - this.#origin));
      }
      this.#watch(load);
    };
    if ("requestVideoFrameCallback" in this.#video) {
      this.#video.requestVideoFrameCallback((_, frame) => see(frame.mediaTime, frame.expectedDisplayTime));
    } else {
      const shown = () => this.times[this.at(this.#video.currentTime - this.#origin)];
      requestAnimationFrame((moment) => see(shown() + this.#origin, moment));
    }
  }

  #show(index) {
    this.#shown = index;
    this.#onFrame();
  }

  /** The frame that is on the screen at a time. */
  at(seconds) {
    let low = 0;
    let high = this.times.length;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (this.times[middle] <= seconds + 1e-6) low = middle;
      else high = middle;
    }
    return low;
  }

  /** The frame whose time is the nearest. */
  nearest(seconds) {
    const index = this.at(seconds);
    const after = this.times[index + 1] ?? Infinity;
    return after - seconds < seconds - this.times[index] ? index + 1 : index;
  }

  /** Shows a frame; where several are asked for quickly, those in between may be left out. */
  seek(index) {
    if (!this.isReady) return;
    this.#target = Math.max(0, Math.min(index, this.times.length - 1));
    if (this.#sought === null) this.#send();
    this.#onFrame();
  }

  /** A step pauses. */
  step(frames) {
    this.pause();
    this.seek(this.frame + frames);
  }

  /** Moves by seconds, playing or not. */
  skip(seconds) {
    this.seek(this.at(this.seconds + seconds));
  }

  #send() {
    const from = this.times[this.#target];
    const to = this.times[this.#target + 1];
    const middle = this.#origin + (to === undefined ? from + 0.001 : (from + to) / 2);
    this.#sought = this.#target;
    this.#video.currentTime = middle;
  }

  #seeked() {
    if (this.#sought === null) return;
    const done = this.#sought === this.#target;
    this.#sought = null;
    if (!done) {
      this.#send();
      return;
    }
    this.#target = this.#seen = null;
    this.#show(this.at(this.#video.currentTime - this.#origin));
  }

  toggle() {
    if (this.isPlaying) this.pause();
    else this.play();
  }

  play() {
    if (this.isReady) this.#video.play().catch(() => {}); // left again before it began
  }

  pause() { this.#video.pause(); }

  /** The next speed above (1) or below (-1), or the given one. */
  changeSpeed(direction) {
    const now = SPEEDS.indexOf(this.speed);
    this.setSpeed(SPEEDS[Math.max(0, Math.min(now + direction, SPEEDS.length - 1))]);
  }

  setSpeed(speed) {
    this.#video.defaultPlaybackRate = this.#video.playbackRate = speed;
  }
}
