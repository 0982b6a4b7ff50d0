// One vocabulary: what is asked, what was answered, and how it is coloured.

import { ServiceError, segment } from "./api.js";
import { Words, css, percent, tidy } from "./words.js";

const QUIET = 300; // milliseconds without typing, after which the full answer is asked

export class Side {
  /** `app` is the page's App, `number` 0 or 1, `root` the element made of the side template. */
  constructor(app, number, root) {
    Object.assign(this, { app, number, root });
    const [input, backgroundInput] = root.querySelectorAll("input");
    const [chips, backgroundChips] = root.querySelectorAll(".chips");
    const label = root.querySelector("label");
    this.input = input;
    input.id = `word-input-${"ab"[number]}`;
    label.htmlFor = input.id;
    this.label = label;
    backgroundInput.id = `background-input-${"ab"[number]}`;
    root.querySelector("details label").htmlFor = backgroundInput.id;
    chips.setAttribute("aria-label", "Words, largest share of the photograph first");
    backgroundChips.setAttribute("aria-label", "Background words");
    this.words = new Words(input, chips, {
      onChange: (event) => this.changed(event),
      onShow: () => this.paint(),
      onPoint: (index) => this.highlight(index),
      onRepeat: (message) => this.#repeat(message),
    });
    this.background = new Words(backgroundInput, backgroundChips, {
      onChange: (event) => this.changed(event),
      onRepeat: (message) => this.#repeat(message),
    });
    this.highlighted = null;
    this.settling = null;
    this.forget();
    this.dress();
  }

  /** Names the side where there are two. */
  call(letter) {
    this.root.querySelector("h2").textContent = letter;
    this.label.textContent = letter ? `Words of ${letter}` : "Words";
  }

  /** Names of all that has a colour here, the word being typed included. */
  get named() {
    return this.words.all;
  }

  set(words, background) {
    this.words.set(words);
    this.background.set(background);
    this.dress();
  }

  /** Lists vocabularies to begin with, [title, words]. */
  offer(vocabularies) {
    const list = this.root.querySelector(".examples");
    list.replaceChildren("Try ");
    for (const [title, words] of vocabularies) {
      const button = document.createElement("button");
      Object.assign(button, { type: "button", className: "link", textContent: title, title: words.join(", ") });
      button.addEventListener("click", (event) => {
        this.words.set(words);
        this.changed(event);
        this.input.focus();
      });
      list.append(button);
    }
  }

  #repeat(message) {
    const place = this.root.querySelector(".repeats");
    place.textContent = message;
    place.hidden = !message;
  }

  /** Drops what was answered: another photograph, or none. */
  forget() {
    this.answer = null; // what api.segment answers
    this.settled = false; // whether that is the full answer
    this.wanted = null;
    this.settling?.abort();
    clearTimeout(this.quiet);
  }

  /** The question as the service takes it; null without a word. A word being typed is asked with one prompt only. */
  question(typing = false) {
    const words = [...this.words.texts];
    const { draft } = this.words;
    if (draft) words.push(typing ? shortPrompt(draft) : draft);
    const background = [...this.background.texts];
    if (this.background.draft) background.push(this.background.draft);
    const { rest } = this.app;
    const tuned = this.number === 0 ? this.app.teach.tuned : null;
    return words.length ? { words, background, rest, ...(tuned && { tuned }) } : null;
  }

  /** After a keystroke or a chip more or less: asks, and asks once more in full when typing pauses. */
  changed(event) {
    this.dress();
    this.app.edited(this);
    this.ask(event?.timeStamp ?? performance.now());
  }

  ask(since = performance.now()) {
    clearTimeout(this.quiet);
    this.settling?.abort();
    if (!this.app.ready) return;
    this.wanted = { question: this.question(true), since };
    if (!this.busy) this.#work();
  }

  /** One request at a time; while it runs, a newer question replaces the one that waits, which is never sent. */
  async #work() {
    this.busy = true;
    while (this.wanted) {
      const { question, since } = this.wanted;
      this.wanted = null;
      try {
        if (question) await this.#show(question, since);
        else this.#clear();
        this.wrong("");
      } catch (error) {
        this.failed(error);
      }
    }
    this.busy = false;
    clearTimeout(this.quiet);
    if (this.answer && this.question()) this.quiet = setTimeout(() => this.#settle(), QUIET);
  }

  /** The full answer, once typing pauses: the last word in all templates, and confidences. */
  async #settle() {
    this.settling = new AbortController();
    try {
      await this.#show(this.question(), undefined, { confidence: true, signal: this.settling.signal });
    } catch (error) {
      if (error.name !== "AbortError") this.failed(error);
    }
  }

  async #show(question, since, options = {}) {
    const { photograph } = this.app;
    const answer = await this.app.withEncoding((id) => segment(id, question, { threshold: this.app.threshold, ...options }));
    if (photograph !== this.app.photograph || options.signal?.aborted) return;
    this.answer = answer;
    this.settled = Boolean(answer.confidence);
    this.dress();
    if (this.settled) this.#sort();
    this.paint();
    this.app.painted(since);
  }

  /** Takes an answer to a picture of the camera; null where there are no words. */
  take(answer) {
    this.answer = answer;
    this.wrong("");
    this.dress();
    this.paint();
  }

  #clear() {
    this.forget();
    this.dress();
    this.paint();
    this.app.painted();
  }

  failed(error) {
    if (error instanceof ServiceError && [400, 413, 422].includes(error.status)) this.wrong(error.message);
    else this.app.failed(error);
  }

  wrong(message) {
    const place = this.root.querySelector(".wrong");
    if (place.textContent !== message) place.textContent = message;
    place.hidden = !message;
    this.input.setAttribute("aria-invalid", String(Boolean(message)));
  }

  highlight(index) {
    this.highlighted = index;
    this.paint();
  }

  #sort() {
    const areas = new Map(this.answer.words.map(({ name, area }) => [name, area]));
    this.words.sort((name) => areas.get(name) ?? 0);
  }

  paint() {
    const { answer, highlighted } = this;
    const words = answer?.words.map(({ name }, index) => {
      const shown = this.words.words[index]?.shown ?? true;
      const faint = highlighted !== null && highlighted !== index;
      const colour = this.app.colours.of(name);
      return shown && !faint && colour ? { name, colour } : null;
    });
    this.app.stage.paint(this.number, answer?.labels, words);
  }

  /** Colours and shares of the chips and of the word being typed, as last answered. */
  dress() {
    const { answer, app } = this;
    app.assignColours();
    const unseen = new Set(answer?.unseen);
    const known = new Map(
      answer?.words.map((word) => [word.name, { ...word, colour: app.colours.of(word.name), unseen: unseen.has(word.name) }]),
    );
    this.words.describe((name) => known.get(name));
    const draft = this.words.draft && known.get(this.words.draft.split("|")[0]);
    this.root.querySelector(".entry .share").textContent = draft ? percent(draft.area) : "";
    this.root.querySelector(".swatch.next").style.backgroundColor = draft?.colour ? css(draft.colour) : "";
    this.root.querySelector(".examples").hidden = this.named.length > 0;
    this.#tellUnseen([...unseen]);
  }

  /** Says which words mean nothing to the model. A word being typed is unknown until it is whole, so only at a pause. */
  #tellUnseen(unseen) {
    const place = this.root.querySelector(".never");
    const kept = new Set(this.words.texts.flatMap((text) => text.split("|")));
    const told = unseen.filter((name) => this.settled || kept.has(name));
    const listed = told.map((name) => `“${name}”`).join(", ");
    place.textContent = told.length ? `The model never read ${listed}: its colour means nothing.` : "";
    place.hidden = !told.length;
  }

  /** What stands at {x, y}: {text, colour}, or null before an answer. */
  read({ x, y }) {
    if (!this.answer) return null;
    const { labels, confidence, unlabelled, words } = this.answer;
    const place = y * this.app.stage.size.width + x;
    const sure = confidence ? ` · ${Math.round((confidence[place] / 255) * 100)} %` : "";
    if (labels[place] === unlabelled) return { text: `unlabelled${sure}`, colour: null };
    const { name } = words[labels[place]];
    return { text: name + sure, colour: this.app.colours.of(name) };
  }
}

/** A word being typed, in one sentence instead of all templates: a fraction of the work, and it will change anyway. */
function shortPrompt(draft) {
  const synonyms = tidy(draft).split("|");
  const last = synonyms.pop();
  return { name: synonyms[0] ?? last, text: last, synonyms, prompts: [`a photo of a ${last}.`] };
}
