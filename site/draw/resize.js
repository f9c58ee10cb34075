/** Levels made larger and smaller. An image is its channels, one after the other, as floats. */

/** Weights of the four pixels around a place, which is a share `t` of the way past the second. */
const KERNELS = {
  nearest: (t) => (t < 0.5 ? [0, 1, 0, 0] : [0, 0, 1, 0]),
  linear: (t) => [0, 1 - t, t, 0],
  cubic: (t) => [far(1 + t), near(t), near(1 - t), far(2 - t)],
};
const SLOPE = -0.75; // of torch
const near = (x) => ((SLOPE + 2) * x - (SLOPE + 3)) * x * x + 1;
const far = (x) => ((SLOPE * x - 5 * SLOPE) * x + 8 * SLOPE) * x - 4 * SLOPE;
const SMOOTH_PASSES = 3;

/** Images of one side enlarged to another, by interpolation between the centres of pixels. */
export function enlarged(x, side, to, kernel = "linear") {
  const taps = Array.from({ length: to }, (_, n) => {
    const place = ((n + 0.5) * side) / to - 0.5;
    const first = Math.floor(place);
    const pixels = [-1, 0, 1, 2].map((k) => Math.min(Math.max(first + k, 0), side - 1));
    return { pixels, weights: KERNELS[kernel](place - first) };
  });
  const rows = x.length / side;
  const wide = new Float32Array(rows * to);
  for (let row = 0; row < rows; row++) {
    taps.forEach(({ pixels: p, weights: w }, n) => {
      const at = row * side;
      wide[row * to + n] =
        w[0] * x[at + p[0]] + w[1] * x[at + p[1]] + w[2] * x[at + p[2]] + w[3] * x[at + p[3]];
    });
  }
  const result = new Float32Array((rows / side) * to * to);
  for (let channel = 0; channel < rows / side; channel++) {
    taps.forEach(({ pixels, weights: w }, n) => {
      const [a, b, c, d] = pixels.map((pixel) => (channel * side + pixel) * to);
      const at = (channel * to + n) * to;
      for (let k = 0; k < to; k++) {
        result[at + k] =
          w[0] * wide[a + k] + w[1] * wide[b + k] + w[2] * wide[c + k] + w[3] * wide[d + k];
      }
    });
  }
  return result;
}

/** D^r: images made smaller by averages. */
export function averaged(x, side, to) {
  const window = side / to;
  const result = new Float32Array(x.length / window ** 2);
  for (let row = 0, at = 0; row < x.length / side; row++) {
    const target = Math.floor(row / window) * to;
    for (let n = 0; n < side; n++) result[target + Math.floor(n / window)] += x[at++];
  }
  return result.map((sum) => sum / window ** 2);
}

/** Images enlarged so that their averages are `x`: `enlarged_exactly` of the library. */
function enlargedExactly(x, side, to) {
  let result = enlarged(x, side, to, "cubic");
  for (const kernel of [...Array(SMOOTH_PASSES - 1).fill("cubic"), "nearest"]) {
    const missing = difference(x, averaged(result, to, side));
    const rest = enlarged(missing, side, to, kernel);
    result = result.map((value, n) => value + rest[n]);
  }
  return result;
}

const difference = (a, b) => a.map((value, n) => value - b[n]);

/** Levels with an image in the place of one, and all others moved to agree with it. */
export function moved(x, sides, { level, image }) {
  return x.map((x_r, r) => {
    if (r === level) return image;
    if (r < level) return averaged(image, sides[level], sides[r]);
    const missing = difference(image, averaged(x_r, sides[r], sides[level]));
    const rest = enlargedExactly(missing, sides[level], sides[r]);
    return x_r.map((value, n) => value + rest[n]);
  });
}
