"""The studio: streams of states, pictures as the library draws them, bounds, turns and origins."""

from __future__ import annotations

import base64
import itertools
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from matryoshka_diffusion.draw import gallery
from matryoshka_diffusion.draw.grid import png
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.studio.app import build
from matryoshka_diffusion.studio.requests import OF_SAMPLER, Limits
from matryoshka_diffusion.studio.served import Served
from matryoshka_diffusion.studio.streams import rgb
from studio_server import b64, exported, file, objects, pixels_of, some_models
from test_pipeline import Words, randomised
from tiny_run import tiny_video

BASE = "http://127.0.0.1:8000"
TEXT, CLASSES, PLAIN = "0", "1", "2"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return some_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def client(served):
    with TestClient(build(served, Limits()), base_url=BASE) as client:
        yield client


def picture(side: int, seed: int = 0, shape: tuple[int, ...] = (3,)) -> np.ndarray:
    return np.random.default_rng(seed).integers(60, 200, (side, side, *shape), dtype=np.uint8)


def drawn(client: TestClient, **wish: Any) -> list[dict[str, Any]]:
    """The lines of a drawing that ends well."""
    response = client.post("/api/draw", json=wish)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    lines = objects(response.text)
    assert "done" in lines[-1], lines[-1]
    return lines


def images(client: TestClient, **wish: Any) -> list[dict[str, Any]]:
    return drawn(client, **wish)[-1]["done"]["images"]


def without_names(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in ("name", "version")}


# --- drawings ----------------------------------------------------------------------------------


def test_a_stream_is_a_place_then_states_of_every_level_then_the_pictures(client):
    lines = drawn(client, model=TEXT, prompt="red", images=2, steps=6)
    kinds = [next(iter(line)) for line in lines]
    places = [line["queued"] for line in lines if "queued" in line]
    assert kinds == ["queued"] * len(places) + ["state"] * 6 + ["done"]
    assert places[-1] == 0
    states = [line["state"] for line in lines if "state" in line]
    assert [state["step"] for state in states] == [1, 2, 3, 4, 5, 6]
    assert {state["steps"] for state in states} == {6}
    times = [state["t"] for state in states]
    assert times == sorted(times, reverse=True)
    assert times[-1] == 0.0
    pixels = [
        [np.frombuffer(base64.b64decode(level["pixels"]), np.uint8) for level in state["levels"]]
        for state in states
    ]
    for levels in pixels:
        assert [level.size for level in levels] == [2 * 8 * 8 * 3, 2 * 16 * 16 * 3]
    assert all((one[1] != other[1]).any() for one, other in itertools.pairwise(pixels))
    for n, image in enumerate(lines[-1]["done"]["images"]):
        for level, side, name in zip(pixels[-1], (8, 16), image["levels"], strict=True):
            assert np.array_equal(level.reshape(2, side, side, 3)[n], pixels_of(name))
        assert np.array_equal(pixels_of(image["png"]), pixels_of(image["levels"][-1]))


@pytest.mark.parametrize("sampler", ["dpmpp-2m", "ddim", "ddpm"])
def test_pictures_are_those_of_the_library(client, served, sampler):
    model = Matryoshka.load(served[0].run, encoder=Words(), precision="fp32")
    wish = {"prompt": "red", "seed": 7, "steps": 5, "sampler": sampler, "guidance": [3.0, 1.0]}
    truth = model.sample(
        "red", n=2, seed=7, steps=5, sampler=sampler, guidance=(3.0, 1.0), negative="blue thing"
    )
    made = images(client, model=TEXT, images=2, negative="blue thing", **wish)
    for n, image in enumerate(made):
        for level, true in zip(image["levels"], truth.levels, strict=True):
            assert np.array_equal(pixels_of(level), true[n])
    classes = Matryoshka.load(served[1].run, precision="fp32")
    (made,) = images(client, model=CLASSES, label=1, seed=3)
    assert np.array_equal(
        pixels_of(made["png"]), classes.sample(classes=["dog"], seed=3).pictures[0]
    )
    plain = Matryoshka.load(served[2].run, precision="fp32")
    (made,) = images(client, model=PLAIN, grid="trailing")
    assert np.array_equal(pixels_of(made["png"]), plain.sample(grid="trailing").pictures[0])


WHITE_ABOVE = np.zeros((8, 8), np.uint8)
WHITE_ABOVE[:4] = 255
EDITS: dict[str, dict[str, Any]] = {
    "keep": {"keep": {8: picture(8)}},
    "several": {"keep": {8: picture(8), 16: picture(40, 1)}},
    "until": {"keep": {8: picture(8)}, "until": 0.5},
    "large": {"keep": {8: picture(70)}},
    "strength": {"image": picture(16), "strength": 0.5},
    "large image": {"image": picture(50), "strength": 0.6},
    "mask": {"image": picture(50), "mask": WHITE_ABOVE},
    "mask as large": {
        "image": picture(50),
        "mask": np.kron(WHITE_ABOVE, np.ones((7, 7), np.uint8))[:50, :50],
    },
    "all": {"image": picture(16), "mask": WHITE_ABOVE, "strength": 0.7, "keep": {8: picture(8)}},
    "correct": {"keep": {8: picture(8)}, "correct": 2},
    "resample": {"image": picture(16), "mask": WHITE_ABOVE, "resample": 2},
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_edits_are_those_of_the_library_and_their_files_bring_them_back(client, served, edit):
    model = Matryoshka.load(served[0].run, encoder=Words(), precision="fp32")
    truth = model.edit("red", n=2, seed=4, **edit)
    files: dict[str, Any] = {
        name: value if isinstance(value, int | float) else file(value)
        for name, value in edit.items()
        if name != "keep"
    }
    files["keep"] = {str(side): file(pixels) for side, pixels in edit.get("keep", {}).items()}
    made = images(client, model=TEXT, prompt="red", images=2, seed=4, **files)
    for n, image in enumerate(made):
        for level, true in zip(image["levels"], truth.levels, strict=True):
            assert np.array_equal(pixels_of(level), true[n])
        said = client.post("/api/picture", json={"picture": image["png"]}).json()
        assert said["settings"] == image["settings"]
        assert (said["width"], said["height"]) == (16, 16)
        (again,) = images(client, **without_names(said["settings"]))
        # Alone and in a batch: equal to one grey value.
        alone, beside = (pixels_of(x["png"]).astype(int) for x in (again, image))
        assert np.abs(alone - beside).max() <= 1


def test_pictures_of_the_command_bring_their_settings_too(client, served, tmp_path):
    """Whose settings name captions, classes and values of the sampler."""
    cases = [
        (served[0], {"prompts": "red", "negative": "blue thing", "rescale": 0.5}, TEXT),
        (served[1], {"classes": "eel", "sampler": "ddim", "eta": 0.5, "wake": (-1.0,)}, CLASSES),
        (served[2], {"threshold": ("dynamic", "clip"), "seed": 2**40}, PLAIN),
    ]
    for one, arguments, number in cases:
        samples = one.model().sample(**arguments, steps=5)
        shown = gallery.Gallery(samples.levels, samples.captions, samples.settings)
        gallery.save_file(shown, tmp_path / f"{number}.png")
        content = b64((tmp_path / f"{number}.png").read_bytes())
        settings = client.post("/api/picture", json={"picture": content}).json()["settings"]
        assert (settings["model"], settings["name"]) == (number, one.config.name)
        (made,) = images(client, **without_names(settings))
        assert np.array_equal(pixels_of(made["png"]), samples.pictures[0])


@pytest.mark.parametrize(
    "settings",
    [
        None,
        {},
        {"model": "text", "captions": [], "seeds": [1]},
        {"model": "text", "captions": ["a"], "seeds": ["1"]},
        {"model": "text", "captions": ["a"], "seeds": [1], "edit": 3},
        {"model": "text", "captions": ["a"], "seeds": [1], "steps": "many"},
        {"model": ["text"], "captions": "a", "seeds": [-1]},
        {"model": "classes", "captions": ["cow"], "seeds": [1]},
        {"model": "text", "captions": ["a"], "seeds": [1], "version": "\ud800"},
    ],
)
def test_settings_that_are_none_of_a_drawing_are_left_alone(client, settings):
    said = client.post("/api/picture", json={"picture": b64(png(picture(20), settings))})
    assert said.json() == {"width": 20, "height": 20, "settings": None}


def test_a_picture_of_a_model_that_is_not_here_says_so(client):
    settings = {"model": "else", "captions": ["a cow"], "seeds": [9], "steps": 3}
    said = client.post("/api/picture", json={"picture": b64(png(picture(20), settings))}).json()
    found = said["settings"]
    assert (found["model"], found["name"], found["prompt"], found["seed"]) == (
        None,
        "else",
        "a cow",
        9,
    )


def test_a_picture_is_brought_to_a_level_as_training_does_it(client, served):
    given = picture(50)
    made = client.post("/api/level", json={"model": TEXT, "picture": file(given), "side": 8}).json()
    kept = served[0].model().edit("red", keep={8: given}).levels[0][0]
    assert np.array_equal(np.frombuffer(base64.b64decode(made["pixels"]), np.uint8), kept.ravel())


def test_clips_have_frames_and_their_files_move(tmp_path):
    config = tiny_video(dropout=0.0)
    model = Matryoshka(randomised(config), config)
    one = Served(str(exported(model, tmp_path)), 0, Words(), precision="fp32")
    with TestClient(build([one], Limits()), base_url=BASE) as client:
        about = client.get("/api/models").json()["models"][0]
        assert [level["frames"] for level in about["levels"]] == [None, 4]
        lines = drawn(client, model="0", prompt="red", steps=5, keep={"8": file(picture(8))})
        (state,) = [line["state"] for line in lines[-2:] if "state" in line]
        assert [level["frames"] for level in state["levels"]] == [None, 4]
        (image,) = lines[-1]["done"]["images"]
        content = base64.b64decode(image["png"])
        assert content[8:12] == b"WEBP"
        assert np.array_equal(pixels_of(image["levels"][0]), picture(8))
        said = client.post("/api/picture", json={"picture": image["png"]}).json()
        assert said["settings"] == image["settings"]
        response = client.post(
            "/api/draw", json={"model": "0", "prompt": "", "keep": {"16": file(picture(16))}}
        )
        assert "no level of images of 16" in response.json()["error"]["message"]


def test_grey_and_transparent_pixels_are_shown_in_colour():
    grey = np.array([[[7], [250]]], np.uint8)
    assert np.array_equal(rgb(grey), np.repeat(grey, 3, axis=-1))
    clear = np.array([[[0, 10, 20, 255], [9, 9, 9, 0], [0, 100, 200, 51]]], np.uint8)
    assert rgb(clear).tolist() == [[[0, 10, 20], [255, 255, 255], [204, 224, 244]]]
    assert rgb(np.array([[[10, 0]]], np.uint8)).tolist() == [[[255, 255, 255]]]


# --- what the page is told -----------------------------------------------------------------------


def test_the_page_is_told_what_there_is(client):
    told = client.get("/api/models").json()
    text, classes, plain = told["models"]
    assert [one["condition"] for one in told["models"]] == ["text", "classes", "none"]
    assert (text["free_text"], classes["free_text"]) == (True, False)
    assert classes["classes"] == ["cat", "dog", "eel"]
    assert plain["levels"] == [{"side": 8, "frames": None}, {"side": 16, "frames": None}]
    assert set(text["defaults"]) == {*OF_SAMPLER}
    assert (text["defaults"]["steps"], text["defaults"]["guidance"]) == (4, [2.0])
    assert told["limits"]["prompt_bytes"] == 1_000
    assert (text["edits"], text["training"], text["images"]) == (True, False, 16)
