// The HTTP service as the page uses it. Every failure is a ServiceError whose message may be shown to a person.

export class ServiceError extends Error {
  constructor(message, status = 0, retryAfter = 0) {
    super(message);
    this.status = status; // 0: nobody answered
    this.retryAfter = retryAfter; // seconds
  }
}

async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError("The service does not answer.");
  }
  if (response.ok) return response;
  let message = "";
  try {
    const problem = await response.json();
    message = typeof problem.detail === "string" ? problem.detail : problem.title || "";
  } catch {
    // not JSON: the status has to do
  }
  const retryAfter = Number(response.headers.get("Retry-After")) || 0;
  throw new ServiceError(message || `The service answered ${response.status}.`, response.status, retryAfter);
}

function asJson(body, accept, signal) {
  const headers = { "Content-Type": "application/json", Accept: accept };
  return { method: "POST", headers, body: JSON.stringify(body), signal };
}

/** What the service is: {model, models, limits}. */
export async function information() {
  return (await call("v1/info")).json();
}

/** The colours of words: {name of a palette: ["#rrggbb", ...]}. */
export async function palettes() {
  return (await (await call("v1/palettes")).json()).palettes;
}

/** Whether the service is there again. */
export async function alive() {
  try {
    return (await fetch("healthz", { cache: "no-store" })).ok;
  } catch {
    return false;
  }
}

/** Sends a photograph to be looked at by a model: {id, width, height}. */
export async function encode(blob, model) {
  const headers = { "Content-Type": blob.type || "application/octet-stream" };
  return (await call(`v1/encodings?model=${encodeURIComponent(model)}`, { method: "POST", headers, body: blob })).json();
}

/** Lets the service forget a photograph; nothing depends on it. */
export function forget(id) {
  fetch(`v1/encodings/${id}`, { method: "DELETE", keepalive: true }).catch(() => {});
}

/**
 * Labels of every pixel: {labels Uint8Array or Uint16Array, unlabelled, confidence Uint8Array or null, words, unseen}, each
 * word with its name and area; unseen are those that the model never read. `question` is {words, background, rest} as the
 * service takes it. Pixels of less confidence than `threshold`, from 0 to 1, are unlabelled.
 */
export async function segment(id, question, { confidence = false, threshold = 0, signal } = {}) {
  const path = `v1/encodings/${id}/segmentation?format=map&confidence=${confidence}&threshold=${threshold}`;
  const buffer = await (await call(path, asJson(question, "application/vnd.opensan.map", signal))).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const pixels = header.width * header.height;
  const Labels = header.bytes_per_label === 2 ? Uint16Array : Uint8Array;
  const labels = new Labels(buffer, 4 + length, pixels);
  const sure = confidence ? new Uint8Array(buffer, 4 + length + labels.byteLength, pixels) : null;
  const { unlabelled, words, unseen } = header;
  return { labels, unlabelled, confidence: sure, words, unseen };
}

/** The collection that can be searched: {name, images}. */
export async function collection() {
  return (await call("v1/collection")).json();
}

/** Yields the lines of a search's answer as they come: {kind: "match", ...}, {kind: "problem", detail}, {kind: "end", ...}. */
export async function* search(question, signal) {
  const response = await call("v1/collection/search", asJson(question, "application/x-ndjson", signal));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line) yield JSON.parse(line);
  }
}

/** Why a pixel has its word: {words [{name, score}], proposals [{share, word, picture}]}, best first. */
export async function explain(id, x, y, question) {
  return (await call(`v1/encodings/${id}/point`, asJson({ ...question, x, y }, "application/json"))).json();
}

/**
 * Fits words to marks: {tuned, images, pixels, unmarked, before, after}. `question` is {words, background},
 * `images` a list of {id, marks [{word, places [[x, y]], joined}]}.
 */
export async function tune(question, images) {
  return (await call("v1/tunings", asJson({ ...question, images }, "application/json"))).json();
}

const FORMATS = {
  labels: ["image/png", "labels", ".labels.png"],
  overlay: ["image/png", "overlay", ".overlay.png"],
  json: ["application/json", "json", ".segments.json"],
};

/** A finished file for the person's own disk: [Blob, end of its name]. */
export async function result(id, question, kind, threshold) {
  const [accept, format, ending] = FORMATS[kind];
  const path = `v1/encodings/${id}/segmentation?format=${format}&threshold=${threshold}`;
  const response = await call(path, asJson(question, accept));
  return [await response.blob(), ending];
}
