/** One level being painted on: its pixels, what is marked to be drawn anew, and the way back. */

const UNDO_DEPTH = 30;

export class Painting {
  #past = [];

  constructor(image) {
    this.side = image.width;
    this.original = image;
    this.image = copy(image);
    this.mask = new Uint8Array(this.side * this.side);
  }

  get marked() {
    return this.mask.includes(1);
  }

  get canUndo() {
    return this.#past.length > 0;
  }

  /** Remember how it is now: the beginning of a stroke. */
  begin() {
    this.#past.push({ image: copy(this.image), mask: this.mask.slice() });
    if (this.#past.length > UNDO_DEPTH) this.#past.shift();
  }

  undo() {
    if (this.canUndo) Object.assign(this, this.#past.pop());
  }

  /** Put a whole picture in place. */
  replace(image) {
    this.begin();
    this.image = copy(image);
  }

  /** A stroke of a round brush from one pixel to another. */
  stroke(tool, from, to, size, colour) {
    const steps = Math.max(Math.abs(to.x - from.x), Math.abs(to.y - from.y), 1);
    for (let step = 0; step <= steps; step++) {
      const x = Math.round(from.x + ((to.x - from.x) * step) / steps);
      const y = Math.round(from.y + ((to.y - from.y) * step) / steps);
      this.#dab(tool, x, y, size, colour);
    }
  }

  #dab(tool, x, y, size, colour) {
    // A brush of even size has its middle between pixels.
    const first = -Math.floor((size - 1) / 2);
    const middle = (size - 1) / 2 + first;
    for (let dy = first; dy < first + size; dy++) {
      for (let dx = first; dx < first + size; dx++) {
        const outside = Math.hypot(dx - middle, dy - middle) > size / 2;
        const within = 0 <= x + dx && x + dx < this.side && 0 <= y + dy && y + dy < this.side;
        if (within && !outside) this.#pixel(tool, (y + dy) * this.side + x + dx, colour);
      }
    }
  }

  #pixel(tool, place, colour) {
    if (tool === "mask") this.mask[place] = 1;
    if (tool === "brush") this.image.data.set([...colour, 255], place * 4);
    if (tool === "eraser") {
      this.mask[place] = 0;
      this.image.data.set(this.original.data.subarray(place * 4, place * 4 + 4), place * 4);
    }
  }

  colourAt({ x, y }) {
    const place = (y * this.side + x) * 4;
    return [...this.image.data.subarray(place, place + 3)];
  }

  /** The marked pixels as a picture: white is drawn anew, black is kept. */
  get maskImage() {
    return this.#marks(() => [255, 255, 255, 255], [0, 0, 0, 255]);
  }

  /** The marked pixels to lay over the picture: a pattern that is seen on every colour. */
  overlay(colour) {
    const checks = (place) => ((place + Math.floor(place / this.side)) % 2 ? 235 : 150);
    return this.#marks((place) => [...colour, checks(place)], [0, 0, 0, 0]);
  }

  #marks(marked, kept) {
    const image = new ImageData(this.side, this.side);
    this.mask.forEach((on, place) => image.data.set(on ? marked(place) : kept, place * 4));
    return image;
  }
}

const copy = (image) => new ImageData(image.data.slice(), image.width, image.height);
