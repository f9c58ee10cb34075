/** Painting by mouse, finger or keys: tools, the brush on a canvas, and the way back. */

import { put } from "./levels.js";

const SWATCHES = {
  Black: "#1c1e22",
  White: "#ffffff",
  Red: "#d6322c",
  Orange: "#f1913b",
  Yellow: "#f7d23e",
  Green: "#4f9d3f",
  Blue: "#3b7dd8",
  Purple: "#8a5bb5",
  Brown: "#8a5a3b",
};
const HINTS = {
  brush: "Paint on the level. With the keyboard: arrow keys move the brush, space paints.",
  eraser: "Brings back what was there, and takes marks away.",
  mask: "Mark what should be drawn anew. Everything else is kept.",
  picker: "Click a pixel of the level to paint with its colour.",
};
const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

const byId = (id) => document.getElementById(id);
const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
const hex = (colour) => `#${colour.map((part) => part.toString(16).padStart(2, "0")).join("")}`;

export class Easel {
  #painting = null;
  #figure = null;
  #at = null; // the pixel under the brush
  #down = false;

  /** @param changed called after every change of the painting. */
  constructor(changed) {
    this.changed = changed;
    this.colour = byId("colour");
    this.size = byId("size");
    byId("swatches").replaceChildren(
      ...Object.entries(SWATCHES).map(([name, value]) => this.#swatch(name, value)),
    );
    for (const radio of document.getElementsByName("tool")) {
      radio.addEventListener("change", () => this.#draw());
    }
    this.size.addEventListener("input", () => this.#draw());
    byId("undo").addEventListener("click", () => this.#undo());
  }

  #swatch(name, value) {
    const button = document.createElement("button");
    button.type = "button";
    button.title = name;
    button.setAttribute("aria-label", name);
    button.style.setProperty("--colour", value);
    button.addEventListener("click", () => {
      this.colour.value = value;
      this.tool = "brush";
    });
    return button;
  }

  get tool() {
    return document.querySelector("input[name=tool]:checked").value;
  }

  set tool(name) {
    document.querySelector(`input[name=tool][value=${name}]`).checked = true;
    this.#draw();
  }

  /** Begin to paint on a figure of `Levels`. */
  open(figure, painting) {
    this.close();
    this.#painting = painting;
    this.#figure = figure;
    this.size.max = Math.max(Math.floor(painting.side / 2), 2);
    this.size.value = Math.max(Math.round(painting.side / 12), 1);
    const middle = Math.floor(painting.side / 2);
    this.#at = { x: middle, y: middle };
    const { picture } = figure;
    picture.onpointerdown = (event) => this.#press(event);
    picture.onpointermove = (event) => this.#drag(event);
    picture.onpointerup = picture.onpointercancel = () => (this.#down = false);
    picture.onkeydown = (event) => this.#key(event);
    this.#draw();
  }

  close() {
    if (!this.#figure) return;
    const { picture, marks, cursor } = this.#figure;
    picture.onpointerdown = picture.onpointermove = picture.onpointerup = null;
    picture.onpointercancel = picture.onkeydown = null;
    marks.getContext("2d").clearRect(0, 0, marks.width, marks.height);
    cursor.hidden = true;
    this.#painting = this.#figure = null;
  }

  #press(event) {
    if (event.button !== 0) return;
    event.preventDefault();
    const { picture } = this.#figure;
    picture.focus({ preventScroll: true });
    picture.setPointerCapture(event.pointerId);
    this.#at = this.#pixel(event);
    this.#down = true;
    this.#use();
  }

  #drag(event) {
    const from = this.#at;
    this.#at = this.#pixel(event);
    if (this.#down && this.tool !== "picker") this.#stroke(from);
    else this.#draw();
  }

  #pixel(event) {
    const box = this.#figure.picture.getBoundingClientRect();
    const { side } = this.#painting;
    const within = (share) => Math.min(Math.max(Math.floor(share * side), 0), side - 1);
    return {
      x: within((event.clientX - box.left) / box.width),
      y: within((event.clientY - box.top) / box.height),
    };
  }

  #key(event) {
    const move = KEYS[event.key];
    if (move) {
      const far = event.shiftKey ? 4 : 1;
      const { side } = this.#painting;
      const within = (value) => Math.min(Math.max(value, 0), side - 1);
      this.#at = { x: within(this.#at.x + far * move[0]), y: within(this.#at.y + far * move[1]) };
      this.#draw();
    } else if (event.key === " ") this.#use();
    else if (event.key === "z" && (event.ctrlKey || event.metaKey)) this.#undo();
    else return;
    event.preventDefault();
  }

  /** Use the tool where the brush is. */
  #use() {
    if (this.tool === "picker") {
      this.colour.value = hex(this.#painting.colourAt(this.#at));
      this.tool = "brush";
      this.#down = false;
      return;
    }
    this.#painting.begin();
    this.#stroke(this.#at);
  }

  #stroke(from) {
    const size = Number(this.size.value);
    this.#painting.stroke(this.tool, from, this.#at, size, rgb(this.colour.value));
    this.#draw();
    this.changed();
  }

  #undo() {
    this.#painting?.undo();
    this.#draw();
    this.changed();
  }

  /** Show the painting, what is marked, and the brush. */
  redraw() {
    this.#draw();
  }

  #draw() {
    byId("tool-hint").textContent = HINTS[this.tool];
    byId("size-shown").textContent = `${this.size.value} px`;
    if (!this.#painting) return;
    const { picture, marks, cursor } = this.#figure;
    const accent = getComputedStyle(document.documentElement).getPropertyValue("--accent").trim();
    put(picture, this.#painting.image);
    put(marks, this.#painting.overlay(rgb(accent)));
    byId("undo").disabled = !this.#painting.canUndo;
    const size = this.tool === "picker" ? 1 : Number(this.size.value);
    const first = Math.floor((size - 1) / 2);
    const share = (pixels) => `${(100 * pixels) / this.#painting.side}%`;
    cursor.hidden = false;
    cursor.style.left = share(this.#at.x - first);
    cursor.style.top = share(this.#at.y - first);
    cursor.style.width = cursor.style.height = share(size);
  }
}
