"""From network to estimate: conversion, guidance and its economies, thresholds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from matryoshka_diffusion import denoiser
from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import Prediction, Threshold, WeightingConfig
from matryoshka_diffusion.denoiser import (
    THRESHOLDS,
    Denoiser,
    Guided,
    NetworkDenoiser,
    Thresholded,
    active_weights,
    dynamic_threshold,
)
from matryoshka_diffusion.diffusion import Process, diffuse, prediction_target
from matryoshka_diffusion.pyramid import Pyramid
from matryoshka_diffusion.schedule import Cosine, Shifted

SIDES = (2, 4)
SCHEDULES = (Cosine(), Shifted(Cosine(), 2.0, 2.0))
HALF = torch.full((3,), 0.5, dtype=torch.float64)
"""A time at which the levels have log-SNR 0 and -2 log 2."""

every_prediction = pytest.mark.parametrize("prediction", ["x0", "eps", "v"])


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pyramid(seed: int) -> Pyramid:
    return tuple(numbers(3, 2, side, side, seed=10 * seed + side) for side in SIDES)


class Says:
    """A denoiser that always gives the same answer and counts how often it was asked."""

    def __init__(self, answer: Pyramid) -> None:
        self.answer, self.asked = answer, 0

    def __call__(self, z: Pyramid, t: Tensor) -> Pyramid:
        self.asked += 1
        return self.answer


def guided(
    *weights: float, interval: tuple[float, float] = (-math.inf, math.inf), rescale: float = 0.0
) -> tuple[Guided, Says, Says]:
    conditional, unconditional = Says(pyramid(1)), Says(pyramid(2))
    wrapped = Guided(conditional, unconditional, SCHEDULES, weights, interval, rescale)
    return wrapped, conditional, unconditional


def assert_close(found: Pyramid, expected: Pyramid) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


# --- networks ------------------------------------------------------------------------------------


@every_prediction
def test_a_right_prediction_becomes_the_picture_on_every_level(prediction: Prediction):
    x, noise = pyramid(0), pyramid(1)
    process = Process(SCHEDULES, prediction, (WeightingConfig(),) * 2, (1.0, 1.0))
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    seen: list[torch.dtype] = []

    def net(z: Pyramid, t: Tensor, cond: Conditioning) -> Pyramid:
        seen.append(t.dtype)
        return tuple(
            prediction_target(prediction, x_r, noise_r, schedule.log_snr(t))
            for x_r, noise_r, schedule in zip(x, noise, SCHEDULES, strict=True)
        )

    denoise = NetworkDenoiser(net, process, Conditioning())
    assert_close(denoise(diffuse(x, noise, t, SCHEDULES), t), x)
    assert seen == [torch.float32], "the network gets times in the precision of its input"


def test_sampling_from_a_network_builds_no_graph():
    layer = nn.Conv2d(2, 2, 1)

    def net(z: Pyramid, t: Tensor, cond: Conditioning) -> Pyramid:
        return tuple(layer(z_r) for z_r in z)

    process = Process(SCHEDULES, "v", (WeightingConfig(),) * 2, (1.0, 1.0))
    estimates = NetworkDenoiser(net, process, Conditioning())(pyramid(0), HALF)
    assert not any(x.requires_grad for x in estimates)


# --- guidance ------------------------------------------------------------------------------------


def test_guidance_leads_away_from_the_unconditional_estimate():
    wrapped, conditional, unconditional = guided(3.0, 0.5)
    c, u = conditional.answer, unconditional.answer
    expected = (u[0] + 3.0 * (c[0] - u[0]), u[1] + 0.5 * (c[1] - u[1]))
    assert_close(wrapped(pyramid(0), HALF), expected)


def test_weight_one_never_asks_for_the_unconditional_estimate():
    wrapped, conditional, unconditional = guided(1.0, 1.0, rescale=0.7)
    assert wrapped(pyramid(0), HALF) is conditional.answer
    assert (conditional.asked, unconditional.asked) == (1, 0)


def test_a_level_of_weight_one_stays_conditional_beside_a_guided_one():
    wrapped, conditional, unconditional = guided(1.0, 2.0)
    torch.testing.assert_close(wrapped(pyramid(0), HALF)[0], conditional.answer[0])
    assert unconditional.asked == 1


@pytest.mark.parametrize(
    ("interval", "active"),
    [
        ((-5.0, 5.0), (3.0, 3.0)),
        ((-1.0, 1.0), (3.0, 1.0)),  # at t = 0.5 the finer level is at log-SNR -1.39
        ((-2.0, -1.0), (1.0, 3.0)),
        ((1.0, 5.0), (1.0, 1.0)),
    ],
)
def test_the_interval_is_measured_by_each_levels_own_log_snr(
    interval: tuple[float, float], active: tuple[float, float]
):
    wrapped, conditional, unconditional = guided(3.0, 3.0, interval=interval)
    assert active_weights(HALF[:1], SCHEDULES, (3.0, 3.0), interval) == active
    found = wrapped(pyramid(0), HALF)
    assert unconditional.asked == (0 if active == (1.0, 1.0) else 1)
    plain = guided(*active)[0](pyramid(0), HALF)
    assert_close(found, plain)
    assert conditional.asked == 1


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_rescale_brings_back_the_conditional_spread(share: float):
    spread = []
    for rescale in (0.0, share):
        wrapped, conditional, _ = guided(5.0, 5.0, rescale=rescale)
        spread.append([x.flatten(1).std(1) for x in wrapped(pyramid(0), HALF)])
    for before, after, c in zip(*spread, conditional.answer, strict=True):
        wanted = (1 - share) * before + share * c.flatten(1).std(1)
        torch.testing.assert_close(after, wanted)


@every_prediction
def test_guiding_the_estimate_is_guiding_the_prediction(prediction: Prediction):
    """x0 is affine in eps and v: it does not matter which of them is led."""
    z, t = pyramid(0), HALF
    process = Process(SCHEDULES, prediction, (WeightingConfig(),) * 2, (1.0, 1.0))
    c, u = pyramid(1), pyramid(2)
    led = tuple(u_r + 4.0 * (c_r - u_r) for c_r, u_r in zip(c, u, strict=True))

    def denoiser(answer: Pyramid) -> Denoiser:
        return NetworkDenoiser(lambda z, t, cond: answer, process, Conditioning())

    found = Guided(denoiser(c), denoiser(u), SCHEDULES, (4.0, 4.0))(z, t)
    assert_close(found, denoiser(led)(z, t))


# --- thresholds ----------------------------------------------------------------------------------


def test_every_level_has_its_own_threshold():
    says = Says(tuple(3.0 * level for level in pyramid(0)))
    found = Thresholded(says, ("none", "clip"))(pyramid(1), HALF)
    assert torch.equal(found[0], says.answer[0])
    assert torch.equal(found[1], says.answer[1].clamp(-1.0, 1.0))


@given(seed=st.integers(0, 1000), scale=st.floats(0.01, 50.0))
def test_dynamic_thresholding_by_its_definition(seed: int, scale: float):
    x = scale * numbers(3, 2, 9, 9, seed=seed)
    extent = np.quantile(np.abs(x.numpy()).reshape(3, -1), 0.995, axis=1).clip(1.0, 100.0)
    extent = torch.from_numpy(extent).float().view(3, 1, 1, 1)
    expected = torch.minimum(torch.maximum(x, -extent), extent) / extent
    torch.testing.assert_close(dynamic_threshold(x), expected)


def test_dynamic_thresholding_of_more_numbers_than_torch_sorts(monkeypatch: pytest.MonkeyPatch):
    """The quantile is one of the numbers then, next to the one between two of them."""
    x = 3.0 * torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    between = dynamic_threshold(x)
    monkeypatch.setattr(denoiser, "QUANTILE_LIMIT", 100)
    torch.testing.assert_close(dynamic_threshold(x), between, rtol=5e-3, atol=0.0)


def test_dynamic_thresholding_leaves_pictures_in_range_and_bounds_wild_ones():
    calm = 0.2 * numbers(2, 3, 4, 4)
    torch.testing.assert_close(dynamic_threshold(calm), calm)
    wild = torch.tensor([1.0, -1000.0]).repeat(48).view(1, 3, 4, 8)
    found = dynamic_threshold(wild)
    torch.testing.assert_close(found.aminmax(), (torch.tensor(-1.0), torch.tensor(0.01)))


def test_a_pictures_threshold_does_not_depend_on_its_neighbours():
    x = numbers(2, 3, 8, 8) * torch.tensor([1.0, 20.0]).view(2, 1, 1, 1)
    torch.testing.assert_close(dynamic_threshold(x)[:1], dynamic_threshold(x[:1]))


@pytest.mark.parametrize("name", ["clip", "dynamic"])
def test_thresholds_keep_pixels_in_range(name: Threshold):
    x = 5.0 * numbers(4, 3, 8, 8)
    assert THRESHOLDS[name](x).abs().max() <= 1.0
