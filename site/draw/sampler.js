/** Draw with a folder of `mdm export --format onnx`: its sample.py in JavaScript, for one image.
 *
 * In addition a level can be held: the others follow it, as in `Matryoshka.edit(keep=...)`.
 */

import { normal } from "./noise.js";
import { enlarged, moved } from "./resize.js";

/** The network of a folder and its sampler. */
export class Model {
  #ort;
  #graphs = new Map(); // by the number of levels that are awake
  #features;

  constructor(about) {
    this.about = about;
  }

  /**
   * @param ort onnxruntime-web.
   * @param read fetches a file of the folder by its name, as bytes.
   */
  static async load(ort, read) {
    const model = new Model(JSON.parse(new TextDecoder().decode(await read("model.json"))));
    model.#ort = ort;
    const weights = { path: "weights.bin", data: await read("weights.bin") };
    for (const count of new Set(model.about.awake)) {
      const graph = await read(`levels-${count}.onnx`);
      const session = await ort.InferenceSession.create(graph, { externalData: [weights] });
      model.#graphs.set(count, session);
    }
    if (model.about.captions) model.#features = await read("captions.bin");
    return model;
  }

  /** The noise that a sample begins with. */
  noise(seed) {
    const { levels, channels } = this.about;
    return levels.map((side, level) => normal(seed, level, channels * side * side));
  }

  /**
   * Draw an image; yield its estimate on the levels that are awake after every step.
   *
   * @param prompt a stored caption, or the name of a class.
   * @param start noise of every level.
   * @param hold a `level` and the `image` that it keeps.
   */
  async *states(prompt, start, hold = null) {
    const { awake, instants, times, guidance, thresholds, levels: sides } = this.about;
    const own = this.#conditions(prompt);
    const hidden = guidance.some((weight) => weight !== 1) ? this.#hidden(own) : null;
    let z = hold ? begun(start, instants[0], hold) : start;
    let before = null;
    for (let step = 0; step < awake.length; step++) {
      const [now, then] = [instants[step], instants[step + 1]];
      const count = awake[step];
      const latents = z.slice(0, count);
      let x = await this.#estimates(latents, times[step], now, own);
      if (hidden) {
        const weak = await this.#estimates(latents, times[step], now, hidden);
        x = x.map((x_r, r) => x_r.map((c, n) => weak[r][n] + guidance[r] * (c - weak[r][n])));
      }
      x = x.map((x_r, r) => THRESHOLDS[thresholds[r]](x_r));
      for (let r = count; r < sides.length; r++) {
        x.push(enlarged(x[r - 1], sides[r - 1], sides[r]));
      }
      if (hold) x = moved(x, sides, hold);
      z = z.map((z_r, r) => {
        const [, sigmaNow, snrNow] = now[r];
        const [alpha, sigma, snr] = then[r];
        if (r >= count) return x[r].map((value, n) => alpha * value + sigma * start[r][n]);
        const h = (snr - snrNow) / 2;
        const past = before && step + 1 < awake.length ? (snrNow - before.now[r][2]) / 2 : Infinity;
        const lean = h / (2 * past);
        const [kept, grown] = [sigma / sigmaNow, -alpha * Math.expm1(-h)];
        return z_r.map((value, n) => {
          const earlier = before ? before.x[r][n] : 0;
          return kept * value + grown * ((1 + lean) * x[r][n] - lean * earlier);
        });
      });
      before = { now, x };
      yield { step: step + 1, steps: awake.length, x: x.slice(0, count) };
    }
  }

  /** The estimate of x on every level that is awake. */
  async #estimates(z, t, now, conditions) {
    const { Tensor } = this.#ort;
    const { channels, levels, prediction } = this.about;
    const inputs = { t: new Tensor("float32", [t], [1]), ...conditions };
    z.forEach((z_r, r) => {
      inputs[`z${r + 1}`] = new Tensor("float32", z_r, [1, channels, levels[r], levels[r]]);
    });
    const outputs = await this.#graphs.get(z.length).run(inputs);
    return z.map((z_r, r) => {
      const { data } = outputs[`x${r + 1}`];
      const [alpha, sigma] = now[r];
      if (prediction === "x0") return data;
      if (prediction === "v") return z_r.map((value, n) => alpha * value - sigma * data[n]);
      return z_r.map((value, n) => (value - sigma * data[n]) / alpha);
    });
  }

  /** The inputs of a graph for the condition of an image. */
  #conditions(prompt) {
    const { Tensor } = this.#ort;
    const { inputs, classes } = this.about;
    const conditions = {};
    if (inputs.includes("tokens")) {
      const { features, count } = this.#stored(prompt);
      conditions.tokens = new Tensor("float32", features, [1, count, features.length / count]);
      conditions.mask = new Tensor("bool", new Uint8Array(count).fill(1), [1, count]);
    }
    if (inputs.includes("labels")) {
      const label = BigInt(classes.indexOf(prompt));
      conditions.labels = new Tensor("int64", BigInt64Array.of(label), [1]);
    }
    if (inputs.includes("dropped")) conditions.dropped = new Tensor("bool", [false], [1]);
    return conditions;
  }

  /** The conditions that guidance leads away from: hidden ones, or the empty caption. */
  #hidden(conditions) {
    if (!("dropped" in conditions)) return this.#conditions("");
    return { ...conditions, dropped: new this.#ort.Tensor("bool", [true], [1]) };
  }

  /** The stored features of a caption, and the number of its tokens. */
  #stored(caption) {
    const { captions, dtype } = this.about;
    const tokens = Object.values(captions).reduce((sum, [, count]) => sum + count, 0);
    const [first, count] = captions[caption];
    const size = this.#features.length / tokens; // bytes
    const bytes = this.#features.slice(first * size, (first + count) * size).buffer;
    const half = dtype === "fp16";
    const features = half ? Float32Array.from(new Uint16Array(bytes), float) : new Float32Array(bytes);
    return { features, count };
  }
}

/** A number of half precision by its bits. */
function float(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = (bits & 1023) / 1024;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction) : 2 ** -14 * fraction);
}

/** Noise around the image that a level holds. */
function begun(start, now, { level, image }) {
  const [alpha, sigma] = now[level];
  return start.with(level, image.map((value, n) => alpha * value + sigma * start[level][n]));
}

const clip = (x, extent) => x.map((value) => Math.min(Math.max(value, -extent), extent));

const THRESHOLDS = {
  none: (x) => x,
  clip: (x) => clip(x, 1),
  /** Clipped to a quantile of |x|, at least 1, and divided by it. */
  dynamic: (x) => {
    const sizes = x.map(Math.abs).sort();
    const place = 0.995 * (sizes.length - 1);
    const [low, high] = [sizes[Math.floor(place)], sizes[Math.ceil(place)]];
    const extent = Math.min(Math.max(low + (place % 1) * (high - low), 1), 100);
    return clip(x, extent).map((value) => value / extent);
  },
};

/** Bytes of an image, its channels pixel by pixel, as screens take them. */
export function bytesOf(x, channels, pixels) {
  const area = x.length / channels;
  const bytes = new Uint8ClampedArray(x.length);
  const whole = pixels === "released" ? Math.floor : (value) => value; // clamping rounds
  for (let n = 0; n < x.length; n++) {
    bytes[(n % area) * channels + Math.floor(n / area)] = whole((x[n] + 1) * 127.5);
  }
  return bytes;
}
