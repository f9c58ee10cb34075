/** The form: from its fields to a request, and from settings back to its fields. */

import { StudioError } from "./api.js";

const byId = (id) => document.getElementById(id);
const IDEAS = 6;
const LARGEST_SEED = 2 ** 31 - 1; // that the dice throws
const FIELDS = ["prompt", "label", "negative", "seed", "steps", "guidance", "sampler"];

/** Settings without a field that are not the model's own: those of a picture that was opened. */
let extras = {};

export const option = (value, text) => new Option(text, value);

/** Show the fields of a model, with its defaults. */
export function show(model, limits) {
  const { condition, classes, prompts, defaults, samplers } = model;
  byId("prompt-field").hidden = byId("negative-field").hidden = condition !== "text";
  byId("label-field").hidden = condition !== "classes";
  byId("plain-field").hidden = condition !== "none";
  byId("label").replaceChildren(...(classes ?? []).map((name, number) => option(number, name)));
  byId("prompts").replaceChildren(...(prompts ?? []).map((prompt) => option(prompt, "")));
  byId("sampler").replaceChildren(...samplers.map((name) => option(name, name)));
  byId("steps").max = limits.steps;
  byId("sampler").value = defaults.sampler;
  byId("steps").value = defaults.steps;
  byId("guidance").value = listed(defaults.guidance);
  const short = (prompts ?? []).filter((prompt) => /^[a-z]+( [a-z]+)?$/.test(prompt));
  const ideas = short.slice(0, IDEAS);
  byId("prompt").placeholder = ideas[0] ?? "";
  byId("ideas").hidden = condition !== "text" || !ideas.length;
  const any = () => prompts[Math.floor(Math.random() * prompts.length)];
  byId("ideas").replaceChildren(
    "Try",
    ...ideas.map((prompt) => idea(prompt, () => prompt)),
    idea("Surprise me", any),
  );
  setExtras({});
}

function setExtras(settings) {
  extras = settings;
  const words = ([name, value]) => `${name.replaceAll("_", " ")} ${value}`;
  const texts = Object.entries(extras).map(words);
  byId("extras").hidden = !texts.length;
  const shown = byId("extras").querySelector("span");
  shown.textContent = `Also as in that picture: ${texts.join("; ")}.`;
}

function idea(name, prompt) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = name;
  button.addEventListener("click", () => {
    byId("prompt").value = prompt();
    byId("composer").requestSubmit();
  });
  return button;
}

const listed = (weights) => [weights].flat().join(", ");

/** The request that the fields ask for. Raises StudioError beside a field that is not filled in. */
export function read(model) {
  const request = {
    ...extras,
    model: model.id,
    seed: whole("seed", 0),
    images: 1,
    steps: whole("steps", 1),
    guidance: weights(model),
    sampler: byId("sampler").value,
  };
  if (model.condition === "classes") return { ...request, label: Number(byId("label").value) };
  if (model.condition === "none") return request;
  const prompt = byId("prompt").value.trim();
  if (!prompt) throw new StudioError({ message: "Say what to draw.", field: "prompt" });
  return { ...request, prompt, negative: byId("negative").value.trim() || null };
}

function whole(field, least) {
  const value = byId(field).valueAsNumber;
  if (Number.isInteger(value) && value >= least) return value;
  throw new StudioError({ message: `Give a whole number from ${least} on.`, field });
}

function weights({ levels }) {
  const texts = byId("guidance").value.split(",");
  const numbers = texts.map((text) => (text.trim() ? Number(text) : NaN));
  if (numbers.every(Number.isFinite) && [1, levels.length].includes(numbers.length)) return numbers;
  const message = `Give one number, or ${levels.length} with commas: one for each level.`;
  throw new StudioError({ message, field: "guidance" });
}

/** Fill the fields from the settings of a picture. */
export function fill(settings, { defaults }) {
  for (const field of FIELDS) {
    if (settings[field] != null) byId(field).value = settings[field];
  }
  byId("negative").value = settings.negative ?? "";
  if (settings.guidance != null) byId("guidance").value = listed(settings.guidance);
  const isOwn = (name) => JSON.stringify(settings[name]) === JSON.stringify(defaults[name]);
  const others = Object.keys(defaults).filter((name) => name in settings && !FIELDS.includes(name));
  const named = others.filter((name) => !isOwn(name)).map((name) => [name, settings[name]]);
  setExtras(Object.fromEntries(named));
}

/** Leave out the settings that have no field. */
export const forgetExtras = () => setExtras({});

/** What the fields hold: the same text draws the same picture. */
export const written = () => ["model", ...FIELDS].map((field) => byId(field).value).join("\n");

export function throwDice() {
  byId("seed").value = Math.floor(Math.random() * LARGEST_SEED);
}

/** Show an error beside its field. False if no field has the name. */
export function complain({ message, field }) {
  const input = byId("composer").elements.namedItem(field) ?? byId(field);
  if (!field || !input?.closest(".field")) return false;
  const note = document.createElement("p");
  note.className = "error";
  note.id = `${field}-error`;
  note.textContent = message;
  input.closest(".field").append(note);
  input.setAttribute("aria-invalid", "true");
  input.setAttribute("aria-describedby", note.id);
  byId("settings").open ||= byId("settings").contains(input);
  input.focus();
  return true;
}

/** Take all errors away. */
export function forgive() {
  document.querySelectorAll(".field > .error").forEach((note) => note.remove());
  for (const input of document.querySelectorAll("[aria-invalid]")) {
    input.removeAttribute("aria-invalid");
    input.removeAttribute("aria-describedby");
  }
}
