/** What is shown: a film on the levels, its images side by side, and paintings on levels. */

import { Film } from "./film.js";
import { Levels, Sheet } from "./levels.js";
import { Easel } from "./paint.js";
import { Painting } from "./painting.js";
import { blankOf } from "./pixels.js";
import { Player } from "./player.js";

const byId = (id) => document.getElementById(id);
const stepOf = (state) => (state ? `step ${state.step} of ${state.steps}` : "");

export class Stage {
  film = null;
  results = []; // the film's finished images: {png, title, settings}
  chosen = 0; // the image that is looked at
  #locked = false; // while something is drawn nothing is painted
  #paintings = new Map(); // by level, of the image that is looked at

  /** @param changed called when buttons may have to change. */
  constructor(changed) {
    this.changed = changed;
    this.levels = new Levels(byId("levels"), (level) => this.paintOn(level));
    this.sheet = new Sheet(byId("variations"), (image) => this.lookAt(image));
    this.easel = new Easel(changed);
    this.time = new Player(byId("time"), {
      words: (at) => stepOf(this.film.states[at]),
      move: () => this.#showState(),
    });
    this.clip = new Player(byId("clip"), {
      words: (at) => `frame ${at + 1} of ${this.film.frames}`,
      move: () => this.#showLevels(),
      loops: true,
      milliseconds: 125,
    });
  }

  /** Show the levels of a model, all noise. */
  useModel(model) {
    this.model = model;
    this.levels.build(model.levels, model.edits);
    this.show(new Film(model.levels));
  }

  /** Show another film from its end on. */
  show(film, results = []) {
    Object.assign(this, { film, results, chosen: 0 });
    this.#paintings = new Map();
    this.clip.length = film.frames;
    this.time.length = film.states.length;
    byId("sheet").hidden = film.images < 2;
    if (film.images > 1) this.sheet.build(film.images);
    this.time.go(Math.max(film.last, 0));
    this.changed();
  }

  get locked() {
    return this.#locked;
  }

  /** A level that was open for painting is open again after a drawing. */
  set locked(locked) {
    const { chosen } = this.levels;
    const opens = this.#locked && !locked && chosen !== null;
    this.#locked = locked;
    if (opens) this.paintOn(chosen);
  }

  /** Show a state that has just come. The first one of a film takes the place of another film. */
  follow(film, state) {
    film.states.push(state);
    if (film !== this.film) {
      this.easel.close();
      this.show(film);
    }
    this.time.length = film.states.length;
    this.time.go(film.last);
  }

  /** Look at one image of a film with several. */
  lookAt(image) {
    this.paintOn(null);
    this.chosen = image;
    this.#paintings = new Map();
    this.sheet.mark(image);
    this.#showLevels();
    this.changed();
  }

  get result() {
    return this.results[this.chosen];
  }

  /** True if there is a picture, and not only noise. */
  get hasPicture() {
    return this.film.states.length > 0;
  }

  #showState() {
    if (!this.locked) this.paintOn(null);
    this.#showLevels();
    if (this.film.images < 2) return;
    const finest = this.film.finest(this.time.at);
    const images = Array.from({ length: this.film.images }, (_, image) => image);
    this.sheet.show(images.map((image) => this.#pictureOf(finest, image)));
  }

  #showLevels() {
    this.levels.show(this.model.levels.map((_, level) => this.levelNow(level)));
  }

  #pictureOf(level, image = this.chosen) {
    return this.film.picture(this.time.at, level, image, this.clip.at);
  }

  /** What is on a level: at the end of time, its painting if there is one. */
  levelNow(level) {
    const painting = this.time.at >= this.film.last ? this.#paintings.get(level) : null;
    return painting?.image ?? this.#pictureOf(level);
  }

  get finest() {
    return this.model.levels.length - 1;
  }

  // --- painting ---

  /** The painting that is open, or undefined. */
  get painting() {
    return this.#paintings.get(this.levels.chosen);
  }

  /** Open a level of the finished image for painting; null closes it. A first sketch is blank. */
  paintOn(level) {
    if (this.locked && level !== null) return;
    if (level !== null && this.time.at < this.film.last) this.time.go(this.film.last);
    this.easel.close();
    this.levels.mark(level);
    byId("tools").hidden = level === null;
    if (level !== null) {
      const { side } = this.model.levels[level];
      if (!this.painting) {
        const image = this.hasPicture ? this.#pictureOf(level) : blankOf(side);
        this.#paintings.set(level, new Painting(image));
      }
      this.easel.open(this.levels.items[level], this.painting);
    }
    this.changed();
  }
}
