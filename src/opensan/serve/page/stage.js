// The photograph and what lies over it: colours, the border between two sides, the cursor, a proposal's mask.

import { css } from "./words.js";

const BORDER = 0xff202020; // ABGR: dark, opaque
const MOST_PIXELS = 4e6; // of a canvas; a larger photograph is shown in smaller size, its labels stay as they are

const abgr = ([r, g, b]) => ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0; // as canvases keep it on little-endian machines

const element = (id) => document.getElementById(id);

export class Stage {
  /** `onRead(x, y)` follows the cursor (null when it leaves), `onExplain(x, y)` a click or Enter; in pixels of the photograph. */
  constructor({ onRead, onExplain }) {
    Object.assign(this, { onRead, onExplain });
    this.frame = element("frame");
    this.photo = element("photo");
    this.overlays = [element("overlay-a"), element("overlay-b")];
    this.mask = element("mask");
    this.pointing = element("pointing");
    this.cross = element("cross");
    this.tip = element("tip");
    this.splitter = element("split");
    this.size = { width: 0, height: 0 };
    this.cursor = null;
    this.#followPointer();
    this.#followKeys();
    this.#followSplit();
    this.opacity(55);
    this.split(50);
  }

  /** Shows a photograph (ImageBitmap); what lay over the last one goes. */
  open(bitmap) {
    this.size = { width: bitmap.width, height: bitmap.height };
    this.step = Math.max(1, Math.ceil(Math.sqrt((bitmap.width * bitmap.height) / MOST_PIXELS)));
    const [width, height] = [Math.ceil(bitmap.width / this.step), Math.ceil(bitmap.height / this.step)];
    for (const canvas of [this.photo, ...this.overlays, this.mask]) Object.assign(canvas, { width, height });
    this.photo.getContext("2d").drawImage(bitmap, 0, 0, width, height);
    this.frame.style.setProperty("--aspect", bitmap.width / bitmap.height);
    this.frame.hidden = false;
    this.hideMask();
    this.moveTo(null);
  }

  opacity(percent) {
    for (const canvas of this.overlays) canvas.style.opacity = percent / 100;
  }

  /** Whether side B is shown too, right of the border. */
  compare(on) {
    this.overlays[1].hidden = !on;
    this.splitter.hidden = !on;
    this.split(this.position);
  }

  split(percent) {
    this.position = Math.min(100, Math.max(0, percent));
    const on = !this.splitter.hidden;
    this.overlays[0].style.clipPath = on ? `inset(0 ${100 - this.position}% 0 0)` : "none";
    this.overlays[1].style.clipPath = `inset(0 0 0 ${this.position}%)`;
    this.splitter.style.left = `${this.position}%`;
    this.splitter.setAttribute("aria-valuenow", Math.round(this.position));
  }

  /** Which side (0 or 1) lies at column x. */
  sideAt(x) {
    return !this.splitter.hidden && x >= (this.position / 100) * this.size.width ? 1 : 0;
  }

  /**
   * Colours side `side`: `labels` [height * width] are indices into `colours`, each [r, g, b] or null; beyond them is
   * unlabelled. Without labels it is cleared.
   */
  paint(side, labels, colours) {
    const canvas = this.overlays[side];
    const context = canvas.getContext("2d");
    if (!labels) {
      context.clearRect(0, 0, canvas.width, canvas.height);
      return;
    }
    const table = new Uint32Array(2 ** (8 * labels.BYTES_PER_ELEMENT));
    colours.forEach((colour, label) => colour && (table[label] = abgr(colour)));
    const picture = context.createImageData(canvas.width, canvas.height);
    const out = new Uint32Array(picture.data.buffer);
    const { step } = this;
    const stride = this.size.width;
    for (let row = 0, at = 0; row < canvas.height; row++) {
      const start = row * step * stride;
      const below = row + 1 < canvas.height ? step * stride : 0;
      for (let column = 0; column < canvas.width; column++, at++) {
        const place = start + column * step;
        const right = column + 1 < canvas.width ? step : 0;
        const colour = table[labels[place]];
        const same = colour === table[labels[place + right]] && colour === table[labels[place + below]];
        out[at] = same ? colour : BORDER;
      }
    }
    context.putImageData(picture, 0, 0);
  }

  /** Darkens all that a proposal leaves out: `mask` is a picture whose brightness is its probability. */
  showMask(mask) {
    drawMask(this.mask, mask);
    this.mask.hidden = false;
  }

  hideMask() {
    this.mask.hidden = true;
  }

  /** A small picture of the photograph under a proposal's mask. */
  thumbnail(mask) {
    const canvas = document.createElement("canvas");
    const scale = 192 / Math.max(this.photo.width, this.photo.height);
    canvas.width = Math.max(1, Math.round(this.photo.width * scale));
    canvas.height = Math.max(1, Math.round(this.photo.height * scale));
    const shade = canvas.cloneNode();
    drawMask(shade, mask);
    const context = canvas.getContext("2d");
    context.drawImage(this.photo, 0, 0, canvas.width, canvas.height);
    context.drawImage(shade, 0, 0);
    return canvas;
  }

  /** Puts the cursor at {x, y} (pixels of the photograph), or nowhere. */
  moveTo(cursor) {
    this.cursor = cursor;
    if (!cursor) this.cross.hidden = true;
    this.onRead(cursor);
  }

  /** The words beside the cursor; "" hides them. */
  say(text, colour) {
    this.tip.hidden = !text || !this.cursor;
    if (this.tip.hidden) return;
    element("tip-text").textContent = text;
    const swatch = this.tip.querySelector(".swatch");
    swatch.hidden = !colour;
    if (colour) swatch.style.backgroundColor = css(colour);
    const box = this.frame.getBoundingClientRect();
    const x = ((this.cursor.x + 0.5) / this.size.width) * box.width;
    const y = ((this.cursor.y + 0.5) / this.size.height) * box.height;
    const { offsetWidth: width, offsetHeight: height } = this.tip;
    const left = x + 14 + width > box.width ? Math.max(0, x - 14 - width) : x + 14;
    const top = y - 10 - height < 0 ? y + 14 : y - 10 - height;
    this.tip.style.transform = `translate(${left}px, ${top}px)`;
  }

  #place(event) {
    const box = this.pointing.getBoundingClientRect();
    const x = Math.floor(((event.clientX - box.left) / box.width) * this.size.width);
    const y = Math.floor(((event.clientY - box.top) / box.height) * this.size.height);
    return this.#inside(x, y);
  }

  #inside(x, y) {
    const { width, height } = this.size;
    return { x: Math.min(width - 1, Math.max(0, x)), y: Math.min(height - 1, Math.max(0, y)) };
  }

  #followPointer() {
    this.pointing.addEventListener("pointermove", (event) => {
      this.cross.hidden = true;
      this.moveTo(this.#place(event));
    });
    this.pointing.addEventListener("pointerleave", () => this.moveTo(null));
    this.pointing.addEventListener("click", (event) => {
      this.moveTo(this.#place(event));
      this.onExplain(this.cursor);
    });
  }

  #followKeys() {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    this.pointing.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && this.cursor) {
        event.preventDefault();
        this.onExplain(this.cursor);
      }
      const direction = steps[event.key];
      if (!direction) return;
      event.preventDefault();
      const { width, height } = this.size;
      const from = this.cursor ?? { x: width >> 1, y: height >> 1 };
      const far = Math.max(1, Math.round(Math.max(width, height) / (event.shiftKey ? 10 : 60)));
      this.cursor = this.#inside(from.x + direction[0] * far, from.y + direction[1] * far);
      this.cross.style.left = `${((this.cursor.x + 0.5) / width) * 100}%`;
      this.cross.style.top = `${((this.cursor.y + 0.5) / height) * 100}%`;
      this.cross.hidden = false;
      this.onRead(this.cursor, true);
    });
    this.pointing.addEventListener("blur", () => this.moveTo(null));
  }

  #followSplit() {
    const { splitter } = this;
    splitter.addEventListener("pointerdown", (event) => splitter.setPointerCapture(event.pointerId));
    splitter.addEventListener("pointermove", (event) => {
      if (!splitter.hasPointerCapture(event.pointerId)) return;
      const box = this.frame.getBoundingClientRect();
      this.split(((event.clientX - box.left) / box.width) * 100);
    });
    splitter.addEventListener("keydown", (event) => {
      const to = { ArrowLeft: this.position - 2, ArrowRight: this.position + 2, Home: 0, End: 100 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      this.split(to);
    });
  }
}

/** Fills `canvas` with a shade that is clear where the mask is bright. */
function drawMask(canvas, mask) {
  const small = document.createElement("canvas");
  Object.assign(small, { width: mask.width, height: mask.height });
  const context = small.getContext("2d");
  context.drawImage(mask, 0, 0);
  const picture = context.getImageData(0, 0, mask.width, mask.height);
  for (let at = 0; at < picture.data.length; at += 4) {
    const probability = picture.data[at];
    picture.data.set([8, 12, 20, Math.round(0.86 * (255 - probability))], at);
  }
  context.putImageData(picture, 0, 0);
  const target = canvas.getContext("2d");
  target.clearRect(0, 0, canvas.width, canvas.height);
  target.drawImage(small, 0, 0, canvas.width, canvas.height);
}
