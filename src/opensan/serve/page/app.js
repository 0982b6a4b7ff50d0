// Wires the page: the photograph, the two sides, what is pressed, and what goes wrong.

import { ServiceError, alive, encode, forget, information, palettes, result } from "./api.js";
import { Camera } from "./camera.js";
import { Colours } from "./colours.js";
import { vocabulariesOf } from "./examples.js";
import { save } from "./files.js";
import { Inspect } from "./inspect.js";
import { Search } from "./search.js";
import { Side } from "./side.js";
import { Sources, credit } from "./sources.js";
import { Stage } from "./stage.js";
import { linkTo, linked, recall, recallPicture, remember, rememberPicture, unlink } from "./store.js";
import { Teach } from "./teach.js";

const element = (id) => document.getElementById(id);

class App {
  constructor({ model, models, limits, collection }, palettes) {
    this.maxBytes = limits.request_bytes;
    this.models = models;
    this.model = models[0];
    this.colours = new Colours(palettes);
    this.sides = [];
    this.photograph = null; // {blob, name, model, encoding {id, width, height}, shown, marks}
    this.suggested = ""; // the words that came with an example
    this.stage = new Stage({
      onRead: (cursor, aloud) => this.read(cursor, aloud),
      onExplain: (cursor) => this.#explain(cursor),
      onMark: (places) => this.teach.mark(places),
    });
    this.teach = new Teach(this);
    this.inspect = new Inspect(this);
    this.camera = new Camera(this, (running) => this.#cameraRuns(running));
    this.sources = new Sources(this);
    this.sides.push(this.#side(0), this.#side(1));
    this.#compare(false);
    element("model").title = `The service was started with ${model}`;
    for (const name of models) element("model").append(new Option(name));
    for (const name of this.colours.names) element("palette").append(new Option(name));
    this.#useModel(this.model);
    this.#wire();
    this.search = collection ? new Search() : null;
    this.search?.open().catch((error) => this.failed(error, () => this.search.open()));
    this.#restore();
  }

  get ready() {
    return Boolean(this.photograph?.shown);
  }

  get comparing() {
    return element("compare").checked;
  }

  /** Whether pixels that no word deserves stay unlabelled. */
  get rest() {
    return element("rest").checked;
  }

  /** Pixels of less confidence stay unlabelled, from 0 to 1. */
  get threshold() {
    return Number(element("threshold").value) / 100;
  }

  /** One colour for each word, on whichever side it stands. */
  assignColours() {
    this.colours.assign(this.sides.flatMap((side) => side.named));
  }

  #side(number) {
    const root = element("side-template").content.cloneNode(true).querySelector(".side");
    element("sides").append(root);
    return new Side(this, number, root);
  }

  // What survives a reload

  get state() {
    const sides = this.sides.map(({ words, background }) => ({ words: words.all, background: background.all }));
    const { model, suggested } = this;
    const [opacity, threshold] = ["opacity", "threshold"].map((id) => element(id).value);
    const { comparing: compare, rest } = this;
    return { sides, model, suggested, compare, rest, threshold, palette: this.colours.name, opacity, tuned: this.teach.tuned };
  }

  #remember() {
    remember(this.state);
  }

  /** `fits`: whether what was learnt is for the model that the page has then. */
  #apply(state, fits) {
    if (!state) return;
    this.suggested = state.suggested ?? "";
    this.#opacity(state.opacity ?? element("opacity").value);
    this.#threshold(state.threshold ?? element("threshold").value);
    element("rest").checked = Boolean(state.rest);
    this.#usePalette(state.palette ?? this.colours.name);
    if (this.models.includes(state.model)) this.#useModel(state.model);
    for (const [number, { words, background }] of state.sides.entries()) this.sides[number]?.set(words, background);
    this.#compare(Boolean(state.compare));
    this.teach.take(state.tuned, fits);
  }

  async #restore() {
    const kept = recall();
    this.#apply(kept, this.models.includes(kept?.model));
    this.#openLink();
    if (this.sources.openChosen()) return; // chosen while the page was still loading
    const picture = await recallPicture();
    if (picture && !this.photograph && !this.camera.running) this.open(picture.blob, picture.name, picture.marks);
  }

  #openLink() {
    const state = linked();
    if (!state) return;
    const model = this.models.includes(state.model) ? state.model : this.model;
    this.#apply({ ...this.state, ...state, model }, model === this.model);
    if (model !== state.model) this.problem(`The link names the model ${state.model}, which is not here: its words are shown with ${this.model}.`);
    this.#remember();
    for (const side of this.sides) side.ask();
  }

  // The photograph

  async open(blob, name, marks = []) {
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
    const photograph = { blob, name, model: this.model, shown: false, marks: [] };
    this.camera.stop();
    const before = this.photograph;
    this.photograph = photograph;
    rememberPicture({ blob, name, marks });
    this.inspect.close();
    this.#makeRoom();
    credit(name);
    this.stage.open(bitmap);
    if (marks.length) this.teach.restore(photograph, marks);
    this.teach.refresh();
    this.#waiting(true);
    for (const side of this.sides) side.forget(), side.paint();
    this.#allow();
    try {
      photograph.encoding = await encode(blob, this.model);
      if (photograph !== this.photograph) return;
      photograph.shown = true;
      this.problem("");
      this.speak(`${name} is open. Type words.`);
      if (before?.encoding && !this.teach.needs(before)) forget(before.encoding.id);
      this.teach.refresh();
      for (const side of this.sides) side.ask();
    } catch (error) {
      if (photograph === this.photograph) this.failed(error, () => this.open(blob, name, marks));
    } finally {
      if (photograph === this.photograph) this.#waiting(false);
    }
  }

  /** A picture of the package, with its words unless somebody's own are there. */
  async openExample(example) {
    try {
      const response = await fetch(example.file);
      if (!response.ok) throw new TypeError();
      const [side] = this.sides;
      if (!side.question() || this.suggested === side.words.texts.join()) {
        this.suggested = example.words.join();
        side.set(example.words, side.background.texts);
        this.edited();
      }
      await this.open(await response.blob(), example.file);
    } catch (error) {
      if (!(error instanceof TypeError)) throw error;
      this.failed(new ServiceError("The service does not answer."), () => this.openExample(example));
    }
  }

  /** `ask(id)` about the photograph; if the service has forgotten it, it is sent once more. */
  async withEncoding(ask) {
    const { photograph } = this;
    try {
      return await ask(photograph.encoding.id);
    } catch (error) {
      if (!(error instanceof ServiceError) || error.status !== 404) throw error;
      photograph.again ??= encode(photograph.blob, this.model).finally(() => (photograph.again = null));
      photograph.encoding = await photograph.again;
      return ask(photograph.encoding.id);
    }
  }

  async #explain(cursor) {
    await this.camera.stop();
    if (this.ready) this.inspect.show(this.sides[this.stage.sideAt(cursor.x)], cursor);
  }

  #makeRoom() {
    element("welcome").hidden = true;
    element("ask").hidden = false;
    scrollTo({ top: 0 }); // the examples are at the end of a phone's page
  }

  // The camera

  /** The camera's pictures take the photograph's place. */
  watch() {
    if (this.photograph?.encoding && !this.teach.needs(this.photograph)) forget(this.photograph.encoding.id);
    this.photograph = null;
    this.teach.refresh();
    this.inspect.close();
    this.#makeRoom();
    credit("");
    this.problem("");
    this.speak("The camera runs. Type words; Camera again stops it.");
    for (const side of this.sides) side.forget();
    this.#allow();
  }

  tellRate(rate) {
    element("time").textContent = rate ? `${rate < 10 ? rate.toFixed(1) : Math.round(rate)} frames a second` : "";
    this.read(this.stage.cursor);
  }

  #cameraRuns(running) {
    for (const button of document.querySelectorAll("[data-do=camera]")) {
      button.textContent = running ? "Stop camera" : button.dataset.label;
      button.classList.toggle("on", running);
    }
    element("stage").classList.toggle("live", running);
    element("time").textContent = "";
  }

  // What the sides report

  edited() {
    this.inspect.close();
    unlink();
    element("copied").textContent = "";
    this.#remember();
    this.#allow();
    this.teach.refresh();
  }

  /** Words were taught, or are as they were. */
  taught() {
    this.#remember();
    for (const side of this.sides) side.ask();
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
    element("link").disabled = !this.sides[0].named.length;
  }

  // What is taken away

  async #download(kind) {
    const sides = this.sides.filter((side) => !side.root.hidden && side.question());
    for (const side of sides) {
      try {
        const question = side.question();
        if (kind === "overlay") question.colours = Object.fromEntries(side.named.map((text) => this.#named(text)));
        const [blob, ending] = await this.withEncoding((id) => result(id, question, kind, this.threshold));
        const stem = this.photograph.name.replace(/.*\/|\.[^.]*$/g, "") || "photograph";
        save(blob, `${stem}${sides.length > 1 ? `.${"ab"[side.number]}` : ""}${ending}`);
      } catch (error) {
        side.failed(error);
      }
    }
  }

  #named(text) {
    return [text.split("|")[0], this.colours.hex(text)];
  }

  async #copyLink() {
    const address = linkTo(this.state);
    history.replaceState(null, "", address);
    let told = "The link is copied.";
    try {
      await navigator.clipboard.writeText(address);
    } catch {
      told = "The link stands in the address bar: copy it there.";
    }
    element("copied").textContent = told;
  }

  // What is chosen and pressed

  #compare(on) {
    element("compare").checked = on;
    this.sides[1].root.hidden = !on;
    this.sides.forEach((side, number) => side.call(on ? "AB"[number] : ""));
    this.stage.compare(on);
    this.assignColours();
  }

  #opacity(percent) {
    element("opacity").value = percent;
    this.stage.opacity(element("opacity").value);
  }

  #threshold(percent) {
    element("threshold").value = percent;
    element("threshold-value").textContent = `${element("threshold").value} %`;
  }

  /** Asks anew, as what stays unlabelled has changed. */
  #askAgain() {
    this.inspect.close();
    this.#remember();
    for (const side of this.sides) side.ask();
  }

  #usePalette(name) {
    this.colours.choose(name);
    element("palette").value = this.colours.name;
    for (const side of this.sides) side.dress(), side.paint();
    this.teach.refresh();
  }

  #useModel(name) {
    this.model = name;
    element("model").value = name;
    this.sources.list(name);
    for (const side of this.sides) side.offer(vocabulariesOf(name));
  }

  #wire() {
    const actions = {
      upload: () => this.sources.upload(),
      paste: () => this.sources.paste(),
      camera: () => (this.camera.running ? this.camera.stop() : this.camera.start()),
    };
    for (const button of document.querySelectorAll("[data-do]")) button.addEventListener("click", actions[button.dataset.do]);
    element("opacity").addEventListener("input", ({ target }) => this.stage.opacity(target.value));
    element("opacity").addEventListener("change", () => this.#remember());
    element("threshold").addEventListener("input", ({ target }) => {
      this.#threshold(target.value);
      this.#askAgain();
    });
    element("rest").addEventListener("change", () => {
      unlink();
      this.#askAgain();
    });
    element("palette").addEventListener("change", ({ target }) => {
      this.#usePalette(target.value);
      this.#remember();
    });
    element("model").addEventListener("change", ({ target }) => {
      this.#useModel(target.value);
      this.teach.take(this.teach.tuned, false);
      this.#remember();
      if (this.photograph) this.open(this.photograph.blob, this.photograph.name, this.photograph.marks);
    });
    element("compare").addEventListener("change", ({ target }) => {
      this.#compare(target.checked);
      this.#remember();
      if (target.checked) this.sides[1].input.focus();
    });
    element("link").addEventListener("click", () => this.#copyLink());
    addEventListener("hashchange", () => this.#openLink());
    for (const button of document.querySelectorAll("[data-download]")) {
      button.addEventListener("click", () => this.#download(button.dataset.download));
    }
    element("help-button").addEventListener("click", () => element("help").showModal());
    document.addEventListener("keydown", (event) => this.#shortcut(event, actions));
  }

  #shortcut(event, { upload, camera }) {
    if (event.ctrlKey || event.metaKey || event.altKey || element("help").open) return;
    if (event.key === "Escape") this.inspect.close();
    if (event.target.matches("input[type=text], select")) return;
    const nudge = (by) => this.#opacity(Number(element("opacity").value) + by);
    const actions = {
      "/": () => this.sides[0].input.focus(),
      p: () => this.stage.frame.hidden || this.stage.pointing.focus(),
      o: upload,
      v: camera,
      "[": () => nudge(-10),
      "]": () => nudge(10),
      c: () => element("compare").click(),
      r: () => element("rest").click(),
      t: () => element("teach").click(),
      "?": () => element("help").showModal(),
    };
    const elsewhere = { "/": () => element("search-words").focus(), "?": actions["?"] };
    const switches = this.search && { s: () => this.search.show(!this.search.showing) };
    const action = { ...(this.search?.showing ? elsewhere : actions), ...switches }[event.key.toLowerCase()];
    if (!action) return;
    event.preventDefault();
    action();
  }
}

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;

try {
  new App(...(await Promise.all([information(), palettes()])));
} catch (error) {
  element("problem").textContent = error.message;
  element("problem").hidden = false;
  throw error;
}
