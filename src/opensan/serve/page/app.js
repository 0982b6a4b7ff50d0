// Wires the page: the photograph, the two sides, what is pressed, and what goes wrong.

import { ServiceError, alive, encode, forget, information, palettes, result } from "./api.js";
import { Colours } from "./colours.js";
import { SCENES, vocabulariesOf } from "./examples.js";
import { Inspect } from "./inspect.js";
import { Side } from "./side.js";
import { Stage } from "./stage.js";

const element = (id) => document.getElementById(id);

class App {
  constructor({ model, limits }, palettes) {
    this.maxBytes = limits.request_bytes;
    this.colours = new Colours(palettes);
    this.vocabularies = vocabulariesOf(model);
    this.sides = [];
    this.photograph = null; // {blob, name, encoding {id, width, height}, shown}
    element("model").textContent = model;
    this.stage = new Stage({
      onRead: (cursor, aloud) => this.read(cursor, aloud),
      onExplain: (cursor) => this.inspect.show(this.sides[this.stage.sideAt(cursor.x)], cursor),
    });
    this.inspect = new Inspect(this);
    this.sides.push(this.#side(0), this.#side(1));
    this.#compare(false);
    this.#listPalettes();
    this.#wire();
    this.#listScenes();
  }

  get ready() {
    return Boolean(this.photograph?.shown);
  }

  get comparing() {
    return element("compare").checked;
  }

  /** One colour for each word, on whichever side it stands. */
  assignColours() {
    this.colours.assign(this.sides.flatMap((side) => side.named));
  }

  #listPalettes() {
    const select = element("palette");
    select.append(...this.colours.names.map((name) => new Option(name)));
    select.addEventListener("change", () => {
      this.colours.choose(select.value);
      for (const side of this.sides) side.dress(), side.paint();
    });
  }

  #side(number) {
    const root = element("side-template").content.cloneNode(true).querySelector(".side");
    element("sides").append(root);
    return new Side(this, number, root);
  }

  // The photograph

  async open(blob, name) {
    if (blob.size > this.maxBytes) {
      this.problem(`${name} has ${megabytes(blob.size)}; this service takes at most ${megabytes(this.maxBytes)}.`);
      return;
    }
    let bitmap;
    try {
      bitmap = await createImageBitmap(blob);
    } catch {
      this.problem(`${name} is not a picture that this browser can read. JPEG, PNG and WebP work everywhere.`);
      return;
    }
    const before = this.photograph;
    const photograph = (this.photograph = { blob, name, shown: false });
    this.inspect.close();
    element("welcome").hidden = true;
    this.stage.open(bitmap);
    this.#waiting(true);
    for (const side of this.sides) side.forget(), side.paint();
    this.#allow();
    try {
      photograph.encoding = await encode(blob);
      if (photograph !== this.photograph) return;
      photograph.shown = true;
      this.problem("");
      this.speak(`${name} is open. Type words.`);
      if (before?.encoding) forget(before.encoding.id);
      for (const side of this.sides) side.ask();
    } catch (error) {
      if (photograph === this.photograph) this.failed(error, () => this.open(blob, name));
    } finally {
      if (photograph === this.photograph) this.#waiting(false);
    }
  }

  /** `ask(id)` about the photograph; if the service has forgotten it, it is sent once more. */
  async withEncoding(ask) {
    const { photograph } = this;
    try {
      return await ask(photograph.encoding.id);
    } catch (error) {
      if (!(error instanceof ServiceError) || error.status !== 404) throw error;
      photograph.again ??= encode(photograph.blob).finally(() => (photograph.again = null));
      photograph.encoding = await photograph.again;
      return ask(photograph.encoding.id);
    }
  }

  // What the sides report

  edited() {
    this.inspect.close();
    this.#allow();
  }

  painted(since) {
    this.#allow();
    this.read(this.stage.cursor);
    if (since === undefined) return;
    // After the next frame the colours are on the screen.
    requestAnimationFrame(() => {
      const { port1, port2 } = new MessageChannel();
      port1.onmessage = () => {
        const { duration } = performance.measure("keystroke", { start: since, end: performance.now() });
        element("time").textContent = `updated in ${Math.round(duration)} ms`;
      };
      port2.postMessage(null);
    });
  }

  read(cursor, aloud = false) {
    const side = cursor && this.sides[this.stage.sideAt(cursor.x)];
    const found = side?.read(cursor);
    this.stage.say(found?.text ?? "", found?.colour);
    if (aloud) this.speak(found ? `${found.text}, at ${cursor.x}, ${cursor.y}` : "no words yet");
  }

  /** For screen readers. */
  speak(text) {
    element("spoken").textContent = text;
  }

  // What goes wrong

  problem(message) {
    const place = element("problem");
    if (place.textContent !== message) place.textContent = message;
    place.hidden = !message;
  }

  /** Shows a failure; where it may pass, `again` is tried until it does. */
  failed(error, again = () => this.sides.forEach((side) => side.ask())) {
    if (!(error instanceof ServiceError)) throw error;
    this.problem(error.message);
    if (error.status === 429 || error.status === 503) {
      this.problem(`${error.message} Trying again.`);
      clearTimeout(this.retry);
      this.retry = setTimeout(() => this.#again(again), 1000 * Math.max(1, error.retryAfter));
    } else if (error.status === 0) {
      this.problem("The service does not answer. Your words are kept; the page goes on when it is back.");
      clearTimeout(this.retry);
      this.retry = setTimeout(() => this.#poll(again), 1000);
    }
  }

  async #poll(again) {
    if (await alive()) this.#again(again);
    else this.retry = setTimeout(() => this.#poll(again), 1000);
  }

  #again(again) {
    this.problem("");
    again();
  }

  #waiting(on) {
    element("waiting").hidden = !on;
    element("stage").setAttribute("aria-busy", String(on));
  }

  #allow() {
    const possible = this.ready && this.sides.some((side) => side.question());
    for (const button of document.querySelectorAll("[data-download]")) button.disabled = !possible;
  }

  // Downloads

  async #download(kind) {
    const sides = this.sides.filter((side) => !side.root.hidden && side.question());
    for (const side of sides) {
      try {
        const question = side.question();
        if (kind === "overlay") question.colours = Object.fromEntries(side.named.map((text) => this.#named(text)));
        const [blob, ending] = await this.withEncoding((id) => result(id, question, kind));
        const stem = this.photograph.name.replace(/\.[^.]*$/, "") || "photograph";
        save(blob, `${stem}${sides.length > 1 ? `.${"ab"[side.number]}` : ""}${ending}`);
      } catch (error) {
        side.failed(error);
      }
    }
  }

  #named(text) {
    return [text.split("|")[0], this.colours.hex(text)];
  }

  // What is pressed, dropped and pasted

  #compare(on) {
    element("compare").checked = on;
    this.sides[1].root.hidden = !on;
    this.sides.forEach((side, number) => side.call(on ? "AB"[number] : ""));
    this.stage.compare(on);
  }

  #wire() {
    const pick = () => element("file").click();
    element("open").addEventListener("click", pick);
    element("choose").addEventListener("click", pick);
    element("file").addEventListener("change", ({ target }) => {
      if (target.files[0]) this.open(target.files[0], target.files[0].name);
      target.value = "";
    });
    element("opacity").addEventListener("input", ({ target }) => this.stage.opacity(target.value));
    element("compare").addEventListener("change", ({ target }) => {
      this.#compare(target.checked);
      if (target.checked) this.sides[1].input.focus();
    });
    for (const button of document.querySelectorAll("[data-download]")) {
      button.addEventListener("click", () => this.#download(button.dataset.download));
    }
    element("help-button").addEventListener("click", () => element("help").showModal());
    this.#takeFiles();
    document.addEventListener("keydown", (event) => this.#shortcut(event, pick));
  }

  #takeFiles() {
    const stage = element("stage");
    document.addEventListener("dragover", (event) => {
      event.preventDefault();
      stage.classList.add("dropping");
    });
    document.addEventListener("dragleave", (event) => event.relatedTarget || stage.classList.remove("dropping"));
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      stage.classList.remove("dropping");
      const [file] = event.dataTransfer.files;
      if (file) this.open(file, file.name);
    });
    document.addEventListener("paste", (event) => {
      const file = [...event.clipboardData.files].find((each) => each.type.startsWith("image/"));
      if (!file) return;
      event.preventDefault();
      this.open(file, file.name || "pasted.png");
    });
  }

  #shortcut(event, pick) {
    if (event.ctrlKey || event.metaKey || event.altKey || element("help").open) return;
    if (event.key === "Escape") this.inspect.close();
    if (event.target.matches("input[type=text]")) return;
    const nudge = (by) => {
      const slider = element("opacity");
      slider.value = Number(slider.value) + by;
      this.stage.opacity(slider.value);
    };
    const actions = {
      "/": () => this.sides[0].input.focus(),
      p: () => this.stage.frame.hidden || this.stage.pointing.focus(),
      o: pick,
      "[": () => nudge(-10),
      "]": () => nudge(10),
      c: () => element("compare").click(),
      "?": () => element("help").showModal(),
    };
    const action = actions[event.key.toLowerCase()];
    if (!action) return;
    event.preventDefault();
    action();
  }

  #listScenes() {
    for (const [name, words] of SCENES) {
      const item = document.createElement("li");
      const button = document.createElement("button");
      button.type = "button";
      const picture = document.createElement("img");
      Object.assign(picture, { src: `scenes/${name}.png`, alt: "", width: 96, height: 72 });
      const title = document.createElement("span");
      title.textContent = name;
      button.append(picture, title);
      button.addEventListener("click", () => this.#openScene(name, words));
      item.append(button);
      element("scenes").append(item);
    }
  }

  async #openScene(name, words) {
    try {
      const blob = await (await fetch(`scenes/${name}.png`)).blob();
      const [side] = this.sides;
      // Words of another scene make room; a person's own stay.
      if (!side.question() || this.suggested === side.words.texts.join()) {
        side.words.set(words);
        side.dress();
        this.suggested = words.join();
      }
      await this.open(blob, `${name}.png`);
    } catch {
      this.failed(new ServiceError("The service does not answer."), () => this.#openScene(name, words));
    }
  }
}

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

try {
  new App(...(await Promise.all([information(), palettes()])));
} catch (error) {
  element("problem").textContent = error.message;
  element("problem").hidden = false;
  throw error;
}
