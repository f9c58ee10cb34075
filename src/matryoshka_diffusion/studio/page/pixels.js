/** Pixels in their three forms: base64 on the wire, RGB bytes in a film, RGBA on a canvas. */

export const bytesOf = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));

/** RGB bytes of a square picture, as a canvas takes them. */
export function imageOf(rgb, side) {
  const image = new ImageData(side, side);
  for (let from = 0, to = 0; from < rgb.length; from += 3, to += 4) {
    image.data[to] = rgb[from];
    image.data[to + 1] = rgb[from + 1];
    image.data[to + 2] = rgb[from + 2];
    image.data[to + 3] = 255;
  }
  return image;
}

/** Pure noise: what a level looks like before it is awake. */
export function noiseOf(side) {
  const rgb = new Uint8Array(side * side * 3);
  for (let start = 0; start < rgb.length; start += 65536) {
    crypto.getRandomValues(rgb.subarray(start, start + 65536));
  }
  // Near to grey, so that the eye rests.
  return imageOf(rgb.map((value) => 120 + value / 4), side);
}

/** A white picture to sketch on. */
export const blankOf = (side) => imageOf(new Uint8Array(side * side * 3).fill(255), side);

/** A PNG of a picture, as base64. */
export async function pngOf(image) {
  const canvas = new OffscreenCanvas(image.width, image.height);
  canvas.getContext("2d").putImageData(image, 0, 0);
  return base64Of(await canvas.convertToBlob({ type: "image/png" }));
}

const SMALLER = 2048; // pixels along the longer side: more than any level has

/** A picture that the studio takes: a photo beyond its limits is made smaller, as a JPEG. */
export async function sendable(file, limits) {
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (!bitmap) return file; // the studio knows more kinds of files, and says what is wrong
  const { width, height } = bitmap;
  const fits = file.size <= limits.picture_bytes && width * height <= limits.picture_pixels;
  const scale = Math.min(1, SMALLER / Math.max(width, height));
  const canvas = new OffscreenCanvas(Math.ceil(width * scale), Math.ceil(height * scale));
  if (!fits) canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return fits ? file : canvas.convertToBlob({ type: "image/jpeg", quality: 0.95 });
}

/** A blob's bytes as base64. */
export function base64Of(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/** A picture file as a blob that knows its kind, by its first letter. */
export function fileOf(base64) {
  const bytes = bytesOf(base64);
  return new Blob([bytes], { type: bytes[0] === 0x52 ? "image/webp" : "image/png" });
}
