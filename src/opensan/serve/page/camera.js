// The camera: each of its pictures is labelled with the words of that moment, one after the other, as fast as the
// service answers. The picture shown is the one that the labels belong to.

import { ServiceError, alive, encode, forget, segment } from "./api.js";

const SIDE = 640; // pixels: the longer side of the pictures that are sent
const QUALITY = 0.85; // of their JPEG
const COUNTED = 10; // pictures over which the rate is taken
const IDLE = 66; // milliseconds between pictures while there are no words

const TROUBLES = {
  NotAllowedError: "The browser does not let this page use the camera. Allow it beside the address, and press Camera again.",
  NotFoundError: "No camera was found.",
  NotReadableError: "The camera is in use by another program.",
};

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

export class Camera {
  /** `onChange(running)` follows start and stop. */
  constructor(app, onChange) {
    Object.assign(this, { app, onChange });
    this.running = null; // a token while it runs
    this.video = document.createElement("video");
    this.video.muted = this.video.playsInline = true;
    this.canvas = new OffscreenCanvas(1, 1);
  }

  async start() {
    if (this.running) return;
    const running = (this.running = {});
    try {
      if (!navigator.mediaDevices) throw new Error("Browsers open a camera only for pages of this machine (127.0.0.1) or over HTTPS.");
      const video = { width: { ideal: SIDE }, height: { ideal: (SIDE * 3) / 4 }, facingMode: "environment" };
      const stream = await navigator.mediaDevices.getUserMedia({ video, audio: false });
      if (this.running !== running) return stream.getTracks().forEach((track) => track.stop());
      this.video.srcObject = stream;
      stream.getVideoTracks()[0].addEventListener("ended", () => this.stop());
      await this.video.play();
    } catch (error) {
      this.#release();
      this.app.problem(TROUBLES[error.name] ?? error.message);
      return;
    }
    this.app.watch();
    this.onChange(true);
    this.finished = this.#run(running);
  }

  /** Ends it; the last picture stays, and is labelled in full like any other. */
  async stop() {
    if (!this.running) return;
    this.#release();
    await this.finished;
    if (this.last && !this.app.photograph) await this.app.open(this.last, "camera.jpg");
  }

  #release() {
    this.running = null;
    for (const track of this.video.srcObject?.getTracks() ?? []) track.stop();
    this.video.srcObject = null;
    this.onChange(false);
  }

  async #run(running) {
    this.last = null;
    const times = [];
    while (this.running === running) {
      if (document.hidden || this.video.readyState < 2) {
        await pause(IDLE);
        continue;
      }
      const begun = performance.now();
      const blob = await this.#picture();
      try {
        const sent = await this.#label(blob, running);
        if (!sent) await pause(IDLE);
        this.app.problem("");
      } catch (error) {
        if (!(error instanceof ServiceError)) throw error;
        await this.#trouble(error, running);
        continue;
      }
      times.push(performance.now());
      if (times.length > COUNTED) times.shift();
      performance.measure("frame", { start: begun, end: times.at(-1) });
      const rate = ((times.length - 1) * 1000) / (times.at(-1) - times[0]);
      this.app.tellRate(times.length > 2 ? rate : 0);
    }
  }

  /** The camera's present picture as a JPEG, in `this.canvas` too. */
  async #picture() {
    const { videoWidth, videoHeight } = this.video;
    const scale = Math.min(1, SIDE / Math.max(videoWidth, videoHeight));
    const [width, height] = [Math.round(videoWidth * scale), Math.round(videoHeight * scale)];
    if (this.canvas.width !== width || this.canvas.height !== height) Object.assign(this.canvas, { width, height });
    this.canvas.getContext("2d").drawImage(this.video, 0, 0, width, height);
    return this.canvas.convertToBlob({ type: "image/jpeg", quality: QUALITY });
  }

  /** Has one picture labelled for each side and shows it; false if there are no words. */
  async #label(blob, running) {
    const sides = this.app.sides.map((side) => (side.root.hidden ? null : side.question(true)));
    let answers = sides.map(() => null);
    if (sides.some(Boolean)) {
      const { id } = await encode(blob, this.app.model);
      try {
        answers = await Promise.all(sides.map((question) => question && segment(id, question, { threshold: this.app.threshold })));
      } finally {
        forget(id);
      }
    }
    if (this.running !== running) return true;
    this.last = blob;
    this.app.stage.renew(this.canvas);
    this.app.sides.forEach((side, number) => side.take(answers[number]));
    return sides.some(Boolean);
  }

  async #trouble(error, running) {
    if ([400, 413, 422].includes(error.status)) {
      // Words that cannot be used: the picture goes on, and the message stays until they change.
      this.app.sides.find((side) => side.question())?.wrong(error.message);
      await pause(IDLE);
    } else {
      this.app.problem(error.status ? error.message : "The service does not answer. The camera goes on when it is back.");
      await pause(1000 * Math.max(1, error.retryAfter));
      while (!error.status && this.running === running && !(await alive())) await pause(1000);
    }
  }
}
