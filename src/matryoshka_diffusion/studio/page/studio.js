/** The studio: draws by levels, live, and lets one paint on any level and draw the others anew. */

import * as api from "./api.js";
import { Film } from "./film.js";
import * as form from "./form.js";
import { History, offer } from "./history.js";
import { sizeOf } from "./levels.js";
import { base64Of, bytesOf, fileOf, imageOf, pngOf, sendable } from "./pixels.js";
import { Stage } from "./stage.js";
import { Training } from "./training.js";

const COUNTS = [4, 6, 9, 12, 16];
const byId = (id) => document.getElementById(id);
const on = (id, event, action) => byId(id).addEventListener(event, action);

let known = { models: [], limits: {} };
let model = null;
let drawing = null; // what stops the drawing that is going on
let drawn = null; // what the form held when it was drawn last
const stage = new Stage(settle);
const training = new Training();
const history = new History({ use: bringBack, again: shown(drawAgain) });

// --- what is said and what can be done ---------------------------------------------------------

/** Let buttons say what can be done now. */
function settle() {
  const busy = drawing !== null;
  const { result } = stage;
  byId("stage").setAttribute("aria-busy", busy);
  byId("draw").textContent = nameOfDraw();
  byId("draw").hidden = busy;
  byId("stop").hidden = !busy;
  byId("next").hidden = !stage.hasPicture;
  byId("next").inert = byId("tools").inert = busy;
  byId("begin-card").hidden = !redraws();
  byId("take-card").hidden = !result;
  if (result) offer(byId("download"), result);
  byId("keep").disabled = busy || !result || result.kept;
  byId("keep").textContent = result?.kept ? "Kept" : "Keep this one";
  for (const { button } of stage.levels.items) button.disabled = busy;
  byId("redraw-marked").disabled = !isMarked();
}

/** What the large button does. */
function nameOfDraw() {
  const opened = model.levels[stage.levels.chosen];
  if (isMarked()) return "Redraw the marks";
  if (opened) return `Draw from ${opened.side} × ${opened.side}`;
  return form.written() === drawn ? "Draw another" : "Draw";
}

/** True if the finest level is a picture that can be sent to be drawn anew in part. */
const redraws = () => model.edits && !model.levels.at(-1).frames;

/** True if a part of a picture is marked to be drawn anew. */
const isMarked = () => redraws() && stage.hasPicture && stage.painting?.marked === true;

function say(text) {
  byId("status").textContent = text;
  byId("alert").hidden = true;
}

/** Show an error beside its field, or above the levels. */
function complain(error) {
  if (error.name === "AbortError") return;
  if (!(error instanceof api.StudioError)) console.error(error);
  byId("status").textContent = "";
  if (form.complain(error)) return;
  byId("alert").textContent = error.message;
  byId("alert").hidden = false;
}

/** An action of a button, whose errors are shown. */
function shown(action) {
  return async (...given) => {
    try {
      await action(...given);
    } catch (error) {
      complain(error);
    }
  };
}

// --- models -----------------------------------------------------------------------------------

function useModel(id) {
  drawing?.abort();
  model = known.models.find((one) => one.id === id) ?? known.models[0];
  byId("model").value = model.id;
  form.show(model, known.limits);
  const plans = model.edits ? model.levels.slice(0, -1).filter(({ frames }) => !frames) : [];
  byId("vary").replaceChildren(
    form.option("", "everything"),
    ...plans.map((level, number) => form.option(number, `all but the level of ${sizeOf(level)}`)),
  );
  const most = model.images ?? known.limits.images;
  const counts = COUNTS.filter((count) => count <= most);
  byId("count").replaceChildren(...counts.map((count) => form.option(count, count)));
  byId("views").hidden = !model.training;
  view("draw");
  stage.useModel(model);
}

function view(name) {
  for (const one of ["draw", "training"]) {
    byId(`view-${one}`).setAttribute("aria-pressed", one === name);
  }
  byId("drawing").hidden = byId("history").hidden = name !== "draw";
  byId("training").hidden = name === "draw";
  if (name === "training") training.open(model);
  else training.close();
}

// --- drawing ----------------------------------------------------------------------------------

/** Draw: what is marked, or from the level that is painted on. The same again has another seed. */
async function drawNow() {
  if (isMarked()) return redrawMarked();
  if (stage.levels.chosen !== null) return redrawOthers();
  if (form.written() === drawn) form.throwDice();
  return draw();
}

/** Draw what the form asks for, with changes, and show every state as it comes. */
async function draw(changes = {}) {
  drawing?.abort();
  form.forgive();
  const request = { ...form.read(model), ...changes };
  const written = form.written();
  const controller = (drawing = new AbortController());
  const film = new Film(model.levels);
  stage.locked = true;
  stage.time.pause();
  say("Asking the studio …");
  settle();
  let done = false;
  try {
    for await (const line of api.draw(request, controller.signal)) {
      done = "done" in line;
      if (line.queued > 0) say(waiting(line.queued));
      if (line.queued === 0) say("Drawing …");
      if (line.state) follow(film, line.state);
      if (done && !Object.keys(changes).length) drawn = written;
      if (done) await finish(film, line.done);
    }
    if (!done) throw new api.StudioError({ message: "The drawing ended early: draw it again." });
  } catch (error) {
    complain(error);
    if (drawing === controller && error.name === "AbortError") {
      say(film.states.length ? `Stopped after step ${film.states[film.last].step}.` : "Stopped.");
    }
  } finally {
    if (drawing === controller) {
      drawing = null;
      stage.locked = false;
      byId("progress").value = 0;
      settle();
    }
  }
}

function waiting(place) {
  if (place === 1) return "Next in the queue …";
  return `Number ${place} in the queue …`;
}

function follow(film, { levels, ...state }) {
  levels = levels.map((level) => ({ ...level, pixels: bytesOf(level.pixels) }));
  stage.follow(film, { ...state, levels });
  byId("progress").max = state.steps;
  byId("progress").value = state.step;
}

async function finish(film, { images }) {
  stage.results = images.map(({ png, settings }) => ({
    png: fileOf(png),
    title: titleOf(settings),
    settings,
  }));
  say(images.length === 1 ? "Drawn." : "Drawn. Look at them below, and keep the one you like.");
  const isCalm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (film.frames > 1 && !isCalm) stage.clip.play();
  if (images.length === 1) await keep();
}

const titleOf = ({ prompt, label }) => prompt || (model.classes?.[label] ?? "Without words");

/** Put the image that is looked at into the history. */
async function keep() {
  const { png, title, settings } = stage.result;
  stage.result.kept = true;
  settle();
  await history.add({ png, title, settings, levels: stage.film.kept(stage.chosen) });
}

/** Bring back the settings of an entry, and its picture on the levels. */
function bringBack(entry) {
  useSettings(entry.settings);
  showStored(entry);
  say("These settings are in the form again.");
  scrollTo({ top: 0 });
}

/** Show an entry of the history, if it is of this model. */
function showStored(entry) {
  if (entry.settings.name !== model.name) return;
  if (entry.levels.map(sizeOf).join() !== model.levels.map(sizeOf).join()) return;
  stage.show(Film.still(entry.levels), [{ ...entry, kept: true }]);
}

/** Fill the form. False if the model of the settings is not here. */
function useSettings(settings) {
  const named = known.models.find(({ name }) => name === settings.name);
  if (named && named !== model) useModel(named.id);
  form.fill(settings, model);
  return named !== undefined;
}

function drawAgain({ settings: { name, version, ...request } }) {
  if (!useSettings({ name, ...request })) {
    throw new api.StudioError({ message: `${name} is not open here: start mdm studio with it.` });
  }
  scrollTo({ top: 0 });
  return draw({ ...request, model: model.id });
}

// --- editing ----------------------------------------------------------------------------------

/** What a level holds, as a request says it. */
const kept = async (level) => ({
  [model.levels[level].side]: await pngOf(stage.levelNow(level)),
});

/** How hard a drawing tries to fit what is kept. */
const effort = () => ({
  correct: Number(byId("correct").value),
  resample: Number(byId("resample").value),
});

/** Draw the others anew from the level that is painted on. */
async function redrawOthers() {
  const level = stage.levels.chosen;
  const until = 1 - Number(byId("hold").value) / 100;
  await draw({ keep: await kept(level), until, ...effort() });
}

/** Draw what is marked anew. What was painted on a coarser level is the plan of it. */
async function redrawMarked() {
  const level = stage.levels.chosen;
  form.throwDice(); // the same noise would draw the same
  const mask = await pngOf(stage.painting.maskImage);
  const keep = level === stage.finest ? {} : await kept(level);
  await draw({ image: await pngOf(stage.levelNow(stage.finest)), mask, keep, ...effort() });
}

async function beginWithPicture() {
  const image = await pngOf(stage.levelNow(stage.finest));
  await draw({ image, strength: Number(byId("strength").value) });
}

/** Draw several images under other seeds, and with the same plan if a level is to stay. */
async function drawVariations() {
  const plan = byId("vary").value;
  const keep = plan === "" ? {} : await kept(Number(plan));
  const seeds = stage.results.map(({ settings }) => settings.seed);
  const seed = Math.max(form.read(model).seed, ...seeds) + 1;
  await draw({ images: Number(byId("count").value), seed, keep });
}

async function putPicture(file) {
  const { side } = stage.painting;
  const { pixels } = await brought(await base64Of(await sendable(file, known.limits)), { side });
  stage.painting.replace(imageOf(pixels, side));
  stage.easel.redraw();
}

// --- pictures from outside --------------------------------------------------------------------

/** Open a picture: its settings come back, and the picture lies on the levels. */
async function openPicture(file) {
  say("Opening the picture …");
  const picture = await base64Of(await sendable(file, known.limits));
  const { settings } = await api.picture(picture);
  const isHere = settings && useSettings(settings);
  const sides = redraws() ? model.levels : [];
  const levels = await Promise.all(sides.map((level) => brought(picture, level)));
  if (levels.length) stage.show(Film.still(levels));
  if (!settings) return say("This picture has no settings.");
  if (isHere) await history.add({ png: file, title: titleOf(settings), settings, levels });
  say(isHere ? "The settings of the picture are in the form." : unknown(settings));
}

const unknown = ({ name }) => `This picture is by ${name}, which is not open here.`;

/** A picture brought to a level as training does it. */
async function brought(picture, { side }) {
  const { pixels } = await api.level(model.id, picture, side);
  return { side, frames: null, pixels: bytesOf(pixels) };
}

/** Let the user choose a file, for what comes next. */
function chooseFile(action) {
  byId("file").onchange = shown(async () => {
    const [file] = byId("file").files;
    byId("file").value = "";
    if (file) await action(file);
  });
  byId("file").click();
}

function acceptDrops() {
  const hasFiles = ({ dataTransfer }) => [...dataTransfer.types].includes("Files");
  const drop = async (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    byId("drop").hidden = true;
    await openPicture(event.dataTransfer.files[0]);
  };
  addEventListener("drop", shown(drop));
  addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    byId("drop").hidden = false;
  });
  addEventListener("dragleave", ({ relatedTarget }) => {
    if (!relatedTarget) byId("drop").hidden = true;
  });
}

// --- everything together ----------------------------------------------------------------------

/** Show in words what a slider says. */
function describe(id, words) {
  const update = () => (byId(`${id}-shown`).textContent = words(Number(byId(id).value)));
  on(id, "input", update);
  update();
}

function onKey(event) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) shown(drawNow)();
  if (event.key === "Escape" && !byId("entry").open) {
    if (drawing) drawing.abort();
    else stage.paintOn(null);
  }
}

function connect() {
  addEventListener("keydown", onKey);
  on("composer", "input", settle);
  on("composer", "submit", (event) => {
    event.preventDefault();
    shown(drawNow)();
  });
  on("stop", "click", () => drawing?.abort());
  on("dice", "click", () => (form.throwDice(), settle()));
  on("forget", "click", form.forgetExtras);
  on("model", "change", () => useModel(byId("model").value));
  on("view-draw", "click", () => view("draw"));
  on("view-training", "click", () => view("training"));
  on("leave", "click", () => stage.paintOn(null));
  on("upload", "click", () => chooseFile(putPicture));
  on("open", "click", () => chooseFile(openPicture));
  on("redraw-others", "click", shown(redrawOthers));
  on("redraw-marked", "click", shown(redrawMarked));
  on("begin", "click", shown(beginWithPicture));
  on("variations-draw", "click", shown(drawVariations));
  on("keep", "click", shown(keep));
  describe("hold", (share) => (share < 100 ? `${share} % of the way, then free` : "to the end"));
  describe("strength", (share) => `${Math.round(share * 100)} %`);
  acceptDrops();
  byId("composer").inert = byId("history").inert = false;
  byId("settings").open = matchMedia("(min-width: 700px)").matches;
}

async function start() {
  known = await api.models();
  byId("model").replaceChildren(...known.models.map(({ id, name }) => form.option(id, name)));
  useModel(known.models[0].id);
  connect();
  say("Write what to draw, or paint a sketch on a level and have it finished.");
  await history.open();
  const newest = history.entries.at(-1);
  if (newest?.settings.name === model.name) {
    form.fill(newest.settings, model);
    drawn = form.written();
    showStored(newest);
  }
  document.body.classList.add("ready");
}

shown(start)();
