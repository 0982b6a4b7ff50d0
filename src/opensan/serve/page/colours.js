// Which colour a word has: the same on both sides, and the same for as long as the word stays.

import { key } from "./words.js";

/** "#e69f00" -> [230, 159, 0]. */
const rgb = (hex) => [1, 3, 5].map((at) => Number.parseInt(hex.slice(at, at + 2), 16));

export class Colours {
  /** `palettes` is {name: ["#rrggbb", ...]}, the default first. */
  constructor(palettes) {
    this.palettes = Object.fromEntries(Object.entries(palettes).map(([name, list]) => [name, list.map(rgb)]));
    this.name = this.names[0];
    this.places = new Map(); // word -> its place in the palette
  }

  get names() {
    return Object.keys(this.palettes);
  }

  choose(name) {
    if (this.palettes[name]) this.name = name;
  }

  /** Gives each of `words` a place: what has one keeps it, others get the first that is free. */
  assign(words) {
    const wanted = new Set(words.map(key));
    for (const word of this.places.keys()) if (!wanted.has(word)) this.places.delete(word);
    const taken = new Set(this.places.values());
    let free = 0;
    for (const word of wanted) {
      if (this.places.has(word)) continue;
      while (taken.has(free)) free++;
      taken.add(free);
      this.places.set(word, free);
    }
  }

  /** [r, g, b] of a word; null for one that has no place. */
  of(word) {
    const place = this.places.get(key(word));
    const colours = this.palettes[this.name];
    return place === undefined ? null : colours[place % colours.length];
  }

  hex(word) {
    return `#${this.of(word).map((part) => part.toString(16).padStart(2, "0")).join("")}`;
  }
}

/** "black" or "white", whichever is easier to read on `colour`: WCAG's contrast is at least 4.5. */
export function ink(colour) {
  const [red, green, blue] = colour.map((part) => {
    const level = part / 255;
    return level <= 0.04045 ? level / 12.92 : ((level + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 ? "black" : "white";
}
