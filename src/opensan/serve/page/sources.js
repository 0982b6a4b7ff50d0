// Where pictures come from: files, the clipboard, the package's examples.

import { PHOTOGRAPHS, SCENES, isOfScenes } from "./examples.js";

const element = (id) => document.getElementById(id);

export class Sources {
  constructor(app) {
    this.app = app;
    element("file").addEventListener("change", () => this.openChosen());
    this.#takeDropped();
    document.addEventListener("paste", (event) => {
      const file = [...event.clipboardData.files].find((each) => each.type.startsWith("image/"));
      if (!file) return;
      event.preventDefault();
      app.open(file, file.name || "pasted.png");
    });
  }

  upload() {
    element("file").click();
  }

  /** Opens the file that stands in the file field, and empties the field, so that the same file can be chosen again. */
  openChosen() {
    const field = element("file");
    const [file] = field.files;
    if (file) this.app.open(file, file.name);
    field.value = "";
    return Boolean(file);
  }

  /** The clipboard's picture, by a button. */
  async paste() {
    try {
      for (const item of await navigator.clipboard.read()) {
        const type = item.types.find((each) => each.startsWith("image/"));
        if (type) return this.app.open(await item.getType(type), "pasted.png");
      }
      this.app.problem("The clipboard holds no picture: copy one first.");
    } catch {
      this.app.problem("The browser does not let this page read the clipboard: press Ctrl+V (on a Mac ⌘V) instead.");
    }
  }

  #takeDropped() {
    const stage = element("stage");
    document.addEventListener("dragover", (event) => {
      event.preventDefault();
      stage.classList.add("dropping");
    });
    document.addEventListener("dragleave", (event) => event.relatedTarget || stage.classList.remove("dropping"));
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      stage.classList.remove("dropping");
      const [file] = event.dataTransfer.files;
      if (file) this.app.open(file, file.name);
    });
  }

  /** Lists the pictures that suit a model. */
  list(model) {
    const scenes = isOfScenes(model);
    element("examples-label").textContent = scenes ? "Drawn scenes" : "Photographs";
    element("examples").replaceChildren(...(scenes ? SCENES : PHOTOGRAPHS).map((example) => this.#button(example)));
  }

  #button(example) {
    const item = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    const picture = document.createElement("img");
    Object.assign(picture, { src: example.file, alt: "", width: 96, height: 72 });
    const title = document.createElement("span");
    title.textContent = example.name;
    button.append(picture, title);
    button.addEventListener("click", () => this.app.openExample(example));
    item.append(button);
    return item;
  }
}

/** Says who made a photograph of the package; nothing for others. */
export function credit(name) {
  const place = element("credit");
  const author = PHOTOGRAPHS.find((each) => each.file === name)?.author;
  place.hidden = !author;
  if (!author) return;
  const link = (text, href) => Object.assign(document.createElement("a"), { textContent: text, href, target: "_blank", rel: "noreferrer" });
  place.replaceChildren("Photograph: ", link(...author), ", ", link("CC BY 2.0", "https://creativecommons.org/licenses/by/2.0/"));
}
