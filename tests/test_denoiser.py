"""From network to estimate: conversion, guidance and its economies, thresholds."""

from __future__ import annotations

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
    Guided,
    NetworkDenoiser,
    Thresholded,
    active_weights,
    dynamic_threshold,
)
from matryoshka_diffusion.diffusion import Network, Process, diffuse, prediction_target
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


Z, WITH, WITHOUT = pyramid(0), pyramid(1), pyramid(2)


class Fixed:
    """A denoiser with the same answer for every input. It counts its calls."""

    def __init__(self, answer: Pyramid) -> None:
        self.answer, self.calls = answer, 0

    def __call__(self, z: Pyramid, t: Tensor) -> Pyramid:
        self.calls += 1
        return self.answer


def guide(*weights: float, **options) -> tuple[Pyramid, int, int]:
    """A guided estimate, and the calls of the two estimates that it needed."""
    conditional, unconditional = Fixed(WITH), Fixed(WITHOUT)
    found = Guided(conditional, unconditional, SCHEDULES, weights, **options)(Z, HALF)
    return found, conditional.calls, unconditional.calls


def assert_close(found: Pyramid, expected: Pyramid) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def network_denoiser(net: Network, prediction: Prediction = "v") -> NetworkDenoiser:
    process = Process(SCHEDULES, prediction, (WeightingConfig(),) * 2, (1.0, 1.0))
    return NetworkDenoiser(net, process, Conditioning())


# --- networks ------------------------------------------------------------------------------------


@every_prediction
def test_a_right_prediction_becomes_the_image_on_every_level(prediction: Prediction):
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    dtypes: list[torch.dtype] = []

    def net(z: Pyramid, t: Tensor, cond: Conditioning) -> Pyramid:
        dtypes.append(t.dtype)
        return tuple(
            prediction_target(prediction, x_r, noise_r, schedule.log_snr(t))
            for x_r, noise_r, schedule in zip(WITH, WITHOUT, SCHEDULES, strict=True)
        )

    z = diffuse(WITH, WITHOUT, t, SCHEDULES)
    assert_close(network_denoiser(net, prediction)(z, t), WITH)
    assert dtypes == [torch.float32], "the network gets times in the precision of its input"


def test_sampling_from_a_network_builds_no_graph():
    layer = nn.Conv2d(2, 2, 1)
    denoise = network_denoiser(lambda z, t, cond: tuple(layer(z_r) for z_r in z))
    assert not any(x.requires_grad for x in denoise(Z, HALF))


# --- guidance ------------------------------------------------------------------------------------


def test_guidance_leads_away_from_the_unconditional_estimate():
    expected = tuple(u + w * (c - u) for c, u, w in zip(WITH, WITHOUT, (3.0, 0.5), strict=True))
    assert_close(guide(3.0, 0.5)[0], expected)


def test_weight_one_never_computes_the_unconditional_estimate():
    found, *calls = guide(1.0, 1.0, rescale=0.7)
    assert found is WITH
    assert calls == [1, 0]
    found, *calls = guide(1.0, 2.0)
    torch.testing.assert_close(found[0], WITH[0])
    assert calls == [1, 1]


@pytest.mark.parametrize(
    ("interval", "active"),
    [
        ((-5.0, 5.0), (3.0, 3.0)),
        ((-1.0, 1.0), (3.0, 1.0)),  # at t = 0.5 the finer level is at log-SNR -1.39
        ((-2.0, -1.0), (1.0, 3.0)),
        ((1.0, 5.0), (1.0, 1.0)),
    ],
)
def test_the_interval_is_in_each_levels_own_log_snr(
    interval: tuple[float, float], active: tuple[float, float]
):
    assert active_weights(HALF[:1], SCHEDULES, (3.0, 3.0), interval) == active
    found, *calls = guide(3.0, 3.0, interval=interval)
    assert calls == [1, int(active != (1.0, 1.0))]
    assert_close(found, guide(*active)[0])


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_rescale_brings_back_the_conditional_spread(share: float):
    spread = [[x.flatten(1).std(1) for x in guide(5.0, 5.0, rescale=r)[0]] for r in (0.0, share)]
    for before, after, c in zip(*spread, WITH, strict=True):
        wanted = (1 - share) * before + share * c.flatten(1).std(1)
        torch.testing.assert_close(after, wanted)


@every_prediction
def test_guiding_the_estimate_is_guiding_the_prediction(prediction: Prediction):
    """x0 is affine in eps and v, so any of them may be guided."""
    led = tuple(u_r + 4.0 * (c_r - u_r) for c_r, u_r in zip(WITH, WITHOUT, strict=True))
    guided, plain, null = (
        network_denoiser(lambda z, t, cond, answer=answer: answer, prediction)
        for answer in (led, WITH, WITHOUT)
    )
    found = Guided(plain, null, SCHEDULES, (4.0, 4.0))(Z, HALF)
    assert_close(found, guided(Z, HALF))


# --- thresholds ----------------------------------------------------------------------------------


def test_every_level_has_its_own_threshold():
    wild = tuple(3.0 * level for level in Z)
    found = Thresholded(Fixed(wild), ("none", "clip"))(Z, HALF)
    assert torch.equal(found[0], wild[0])
    assert torch.equal(found[1], wild[1].clamp(-1.0, 1.0))


@given(seed=st.integers(0, 1000), scale=st.floats(0.01, 50.0))
def test_dynamic_thresholding_by_its_definition(seed: int, scale: float):
    x = scale * numbers(3, 2, 9, 9, seed=seed)
    extent = np.quantile(np.abs(x.numpy()).reshape(3, -1), 0.995, axis=1).clip(1.0, 100.0)
    extent = torch.from_numpy(extent).float().view(3, 1, 1, 1)
    expected = torch.minimum(torch.maximum(x, -extent), extent) / extent
    torch.testing.assert_close(dynamic_threshold(x), expected)


def test_dynamic_thresholding_of_more_numbers_than_torch_sorts(monkeypatch: pytest.MonkeyPatch):
    """The quantile is then one of the numbers, next to the one between two of them."""
    x = 3.0 * numbers(2, 3, 40, 40)
    between = dynamic_threshold(x)
    monkeypatch.setattr(denoiser, "QUANTILE_LIMIT", 100)
    torch.testing.assert_close(dynamic_threshold(x), between, rtol=5e-3, atol=0.0)


def test_dynamic_thresholding_leaves_images_in_range_and_bounds_wild_ones():
    calm = 0.2 * numbers(2, 3, 4, 4)
    torch.testing.assert_close(dynamic_threshold(calm), calm)
    wild = torch.tensor([1.0, -1000.0]).repeat(48).view(1, 3, 4, 8)
    found = dynamic_threshold(wild)
    torch.testing.assert_close(found.aminmax(), (torch.tensor(-1.0), torch.tensor(0.01)))


@pytest.mark.parametrize("name", ["clip", "dynamic"])
def test_thresholds_keep_each_image_in_range_by_itself(name: Threshold):
    x = numbers(2, 3, 8, 8) * torch.tensor([5.0, 20.0]).view(2, 1, 1, 1)
    found = THRESHOLDS[name](x)
    assert found.abs().max() <= 1.0
    torch.testing.assert_close(found[:1], THRESHOLDS[name](x[:1]))
