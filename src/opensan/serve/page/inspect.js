// Why a place has its word: the best words there, and the mask proposals ("regions") that decide.

import { explain } from "./api.js";
import { css, percent } from "./words.js";

const MOST_WORDS = 4;
const MOST_PROPOSALS = 6;
const LEAST_SHARE = 0.01; // of the winner's score; what adds less decides nothing

const element = (id) => document.getElementById(id);

export class Inspect {
  constructor(app) {
    this.app = app;
    this.root = element("inspect");
    element("inspect-close").addEventListener("click", () => this.close());
    this.root.addEventListener("keydown", (event) => event.key === "Escape" && this.close());
  }

  get open() {
    return !this.root.hidden;
  }

  close() {
    if (!this.open) return;
    const inside = this.root.contains(document.activeElement);
    this.root.hidden = true;
    this.app.stage.hideMask();
    if (inside) this.app.stage.pointing.focus();
  }

  /** Asks about {x, y} as `side` sees it, and shows the answer. */
  async show(side, { x, y }) {
    const question = side.question();
    if (!question) return;
    const asked = (this.asked = {});
    try {
      const answer = await this.app.withEncoding((id) => explain(id, x, y, question));
      answer.proposals = answer.proposals.filter((each, index) => index === 0 || each.share >= LEAST_SHARE).slice(0, MOST_PROPOSALS);
      const masks = await Promise.all(answer.proposals.map((each) => decode(each.picture)));
      if (asked !== this.asked) return;
      this.#fill(answer, masks, side);
    } catch (error) {
      side.failed(error);
    }
  }

  #fill({ x, y, words, proposals }, masks, side) {
    this.app.stage.hideMask();
    element("inspect-title").textContent = `Why “${words[0].name}” here?`;
    element("inspect-place").textContent = `Pixel ${x}, ${y}${this.app.comparing ? ` of side ${"AB"[side.number]}` : ""}`;
    const most = Math.max(words[0].score, 1e-9);
    element("best-words").replaceChildren(
      ...words.slice(0, MOST_WORDS).map((word) => bar(word, most, word.background ? null : this.app.colours.of(word.name))),
    );
    element("proposals").replaceChildren(...masks.map((mask, index) => this.#proposal(proposals[index], mask)));
    this.root.hidden = false;
    this.root.scrollIntoView({ block: "nearest" });
    this.app.speak(
      `${words[0].name}. Next best: ${words.slice(1, 3).map((word) => word.name).join(", ") || "none"}. ` +
        `${masks.length} regions shown.`,
    );
  }

  #proposal({ share, word, word_probability: probability }, mask) {
    const { stage } = this.app;
    const item = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    const text = document.createElement("span");
    text.textContent = percent(share);
    const kind = document.createElement("span");
    kind.className = "faint";
    kind.textContent = word;
    const label = `This region gives ${percent(share)} of the score. It is most like ${word}, and by ${percent(probability)} like the winner.`;
    button.setAttribute("aria-label", label);
    button.title = label;
    button.append(stage.thumbnail(mask), text, kind);
    for (const [begin, end] of [["pointerenter", "pointerleave"], ["focus", "blur"]]) {
      button.addEventListener(begin, () => stage.showMask(mask));
      button.addEventListener(end, () => stage.hideMask());
    }
    item.append(button);
    return item;
  }
}

function bar(word, most, colour) {
  const item = document.createElement("li");
  const name = document.createElement("span");
  name.className = "name";
  name.textContent = word.background ? `${word.name} (background)` : word.name;
  const meter = document.createElement("span");
  meter.className = "meter";
  const fill = document.createElement("span");
  fill.style.width = `${Math.max(0, Math.min(1, word.score / most)) * 100}%`;
  if (colour) fill.style.backgroundColor = css(colour);
  meter.append(fill);
  const score = document.createElement("span");
  score.className = "share";
  score.textContent = word.score.toFixed(2);
  item.append(name, meter, score);
  return item;
}

async function decode(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  return createImageBitmap(new Blob([bytes], { type: "image/png" }));
}
