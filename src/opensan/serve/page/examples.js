// Pictures of the package and words to begin with.

// The drawn scenes, and words that the model `tiny` knows.
export const SCENES = [
  ["playground", ["night sky", "brick", "green heart", "white heart", "orange circle", "orange cross", "red square"]],
  ["court", ["grass", "tiles", "white flower", "blue ring", "orange star", "black ring", "green triangle", "green square"]],
  ["workshop", ["grass", "wood", "orange circle", "red cross", "white triangle", "black cross", "green cross"]],
];

const VOCABULARIES = [
  ["street", ["sky", "road", "building", "tree", "car", "person", "bicycle"]],
  ["room", ["wall", "floor", "window", "desk|table", "chair", "monitor|screen", "keyboard"]],
  ["outdoors", ["sky", "ocean|sea", "sand", "grass", "mountain", "tree", "person", "horse"]],
];

/** Three vocabularies to begin with, [title, words], that the model can read. */
export const vocabulariesOf = (model) =>
  /^tiny\b/.test(model) ? SCENES.map(([scene, words]) => [`of the ${scene}`, words]) : VOCABULARIES;
