"""Samples in Python: how they print, what a notebook shows, and how they are saved."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

import evaluating
from matryoshka_diffusion.cascade import Cascade
from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.draw import gallery, grid
from matryoshka_diffusion.draw.grid import SETTINGS_KEY
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.progress import shown
from matryoshka_diffusion.training.weights import export_weights
from test_pipeline import class_model, plain_model, text_model


@pytest.fixture(scope="module")
def model():
    return class_model()


@pytest.fixture(scope="module")
def drawn(model):
    return model.sample(classes=["cat", "dog"], n=2, steps=1)


def test_images_are_the_pictures(drawn):
    assert all(isinstance(image, Image.Image) for image in drawn.images)
    for image, picture in zip(drawn.images, drawn.pictures, strict=True):
        np.testing.assert_array_equal(np.asarray(image), picture)


def test_samples_and_models_print_as_one_line(model, drawn):
    assert repr(drawn) == "Samples(4 images of 'cat', 'dog', levels of 8, 16 pixels)"
    one = plain_model().sample(steps=1)
    assert repr(one) == "Samples(1 image, levels of 8, 16 pixels)"
    long = text_model().sample("word " * 5000, steps=1)
    assert len(repr(long)) < 200
    assert "8, 16 on cpu in fp32" in repr(model)
    pair = Cascade.__new__(Cascade)
    pair.base = pair.upsampler = model
    assert repr(pair) == f"Cascade({model!r}, {model!r})"


def test_a_notebook_shows_a_grid_and_film_strips_of_clips(drawn):
    with Image.open(io.BytesIO(drawn._repr_png_())) as shown_image:
        samples = gallery.Gallery(drawn.levels, drawn.captions, drawn.settings)
        np.testing.assert_array_equal(shown_image, gallery.grid_of(samples)[0])
    clips = evaluating.model("classes", evaluating.FRAMES).sample(classes="dog", n=2, steps=1)
    assert repr(clips).startswith("Samples(2 clips of 'dog', ")
    with Image.open(io.BytesIO(clips._repr_png_())) as strip:
        expected = grid.strip(clips.videos, ["dog", "dog"])
        np.testing.assert_array_equal(strip, np.asarray(expected))


def test_samples_are_saved_as_the_command_writes_them(drawn, tmp_path):
    assert drawn.save(tmp_path / "all.png") == tmp_path / "all.png"
    folder = drawn.save(str(tmp_path / "all"))
    names = sorted(path.name for path in folder.iterdir())
    each = ("000-cat.png", "001-cat.png", "002-dog.png", "003-dog.png")
    assert names == [*each, "grid.png", "levels.png"]
    with Image.open(folder / "003-dog.png") as image:
        np.testing.assert_array_equal(image, drawn.pictures[3])
        assert json.loads(image.info[SETTINGS_KEY])["seeds"] == [3]
    for taken in ("all.png", "all"):
        with pytest.raises(UsageError, match="overwrite=True"):
            drawn.save(tmp_path / taken)
        drawn.save(tmp_path / taken, overwrite=True)
    with pytest.raises(UsageError, match=r"a\.jpg"):
        drawn.save(tmp_path / "a.jpg")


def test_progress_may_be_true(model, capsys):
    model.sample(classes="cat", steps=3, progress=True)
    bar = capsys.readouterr().err
    assert "3/3" in bar
    assert "steps" in bar
    model.sample(classes="cat", steps=1, progress=False)
    assert capsys.readouterr().err == ""
    assert shown(print, "steps") is print
    assert shown(None, "steps") is None


@pytest.mark.parametrize(("there", "device"), [(False, "cpu"), (True, "cuda")])
def test_auto_is_a_gpu_where_there_is_one(there, device, model, tmp_path, monkeypatch):
    export_weights(tmp_path, model.net.state_dict(), model.config)
    devices = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(Matryoshka, "__init__", lambda *_, **own: devices.append(own["device"]))
    Matryoshka.load(tmp_path)
    Matryoshka.load(tmp_path, device="cpu")
    assert devices == [device, "cpu"]
