// What survives a reload: words and choices in the browser's local storage, the picture in its database. And links that
// reopen the same words. Where a browser keeps nothing, as in private windows, the page works without.

const STATE = "opensan";
const PICTURES = "pictures";

/** `state` is {sides [{words, background}], compare, rest, threshold, palette, opacity, model, tuned}. */
export function remember(state) {
  try {
    localStorage.setItem(STATE, JSON.stringify(state));
  } catch {
    // no room, or not allowed
  }
}

export function recall() {
  try {
    return checked(JSON.parse(localStorage.getItem(STATE)));
  } catch {
    return null;
  }
}

/** The state with words that are lists of texts, whoever wrote it; null if there is none. */
function checked(state) {
  if (!state || !Array.isArray(state.sides)) return null;
  const texts = (list) => (Array.isArray(list) ? list.filter((each) => typeof each === "string") : []);
  return { ...state, sides: state.sides.map((side) => ({ words: texts(side?.words), background: texts(side?.background) })) };
}

const FIELDS = [["a", 0, "words"], ["a-background", 0, "background"], ["b", 1, "words"], ["b-background", 1, "background"]];

/** An address that reopens these words: they stand after its "#", which browsers do not send to a service. */
export function linkTo(state) {
  const fields = new URLSearchParams();
  for (const [field, side, list] of FIELDS) {
    if (side && !state.compare) continue;
    for (const word of state.sides[side][list]) fields.append(field, word);
  }
  if (state.compare) fields.set("compare", "1");
  if (state.rest) fields.set("rest", "1");
  fields.set("model", state.model);
  const address = new URL(location.href);
  address.hash = fields;
  return address.href;
}

/** The state that the present address asks for; null if it names no words. */
export function linked() {
  const fields = new URLSearchParams(location.hash.slice(1));
  if (!fields.has("a")) return null;
  const state = { sides: [{}, {}], compare: fields.has("compare"), rest: fields.has("rest"), model: fields.get("model") };
  for (const [field, side, list] of FIELDS) state.sides[side][list] = fields.getAll(field);
  return state;
}

/** Once words are edited, the address no longer tells them. */
export function unlink() {
  if (location.hash.length > 1) history.replaceState(null, "", location.pathname + location.search);
}

function pictures(mode, use) {
  return new Promise((resolve, reject) => {
    const opening = indexedDB.open(STATE, 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore(PICTURES);
    opening.onerror = () => reject(opening.error);
    opening.onsuccess = () => {
      const transaction = opening.result.transaction(PICTURES, mode);
      const asked = use(transaction.objectStore(PICTURES));
      transaction.oncomplete = () => resolve(asked.result);
      transaction.onabort = transaction.onerror = () => reject(transaction.error);
    };
  });
}

/** `picture` is {blob, name, marks}. */
export async function rememberPicture(picture) {
  try {
    await pictures("readwrite", (store) => store.put(picture, "last"));
  } catch {
    // no room, or not allowed
  }
}

export async function recallPicture() {
  try {
    return await pictures("readonly", (store) => store.get("last"));
  } catch {
    return undefined;
  }
}
