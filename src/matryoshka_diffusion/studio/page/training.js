/** A run in training: how far it is, its curves, and its previews, asked for every few seconds. */

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
    for (const figure of document.querySelectorAll("#charts [data-title]")) figure.remove();
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
    const { images, of, rate, levels, losses, held_out, measured } = this.report;
    const speed = rate ? `, ${rate.toPrecision(3)} a second` : "";
    const left = of > images && rate > 0 ? `, about ${duration((of - images) / rate)} left` : "";
    byId("training-status").textContent =
      `${whole(images)} of ${whole(of)} images` + speed + left;
    byId("training-progress").max = of;
    byId("training-progress").value = images;
    const names = levels.map((side) => `${side} px`);
    chart(byId("losses").closest("figure"), losses, names);
    chart(byId("held-out").closest("figure"), held_out, names);
    for (const [title, rows] of Object.entries(measured)) {
      chart(this.#figure(title), rows, ["averaged weights"], "linear");
    }
  }

  /** The figure of something measured, which is made when it first occurs. */
  #figure(title) {
    const charts = byId("charts");
    const known = [...charts.children].find(({ dataset }) => dataset.title === title);
    if (known) return known;
    const figure = charts.lastElementChild.cloneNode(true);
    figure.dataset.title = title;
    figure.querySelector("figcaption").textContent = title;
    for (const part of figure.querySelectorAll("[id]")) part.removeAttribute("id");
    charts.append(figure);
    return figure;
  }
}

function duration(seconds) {
  if (seconds < 90) return `${Math.ceil(seconds)} seconds`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} minutes`;
  return `${(seconds / 3600).toFixed(1)} hours`;
}

/** Draw curves of [images, value of curve 1, value of curve 2, ...] over the images. */
function chart(figure, rows, names, scale = "logarithmic") {
  figure.hidden = !rows.length;
  if (!rows.length) return;
  const canvas = figure.querySelector("canvas");
  const style = getComputedStyle(canvas);
  const colour = (name) => style.getPropertyValue(name).trim();
  const { width, height } = canvas.getBoundingClientRect();
  const pen = canvas.getContext("2d");
  canvas.width = width * devicePixelRatio;
  canvas.height = height * devicePixelRatio;
  pen.scale(devicePixelRatio, devicePixelRatio);

  const isLogarithmic = scale === "logarithmic";
  const isDrawn = (value) => typeof value === "number" && (value > 0 || !isLogarithmic);
  const values = rows.flatMap(([, ...each]) => each).filter(isDrawn);
  const high = Math.max(...values) * 1.1 || 1;
  const low = isLogarithmic ? Math.min(...values) / 1.1 : 0;
  const last = rows.at(-1)[0];
  const x = (n) => PADDING.left + (n / last) * (width - PADDING.left - PADDING.right);
  const share = (value) => isLogarithmic ? Math.log(value / low) / Math.log(high / low) : value / high;
  const drop = height - PADDING.top - PADDING.bottom;
  const y = (value) => height - PADDING.bottom - share(value) * drop;

  pen.font = `12px ${style.fontFamily}`;
  pen.fillStyle = colour("--quiet");
  pen.strokeStyle = colour("--line");
  for (const value of isLogarithmic ? ticks(low, high) : even(high)) {
    line(pen, [[PADDING.left, y(value)], [width - PADDING.right, y(value)]]);
    pen.textAlign = "right";
    pen.fillText(Number(value.toPrecision(2)), PADDING.left - 8, y(value) + 4);
  }
  pen.fillText(`${whole(last)} images`, width - PADDING.right, height - 6);
  pen.textAlign = "left";
  pen.fillText("0", PADDING.left, height - 6);

  names.forEach((_, curve) => {
    pen.strokeStyle = pen.fillStyle = colour(`--curve-${curve % 4}`);
    pen.setLineDash(DASHES[curve % DASHES.length]);
    pen.lineWidth = 2;
    const points = rows.filter((row) => isDrawn(row[curve + 1]));
    line(pen, points.map((row) => [x(row[0]), y(row[curve + 1])]));
    if (points.length === 1) pen.fillRect(x(points[0][0]) - 3, y(points[0][curve + 1]) - 3, 6, 6);
  });

  const newest = (curve) => rows.findLast((row) => isDrawn(row[curve + 1]))?.[curve + 1];
  const texts = names.map((name, curve) => {
    const value = newest(curve);
    return `${name}: ${value === undefined ? "not yet" : Number(value.toPrecision(3))}`;
  });
  const title = figure.querySelector("figcaption").textContent;
  canvas.setAttribute("aria-label", `${title}, newest: ${texts.join(", ")}`);
  figure.querySelector(".legend").replaceChildren(
    ...texts.map((text, curve) => {
      const item = document.createElement("li");
      item.className = `curve-${curve % 4}`;
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
  if (found.length < 2) return even(high).filter((value) => value >= low);
  return found.length > 6 ? found.filter((_, index) => index % 3 === 0) : found;
}

/** A few round numbers from 0 on, for an even scale. */
function even(high) {
  const power = 10 ** Math.floor(Math.log10(high));
  const step = [0.2, 0.5, 1, 2].find((digit) => high / (digit * power) <= 6) * power;
  return Array.from({ length: Math.floor(high / step) + 1 }, (_, index) => index * step);
}
