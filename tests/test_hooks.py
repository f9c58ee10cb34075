"""Previews: the same prompts and seeds every time, drawn with the averaged weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from matryoshka_diffusion.data.source import array_source
from matryoshka_diffusion.draw.grid import SETTINGS_KEY
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.runs.hooks import Preview, preview_of
from matryoshka_diffusion.train.trainer import View
from test_pipeline import Words, text_model


def drawn(folder, averaged):
    """The pixels of a preview, and what it says about itself."""
    config = text_model(steps=2).config
    view = View(config, folder, 64, lambda: averaged)
    with Image.open(Preview({"prompts": ["red", "blue thing"]}, Words(), "cpu")(view)) as page:
        return np.asarray(page), json.loads(page.info[SETTINGS_KEY])


def test_a_preview_shows_the_averaged_weights_and_nothing_else(tmp_path):
    trained = text_model().net
    fresh = NestedUNet(trained.config, seed=2)
    page, settings = drawn(tmp_path / "a", trained)
    again, _ = drawn(tmp_path / "b", trained)
    other, _ = drawn(tmp_path / "c", fresh)
    np.testing.assert_array_equal(page, again)
    assert (page != other).any()
    assert settings["images_seen"] == 64
    assert settings["captions"] == ["red", "blue thing"]


@pytest.mark.parametrize("count", [3, 100])
def test_the_prompts_of_previews_are_the_same_every_time(count):
    source = array_source(
        name="toy",
        array=np.zeros((count, 8, 8, 3), np.uint8),
        keys=[str(n) for n in range(count)],
        captions=[(f"caption {n}", "another") for n in range(count)],
    )
    config = text_model().config
    prompts = preview_of(source, config)["prompts"]
    assert prompts == preview_of(source, config)["prompts"]
    assert len(set(prompts)) == min(count, 8)
    assert all(prompt.startswith("caption") for prompt in prompts)
