// A field that turns what is typed into chips. All that is typed is text, never HTML.

/** What makes two words the same: their names, whatever their capitals and spaces. */
export const key = (text) => text.split("|")[0].trim().toLowerCase().replace(/\s+/g, " ");

/** "car | taxi |" -> "car|taxi". */
export const tidy = (text) => text.split("|").map((part) => part.trim()).filter(Boolean).join("|");

// What separates words in a line of text; `opensan.word_lists` has the same.
const SEPARATORS = /[,，、،﹐､;；؛\r\n]/;

/** The words of pasted text: of a JSON list, or of a line or lines. */
function pasted(text) {
  if (text.trim().startsWith("[")) {
    try {
      const listed = JSON.parse(text);
      if (Array.isArray(listed) && listed.every((word) => typeof word === "string")) return listed;
    } catch {
      // no list: plain text
    }
  }
  return text.split(SEPARATORS);
}

export const css = (colour) => `rgb(${colour.join(" ")})`;

export function percent(share) {
  if (share > 0 && share < 0.001) return "<0.1 %";
  return share > 0 && share < 0.1 ? `${(share * 100).toFixed(1)} %` : `${Math.round(share * 100)} %`;
}

export class Words {
  /**
   * `input` and `chips` are the elements; `onChange(event)` follows every keystroke and every chip made or removed,
   * `onShow()` a chip switched on or off, `onPoint(index or null)` the chip that is pointed at, `onRepeat(message)` a
   * word that is not taken because it repeats another ("" when there is none any more).
   */
  constructor(input, chips, { onChange, onShow = null, onPoint = () => {}, onRepeat = () => {} }) {
    Object.assign(this, { input, chips, onChange, onShow, onPoint, onRepeat });
    this.words = []; // {text, shown, element}, in the order in which they were typed
    this.repeated = "";
    input.addEventListener("input", (event) => this.#typed(event));
    input.addEventListener("keydown", (event) => this.#pressed(event));
    input.addEventListener("paste", (event) => this.#pasted(event));
    chips.addEventListener("keydown", (event) => this.#pressedOnChip(event));
  }

  /** What is typed and not yet a chip; "" where it repeats one. */
  get draft() {
    const text = tidy(this.input.value);
    return text && !this.repetition(text) ? text : "";
  }

  /** In which way `text` repeats a word or a synonym; "" if it does not. */
  repetition(text) {
    const parts = text.split("|").map(key);
    const twice = parts.find((part, index) => parts.indexOf(part) < index);
    if (twice !== undefined) return `“${twice}” stands twice in “${text}”.`;
    for (const word of this.words) {
      const [name, ...synonyms] = word.text.split("|").map(key);
      const part = parts.find((each) => each === name || synonyms.includes(each));
      if (part === name) return `“${part}” repeats a word that is there already.`;
      if (part !== undefined) return `“${part}” repeats a synonym of “${name}”.`;
    }
    return "";
  }

  get texts() {
    return this.words.map((word) => word.text);
  }

  /** The texts, with that being typed. */
  get all() {
    return this.draft ? [...this.texts, this.draft] : this.texts;
  }

  set(texts) {
    this.words = [];
    this.chips.replaceChildren();
    this.input.value = "";
    for (const text of texts) this.#add(text);
  }

  /** Gives each chip its colour and share: `find(name)` answers {colour, area, unseen}, or undefined if not known. */
  describe(find) {
    for (const { text, element } of this.words) {
      const found = find(text.split("|")[0]);
      element.querySelector(".swatch").style.backgroundColor = found?.colour ? css(found.colour) : "";
      element.querySelector(".share").textContent = found ? percent(found.area) : "";
      element.classList.toggle("unseen", Boolean(found?.unseen));
      element.querySelector(".unseen-mark").hidden = !found?.unseen;
    }
  }

  /** Puts the chips with the largest shares first, unless somebody is at them. */
  sort(area) {
    if (this.chips.matches(":hover, :focus-within")) return;
    const sorted = [...this.words].sort((a, b) => area(b.text.split("|")[0]) - area(a.text.split("|")[0]));
    if (sorted.some(({ element }, index) => element !== this.chips.children[index])) {
      this.chips.replaceChildren(...sorted.map(({ element }) => element));
    }
  }

  #add(text) {
    const tidied = tidy(text);
    if (!tidied) return;
    const repetition = this.repetition(tidied);
    if (repetition) {
      this.repeated = repetition;
      return;
    }
    const word = { text: tidied, shown: true };
    word.element = this.#chip(word);
    this.words.push(word);
    this.chips.append(word.element);
  }

  /** Tells what repeats: a word that was not taken just now, or the one being typed. */
  #changed(event) {
    this.onRepeat(this.repeated || this.repetition(tidy(this.input.value)));
    this.repeated = "";
    this.onChange(event);
  }

  #chip(word) {
    const item = document.createElement("li");
    item.className = "chip";
    const body = document.createElement("button");
    body.type = "button";
    body.className = "body";
    const [name, ...synonyms] = word.text.split("|");
    const parts = [["swatch", ""], ["name", name], ["synonyms", synonyms.join(", ")], ["share", ""], ["unseen-mark", "never read"]];
    for (const [kind, text] of parts) {
      if (kind === "synonyms" && !text) continue;
      const part = document.createElement("span");
      part.className = kind;
      part.textContent = text;
      part.hidden = kind === "unseen-mark";
      body.append(part);
    }
    if (this.onShow) {
      body.setAttribute("aria-pressed", "true");
      body.title = "Show or hide";
      body.addEventListener("click", () => {
        word.shown = !word.shown;
        body.setAttribute("aria-pressed", String(word.shown));
        this.onShow();
      });
    }
    const remove = document.createElement("button");
    remove.type = "button";
    remove.className = "remove";
    remove.tabIndex = -1; // Delete on the word does it, so that twenty words are not forty stops
    remove.setAttribute("aria-label", `Remove ${name}`);
    remove.textContent = "×";
    remove.addEventListener("click", (event) => this.#remove(word, event));
    item.append(body, remove);
    const point = (on) => this.onPoint(on ? this.words.indexOf(word) : null);
    item.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && point(true));
    item.addEventListener("pointerleave", () => point(false));
    return item;
  }

  #remove(word, event) {
    const index = this.words.indexOf(word);
    if (index < 0) return;
    const focused = word.element.contains(document.activeElement);
    const neighbour = word.element.nextElementSibling ?? word.element.previousElementSibling;
    this.words.splice(index, 1);
    word.element.remove();
    this.onPoint(null);
    if (focused) (neighbour?.querySelector(".body") ?? this.input).focus();
    this.#changed(event);
  }

  #typed(event) {
    if (SEPARATORS.test(this.input.value) && !event.isComposing) {
      const parts = this.input.value.split(SEPARATORS);
      this.input.value = parts.pop().trimStart();
      parts.forEach((part) => this.#add(part));
    }
    this.#changed(event);
  }

  /** A field of one line would join pasted lines without anything between them. */
  #pasted(event) {
    const parts = pasted(event.clipboardData.getData("text"));
    if (parts.length < 2) return;
    event.preventDefault();
    parts.forEach((part) => this.#add(part));
    this.#changed(event);
  }

  #pressed(event) {
    if (event.isComposing) return;
    if (event.key === "Enter") {
      event.preventDefault();
      if (!tidy(this.input.value)) return;
      this.#add(this.input.value);
      this.input.value = "";
      this.#changed(event);
    } else if (event.key === "Backspace" && !this.input.value && this.words.length) {
      event.preventDefault();
      this.#remove(this.words.at(-1), event);
    }
  }

  #pressedOnChip(event) {
    const word = this.words.find(({ element }) => element.contains(event.target));
    if (!word) return;
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (step) {
      event.preventDefault();
      const next = step > 0 ? word.element.nextElementSibling : word.element.previousElementSibling;
      next?.querySelector(".body").focus();
    } else if (event.key === "Delete" || event.key === "Backspace") {
      event.preventDefault();
      this.#remove(word, event);
    }
  }
}
