/** The levels of a picture side by side, all at one size on the screen. */

const SMOOTH_FROM = 128;
/** From this side on a browser may smooth: pixels are as small as those of the screen. */

/** What a level is for, in a word. */
function role(level, levels) {
  if (levels.length === 1) return "the picture";
  return { 0: "the plan", [levels.length - 1]: "the picture" }[level] ?? "in between";
}

export const sizeOf = ({ side, frames }) =>
  `${side} × ${side}` + (frames ? ` × ${frames} frames` : "");

/** Put a picture on a canvas of its own size. */
export function put(canvas, image) {
  if (canvas.width !== image.width) canvas.width = canvas.height = image.width;
  canvas.getContext("2d").putImageData(image, 0, 0);
}

export class Levels {
  items = [];
  chosen = null;

  /** @param choose called with the number of a level that was clicked, or null. */
  constructor(list, choose) {
    this.list = list;
    this.choose = choose;
  }

  /** Make a figure for each level of a model, coarse to fine. */
  build(levels, paintable) {
    this.list.style.setProperty("--levels", levels.length);
    this.list.style.setProperty("--coarser", Math.max(levels.length - 1, 1));
    this.items = levels.map((level, number) =>
      this.#item(level, number, levels, paintable && !level.frames),
    );
    this.list.replaceChildren(...this.items.map(({ item }) => item));
    this.mark(null);
  }

  #item(level, number, levels, paintable) {
    const item = document.getElementById("level").content.firstElementChild.cloneNode(true);
    const [picture, marks] = item.querySelectorAll("canvas");
    const name = `Level of ${sizeOf(level)} pixels, ${role(number, levels)}`;
    item.querySelector("strong").textContent = sizeOf(level);
    item.querySelector("span").textContent = role(number, levels);
    picture.setAttribute("role", "img");
    picture.setAttribute("aria-label", name);
    picture.classList.toggle("smooth", level.side >= SMOOTH_FROM);
    const button = item.querySelector("button");
    button.hidden = !paintable;
    button.setAttribute("aria-label", `Paint on the level of ${sizeOf(level)}`);
    button.addEventListener("click", () => {
      this.choose(this.chosen === number ? null : number);
      picture.focus({ preventScroll: true });
    });
    if (paintable) {
      picture.addEventListener("pointerdown", () => this.chosen !== number && this.choose(number));
    }
    return { item, picture, marks, cursor: item.querySelector(".cursor"), button, name };
  }

  /** Show a picture on every level. */
  show(images) {
    this.items.forEach(({ picture }, number) => put(picture, images[number]));
  }

  /** Mark the level that is painted on; null marks none. */
  mark(chosen) {
    this.chosen = chosen;
    this.items.forEach(({ item, picture, button, name }, number) => {
      const here = number === chosen;
      item.classList.toggle("chosen", here);
      button.setAttribute("aria-pressed", here);
      picture.setAttribute("role", here ? "application" : "img");
      picture.setAttribute(
        "aria-label",
        here ? `${name}. Arrow keys move the brush, space paints.` : name,
      );
      if (here) picture.tabIndex = 0;
      else picture.removeAttribute("tabindex");
    });
    this.list.classList.toggle("painting", chosen !== null);
  }
}

/** Many images at once: one is looked at, and its levels are above. */
export class Sheet {
  constructor(list, choose) {
    this.list = list;
    this.choose = choose;
    this.canvases = [];
  }

  build(count) {
    this.canvases = Array.from({ length: count }, () => document.createElement("canvas"));
    this.buttons = this.canvases.map((canvas, number) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(canvas);
      button.setAttribute("aria-label", `Variation ${number + 1} of ${count}`);
      button.addEventListener("click", () => this.choose(number));
      return button;
    });
    this.list.replaceChildren(
      ...this.buttons.map((button) => {
        const item = document.createElement("li");
        item.append(button);
        return item;
      }),
    );
    this.mark(0);
  }

  show(images) {
    this.canvases.forEach((canvas, number) => {
      put(canvas, images[number]);
      canvas.classList.toggle("smooth", canvas.width >= SMOOTH_FROM);
    });
  }

  mark(chosen) {
    this.buttons.forEach((button, number) => {
      button.setAttribute("aria-pressed", number === chosen);
    });
  }
}
