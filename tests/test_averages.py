"""Averages of the weights: closed forms, brute force, and what growing does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from matryoshka_diffusion.config import UNIFORM
from matryoshka_diffusion.training.averages import (
    Ema,
    PowerEma,
    Profile,
    exponent,
    fit,
    inner,
    synthesise,
    write_snapshot,
)

LENGTHS = (0.05, 0.1)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))


@torch.no_grad()
def set_all(model: nn.Module, value: float) -> None:
    for parameter in model.parameters():
        parameter.fill_(value)


# --- the average that samples are drawn from ---------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9999])
def test_follows_its_formula(decay):
    model = net()
    ema = Ema(model, decay)
    expected = {name: value.detach().double() for name, value in model.named_parameters()}
    for step in range(20):
        with torch.no_grad():
            for value in model.parameters():
                value += torch.randn_like(value)
        ema.update(model, step)
        keep = min(decay, (1 + step) / (10 + step))
        for name, value in model.named_parameters():
            expected[name] = keep * expected[name] + (1 - keep) * value.detach().double()
    for name, value in expected.items():
        torch.testing.assert_close(ema.weights[name].double(), value, rtol=1e-5, atol=1e-6)


def test_initial_weights_are_soon_forgotten_also_by_what_joins_late():
    model = nn.Linear(1, 1)
    set_all(model, 1.0)
    ema = Ema(model, 0.9999)
    set_all(model, 0.0)
    for step in range(5000, 6000):
        ema.update(model, step, joined={"weight": 5000, "bias": 0}.__getitem__)
    assert ema.weights["weight"].item() < 1e-3  # a constant decay would leave 0.9
    assert 0.1 < ema.weights["bias"].item() < 0.3  # of age 5000 from the beginning


def test_averages_are_float32_copies_and_only_of_what_is_learnt():
    model = nn.Sequential(nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2).requires_grad_(False))
    ema, tracks = Ema(model, 0.9), PowerEma(model, LENGTHS)
    ema.update(model, 100)
    tracks.update(model, 4)
    averages = [ema.weights, *tracks.averages.values()]
    for average in averages:
        assert average.keys() == tracks.ages.keys() == {"0.weight", "0.bias"}
        assert {value.dtype for value in average.values()} == {torch.float32}
    set_all(model, 0.0)
    assert all(average["0.weight"].any() for average in averages)


def test_old_averages_stay_when_parameters_are_added_loaded_or_frozen():
    small, large = net(), net(seed=1)
    large.append(nn.Linear(2, 2))
    ema, other = Ema(small, 0.9), Ema(small, 0.5)
    set_all(small, 0.0)
    ema.update(small, 100)
    before = {name: value.clone() for name, value in ema.weights.items()}
    other.load(ema.weights)
    ema.extend(large)
    assert list(ema.weights) == [name for name, _ in large.named_parameters()]
    for name, value in large.named_parameters():
        assert torch.equal(ema.weights[name], before.get(name, value))
    set_all(small, 1.0)
    other.update(small, 100, frozen={"0.weight", "2.bias"})
    still = {name for name, value in before.items() if torch.equal(value, other.weights[name])}
    assert still == {"0.weight", "2.bias"}
    assert torch.equal(ema.weights["0.bias"], before["0.bias"]), "loading copies"


# --- profiles ----------------------------------------------------------------------------------


def recursion(length: float, steps: int) -> np.ndarray:
    """Weight of each step after each step, by the recursion of Section 3.1 in float64."""
    weights = np.zeros((steps, steps))
    for t in range(1, steps + 1):
        decay = (1 - 1 / t) ** (exponent(length) + 1)
        weights[t - 1] = decay * weights[t - 2]
        weights[t - 1, t - 1] = 1 - decay
    return weights


@pytest.mark.parametrize("length", [0.02, 0.25])
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


@pytest.mark.parametrize(("gamma", "age"), [(6.94, 1.0), (16.97, 0.3), (0.5, 0.7)])
def test_inner_products_are_the_integrals_that_they_claim_to_be(gamma, age):
    s = (np.arange(200_000) + 0.5) / 200_000

    def density(p: Profile) -> np.ndarray:
        return np.where(s < p.age, (p.gamma + 1) * s**p.gamma / p.age ** (p.gamma + 1), 0.0)

    a, b = Profile(gamma, age), Profile(16.97, 1.0)
    expected = (density(a) * density(b)).mean()
    assert [inner(a, b), inner(b, a)] == pytest.approx([expected] * 2, rel=1e-3)


@pytest.mark.parametrize("length", [0.03, 0.2])
def test_the_fit_is_as_far_from_the_profile_as_it_says(length):
    steps = 960
    kept = [(track, end) for track in LENGTHS for end in range(30, steps + 1, 30)]
    profiles = [Profile(exponent(track), end) for track, end in kept]
    factors, error = fit(profiles, Profile(exponent(length), steps))
    tracked = {track: recursion(track, steps) for track in LENGTHS}
    made = sum(factor * tracked[t][end - 1] for factor, (t, end) in zip(factors, kept, strict=True))
    wanted = recursion(length, steps)[-1]
    distance = np.linalg.norm(made - wanted) / np.linalg.norm(wanted)
    assert distance == pytest.approx(error, rel=0.05)
    assert error < 0.012
    assert factors.sum() == pytest.approx(1.0, abs=1e-9)


# --- tracks ------------------------------------------------------------------------------------


class Walk:
    """A network whose weights drift and jitter, as weights do."""

    def __init__(self, *widths: int) -> None:
        self.net = nn.Sequential(*(nn.Linear(width, 2) for width in widths))
        self.generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def step(self, frozen: str = "") -> None:
        for name, value in self.net.named_parameters():
            change = 0.01 + 0.1 * torch.randn(value.shape, generator=self.generator)
            value += change * (name != frozen)


def test_an_average_weighs_each_step_by_its_share_of_the_profile():
    """The profile's integral over the images of a step, whatever their number."""
    model = nn.Linear(1, 1, bias=False).double()
    batches = [1 + n % 7 for n in range(100)]
    ends = np.cumsum([0, *batches])
    tracks = PowerEma(model, LENGTHS)
    for end, images in zip(ends[1:], batches, strict=True):
        set_all(model, float(end))
        tracks.update(model, images)
    for length in LENGTHS:
        shares = np.diff((ends / ends[-1]) ** (exponent(length) + 1))
        average = tracks.averages[length]["weight"].item()
        assert average == pytest.approx(shares @ ends[1:], rel=1e-5)
    assert tracks.ages == {"weight": ends[-1]}


@pytest.mark.parametrize("length", [0.04, 0.1, 0.15])
def test_an_average_made_afterwards_is_the_one_that_was_tracked(tmp_path, length):
    """Also where a layer comes later, one rests for a while, and steps are of two sizes."""
    walk = Walk(3)
    tracks, direct = PowerEma(walk.net, LENGTHS), PowerEma(walk.net, (length,))
    for step in range(960):
        if step == 400:
            walk.net.append(nn.Linear(2, 2))
            tracks.extend(walk.net)
            direct.extend(walk.net)
        frozen = "0.weight" if 400 <= step < 480 else ""
        walk.step(frozen)
        for averages in (tracks, direct):
            averages.update(walk.net, 4 if step % 2 else 2, {frozen})
        if step % 20 == 19:
            write_snapshot(tmp_path, tracks.state(), step)
    made, error = synthesise(tmp_path, length)
    assert made.keys() == direct.averages[length].keys()
    assert error < 0.005
    for name, value in direct.averages[length].items():
        spread = (walk.net.get_parameter(name) - value).abs().max().item()
        torch.testing.assert_close(made[name], value, rtol=0, atol=1e-3 * spread)
    assert all(value.dtype == torch.float32 for value in made.values())


def test_a_frozen_parameter_neither_moves_nor_ages_and_a_snapshot_holds_the_state(tmp_path):
    model = nn.Linear(3, 2)
    tracks, other = PowerEma(model, LENGTHS), PowerEma(nn.Linear(3, 2), LENGTHS)
    write_snapshot(tmp_path / "none", PowerEma(model, ()).state(), 4)
    assert not (tmp_path / "none").exists()
    for images_seen in (4, 8):
        with torch.no_grad():
            model.weight += 1
        tracks.update(model, 4, frozen={"bias"})
        write_snapshot(tmp_path, tracks.state(), images_seen)
    assert tracks.ages == {"weight": 8, "bias": 0}
    held, state = load_file(tmp_path / "0000000008.safetensors"), tracks.state()
    assert held.keys() == state.keys()
    assert all(torch.equal(held[name], state[name]) for name in state)
    other.load(held)
    assert all(torch.equal(value, state[name]) for name, value in other.state().items())
    assert torch.equal(synthesise(tmp_path, 0.2).weights["bias"], model.bias.detach())


def test_an_early_average_is_that_of_the_training_until_then(tmp_path):
    walk = Walk(3)
    tracks = PowerEma(walk.net, LENGTHS)
    for step in range(1, 41):
        walk.step("")
        tracks.update(walk.net, 2)
        if step % 10 == 0:
            write_snapshot(tmp_path / "all", tracks.state(), 2 * step)
            if step <= 20:
                write_snapshot(tmp_path / "early", tracks.state(), 2 * step)
    early = synthesise(tmp_path / "early", 0.1).weights
    for until in (40, 59):
        made = synthesise(tmp_path / "all", 0.1, until).weights
        assert all(torch.equal(made[name], value) for name, value in early.items())
    assert not torch.equal(synthesise(tmp_path / "all", 0.1).weights["0.weight"], early["0.weight"])
    with pytest.raises(FileNotFoundError, match=r"the first snapshot is of 20 images.* --until"):
        synthesise(tmp_path / "all", 0.1, 19)


def test_a_folder_without_whole_snapshots_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no snapshots .* train\.ema_power"):
        synthesise(tmp_path / "ema", 0.1)
    (tmp_path / "0000000004.safetensors").write_bytes(b"\x00" * 7)
    with pytest.raises(ValueError, match=r"0000000004\.safetensors: damaged"):
        synthesise(tmp_path, 0.1)
    with pytest.raises(ValueError, match="between 0 and"):
        synthesise(tmp_path, 0.5)
    state = PowerEma(torch.nn.Linear(2, 1), [0.05, 0.1]).state()
    for lost in state:
        write_snapshot(tmp_path, {key: state[key] for key in state if key != lost}, 4)
        with pytest.raises(ValueError, match=rf"0000000004\.safetensors: {lost}"):
            synthesise(tmp_path, 0.1)
