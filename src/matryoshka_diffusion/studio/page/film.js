/** A film: all states of one drawing, so that one can go back through time. */

import { imageOf, noiseOf } from "./pixels.js";

/** States in order. Each has levels, coarse to fine, with the bytes of all images and frames. */
export class Film {
  states = [];
  #noise;

  /** @param levels those of the model: `side` and `frames`, coarse to fine. */
  constructor(levels) {
    this.levels = levels;
    this.#noise = levels.map(({ side }) => noiseOf(side));
  }

  /** A film of a single state: a picture of which only the end is known. */
  static still(levels) {
    const film = new Film(levels);
    film.states.push({ step: 1, steps: 1, levels });
    return film;
  }

  get last() {
    return this.states.length - 1;
  }

  get frames() {
    return Math.max(...this.levels.map(({ frames }) => frames ?? 1));
  }

  get images() {
    if (!this.states.length) return 0;
    const { side, frames, pixels } = this.states[0].levels[0];
    return pixels.length / (side * side * 3 * (frames ?? 1));
  }

  /** One picture: of a state, level, image and frame. A level that sleeps is noise. */
  picture(at, level, image = 0, frame = 0) {
    const found = this.states[at]?.levels[level];
    if (!found) return this.#noise[level];
    const size = found.side * found.side * 3;
    const row = found.frames ? image * found.frames + Math.min(frame, found.frames - 1) : image;
    return imageOf(found.pixels.subarray(row * size, (row + 1) * size), found.side);
  }

  /** The finest level that is awake in a state. */
  finest(at) {
    return (this.states[at]?.levels.length ?? this.levels.length) - 1;
  }

  /** All levels of one image at the end, to be stored. */
  kept(image) {
    return this.states[this.last].levels.map(({ side, frames, pixels }) => {
      const size = side * side * 3 * (frames ?? 1);
      return { side, frames, pixels: pixels.slice(image * size, (image + 1) * size) };
    });
  }
}
