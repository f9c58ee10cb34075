"""Edits: what is kept is kept exactly, and samples go to the conditional distribution."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor

from matryoshka_diffusion.cli.main import main
from matryoshka_diffusion.config import SamplerName, UsageError
from matryoshka_diffusion.diffusion import diffuse
from matryoshka_diffusion.draw.grid import SETTINGS_KEY
from matryoshka_diffusion.edit import UNCHANGED, Edit, Hold, enlarged_exactly
from matryoshka_diffusion.pyramid import Resolution, down_sample, up_sample
from matryoshka_diffusion.samplers import (
    SAMPLERS,
    ddpm,
    dpmpp_2m,
    last,
    resampling,
    trailing_grid,
    waking,
)
from matryoshka_diffusion.schedule import Cosine, instants
from matryoshka_diffusion.training.weights import export_weights
from oracle import GaussianImages, UnitNoise, moments, small_clips, small_world
from test_pipeline import plain_model, text_model

every_world = pytest.mark.parametrize("make", [small_world, small_clips])
GIVEN = torch.tensor([[1.3, 0.7, 0.1, 0.5]], dtype=torch.float64)
every_sampler = pytest.mark.parametrize("name", SAMPLERS)


def relative(result: Tensor, truth: Tensor) -> float:
    return float((result - truth).norm() / truth.norm())


def hold(world: GaussianImages, level: int, mask: tuple[int, ...] = (), until: float = 0.0) -> Hold:
    """A level of an image far from the mean, or some pixels of it."""
    x = world.pyramid(GIVEN)[level]
    kept = torch.ones_like(x, dtype=torch.bool)
    return Hold(level, x, torch.tensor(mask).bool().view_as(x) if mask else kept, until)


def drawn(
    world: GaussianImages,
    edit: Edit,
    name: SamplerName = "ddim",
    steps: int = 20,
    floor: Any = None,
):
    """The states of a sampler with an edit, for unit vectors of noise."""
    noise = UnitNoise(world.resolutions, steps if name == "ddpm" else 0)
    sampler = edit(SAMPLERS[name])
    sampler = sampler if floor is None else waking(sampler, (floor,) * 3)
    times = trailing_grid(steps, world.schedules[0])
    return list(sampler(world, noise.start(), world.schedules, times, noise=noise))


# --- exactness ---------------------------------------------------------------------------------


@every_world
@every_sampler
@pytest.mark.parametrize("floor", [None, -2.0])
def test_an_edit_that_holds_nothing_changes_no_bit(name: SamplerName, make: Callable, floor: Any):
    world = make(Cosine())
    noise = UnitNoise(world.resolutions, 20 if name == "ddpm" else 0)
    plain = SAMPLERS[name] if floor is None else waking(SAMPLERS[name], (floor,) * 3)
    times = trailing_grid(20, world.schedules[0])
    truth = list(plain(world, noise.start(), world.schedules, times, noise=noise))
    free = hold(world, 1, until=1.0)
    for edit in (UNCHANGED, Edit(corrections=2), Edit((free,), corrections=2)):
        for state, true in zip(drawn(world, edit, name, floor=floor), truth, strict=True):
            assert (state.step, state.t) == (true.step, true.t)
            assert all(map(torch.equal, (*state.z, *state.x), (*true.z, *true.x)))


@every_world
@every_sampler
@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_level_agrees_with_a_held_one_and_an_image_held_whole_comes_back(
    name: SamplerName, make: Callable, level: int
):
    world = make(Cosine())
    held = hold(world, level)
    corrected = Edit((held,), corrections=1, passes=2)
    for floor, edit in ((None, Edit((held,))), (-2.0, Edit((held,))), (-2.0, corrected)):
        z = drawn(world, edit, name, floor=floor)[-1].z
        for r in range(level + 1):
            resolution = world.resolutions[r]
            torch.testing.assert_close(z[r], down_sample(held.image, resolution).expand_as(z[r]))
        for finer in z[level:]:
            pooled = down_sample(finer, world.resolutions[level])
            torch.testing.assert_close(pooled, held.image.expand_as(pooled))


@every_world
@pytest.mark.parametrize("name", ["ddim", "dpmpp-2m"])
def test_a_held_level_keeps_the_noise_of_its_sample(name: SamplerName, make: Callable):
    world = make(Cosine())
    held, noise = hold(world, 1), UnitNoise(world.resolutions, 0).start()[1]
    times = trailing_grid(20, world.schedules[0])
    states = drawn(world, Edit((held,)), name)
    for state, then in zip(states, instants(times, world.schedules)[1:], strict=True):
        alpha, sigma, _ = then.levels[1]
        torch.testing.assert_close(state.z[1], alpha * held.image + sigma * noise)


def test_a_hold_lets_go_at_its_time():
    world = small_world(Cosine())
    level = Resolution(1, 2)
    for state in drawn(world, Edit((hold(world, 1, until=0.5),))):
        kept = hold(world, 1).image.expand_as(state.x[1])
        agrees = torch.allclose(down_sample(state.x[2], level), kept)
        assert agrees == (state.t > 0.5 - 1e-9)  # made at the time before


@pytest.mark.parametrize(
    ("coarse", "fine"),
    [
        (Resolution(4, 4), Resolution(16, 16)),
        (Resolution(4, 4), Resolution(8, 8, 4)),
        (Resolution(4, 4, 2), Resolution(8, 8, 4)),
    ],
)
def test_enlarging_keeps_every_average_and_shows_less_of_the_pixels(
    coarse: Resolution, fine: Resolution
):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *coarse.shape(3), generator=generator, dtype=torch.float64)
    like = torch.empty(2, *fine.shape(3), dtype=torch.float64)
    smooth, blocks = enlarged_exactly(x, like), up_sample(x, fine, "nearest")
    torch.testing.assert_close(down_sample(smooth, coarse), x)

    def jumps(image: Tensor) -> float:
        """Differences across the borders of coarse pixels."""
        step = fine.width // coarse.width
        return float(image.diff(dim=-1)[..., step - 1 :: step].square().mean())

    assert jumps(smooth) < 0.7 * jumps(blocks)


# --- samples against the conditional distribution ------------------------------------------------

BIASES = {
    "level": (1, (), 0.042),
    "level of one pixel": (0, (), 0.012),
    "pixels": (2, (1, 0, 0, 1), 0.105),
    "coarse pixels": (1, (1, 0), 0.145),
}
"""Bounds of the relative error of the mean, which does not fall with the number of steps."""
WORLD = small_world(Cosine())


def conditional(level: int, mask: tuple[int, ...]) -> tuple[Hold, Tensor, Tensor]:
    """x given A x = y is N(m + K (y - A m), S - K A S) with K = S A' (A S A')^-1."""
    held = hold(WORLD, level, mask)
    kept = held.mask.flatten()
    a, y = WORLD.pools[level][kept], held.image.flatten()[kept]
    gain = WORLD.covariance @ a.T @ (a @ WORLD.covariance @ a.T).inverse()
    mean = WORLD.mean + gain @ (y - a @ WORLD.mean)
    return held, mean, WORLD.covariance - gain @ a @ WORLD.covariance


@pytest.mark.parametrize(("level", "mask", "bias"), BIASES.values(), ids=BIASES.keys())
def test_covariance_goes_to_that_of_the_condition_and_the_mean_has_a_known_bias(
    level: int, mask: tuple[int, ...], bias: float
):
    held, mean, covariance = conditional(level, mask)
    errors = []
    for steps in (25, 50, 100):
        result, spread = moments(drawn(WORLD, Edit((held,)), steps=steps)[-1].z[-1])
        assert 0.5 * bias < relative(result, mean) < bias
        errors.append(relative(spread, covariance))
    assert errors[-1] < 0.15
    assert all(fine / coarse < 0.6 for coarse, fine in pairwise(errors))


@pytest.mark.parametrize(("level", "mask", "bias"), BIASES.values(), ids=BIASES.keys())
def test_with_corrections_mean_and_covariance_go_to_those_of_the_condition(
    level: int, mask: tuple[int, ...], bias: float
):
    held, mean, covariance = conditional(level, mask)
    errors = []
    for steps in (25, 50, 100):
        edit = Edit((held,), corrections=4, reach=math.inf)
        result, spread = moments(drawn(WORLD, edit, steps=steps)[-1].z[-1])
        assert relative(result, mean) < 1e-3
        errors.append(relative(spread, covariance))
    assert errors[-1] < 0.16
    assert all(fine / coarse < 0.6 for coarse, fine in pairwise(errors))
    once = Edit((held,), corrections=1, reach=math.inf)
    assert relative(drawn(WORLD, once)[-1].z[-1][0].flatten(), mean) < 0.15 * bias


@pytest.mark.parametrize(("level", "mask", "bias"), BIASES.values(), ids=BIASES.keys())
def test_steps_taken_twice_have_less_bias(level: int, mask: tuple[int, ...], bias: float):
    held, mean, covariance = conditional(level, mask)
    errors = []
    for steps in (25, 50):
        noise = UnitNoise(WORLD.resolutions, 2 * steps)
        sampler, times = Edit((held,), passes=2)(dpmpp_2m), trailing_grid(steps, WORLD.schedules[0])
        states = sampler(WORLD, noise.start(), WORLD.schedules, times, noise=noise)
        result, spread = moments(last(states).z[-1])
        assert relative(result, mean) < 0.8 * bias
        errors.append(relative(spread, covariance))
    assert errors[1] < 0.65 * errors[0] < 0.3


def test_passes_show_each_step_once_and_never_repeat_noise():
    asked: list[tuple[str, int]] = []
    unit = UnitNoise(WORLD.resolutions, 0)

    def noise(purpose: str, step: int):
        asked.append((purpose, step))
        return unit("start", 1)

    times = trailing_grid(23, WORLD.schedules[0])
    states = list(resampling(ddpm, 3)(WORLD, unit.start(), WORLD.schedules, times, noise=noise))
    assert [state.step for state in states] == [*range(1, 24)]
    assert [state.t for state in states] == times[1:].tolist()
    assert len(set(asked)) == len(asked) == 3 * 23 + 2 * 3


@every_world
def test_a_late_start_goes_to_the_posterior_of_its_noised_image(make: Callable):
    """x ~ p(x | z_t) for z_t = alpha x0 + sigma eps: its moments over eps have a closed form."""
    world, strength = make(Cosine()), 0.6
    x = world.pyramid(GIVEN)
    noise = UnitNoise(world.resolutions, 0).start()
    t = torch.full((len(noise[0]),), strength, dtype=torch.float64)
    images = tuple(x_r.expand_as(eps) for x_r, eps in zip(x, noise, strict=True))
    estimates = world.posterior_mean(diffuse(images, noise, t, world.schedules), t)[-1]
    mean, between = moments(estimates)
    covariance = between + world.posterior_covariance(t[:1])[0]
    errors = []
    for steps in (20, 40):
        state = drawn(world, Edit(start=x, strength=strength), "ddpm", steps)[-1]
        result, spread = moments(state.z[-1])
        assert (state.step, state.t) == (steps, 0.0)
        assert relative(result, mean) < 1e-6
        errors.append(relative(spread, covariance))
    assert errors[1] < 0.65 * errors[0] < 0.2


def test_no_strength_returns_the_image_and_a_full_one_hides_it():
    world = small_world(Cosine())
    x = world.pyramid(GIVEN)
    for floor in (None, -2.0):
        (state,) = drawn(world, Edit(start=x, strength=0.0), floor=floor)
        assert all(torch.equal(z, x_r.expand_as(z)) for z, x_r in zip(state.z, x, strict=True))
    hidden, plain = (drawn(world, one)[-1].z[-1] for one in (Edit(start=x), UNCHANGED))
    assert relative(hidden, plain) < 0.01


# --- pictures that a user gives ------------------------------------------------------------------


def picture(side: int, seed: int = 0, shape: tuple[int, ...] = (3,)) -> np.ndarray:
    return np.random.default_rng(seed).integers(60, 200, (side, side, *shape), dtype=np.uint8)


def test_a_sketch_is_kept_to_the_byte_and_alone_as_in_a_batch():
    model, sketches = text_model(), [picture(8, seed) for seed in range(3)]
    drawn = model.edit("red", keep={8: sketches}, n=3, seed=4)
    assert np.array_equal(drawn.levels[0], np.stack(sketches))
    alone = model.edit("red", keep={8: sketches[2]}, seed=6)
    assert np.abs(alone.pictures[0].astype(int) - drawn.pictures[2]).max() <= 1
    with pytest.raises(UsageError, match="3 pictures for 2 samples"):
        model.edit("red", keep={8: sketches}, n=2)


def test_pixels_under_black_are_kept_and_those_under_white_are_drawn_anew():
    model = plain_model()
    side = model.picture_side
    image, white = picture(side), np.zeros((8, 8), np.uint8)
    white[:4] = 255
    hole = np.kron(white, np.ones((side // 8, side // 8))) > 0
    for mask in (white, hole):
        kept = model.edit(image=image, mask=mask, strength=0.9, n=2).pictures
        assert np.array_equal(kept[:, ~hole], np.stack([image[~hole]] * 2))
        assert not np.array_equal(kept[0][hole], kept[1][hole])
    same = model.edit(image=image, mask=np.zeros((8, 8), np.uint8)).levels
    assert np.array_equal(same[-1][0], image)


def test_a_mask_frees_a_part_of_a_kept_level():
    model, sketch, white = plain_model(), picture(8), np.zeros((16, 16), np.uint8)
    white[:8] = 255
    first, second = model.edit(keep={8: sketch}, mask=white, n=2).levels[0]
    assert np.array_equal(first[4:], sketch[4:])
    assert np.array_equal(second[4:], sketch[4:])
    assert (first[:4] != second[:4]).mean() > 0.5


def test_files_of_any_size_and_orientation_are_cut_as_training_cuts_them(tmp_path):
    model = plain_model()
    pixels = np.full((40, 80, 3), 100, np.uint8)
    pixels[:, :10] = 200  # well left of the middle square
    turned = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned.save(tmp_path / "photo.png", exif=exif)
    drawn = model.edit(image=tmp_path / "photo.png", strength=0.0)
    assert (drawn.pictures == 100).all()
    mask = np.zeros((80, 40), np.uint8)  # as large as the upright picture
    drawn = model.edit(image=tmp_path / "photo.png", mask=mask)
    assert (drawn.pictures == 100).all()
    assert drawn.settings["edit"]["mask"]


ASKED: dict[str, tuple[dict[str, Any], str]] = {
    "level": ({"keep": {20: picture(20)}}, "no level 20.*8"),
    "strength": ({"image": picture(16), "strength": 1.5}, "strength is 1.5"),
    "until": ({"keep": {8: picture(8)}, "until": -1.0}, "until is -1"),
    "mask": ({"image": picture(16), "mask": picture(12, shape=())}, "12x12.*16x16"),
    "no image": ({"strength": 0.5}, "--image"),
    "no change": ({"image": picture(16)}, "--mask.*--strength"),
    "nothing kept": ({"correct": 1}, "--keep or --mask"),
    "bytes": ({"keep": {8: np.zeros((8, 8, 3))}}, "float64"),
    "no bytes": ({"keep": {8: np.zeros((0, 8, 3), np.uint8)}}, r"\(0, 8, 3\)"),
    "no pictures": ({"keep": {8: []}}, "level 8 is empty"),
    "correct": ({"keep": {8: picture(8)}, "correct": -1}, "correct is -1.*from 0"),
    "resample": ({"keep": {8: picture(8)}, "resample": 0}, "resample is 0.*from 1"),
    "channels": ({"keep": {8: picture(8, shape=(5,))}}, "5 channels"),
}


@pytest.mark.parametrize(("asked", "message"), ASKED.values(), ids=ASKED.keys())
def test_an_edit_that_does_not_fit_is_refused(asked: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        plain_model().edit(**asked)


def test_the_command_keeps_a_level_and_names_what_does_not_fit(tmp_path, capsys):
    model, sketch = plain_model(), picture(8)
    export_weights(tmp_path / "run" / "model", model.net.state_dict(), model.config)
    Image.fromarray(sketch).save(tmp_path / "sketch.png")
    words = ["edit", str(tmp_path / "run"), "--steps", "2", "-o", str(tmp_path / "out.png")]
    words.append("--overwrite")
    more = ["--correct", "1", "--resample", "2"]
    assert main([*words, "--keep", f"8={tmp_path / 'sketch.png'}", *more]) == 0
    with Image.open(tmp_path / "out.png") as drawn:
        record = json.loads(drawn.info[SETTINGS_KEY])["edit"]
        assert (record["keep"], record["correct"], record["resample"]) == (["8"], 1, 2)
        pixels = torch.tensor(np.asarray(drawn)).permute(2, 0, 1)[None].float()
    kept = down_sample(pixels, Resolution(8, 8))[0].permute(1, 2, 0).numpy()
    assert np.abs(kept - sketch).mean() < 4
    capsys.readouterr()
    for wrong, part in (("9=sketch.png", "8"), ("8", "16=sketch.png"), ("8=none.png", "none.png")):
        try:
            status = main([*words, "--keep", wrong])
        except SystemExit as leaving:
            status = leaving.code
        assert status
        assert part in capsys.readouterr().err


def test_a_missing_or_damaged_file_is_named(tmp_path):
    with pytest.raises(OSError, match=r"none\.png"):
        plain_model().edit(keep={8: tmp_path / "none.png"})
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    with pytest.raises(UsageError, match=r"bad\.png"):
        plain_model().edit(keep={8: tmp_path / "bad.png"})
