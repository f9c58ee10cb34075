"""Measuring a model against its training pictures: with a model whose samples are known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from matryoshka_diffusion.data.source import array_source
from matryoshka_diffusion.eval import demo as measure
from matryoshka_diffusion.pipeline import Samples


def source(count=40, captions=None, frames=()):
    shape = (count, *frames, 16, 16, 3)
    pictures = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    texts = captions or [f"picture {i}" for i in range(count)]
    return array_source("test", pictures, texts, captions=[(c,) for c in texts])


class Recall:
    """A model that draws the training picture of its prompt, but `misses` for some prompts."""

    def __init__(self, known, misses=()):
        self.known = {known[i].captions[0]: known[i].picture for i in range(len(known))}
        self.misses = set(misses)
        model = SimpleNamespace(text=True, classes=0)
        self.config = SimpleNamespace(name="recall", model=model)
        self.asked = []

    def sampling(self, settings):
        return SimpleNamespace(steps=settings.get("steps", 1))

    def sample(self, prompts, *, seed=0, progress=None, **settings):
        black = np.zeros_like(next(iter(self.known.values())))
        pictures = np.stack(
            [black if p in self.misses else self.known.get(p, black) for p in prompts]
        )
        coarse = pictures.reshape(len(pictures), -1, 16, 16, 3)[:, 0, ::2, ::2]  # the first frame
        return Samples((coarse, pictures), tuple(prompts), tuple(range(len(prompts))), {})


def recall(known, misses=()) -> Any:
    return Recall(known, misses)


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch):
    """The stand-in model is no Matryoshka; call the functions below their type checks."""
    for name in ("retrieval", "sheet"):
        function = getattr(measure, name)
        while hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        monkeypatch.setattr(measure, name, function)


@pytest.mark.parametrize("frames", [(), (4,)])
def test_retrieval_asks_for_captions_and_counts_what_comes_back(frames):
    known = source(frames=frames)
    assert measure.retrieval(recall(known), known).first == 1.0
    missed = measure.retrieval(recall(known, misses=["picture 3", "picture 5"]), known)
    assert missed.count == 40
    assert 0.9 < missed.first < 1.0


def test_the_sheet_shows_known_and_unseen_prompts_and_needs_the_captions():
    known = source(24, [*measure.SHEET_PROMPTS, "a", "b", "c", "d"])
    page = measure.sheet(recall(known), known)
    assert page.size[0] > page.size[1] / 2
    with pytest.raises(ValueError, match="has no caption 'red apple'"):
        measure.sheet(recall(source()), source())
