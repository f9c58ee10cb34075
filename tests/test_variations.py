"""Variations and blends of seeds: whose noise is on which level, and that it can be had again."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from matryoshka_diffusion.cli.main import main
from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.draw.grid import SETTINGS_KEY
from matryoshka_diffusion.samplers import Blend, SeededNoise
from matryoshka_diffusion.training.weights import export_weights
from test_pipeline import plain_model, text_model

SHAPES = ((3, 8, 8), (3, 16, 16))


@pytest.mark.parametrize(("purpose", "step"), [("start", 0), ("step", 3)])
def test_a_blend_has_the_noise_of_its_seeds_at_its_ends_and_a_sphere_between(
    purpose: str, step: int
):
    first, second, other = (SeededNoise([seed], SHAPES)(purpose, step) for seed in (1, 2, 7))
    ends, middle = Blend(1, 2, (0.0, 1.0)), Blend(1, 2, (0.5, 1 / 3))
    rows = SeededNoise([7, ends, middle], SHAPES)(purpose, step)
    for r, share in enumerate(middle.shares):
        angle = share * math.pi / 2
        between = math.cos(angle) * first[r][0] + math.sin(angle) * second[r][0]
        assert torch.equal(rows[r][0], other[r][0])
        assert torch.equal(rows[r][1], (first, second)[r][r][0])
        torch.testing.assert_close(rows[r][2], between)
        assert abs(float(rows[r][2].square().mean()) - 1.0) < 0.2


def test_variations_differ_on_their_levels_only_and_can_be_had_again():
    model = text_model()
    drawn = model.edit("red", levels=[16], n=3, seed=4)
    assert drawn.seeds == tuple(Blend(4, seed, (0.0, 1.0)) for seed in (4, 5, 6))
    plain = model.sample("red", n=3, seed=[4, 9, 9])
    for level, own in zip(drawn.levels, plain.levels, strict=True):
        assert np.array_equal(level[0], own[0])
    assert len(np.unique(drawn.pictures, axis=0)) == 3
    stored = json.loads(json.dumps(drawn.settings))["seeds"]
    again = model.sample("red", seed=[Blend(*stored[2])])
    assert np.abs(again.pictures[0].astype(int) - drawn.pictures[2]).max() <= 1


@pytest.mark.parametrize("sampler", ["dpmpp-2m", "ddpm"])
def test_a_walk_between_seeds_begins_and_ends_with_their_own_samples(sampler: str):
    model = text_model(sampler=sampler)
    walk = model.edit("red", between=(3, 8), n=5)
    plain = model.sample("red", n=5, seed=[3, 1, 1, 1, 8])
    for level, own in zip(walk.levels, plain.levels, strict=True):
        assert np.array_equal(level[[0, -1]], own[[0, -1]])
    steps = np.abs(np.diff(walk.pictures.astype(int), axis=0)).mean(axis=(1, 2, 3))
    assert steps.min() > 0
    assert steps.max() < np.abs(walk.pictures[0].astype(int) - walk.pictures[-1]).mean()


def test_each_prompt_has_the_same_walk_on_the_levels_that_are_named():
    drawn = text_model().edit(["red", "blue thing"], between=(3, 8), levels=["8"], n=2)
    assert drawn.captions == ("red", "red", "blue thing", "blue thing")
    assert drawn.seeds == (Blend(3, 8, (0.0, 0.0)), Blend(3, 8, (1.0, 0.0))) * 2


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "level": ({"levels": [8, 20], "n": 2}, "no level 20.*8, 16"),
    "one step": ({"between": (1, 2)}, "-n"),
    "three seeds": ({"between": (1, 2), "seed": 3, "n": 2}, "--seed"),
}


@pytest.mark.parametrize(("asked", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_seeds_that_do_not_fit_are_refused(asked: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        plain_model().edit(**asked)


def test_the_command_draws_variations_and_walks(tmp_path):
    model = plain_model()
    export_weights(tmp_path / "run" / "model", model.net.state_dict(), model.config)
    words = ["edit", str(tmp_path / "run"), "--steps", "2", "-o"]
    for name, more, seeds in (
        ("variations", ["--variations", "2", "--levels", "16", "--seed", "4"], (4, 5)),
        ("walk", ["-n", "2", "--levels", "16", "--between", "4", "5"], (4, 5)),
    ):
        assert main([*words, str(tmp_path / name), *more]) == 0
        with Image.open(tmp_path / name / "001.png") as picture:
            assert json.loads(picture.info[SETTINGS_KEY])["seeds"] == [[*seeds, [0.0, 1.0]]]
