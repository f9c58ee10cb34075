"""Prompts on regions: estimates of several prompts, weighted at every pixel, in one call."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from matryoshka_diffusion.cli.main import main
from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.denoiser import Regional
from matryoshka_diffusion.pyramid import Pyramid
from matryoshka_diffusion.schedule import Cosine, Instant, instants
from matryoshka_diffusion.training.weights import export_weights
from test_pipeline import class_model, text_model

RIGHT = np.zeros((16, 16), np.uint8)
RIGHT[:, 8:] = 255


def close(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.abs(one.astype(int) - other).max() <= 1)


def test_each_condition_sees_all_rows_and_its_estimates_count_by_its_weights():
    calls: list[int] = []

    def denoise(z: Pyramid, now: Instant) -> Pyramid:
        calls.append(len(z[0]))
        scale = torch.tensor([1.0, 1.0, 10.0, 10.0]).view(4, 1, 1, 1)
        return tuple(scale * z_r for z_r in z)

    weight = torch.tensor([[[[0.25, 1.0], [0.0, 0.5]]]])
    parts = [(1 - weight.mean()[None, None, None, None], 1 - weight), (weight.mean(), weight)]
    z = (torch.full((2, 1, 1, 1), 3.0), torch.arange(8.0).view(2, 1, 2, 2))
    (now,) = instants(torch.tensor([0.5], dtype=torch.float64), [Cosine(), Cosine()])
    coarse, fine = Regional(denoise, parts)(z, now)
    assert calls == [4]
    torch.testing.assert_close(coarse, z[0] * (1 + 9 * 0.4375))
    torch.testing.assert_close(fine, z[1] * (1 + 9 * weight))


@pytest.mark.parametrize("negative", [None, "a green square"])
def test_in_one_step_each_side_of_a_mask_is_as_its_own_prompt_draws_it(negative: str | None):
    """At the first step all levels are noise, so an estimate is a sample of its prompt alone."""
    model = text_model()
    options: dict[str, Any] = {"n": 3, "steps": 1, "negative": negative, "batch_size": 2}
    drawn = model.edit("red", regions=[(RIGHT, "blue thing")], **options)
    left, right = (model.sample(one, **options) for one in ("red", "blue thing"))
    for level, of_left, of_right in zip(drawn.levels, left.levels, right.levels, strict=True):
        half = level.shape[2] // 2
        assert close(level[:, :, :half], of_left[:, :, :half])
        assert close(level[:, :, half:], of_right[:, :, half:])
        assert not close(of_left, of_right)


def test_weights_mix_prompts_and_sum_to_one():
    model = text_model(guidance=(1.0,))
    alone = [model.sample(one).pictures for one in ("red", "blue thing")]
    for weight, own in ((0.0, alone[0]), (1.0, alone[1])):
        assert close(model.edit("red", regions=[(weight, "blue thing")]).pictures, own)
    several = [(1.0, "blue thing"), (1.0, "a green square")]
    halves = [(0.5, "blue thing"), (0.5, "a green square")]
    mixed = model.edit("red", regions=several).pictures
    assert close(mixed, model.edit("red", regions=halves).pictures)
    assert not any(close(mixed, own) for own in alone)


def test_a_model_of_classes_has_classes_in_regions():
    model = class_model()
    drawn = model.edit(classes="cat", regions=[(RIGHT, "eel")], steps=1).pictures
    left, right = (model.sample(classes=one, steps=1).pictures for one in ("cat", "eel"))
    assert close(drawn[:, :, :8], left[:, :, :8])
    assert close(drawn[:, :, 8:], right[:, :, 8:])


def test_a_region_of_a_picture_keeps_what_the_mask_of_the_picture_keeps():
    model, image = text_model(), np.full((16, 16, 3), 90, np.uint8)
    drawn = model.edit("red", image=image, mask=RIGHT, regions=[(RIGHT, "blue thing")]).pictures
    assert (drawn[:, :, :8] == 90).all()


def test_a_weight_out_of_range_and_a_mask_of_another_size_are_refused():
    model, image = text_model(), np.zeros((20, 20, 3), np.uint8)
    with pytest.raises(UsageError, match=r"'blue thing' is 1\.5"):
        model.edit("red", regions=[(1.5, "blue thing")])
    with pytest.raises(UsageError, match=r"12x12.*20x20"):
        model.edit("red", image=image, strength=0.5, regions=[(RIGHT[:12, :12], "blue thing")])


def test_the_command_takes_masks_and_weights(tmp_path, capsys):
    model = class_model()
    export_weights(tmp_path / "run" / "model", model.net.state_dict(), model.config)
    Image.fromarray(RIGHT).save(tmp_path / "right.png")
    words = ["edit", str(tmp_path / "run"), "--class", "cat", "--steps", "1", "-o"]
    region = f"{tmp_path / 'right.png'}=eel"
    assert main([*words, str(tmp_path / "a.png"), "--region", region, "--region", "0=dog"]) == 0
    with Image.open(tmp_path / "a.png") as file:
        drawn = np.asarray(file)
    truth = model.edit(classes="cat", regions=[(RIGHT, "eel")], steps=1).pictures[0]
    assert close(drawn, truth)
    with pytest.raises(SystemExit):
        main([*words, str(tmp_path / "b.png"), "--region", "right.png"])
    assert "sky.png=blue sky" in capsys.readouterr().err
