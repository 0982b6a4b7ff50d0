// Teaching: words are fitted to places that somebody marked on pictures ("this is bark, this is path").

import { ServiceError, encode, tune } from "./api.js";
import { save } from "./files.js";
import { rememberPicture } from "./store.js";
import { percent } from "./words.js";

const MOST_PICTURES = 16; // the service takes no more

const GREY = [128, 128, 128]; // a word that is no longer there
const WORDS_FIRST = "Type the words first, and keep each with Enter or a comma.";

const element = (id) => document.getElementById(id);

export class Teach {
  /** `app` is the page's App. Words of side A are taught; where two are compared, B shows them as they were. */
  constructor(app) {
    this.app = app;
    this.tuned = null; // what the service fitted, as its questions take it
    this.pictures = []; // photographs with marks, the present one last
    element("teach").addEventListener("change", ({ target }) => this.show(target.checked));
    element("teach-word").addEventListener("change", () => this.refresh());
    element("learn").addEventListener("click", () => this.learn());
    element("undo-mark").addEventListener("click", () => this.#undo());
    element("unlearn").addEventListener("click", () => this.#startOver());
    element("save-words").addEventListener("click", () => this.#saveWords());
    element("save-points").addEventListener("click", () => this.#saveMarks());
  }

  get on() {
    return element("teach").checked;
  }

  show(on) {
    element("teach").checked = on;
    element("teaching").hidden = !on;
    this.app.stage.mark(on);
    element("ask").textContent = on ? "Click the picture, or draw on it, to mark the word" : "Click the picture to ask “why here?”";
    if (on) this.app.inspect.close();
    this.#tell("");
    this.refresh();
  }

  /** Whether the service must keep a photograph's encoding. */
  needs(photograph) {
    return this.pictures.includes(photograph);
  }

  /** Words, colours or the photograph have changed. */
  refresh() {
    const [side] = this.app.sides;
    const words = side?.words.texts.map((text) => text.split("|")[0]) ?? [];
    const select = element("teach-word");
    const chosen = select.value;
    select.replaceChildren(...words.map((word) => new Option(word)));
    if (words.includes(chosen)) select.value = chosen;
    const marks = this.app.photograph?.marks ?? [];
    const shown = this.on ? marks : [];
    const colour = (word) => this.app.colours.of(word) ?? GREY;
    this.app.stage.showMarks(shown.map(({ word, places }) => ({ places, colour: colour(word) })), colour(select.value));
    const all = this.pictures.flatMap((picture) => picture.marks);
    element("learn").disabled = !all.length || !this.app.ready;
    element("undo-mark").disabled = !marks.length;
    element("unlearn").disabled = !all.length && !this.tuned;
    element("save-words").disabled = !this.tuned || !side?.question();
    element("save-points").disabled = !all.length;
    if (this.tuned && !this.on) this.#tell("Words are as you taught them. Turn this on to start over.");
  }

  mark(places) {
    const { photograph } = this.app;
    const word = element("teach-word").value;
    if (!this.app.ready) return this.#tell("Marks are for a picture that the model has looked at: open one, or wait until it has.");
    if (!word) return this.#tell(WORDS_FIRST);
    const [first] = this.pictures;
    photograph.marks = [...photograph.marks, { word, places }];
    this.#changed(photograph);
    const missing = new Set(this.pictures.flatMap(({ marks }) => marks.map((each) => each.word))).size < 2;
    if (first && !this.pictures.includes(first)) this.#tell(`Marks of ${MOST_PICTURES} pictures count: those of ${first.name} are left out now.`);
    else this.#tell(missing ? "Now choose another word and mark a place of it." : "Learn fits the words to your marks.");
  }

  /** A picture that was kept, with its marks: the page was loaded anew. */
  restore(photograph, marks) {
    photograph.marks = marks;
    this.pictures = this.pictures.filter(({ blob }) => blob !== photograph.blob);
    this.#changed(photograph);
  }

  /** Takes what was learnt before; vectors are those of one model, and `fits` tells whether it is the present one. */
  take(tuned, fits) {
    this.tuned = fits ? (tuned ?? null) : null;
    this.refresh();
    if (tuned && !fits) this.#tell("The words were learnt for another model, and are as they were: mark places and press Learn for this one.");
  }

  #undo() {
    const { photograph } = this.app;
    photograph.marks = photograph.marks.slice(0, -1);
    this.#changed(photograph);
  }

  #startOver() {
    for (const picture of this.pictures) picture.marks = [];
    this.pictures = [];
    this.tuned = null;
    this.#tell("The words are as they were.");
    if (this.app.photograph) this.#changed(this.app.photograph);
    this.app.taught();
  }

  #changed(photograph) {
    this.pictures = this.pictures.filter((each) => each !== photograph);
    if (photograph.marks.length) this.pictures = [...this.pictures, photograph].slice(-MOST_PICTURES);
    rememberPicture({ blob: photograph.blob, name: photograph.name, marks: photograph.marks });
    this.refresh();
  }

  async learn() {
    const { model } = this.app;
    const question = this.app.sides[0].question();
    if (!question) return this.#tell(WORDS_FIRST);
    const { words, background } = question;
    this.#tell("Learning…");
    element("learn").disabled = true;
    try {
      const answer = await this.#fitted({ words, background });
      if (model !== this.app.model) return this.#tell("The model has changed meanwhile: press Learn once more.");
      this.tuned = answer.tuned;
      this.#tell(report(answer));
      this.app.taught();
    } catch (error) {
      if (!(error instanceof ServiceError)) throw error;
      this.#tell(error.message);
    } finally {
      this.refresh();
    }
  }

  /** The service's answer; pictures that it has forgotten, or that another model looked at, are sent once more. */
  async #fitted(question) {
    const { model } = this.app;
    for (const again of [false, true]) {
      for (const picture of this.pictures) {
        if (again || picture.model !== model || !picture.encoding) {
          picture.encoding = await encode(picture.blob, model);
          picture.model = model;
        }
      }
      const images = this.pictures.map(({ encoding, marks }) => ({
        id: encoding.id,
        marks: marks.map(({ word, places }) => ({ word, places, joined: places.length > 1 })),
      }));
      try {
        return await tune(question, images);
      } catch (error) {
        if (again || !(error instanceof ServiceError) || error.status !== 404) throw error;
      }
    }
  }

  #tell(message) {
    const place = element("teach-status");
    if (place.textContent !== message) place.textContent = message; // else screen readers would say it again
  }

  /** A word file: `opensan segment --words-file`. */
  #saveWords() {
    const { words, background } = this.app.sides[0].question();
    save(json({ words, background, tuned: this.tuned }), "words.json");
  }

  /** A file of points: `opensan tune words`. */
  #saveMarks() {
    const entries = this.pictures.flatMap(({ name, marks }) =>
      marks.map(({ word, places }) => ({
        image: name.replace(/.*\//, ""),
        word,
        ...(places.length > 1 ? { scribble: places } : { points: places }),
      })),
    );
    save(json(entries), "points.json");
  }
}

function report({ pixels, images, before, after }) {
  const where = images === 1 ? "this picture" : `${images} pictures`;
  const figures = `mean IoU there ${percent(before)} before, ${percent(after)} now`;
  return `Learnt from ${pixels.toLocaleString("en")} marked pixels of ${where}: ${figures}. Look whether the rest is right too.`;
}

const json = (data) => new Blob([`${JSON.stringify(data, null, 1)}\n`], { type: "application/json" });
