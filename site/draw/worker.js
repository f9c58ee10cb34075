/** Draws beside the page, which stays awake meanwhile. */

import * as ort from "./runtime/ort.wasm.bundle.min.mjs";
import { Model, bytesOf } from "./sampler.js";

let loaded = 0; // bytes
let model = null;

/** The bytes of a file; says how many have come in all. */
async function read(path) {
  const response = await fetch(new URL(path, import.meta.url));
  if (!response.ok) throw new Error(`${path} cannot be loaded: ${response.status}`);
  const counted = new TransformStream({
    transform(chunk, controller) {
      loaded += chunk.length;
      postMessage({ loaded });
      controller.enqueue(chunk);
    },
  });
  const whole = new Response(response.body.pipeThrough(counted));
  return new Uint8Array(await whole.arrayBuffer());
}

async function load() {
  // A page of a plain web server has no memory that threads could share.
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = await read("runtime/ort-wasm-simd-threaded.wasm");
  model = await Model.load(ort, (name) => read(`model/${name}`));
  postMessage({ about: model.about });
}

async function draw({ prompt, seed, hold }) {
  const { channels, levels, pixels } = model.about;
  const begin = performance.now();
  for await (const { step, steps, x } of model.states(prompt, model.noise(seed), hold)) {
    const shown = x.map((x_r, r) => {
      const bytes = bytesOf(x_r, channels, pixels);
      return { side: levels[r], frames: null, pixels: bytes };
    });
    postMessage({ state: { step, steps, levels: shown }, milliseconds: performance.now() - begin });
  }
  postMessage({ done: true });
}

/** Say to the page what went wrong. */
const guarded = (work) => work.catch(({ message }) => postMessage({ error: message }));

const loading = guarded(load());
onmessage = ({ data }) => guarded(loading.then(() => draw(data)));
