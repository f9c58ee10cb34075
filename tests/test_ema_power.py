"""Averages of any length after training: closed forms, brute force, and what growing does."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from matryoshka_diffusion.train.averages import (
    UNIFORM,
    PowerEma,
    Profile,
    exponent,
    fit,
    inner,
    synthesise,
    write_snapshot,
)

LENGTHS = (0.05, 0.1)


def recursion(length: float, steps: int) -> np.ndarray:
    """The weight of each step after each step, by Section 3.1's recursion in float64."""
    weights = np.zeros((steps, steps))
    for t in range(1, steps + 1):
        decay = (1 - 1 / t) ** (exponent(length) + 1)
        weights[t - 1] = decay * weights[t - 2]
        weights[t - 1, t - 1] = 1 - decay
    return weights


@pytest.mark.parametrize("length", [0.02, 0.05, 0.1, 0.25])
def test_a_length_is_the_standard_deviation_of_its_profile(length):
    weights, times = recursion(length, 1000)[-1], (np.arange(1000) + 0.5) / 1000
    mean = weights @ times
    assert math.sqrt(weights @ (times - mean) ** 2) == pytest.approx(length, rel=1e-3)


def test_known_exponents_and_lengths_that_do_not_exist():
    assert exponent(0.05) == pytest.approx(16.97, abs=0.01)  # Section 3.1 of the paper
    assert exponent(0.1) == pytest.approx(6.94, abs=0.01)
    assert exponent(UNIFORM - 1e-9) == pytest.approx(0.0, abs=1e-6)
    for length in (0.0, -0.1, UNIFORM, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"between 0 and 0\.2887"):
            exponent(length)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (Profile(16.97, 1.0), Profile(6.94, 1.0)),
        (Profile(16.97, 0.3), Profile(6.94, 1.0)),
        (Profile(6.94, 1.0), Profile(16.97, 0.3)),
        (Profile(0.5, 0.7), Profile(30.0, 0.7)),
    ],
)
def test_inner_products_are_the_integrals_that_they_claim_to_be(a, b):
    s = (np.arange(200_000) + 0.5) / 200_000

    def density(p: Profile) -> np.ndarray:
        return np.where(s < p.age, (p.gamma + 1) * s**p.gamma / p.age ** (p.gamma + 1), 0.0)

    assert inner(a, b) == pytest.approx((density(a) * density(b)).mean(), rel=1e-3)


@pytest.mark.parametrize("length", [0.03, 0.07, 0.15, 0.2])
def test_the_fit_is_as_far_from_the_profile_as_it_says(length):
    steps = 960
    ends = range(30, steps + 1, 30)
    kept = [(track, end) for track in LENGTHS for end in ends]
    factors, error = fit(
        [Profile(exponent(track), end) for track, end in kept], Profile(exponent(length), steps)
    )
    tracked = {track: recursion(track, steps) for track in LENGTHS}
    made = sum(factor * tracked[t][end - 1] for factor, (t, end) in zip(factors, kept, strict=True))
    wanted = recursion(length, steps)[-1]
    found = np.linalg.norm(made - wanted) / np.linalg.norm(wanted)
    assert found == pytest.approx(error, rel=0.05)
    assert error < 0.012
    assert factors.sum() == pytest.approx(1.0, abs=1e-9)


def test_a_length_that_was_tracked_is_that_track():
    profiles = [Profile(exponent(track), age) for age in (10, 20, 30) for track in LENGTHS]
    factors, error = fit(profiles, Profile(exponent(0.05), 30))
    np.testing.assert_allclose(factors, [0, 0, 0, 0, 1, 0], atol=1e-8)
    assert error < 1e-6


class Walk:
    """A network whose weights drift and jitter, as weights do."""

    def __init__(self, *widths: int) -> None:
        self.net = nn.Sequential(*(nn.Linear(width, 2) for width in widths))
        self.generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def step(self) -> None:
        for value in self.net.parameters():
            value += 0.01 + 0.1 * torch.randn(value.shape, generator=self.generator)


def test_weights_that_grow_evenly_have_the_closed_form_of_their_average():
    model, steps = nn.Linear(1, 1, bias=False).double(), 400
    tracks = PowerEma(model, LENGTHS)
    for step in range(1, steps + 1):
        nn.init.constant_(model.weight, float(step))
        tracks.update(model, 1)
    for length in LENGTHS:
        power = exponent(length) + 1
        # Summation by parts of sum_s s (s^power - (s - 1)^power) / T^power.
        expected = steps - sum((s / steps) ** power for s in range(1, steps))
        assert tracks.averages[length]["weight"].item() == pytest.approx(expected, rel=1e-5)


def test_time_is_images_so_an_uneven_batch_weighs_what_it_holds():
    whole, parts = nn.Linear(1, 1), nn.Linear(1, 1)
    even, uneven = PowerEma(whole, LENGTHS), PowerEma(parts, LENGTHS)
    for value, images in ((1.0, 8), (-3.0, 2), (0.5, 6)):
        for model in (whole, parts):
            for parameter in model.parameters():
                nn.init.constant_(parameter, value)
        uneven.update(parts, images)
        for _ in range(images):
            even.update(whole, 1)
    for length in LENGTHS:
        for name, value in even.averages[length].items():
            torch.testing.assert_close(uneven.averages[length][name], value)
    assert uneven.ages == even.ages == {"weight": 16, "bias": 16}


def test_a_frozen_parameter_neither_moves_nor_ages():
    walk = Walk(3, 2)
    tracks = PowerEma(walk.net, LENGTHS)
    for _ in range(3):
        walk.step()
        tracks.update(walk.net, 4)
    before = {name: value.clone() for name, value in tracks.state().items()}
    walk.step()
    tracks.update(walk.net, 4, frozen={"0.weight", "0.bias"})
    for name, value in tracks.state().items():
        assert torch.equal(value, before[name]) == ("0." in name.split("/")[2]), name


def test_averages_are_float32_copies_and_only_of_what_is_learnt():
    model = nn.Sequential(nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2).requires_grad_(False))
    tracks = PowerEma(model, LENGTHS)
    tracks.update(model, 4)
    assert tracks.ages.keys() == {"0.weight", "0.bias"}
    assert {v.dtype for average in tracks.averages.values() for v in average.values()} == {
        torch.float32
    }
    nn.init.zeros_(model.get_parameter("0.weight"))
    assert tracks.averages[0.05]["0.weight"].any()


@pytest.mark.parametrize("length", [0.04, 0.07, 0.1, 0.15])
def test_an_average_made_afterwards_is_the_one_that_was_tracked(tmp_path, length):
    """Also where a layer comes later, one rests for a while, and steps are of two sizes."""
    walk = Walk(3)
    tracks, direct = PowerEma(walk.net, LENGTHS), PowerEma(walk.net, (length,))
    for step in range(960):
        if step == 400:
            walk.net.append(nn.Linear(2, 2))
            tracks.extend(walk.net)
            direct.extend(walk.net)
        frozen = {"0.weight"} if 400 <= step < 480 else set()
        before = walk.net.get_parameter("0.weight").clone()
        walk.step()
        if frozen:
            walk.net.get_parameter("0.weight").data.copy_(before)
        for averages in (tracks, direct):
            averages.update(walk.net, 4 if step % 2 else 2, frozen)
        if step % 20 == 19:
            write_snapshot(tmp_path, tracks.state(), step)
    made, error = synthesise(tmp_path, length)
    assert made.keys() == direct.averages[length].keys()
    assert error < 0.005
    for name, value in direct.averages[length].items():
        spread = (walk.net.get_parameter(name) - value).abs().max().item()
        torch.testing.assert_close(made[name], value, rtol=0, atol=1e-3 * spread)
    assert all(value.dtype == torch.float32 for value in made.values())


def test_a_parameter_that_never_moved_is_kept_whatever_the_fit(tmp_path):
    model = nn.Linear(3, 2)
    tracks = PowerEma(model, LENGTHS)
    for images_seen in (4, 8):
        tracks.update(model, 4, frozen={"bias"})
        write_snapshot(tmp_path, tracks.state(), images_seen)
    made = synthesise(tmp_path, 0.2).weights
    torch.testing.assert_close(made["weight"], model.weight.detach(), rtol=1e-6, atol=0)
    assert torch.equal(made["bias"], model.bias.detach()), "it never learnt, so it has no age"


def test_a_snapshot_holds_the_state_and_without_tracks_there_is_none(tmp_path):
    model = nn.Linear(3, 2)
    tracks = PowerEma(model, LENGTHS)
    tracks.update(model, 4)
    write_snapshot(tmp_path, tracks.state(), 4)
    (path,) = tmp_path.iterdir()
    assert path.name == "0000000004.safetensors"
    held, state = load_file(path), tracks.state()
    assert held.keys() == state.keys()
    assert all(torch.equal(held[name], state[name]) for name in state)
    other = PowerEma(nn.Linear(3, 2), LENGTHS)
    other.load(held)
    assert all(torch.equal(value, state[name]) for name, value in other.state().items())
    none = PowerEma(model, ())
    none.update(model, 4)
    write_snapshot(tmp_path / "none", none.state(), 4)
    assert not (tmp_path / "none").exists()


def test_a_folder_without_whole_snapshots_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no snapshots .* train\.ema_power"):
        synthesise(tmp_path / "ema", 0.1)
    Path(tmp_path / "0000000004.safetensors").write_bytes(b"\x00" * 7)
    with pytest.raises(ValueError, match=r"0000000004\.safetensors: damaged"):
        synthesise(tmp_path, 0.1)
    with pytest.raises(ValueError, match="between 0 and"):
        synthesise(tmp_path, 0.5)
