// Pictures of the package and words to begin with.

const flickr = (number) => [`Flickr photo ${number}`, `https://www.flickr.com/photo.gne?id=${number}`];

/** {name, file, words, author [text, address]}: as the package's `assets/photographs/ATTRIBUTION.md` and `opensan demo`. */
export const PHOTOGRAPHS = [
  { name: "street", words: ["sky", "road", "tree", "bicycle"], author: flickr("4918743472") },
  { name: "room", words: ["wall", "monitor", "desk"], author: flickr("3267385733") },
  { name: "animal", words: ["ocean", "horse"], author: flickr("8392128987") },
  {
    name: "food",
    words: ["hot dog", "snow"],
    author: ["“Hot Dog” by TheCulinaryGeek", "https://www.flickr.com/photos/preppybyday/5076302395"],
  },
].map((each) => ({ ...each, file: `photographs/${each.name}.jpg` }));

/** The drawn scenes, and words that the model `tiny` knows. */
export const SCENES = [
  { name: "playground", words: ["night sky", "brick", "green heart", "white heart", "orange circle", "orange cross", "red square"] },
  { name: "court", words: ["grass", "tiles", "white flower", "blue ring", "orange star", "black ring", "green triangle", "green square"] },
  { name: "workshop", words: ["grass", "wood", "orange circle", "red cross", "white triangle", "black cross", "green cross"] },
].map((each) => ({ ...each, file: `scenes/${each.name}.png` }));

const VOCABULARIES = [
  ["street", ["sky", "road", "building", "tree", "car", "person", "bicycle"]],
  ["room", ["wall", "floor", "window", "desk|table", "chair", "monitor|screen", "keyboard"]],
  ["outdoors", ["sky", "ocean|sea", "sand", "grass", "mountain", "tree", "person", "horse"]],
];

export const isOfScenes = (model) => model === "tiny";

/** Three vocabularies to begin with, [title, words], that the model can read. */
export const vocabulariesOf = (model) =>
  isOfScenes(model) ? SCENES.map(({ name, words }) => [`of the ${name}`, words]) : VOCABULARIES;
