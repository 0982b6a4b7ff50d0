// The collection: a word is typed, and its matching images come one after the other, best first.

import { collection, search } from "./api.js";

const QUIET = 400; // milliseconds without typing, after which the collection is asked
const element = (id) => document.getElementById(id);

export class Search {
  constructor() {
    this.asking = null; // AbortController of the search underway
    this.settling = null;
    const [picture, images] = [element("view-picture"), element("view-collection")];
    picture.addEventListener("click", () => this.show(false));
    images.addEventListener("click", () => this.show(true));
    element("search-words").addEventListener("input", () => {
      clearTimeout(this.settling);
      this.settling = setTimeout(() => this.ask(), QUIET);
    });
    element("search-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.ask();
    });
  }

  async open() {
    const { name, images } = await collection();
    element("collection-name").textContent = `${images.toLocaleString("en")} images of ${name}`;
    element("views").hidden = false;
  }

  /** Shows the collection, or the picture. */
  show(on) {
    element("view-picture").setAttribute("aria-pressed", String(!on));
    element("view-collection").setAttribute("aria-pressed", String(on));
    element("label-view").hidden = on;
    element("collection").hidden = !on;
    if (on) element("search-words").focus();
  }

  get showing() {
    return !element("collection").hidden;
  }

  /** Asks for the typed words; an answer underway is dropped. */
  async ask() {
    clearTimeout(this.settling);
    this.asking?.abort();
    const question = questionOf(element("search-words").value);
    this.#problem("");
    element("matches").replaceChildren();
    if (!question) {
      element("search-status").textContent = "";
      return;
    }
    const asking = (this.asking = new AbortController());
    const list = element("matches");
    let count = 0;
    element("search-status").textContent = "Searching…";
    try {
      for await (const line of search(question, asking.signal)) {
        if (asking !== this.asking) return;
        if (line.kind === "match") {
          list.append(itemOf(line));
          element("search-status").textContent = `${++count} images so far`;
        } else if (line.kind === "problem") this.#problem(line.detail);
        else {
          const looked = line.approximate ? "the likely ones of " : "";
          element("search-status").textContent = `${count} images, best first, of ${looked}${line.images.toLocaleString("en")}`;
        }
      }
    } catch (error) {
      if (error.name === "AbortError" || asking !== this.asking) return;
      element("search-status").textContent = "";
      this.#problem(error.message);
    }
  }

  #problem(text) {
    element("search-problem").textContent = text;
    element("search-problem").hidden = !text;
  }
}

/** "car|automobile, road, -person": the first word is searched, the others must be there too, or with - must not. */
export function questionOf(text) {
  const words = text.split(",").map((word) => word.trim()).filter((word) => word && word !== "-");
  const without = words.filter((word) => word.startsWith("-")).map((word) => word.slice(1).trim());
  const [first, ...also] = words.filter((word) => !word.startsWith("-"));
  return first ? { words: first, also, without } : null;
}

function itemOf({ name, score, regions, width, height, picture, missing, copies }) {
  const bytes = Uint8Array.from(atob(picture), (character) => character.charCodeAt(0));
  const image = new Image(width, height);
  const address = URL.createObjectURL(new Blob([bytes], { type: "image/jpeg" }));
  image.addEventListener("load", () => URL.revokeObjectURL(address));
  image.src = address;
  const best = `${regions.length} region${regions.length > 1 ? "s" : ""}, best ${regions[0].probability.toFixed(2)}`;
  image.alt = `${name}: ${best}`;
  const caption = document.createElement("figcaption");
  const bold = document.createElement("b");
  bold.textContent = score.toFixed(3);
  const more = document.createElement("span");
  more.className = "hint";
  more.textContent = best + (copies ? `, ${copies} more of this content` : "") + (missing ? ", the file can't be read any more" : "");
  caption.append(bold, ` ${name}`, more);
  const figure = document.createElement("figure");
  figure.append(image, caption);
  const item = document.createElement("li");
  item.append(figure);
  return item;
}
