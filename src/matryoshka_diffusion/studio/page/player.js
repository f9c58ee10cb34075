/** A slider with a play button: through time, through the frames of a clip, through previews. */

const ICONS = { play: "M8 5v14l11-7z", pause: "M7 5h4v14H7zM13 5h4v14h-4z" };

function icon(path) {
  const namespace = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(namespace, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const shape = svg.appendChild(document.createElementNS(namespace, "path"));
  shape.setAttribute("d", path);
  return svg;
}

export class Player {
  #timer = null;

  /**
   * @param root holds a button, a slider and an output.
   * @param words says in words where the slider stands.
   * @param move called with the place whenever it changes.
   * @param loops whether playing begins again at the end.
   */
  constructor(root, { words, move, loops = false, milliseconds = 80 }) {
    Object.assign(this, { root, words, move, loops, milliseconds });
    this.button = root.querySelector("button");
    this.slider = root.querySelector("input");
    this.output = root.querySelector("output");
    this.button.addEventListener("click", () => (this.#timer ? this.pause() : this.play()));
    this.slider.addEventListener("input", () => {
      this.pause();
      this.#moved();
    });
    this.pause();
  }

  get at() {
    return Number(this.slider.value);
  }

  /** Set the number of places; with fewer than two there is nothing to play. */
  set length(length) {
    this.slider.max = Math.max(length - 1, 0);
    this.root.hidden = length < 2;
    if (length < 2) this.pause();
  }

  /** Go to a place without being asked. */
  go(at) {
    this.slider.value = at;
    this.#moved();
  }

  play() {
    if (!this.loops && this.at === Number(this.slider.max)) this.go(0);
    this.#timer ??= setInterval(() => this.#next(), this.milliseconds);
    this.button.replaceChildren(icon(ICONS.pause));
    this.button.setAttribute("aria-pressed", "true");
  }

  pause() {
    clearInterval(this.#timer);
    this.#timer = null;
    this.button.replaceChildren(icon(ICONS.play));
    this.button.setAttribute("aria-pressed", "false");
  }

  #next() {
    const end = this.at === Number(this.slider.max);
    if (end && !this.loops) this.pause();
    else this.go(end ? 0 : this.at + 1);
  }

  #moved() {
    const text = this.words(this.at);
    this.output.textContent = text;
    this.slider.setAttribute("aria-valuetext", text);
    this.move(this.at);
  }
}
