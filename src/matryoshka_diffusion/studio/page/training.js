/** A run in training: how far it is, its losses, and its previews, asked for every few seconds. */

import * as api from "./api.js";
import { Player } from "./player.js";

const SECONDS_BETWEEN = 3;
const DASHES = [[], [6, 3], [2, 3], [9, 3, 2, 3]];
const PADDING = { left: 52, right: 12, top: 12, bottom: 26 };

const byId = (id) => document.getElementById(id);
const whole = (number) => Math.round(number).toLocaleString();

export class Training {
  #timer = null;
  #previews = [];
  #pictures = new Map();

  constructor() {
    this.player = new Player(byId("previews"), {
      words: (at) => `after ${whole(parseInt(this.#previews[at]))} images`,
      move: (at) => this.#show(this.#previews[at]),
      milliseconds: 400,
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#draw());
    addEventListener("resize", () => this.#draw());
  }

  /** Watch the run of a model until `close`. */
  open(model) {
    this.close();
    Object.assign(this, { model, report: null });
    this.#previews = [];
    this.#pictures.clear();
    this.#watch();
  }

  close() {
    clearTimeout(this.#timer);
    this.model = null;
  }

  async #watch() {
    const { model } = this;
    try {
      if (!document.hidden) {
        const report = await api.run(model.id);
        if (model !== this.model) return;
        this.report = report;
        this.#draw();
        this.#preview(report.previews);
      }
      byId("training-error").hidden = true;
    } catch (error) {
      byId("training-error").textContent = error.message;
      byId("training-error").hidden = false;
    }
    if (model === this.model) {
      this.#timer = setTimeout(() => this.#watch(), SECONDS_BETWEEN * 1000);
    }
  }

  /** Follow the newest preview, unless somebody looks at an older one. */
  #preview(names) {
    const atEnd = this.player.at >= this.#previews.length - 1;
    const isNew = names.length !== this.#previews.length;
    this.#previews = names;
    byId("preview-figure").hidden = !names.length;
    this.player.length = names.length;
    if (isNew && atEnd) this.player.go(names.length - 1);
  }

  async #show(name) {
    const { model } = this;
    if (!this.#pictures.has(name)) {
      this.#pictures.set(name, api.preview(model.id, name).then(URL.createObjectURL));
    }
    const url = await this.#pictures.get(name);
    if (this.#previews[this.player.at] === name) byId("preview").src = url;
  }

  #draw() {
    if (!this.report || byId("training").hidden) return;
    const { images, of, rate, levels, losses, held_out } = this.report;
    const speed = rate ? `, ${rate.toPrecision(3)} a second` : "";
    const left = of > images && rate > 0 ? `, about ${duration((of - images) / rate)} left` : "";
    byId("training-status").textContent =
      `${whole(images)} of ${whole(of)} images` + speed + left;
    byId("training-progress").max = of;
    byId("training-progress").value = images;
    chart("losses", losses, levels);
    chart("held-out", held_out, levels);
  }
}

function duration(seconds) {
  if (seconds < 90) return `${Math.ceil(seconds)} seconds`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} minutes`;
  return `${(seconds / 3600).toFixed(1)} hours`;
}

/** Draw curves of [images, loss of level 1, loss of level 2, ...] on a logarithmic scale. */
function chart(id, rows, levels) {
  const canvas = byId(id);
  canvas.closest("figure").hidden = !rows.length;
  if (!rows.length) return;
  const style = getComputedStyle(canvas);
  const colour = (name) => style.getPropertyValue(name).trim();
  const { width, height } = canvas.getBoundingClientRect();
  const pen = canvas.getContext("2d");
  canvas.width = width * devicePixelRatio;
  canvas.height = height * devicePixelRatio;
  pen.scale(devicePixelRatio, devicePixelRatio);

  const values = rows.flatMap(([, ...losses]) => losses).filter((loss) => loss > 0);
  const [low, high] = [Math.min(...values) / 1.1, Math.max(...values) * 1.1];
  const last = rows.at(-1)[0];
  const x = (n) => PADDING.left + (n / last) * (width - PADDING.left - PADDING.right);
  const share = (loss) => Math.log(loss / low) / Math.log(high / low);
  const drop = height - PADDING.top - PADDING.bottom;
  const y = (loss) => height - PADDING.bottom - share(loss) * drop;

  pen.font = `12px ${style.fontFamily}`;
  pen.fillStyle = colour("--quiet");
  pen.strokeStyle = colour("--line");
  for (const loss of ticks(low, high)) {
    line(pen, [[PADDING.left, y(loss)], [width - PADDING.right, y(loss)]]);
    pen.textAlign = "right";
    pen.fillText(Number(loss.toPrecision(2)), PADDING.left - 8, y(loss) + 4);
  }
  pen.fillText(`${whole(last)} images`, width - PADDING.right, height - 6);
  pen.textAlign = "left";
  pen.fillText("0", PADDING.left, height - 6);

  levels.forEach((_, level) => {
    pen.strokeStyle = colour(`--curve-${level % 4}`);
    pen.setLineDash(DASHES[level % DASHES.length]);
    pen.lineWidth = 2;
    const points = rows.filter((row) => row[level + 1] > 0);
    line(pen, points.map((row) => [x(row[0]), y(row[level + 1])]));
  });

  const newest = (level) => rows.findLast((row) => row[level + 1] > 0)?.[level + 1];
  const texts = levels.map((level, number) => {
    const loss = newest(number);
    return `${level} px${loss ? `: ${loss.toPrecision(3)}` : ": not yet"}`;
  });
  canvas.setAttribute("aria-label", `Newest losses: ${texts.join(", ")}`);
  byId(`${id}-legend`).replaceChildren(
    ...texts.map((text, level) => {
      const item = document.createElement("li");
      item.className = `curve-${level % 4}`;
      item.textContent = text;
      return item;
    }),
  );
}

function line(pen, points) {
  pen.beginPath();
  points.forEach(([x, y]) => pen.lineTo(x, y));
  pen.stroke();
}

/** A few round numbers between two, for a logarithmic scale. */
function ticks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const digit of [1, 2, 5]) {
      const value = digit * 10 ** power;
      if (low <= value && value <= high) found.push(value);
    }
  }
  return found.length > 6 ? found.filter((_, index) => index % 3 === 0) : found;
}
