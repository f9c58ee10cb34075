/** The page: draws with the model in its folder, level by level, in a worker of the browser. */

import { Film } from "./studio/film.js";
import { Stage } from "./studio/stage.js";

const IDEAS = ["red apple", "umbrella", "rainbow", "cat face", "sailboat"];
const LARGEST_SEED = 2 ** 31 - 1; // that the dice throws
const byId = (id) => document.getElementById(id);
const on = (id, event, action) => byId(id).addEventListener(event, action);

const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
const stage = new Stage(settle);
let prompts = [];
let film = null; // what is being drawn
let drawn = null; // what the form held when it was drawn last

/** Let buttons say what can be done now. */
function settle() {
  const busy = film !== null;
  byId("stage").setAttribute("aria-busy", busy);
  byId("draw").disabled = byId("tools").inert = busy;
  byId("draw").textContent = written() === drawn ? "Draw another" : "Draw";
  for (const { button } of stage.levels.items) button.disabled = busy;
  for (const idea of byId("ideas").children) idea.disabled = busy;
}

function say(text) {
  byId("status").textContent = text;
  byId("alert").hidden = true;
}

function complain(text) {
  byId("status").textContent = "";
  byId("alert").textContent = text;
  byId("alert").hidden = false;
}

// --- the form -------------------------------------------------------------------------------------

const written = () => `${byId("prompt").value}\n${byId("seed").value}`;

function throwDice() {
  byId("seed").value = Math.floor(Math.random() * LARGEST_SEED);
  settle();
}

/** The prompt: what is written, or the first caption that begins with it, or that has it. */
function chosenPrompt() {
  const text = byId("prompt").value.trim().toLowerCase();
  const found =
    prompts.find((prompt) => prompt.toLowerCase() === text) ??
    (text && prompts.find((prompt) => prompt.startsWith(text))) ??
    (text && prompts.find((prompt) => prompt.includes(text)));
  if (!found) throw new Error(`Choose one of the ${prompts.length} captions in the list.`);
  byId("prompt").value = found;
  return found;
}

function chosenSeed() {
  const seed = byId("seed").valueAsNumber;
  if (Number.isSafeInteger(seed) && seed >= 0) return seed;
  throw new Error("Give a whole number from 0 on for the seed.");
}

function idea(words, prompt) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = words;
  button.addEventListener("click", () => {
    byId("prompt").value = prompt();
    draw();
  });
  return button;
}

// --- drawing --------------------------------------------------------------------------------------

/** Draw what the form asks for; a held level stays. */
function draw(hold = null) {
  if (film) return;
  try {
    worker.postMessage({ prompt: chosenPrompt(), seed: chosenSeed(), hold });
  } catch ({ message }) {
    complain(message);
    return;
  }
  drawn = written();
  film = new Film(stage.model.levels);
  stage.locked = true;
  stage.time.pause();
  say("Drawing …");
  settle();
}

function follow(state, milliseconds) {
  stage.follow(film, state);
  byId("progress").max = state.steps;
  byId("progress").value = state.step;
  const each = Math.round(milliseconds / state.step);
  const all = (milliseconds / 1000).toFixed(1);
  say(`${state.step} of ${state.steps} steps in ${all} s, ${each} ms each.`);
}

function finish() {
  film = null;
  stage.locked = false;
  byId("progress").value = 0;
  settle();
}

/** Draw the other levels anew from the one that is painted on. */
function redraw() {
  const level = stage.levels.chosen;
  const { data } = stage.levelNow(level);
  const area = data.length / 4;
  const image = new Float32Array(3 * area);
  for (let n = 0; n < image.length; n++) {
    image[n] = data[4 * (n % area) + Math.floor(n / area)] / 127.5 - 1;
  }
  draw({ level, image });
}

// --- everything together --------------------------------------------------------------------------

/** Show the levels of the model and what it can be asked for. */
function open({ levels, captions }) {
  prompts = Object.keys(captions).filter(Boolean).sort();
  byId("prompts").replaceChildren(...prompts.map((prompt) => new Option(prompt)));
  const known = IDEAS.filter((prompt) => prompts.includes(prompt));
  const any = () => prompts[Math.floor(Math.random() * prompts.length)];
  byId("ideas").replaceChildren(
    ...known.map((prompt) => idea(prompt, () => prompt)),
    idea("Surprise me", any),
  );
  byId("count").textContent = prompts.length;
  stage.useModel({ levels: levels.map((side) => ({ side, frames: null })), edits: true });
  say("Choose what to draw, or paint a sketch on a level and have it finished.");
  byId("composer").inert = byId("ideas").inert = false;
  document.body.classList.add("ready");
}

function receive({ data: { loaded, about, state, milliseconds, done, error } }) {
  if (loaded) say(`Loading the model: ${(loaded / 2 ** 20).toFixed(0)} MB …`);
  if (about) open(about);
  if (state) follow(state, milliseconds);
  if (done || error) finish();
  if (error) complain(error);
}

worker.addEventListener("message", receive);
worker.addEventListener("error", ({ message }) => complain(message ?? "The browser is too old."));
on("composer", "input", settle);
on("composer", "submit", (event) => {
  event.preventDefault();
  if (written() === drawn) throwDice();
  draw();
});
on("dice", "click", throwDice);
on("leave", "click", () => stage.paintOn(null));
on("redraw", "click", redraw);
addEventListener("keydown", ({ key }) => key === "Escape" && !film && stage.paintOn(null));
