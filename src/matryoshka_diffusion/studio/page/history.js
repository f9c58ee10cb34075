/** The history: pictures with their exact settings, kept by this browser (IndexedDB). */

const MOST = 200;
const NAMES = {
  name: "Model",
  negative: "Leave out",
  seed: "Seed",
  steps: "Steps",
  guidance: "Guidance",
  sampler: "Sampler",
  strength: "Strength",
};

const byId = (id) => document.getElementById(id);
const settled = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

/** Entries in the order of their numbers: {number, at, title, settings, png, levels}. */
class Store {
  async open() {
    const request = indexedDB.open("matryoshka-studio", 1);
    request.onupgradeneeded = () =>
      request.result.createObjectStore("pictures", { keyPath: "number", autoIncrement: true });
    this.database = await settled(request);
    return this;
  }

  #pictures(mode) {
    return this.database.transaction("pictures", mode).objectStore("pictures");
  }

  all() {
    return settled(this.#pictures("readonly").getAll());
  }

  add(entry) {
    return settled(this.#pictures("readwrite").add(entry));
  }

  remove(number) {
    return settled(this.#pictures("readwrite").delete(number));
  }
}

export class History {
  entries = [];

  /**
   * @param use called with an entry whose settings are wanted back.
   * @param again called with an entry that is to be drawn again.
   */
  constructor({ use, again }) {
    this.dialog = byId("entry");
    const act = (id, action) =>
      byId(id).addEventListener("click", () => {
        this.dialog.close();
        action(this.entries.find(({ number }) => number === this.shown));
      });
    act("entry-use", use);
    act("entry-again", again);
    act("entry-close", () => {});
    act("entry-remove", (entry) => this.#remove(entry));
  }

  /** Read what the browser has kept. Without a store entries live as long as the page. */
  async open() {
    this.store = await new Store().open().catch(() => null);
    this.entries = (await this.store?.all()) ?? [];
    this.#show();
  }

  /** Add an entry, unless there is one with the same settings. */
  async add(entry) {
    const settings = JSON.stringify(entry.settings);
    if (this.entries.some((other) => JSON.stringify(other.settings) === settings)) return;
    entry = { ...entry, at: Date.now() };
    // What the browser has no room for lives as long as the page, under a number of its own.
    entry.number = (await this.store?.add(entry).catch(() => null)) ?? -entry.at;
    this.entries.push(entry);
    while (this.entries.length > MOST) await this.#remove(this.entries[0]);
    this.#show();
  }

  async #remove(entry) {
    await this.store?.remove(entry.number);
    this.entries = this.entries.filter((other) => other !== entry);
    URL.revokeObjectURL(entry.url);
    this.#show();
  }

  #show() {
    byId("history-empty").hidden = this.entries.length > 0;
    byId("entries").replaceChildren(...this.entries.map((entry) => this.#item(entry)).reverse());
  }

  #item(entry) {
    const item = document.createElement("li");
    const button = item.appendChild(document.createElement("button"));
    button.type = "button";
    const image = button.appendChild(document.createElement("img"));
    entry.url ??= URL.createObjectURL(entry.png);
    image.src = entry.url;
    image.alt = "";
    const title = button.appendChild(document.createElement("span"));
    title.textContent = entry.title;
    button.addEventListener("click", () => this.#open(entry));
    return item;
  }

  #open(entry) {
    this.shown = entry.number;
    byId("entry-picture").src = entry.url;
    byId("entry-title").textContent = entry.title;
    byId("entry-settings").replaceChildren(
      ...Object.entries(described(entry)).flatMap(([name, value]) => {
        const [term, description] = ["dt", "dd"].map((tag) => document.createElement(tag));
        term.textContent = name;
        description.textContent = value;
        return [term, description];
      }),
    );
    offer(byId("entry-download"), entry);
    this.dialog.showModal();
  }
}

/** The settings of an entry in words, with what the picture was made from. */
function described({ settings, at }) {
  const words = {};
  for (const [key, name] of Object.entries(NAMES)) {
    if (settings[key] != null) words[name] = [settings[key]].flat().join(", ");
  }
  const sides = Object.keys(settings.keep ?? {});
  const until = settings.until ? ` (let go at time ${settings.until})` : "";
  if (sides.length) words["Held level"] = sides.join(", ") + until;
  if (settings.mask) words["Drawn anew"] = "what was marked";
  if (settings.correct) words.Corrections = settings.correct;
  if (settings.resample > 1) words.Passes = settings.resample;
  words["Made"] = new Date(at).toLocaleString();
  return words;
}

/** Let a link download a picture under a name that says what it is. */
export function offer(link, { png, title, settings }) {
  URL.revokeObjectURL(link.href);
  link.href = URL.createObjectURL(png);
  const name = title.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60) || "picture";
  link.download = `${name}-${settings.seed ?? 0}.${png.type.split("/")[1]}`;
}
