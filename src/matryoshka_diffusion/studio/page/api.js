/** The studio's server: JSON both ways, and a stream of lines while it draws. */

const token = new URLSearchParams(location.hash.slice(1)).get("token");
/** A name of this page, so that pages take turns. */
const client = Array.from(crypto.getRandomValues(new Uint32Array(4))).join("-");

/** What went wrong in plain words, and the field of the form that it belongs to, if any. */
export class StudioError extends Error {
  constructor({ message, field = null }) {
    super(message);
    this.field = field;
  }
}

const SILENT = "The studio does not answer. Is `mdm studio` still running?";

async function ask(path, body, signal) {
  const headers = { "X-Client": client };
  if (body) headers["Content-Type"] = "application/json";
  if (token) headers.Authorization = `Bearer ${token}`;
  const method = body ? "POST" : "GET";
  const response = await reached(
    fetch(path, { method, headers, body: body && JSON.stringify(body), signal }),
  );
  if (!response.ok) {
    const { error } = await response.json().catch(() => ({}));
    throw new StudioError(error ?? { message: `The studio answered with ${response.status}.` });
  }
  return response;
}

/** A network error in words. An abort stays what it is. */
async function reached(promise) {
  try {
    return await promise;
  } catch (error) {
    throw error.name === "AbortError" ? error : new StudioError({ message: SILENT });
  }
}

const json = async (path, body) => (await ask(path, body)).json();

/** The models that the studio has, and its limits. */
export const models = () => json("api/models");

/** What a picture says about itself: its settings (or null) and its size. */
export const picture = (base64) => json("api/picture", { picture: base64 });

/** A picture brought to one level, as training does it. */
export const level = (model, base64, side) =>
  json("api/level", { model, picture: base64, side });

/** How a run in training stands. */
export const run = (id) => json(`api/runs/${encodeURIComponent(id)}`);

/** One preview of a run, as a blob: an <img> cannot send the token. */
export const preview = async (id, name) =>
  (
    await ask(`api/runs/${encodeURIComponent(id)}/previews/${encodeURIComponent(name)}`)
  ).blob();

/** Draw: yields what the server says, an object a line, as soon as it says it. */
export async function* draw(request, signal) {
  const response = await ask("api/draw", request, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reached(reader.read());
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.filter(Boolean)) {
      const object = JSON.parse(line);
      if (object.error) throw new StudioError(object.error);
      yield object;
    }
  }
}
