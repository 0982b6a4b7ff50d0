// The photograph and what lies over it: colours and names, the border between two sides, the cursor, a proposal's mask.

import { ink } from "./colours.js";
import { namePlaces, partAt, withoutCrowds } from "./regions.js";
import { css } from "./words.js";

const BORDER = 0xff202020; // ABGR: dark, opaque
const MOST_PIXELS = 4e6; // of a canvas; a larger photograph is shown in smaller size, its labels stay as they are
const OPACITY = 60; // percent; the package's overlays have the same
const MUTED = 50; // percent of opacity, from which on the photograph is wholly muted under the colours
const MOST_NAMES = 30;
const MOST_PLACES = 2000; // of a line; the service takes no more
const LETTERS = 13; // pixels of the screen: height of the names

const abgr = ([r, g, b]) => ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0; // as canvases keep it on little-endian machines

const element = (id) => document.getElementById(id);

export class Stage {
  /**
   * `onRead(x, y)` follows the cursor (null when it leaves), `onExplain(x, y)` a click or Enter; in pixels of the photograph.
   * While `marking`, a click, a line that is drawn, or Enter is a mark instead: `onMark([[x, y], ...])`.
   */
  constructor({ onRead, onExplain, onMark }) {
    Object.assign(this, { onRead, onExplain, onMark });
    this.marking = false;
    this.line = null; // what is being drawn
    this.shownMarks = [];
    this.marks = element("marks");
    this.frame = element("frame");
    this.photo = element("photo");
    this.layers = ["a", "b"].map((side) => ({
      root: element(`layer-${side}`),
      muted: element(`muted-${side}`),
      overlay: element(`overlay-${side}`),
      names: element(`names-${side}`),
      shown: null, // {labels, words}: what was painted last
    }));
    this.mask = element("mask");
    this.object = element("object");
    this.part = null; // the part under the cursor, and the labels that it is of
    this.pointing = element("pointing");
    this.cross = element("cross");
    this.tip = element("tip");
    this.splitter = element("split");
    this.photo.getContext("2d", { willReadFrequently: true }); // `mute` reads each of the camera's pictures
    this.grey = document.createElement("canvas");
    this.size = { width: 0, height: 0 };
    this.cursor = null;
    this.#followPointer();
    this.#followKeys();
    this.#followSplit();
    new ResizeObserver(() => this.layers.forEach((layer) => this.#writeNames(layer))).observe(this.frame);
    this.opacity(OPACITY);
    this.split(50);
  }

  /** Shows the camera's next picture, a canvas; what lies over the last one stays until it is painted anew. */
  renew(canvas) {
    if (this.frame.hidden || canvas.width !== this.size.width || canvas.height !== this.size.height) return this.open(canvas);
    this.photo.getContext("2d").drawImage(canvas, 0, 0);
    mute(this.photo, this.grey);
  }

  /** Shows a photograph (ImageBitmap or canvas); what lay over the last one goes. */
  open(bitmap) {
    this.size = { width: bitmap.width, height: bitmap.height };
    this.step = Math.max(1, Math.ceil(Math.sqrt((bitmap.width * bitmap.height) / MOST_PIXELS)));
    const [width, height] = [Math.ceil(bitmap.width / this.step), Math.ceil(bitmap.height / this.step)];
    const canvases = [this.photo, this.grey, this.mask, this.object, this.marks, ...this.layers.flatMap(({ muted, overlay }) => [muted, overlay])];
    for (const canvas of canvases) Object.assign(canvas, { width, height });
    this.photo.getContext("2d").drawImage(bitmap, 0, 0, width, height);
    mute(this.photo, this.grey);
    this.frame.style.setProperty("--aspect", bitmap.width / bitmap.height);
    this.frame.hidden = false;
    this.layers.forEach((_, side) => this.paint(side));
    this.hideMask();
    this.moveTo(null);
  }

  opacity(percent) {
    for (const { overlay, muted } of this.layers) {
      overlay.style.opacity = percent / 100;
      muted.style.opacity = Math.min(1, percent / MUTED);
    }
  }

  /** Whether side B is shown too, right of the border. */
  compare(on) {
    this.layers[1].root.hidden = !on;
    this.splitter.hidden = !on;
    this.split(this.position);
  }

  split(percent) {
    this.position = Math.min(100, Math.max(0, percent));
    const on = !this.splitter.hidden;
    this.layers[0].root.style.clipPath = on ? `inset(0 ${100 - this.position}% 0 0)` : "none";
    this.layers[1].root.style.clipPath = `inset(0 0 0 ${this.position}%)`;
    this.splitter.style.left = `${this.position}%`;
    this.splitter.setAttribute("aria-valuenow", Math.round(this.position));
    for (const layer of this.layers) this.#writeNames(layer);
  }

  /** Between which columns of the photograph a layer is seen. */
  #seen(layer) {
    const { width } = this.size;
    const border = this.splitter.hidden ? width : (this.position / 100) * width;
    return layer === this.layers[0] ? [0, border] : [border, width];
  }

  /** Which side (0 or 1) lies at column x. */
  sideAt(x) {
    return !this.splitter.hidden && x >= (this.position / 100) * this.size.width ? 1 : 0;
  }

  /**
   * Colours side `side`: `labels` [height * width] are indices into `words`, each {name, colour} with colour [r, g, b],
   * or null for a hidden one; beyond them is unlabelled. Without labels it is cleared.
   */
  paint(side, labels, words) {
    const layer = this.layers[side];
    const { overlay, muted } = layer;
    const context = overlay.getContext("2d");
    const grey = muted.getContext("2d");
    grey.globalCompositeOperation = "copy";
    if (!labels) {
      layer.shown = null;
      for (const each of [context, grey]) each.clearRect(0, 0, overlay.width, overlay.height);
      this.#writeNames(layer);
      this.#outline();
      return;
    }
    context.putImageData(this.#coloured(labels, words), 0, 0);
    // The photograph is muted where it is coloured, and untouched elsewhere.
    grey.drawImage(this.grey, 0, 0);
    grey.globalCompositeOperation = "destination-in";
    grey.drawImage(overlay, 0, 0);
    layer.shown = { labels, words };
    this.#writeNames(layer);
    this.#outline();
  }

  /** Draws a line around the connected part of a word that the cursor is in. */
  #outline() {
    const { cursor } = this;
    const { width, height } = this.size;
    const shown = cursor && this.layers[this.sideAt(cursor.x)].shown;
    const named = shown && shown.words[shown.labels[cursor.y * width + cursor.x]];
    if (!named) {
      this.object.hidden = true;
      this.part = null;
      return;
    }
    const { labels } = shown;
    const old = this.part;
    const cell = old && Math.floor(cursor.y / old.step) * old.columns + Math.floor(cursor.x / old.step);
    if (old?.labels === labels && old.label === labels[cursor.y * width + cursor.x] && old.inside[cell]) return;
    const part = partAt(labels, width, height, cursor);
    this.part = part && { ...part, labels };
    this.object.hidden = !part;
    if (part) drawOutline(this.object, part, this.step);
  }

  #coloured(labels, words) {
    const { width, height } = this.photo;
    const table = new Uint32Array(2 ** (8 * labels.BYTES_PER_ELEMENT));
    words.forEach((word, label) => word && (table[label] = abgr(word.colour)));
    const picture = new ImageData(width, height);
    const out = new Uint32Array(picture.data.buffer);
    const borders = new Uint8Array(out.length);
    const { step } = this;
    const stride = this.size.width;
    for (let row = 0, at = 0; row < height; row++) {
      const start = row * step * stride;
      const below = row + 1 < height ? step * stride : 0;
      for (let column = 0; column < width; column++, at++) {
        const place = start + column * step;
        const right = column + 1 < width ? step : 0;
        const colour = table[labels[place]];
        out[at] = colour;
        borders[at] = colour !== table[labels[place + right]] || colour !== table[labels[place + below]];
      }
    }
    const kept = withoutCrowds(borders, width, height);
    for (let at = 0; at < kept.length; at++) if (kept[at]) out[at] = BORDER;
    return picture;
  }

  /** Names of large regions, largest first, none over another. */
  #writeNames(layer) {
    const { shown, names } = layer;
    names.replaceChildren();
    if (!shown || layer.root.hidden || !this.frame.clientWidth) return;
    const { width, height } = this.size;
    const scale = this.frame.clientWidth / width;
    const [from, to] = this.#seen(layer);
    const bottom = this.frame.clientHeight;
    const taken = [];
    for (const { label, x, y, radius } of namePlaces(shown.labels, width, height, (each) => Boolean(shown.words[each]), from, to)) {
      const { name, colour } = shown.words[label];
      const half = textWidth(name) / 2 + 7;
      const up = 0.75 * LETTERS;
      if (taken.length === MOST_NAMES) break;
      if (radius * scale < up || half > 2.5 * radius * scale) continue;
      const middle = { x: within(x * scale, from * scale + half, to * scale - half), y: within(y * scale, up, bottom - up) };
      const near = (other) => Math.abs(other.x - middle.x) < other.half + half && Math.abs(other.y - middle.y) < 2 * up;
      if (taken.some(near)) continue;
      taken.push({ ...middle, half });
      const tag = document.createElement("span");
      tag.textContent = name;
      Object.assign(tag.style, { left: `${middle.x}px`, top: `${middle.y}px`, backgroundColor: css(colour), color: ink(colour) });
      names.append(tag);
    }
  }

  /** Darkens all that a proposal leaves out: `mask` is a picture whose brightness is its probability. */
  showMask(mask) {
    drawMask(this.mask, mask);
    this.mask.hidden = false;
  }

  hideMask() {
    this.mask.hidden = true;
  }

  /** While it is on, pointing marks places and explains nothing. */
  mark(on) {
    this.marking = on;
    this.line = null;
    this.pointing.classList.toggle("marking", on);
  }

  /** Draws marks, each {places [[x, y]], colour [r, g, b]}; `pen` is the colour of the next one. */
  showMarks(marks, pen) {
    this.shownMarks = marks;
    this.pen = pen;
    this.#drawMarks(marks);
  }

  #drawMarks(marks) {
    const context = this.marks.getContext("2d");
    context.clearRect(0, 0, this.marks.width, this.marks.height);
    const size = Math.max(2, Math.max(this.marks.width, this.marks.height) / 220);
    Object.assign(context, { lineCap: "round", lineJoin: "round" });
    for (const [width, colour] of [[3 * size, () => "#202020"], [2.2 * size, () => "#ffffff"], [1.4 * size, css]]) {
      for (const mark of marks) {
        context.lineWidth = width;
        context.strokeStyle = colour(mark.colour);
        context.beginPath();
        const places = mark.places.map(([x, y]) => [(x + 0.5) / this.step, (y + 0.5) / this.step]);
        context.moveTo(...places[0]);
        for (const [x, y] of places) context.lineTo(x + 0.01, y); // a line without length would not be drawn
        context.stroke();
      }
    }
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
    this.#outline();
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

  #mark({ x, y }) {
    this.cross.style.left = `${((x + 0.5) / this.size.width) * 100}%`;
    this.cross.style.top = `${((y + 0.5) / this.size.height) * 100}%`;
    this.cross.hidden = false;
  }

  #followPointer() {
    this.pointing.addEventListener("pointermove", (event) => {
      this.cross.hidden = true;
      this.moveTo(this.#place(event));
      this.#extend(this.cursor);
    });
    this.pointing.addEventListener("pointerleave", () => this.moveTo(null));
    this.pointing.addEventListener("pointerdown", (event) => {
      if (!this.marking || event.button) return;
      this.pointing.setPointerCapture(event.pointerId);
      const { x, y } = this.#place(event);
      this.line = [[x, y]];
    });
    this.pointing.addEventListener("pointerup", () => this.#marked());
    this.pointing.addEventListener("pointercancel", () => this.#dropLine());
    this.pointing.addEventListener("click", (event) => {
      if (this.marking) return;
      this.moveTo(this.#place(event));
      this.onExplain(this.cursor);
    });
  }

  /** Lengthens the line that is drawn, by steps that a hand can mean. */
  #extend({ x, y }) {
    const last = this.line?.at(-1);
    const step = Math.max(this.size.width, this.size.height) / 150;
    if (!last || this.line.length >= MOST_PLACES || Math.hypot(x - last[0], y - last[1]) < step) return;
    this.line.push([x, y]);
    this.#drawMarks([...this.shownMarks, { places: this.line, colour: this.pen }]);
  }

  #marked() {
    const { line } = this;
    if (!line) return;
    this.#dropLine();
    this.onMark(line);
  }

  /** Forgets the line that was drawn: whether it becomes a mark is told by `showMarks`. */
  #dropLine() {
    this.line = null;
    this.#drawMarks(this.shownMarks);
  }

  #followKeys() {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    this.pointing.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && this.cursor) {
        event.preventDefault();
        if (this.marking) this.onMark([[this.cursor.x, this.cursor.y]]);
        else this.onExplain(this.cursor);
      }
      const direction = steps[event.key];
      if (!direction) return;
      event.preventDefault();
      const { width, height } = this.size;
      const from = this.cursor ?? { x: width >> 1, y: height >> 1 };
      const far = Math.max(1, Math.round(Math.max(width, height) / (event.shiftKey ? 10 : 60)));
      this.cursor = this.#inside(from.x + direction[0] * far, from.y + direction[1] * far);
      this.#mark(this.cursor);
      this.#outline();
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

const within = (value, least, most) => Math.max(least, Math.min(most, value));

const pen = document.createElement("canvas").getContext("2d");

function textWidth(text) {
  pen.font = `600 ${LETTERS}px system-ui, sans-serif`;
  return pen.measureText(text).width;
}

/** Draws `photo` into `grey` as light grey of little contrast, over which colours stay what they are. */
function mute(photo, grey) {
  const picture = photo.getContext("2d").getImageData(0, 0, photo.width, photo.height);
  const { data } = picture;
  for (let at = 0; at < data.length; at += 4) {
    const level = 0.61 * ((77 * data[at] + 150 * data[at + 1] + 29 * data[at + 2]) >> 8) + 95;
    data[at] = data[at + 1] = data[at + 2] = level;
  }
  grey.getContext("2d").putImageData(picture, 0, 0);
}

/** Draws a light line inside and a dark one outside a part's edge; `scale` is the labels' pixels to one of `canvas`. */
function drawOutline(canvas, { step, columns, rows, inside }, scale) {
  const small = document.createElement("canvas");
  Object.assign(small, { width: columns, height: rows });
  const picture = new ImageData(columns, rows);
  const out = new Uint32Array(picture.data.buffer);
  for (let row = 0, at = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++, at++) {
      const edge =
        (column > 0 && inside[at - 1] !== inside[at]) || (column + 1 < columns && inside[at + 1] !== inside[at]) ||
        (row > 0 && inside[at - columns] !== inside[at]) || (row + 1 < rows && inside[at + columns] !== inside[at]);
      if (edge) out[at] = inside[at] ? 0xffffffff : BORDER;
    }
  }
  small.getContext("2d").putImageData(picture, 0, 0);
  const target = canvas.getContext("2d");
  target.clearRect(0, 0, canvas.width, canvas.height);
  target.imageSmoothingEnabled = false;
  target.drawImage(small, 0, 0, (columns * step) / scale, (rows * step) / scale);
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
