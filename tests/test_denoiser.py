"""From network to estimate: conversion, guidance and its economies, thresholds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import Prediction, Threshold, WeightingConfig
from matryoshka_diffusion.denoiser import (
    THRESHOLDS,
    ConditionPair,
    Guided,
    NetworkDenoiser,
    Thresholded,
    active_weights,
    dynamic_threshold,
    upper_quantile,
)
from matryoshka_diffusion.diffusion import Network, Process, diffuse, prediction_target
from matryoshka_diffusion.pyramid import Pyramid
from matryoshka_diffusion.schedule import Cosine, Instant, Shifted, instants

SCHEDULES = (Cosine(), Shifted(Cosine(), 2.0, 2.0))
[HALF] = instants(torch.tensor([0.5]), SCHEDULES)
"""An instant at which the levels have log-SNR 0 and -2 log 2."""

every_prediction = pytest.mark.parametrize("prediction", ["x0", "eps", "v"])


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


Z, WITH, WITHOUT = (
    tuple(numbers(3, 2, side, side, seed=10 * seed + side) for side in (2, 4)) for seed in range(3)
)
BOTH = tuple(torch.cat(pair) for pair in zip(WITH, WITHOUT, strict=True))


def guide(*weights: float, **options) -> tuple[Pyramid, list[str]]:
    """A guided estimate, and the estimates that it needed."""
    calls: list[str] = []

    def conditional(z: Pyramid, now: Instant) -> Pyramid:
        calls.append("with")
        return WITH

    def both(z: Pyramid, now: Instant) -> Pyramid:
        calls.append("both")
        assert all(torch.equal(z_r, own.repeat(2, 1, 1, 1)) for z_r, own in zip(z, Z, strict=True))
        return BOTH

    return Guided(ConditionPair(conditional, both), weights, **options)(Z, HALF), calls


def led(*weights: float) -> Pyramid:
    """The definition of guidance."""
    return tuple(u + w * (c - u) for c, u, w in zip(WITH, WITHOUT, weights, strict=True))


def network_denoiser(net: Network, prediction: Prediction = "v") -> NetworkDenoiser:
    process = Process(SCHEDULES, prediction, (WeightingConfig(),) * 2, (1.0, 1.0))
    return NetworkDenoiser(net, process, Conditioning())


# --- networks ------------------------------------------------------------------------------------


@every_prediction
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_a_right_prediction_becomes_the_image_on_every_level(prediction: Prediction, t: float):
    rows = torch.full((3,), t, dtype=torch.float64)

    def net(z: Pyramid, t: Tensor, cond: Conditioning) -> Pyramid:
        assert t.dtype == torch.float32, "the network gets times in the precision of its input"
        return tuple(
            prediction_target(prediction, x_r, noise_r, schedule.log_snr(t))
            for x_r, noise_r, schedule in zip(WITH, WITHOUT, SCHEDULES, strict=True)
        )

    z = diffuse(WITH, WITHOUT, rows, SCHEDULES)
    [now] = instants(rows[:1], SCHEDULES)
    torch.testing.assert_close(network_denoiser(net, prediction)(z, now), WITH)


def test_sampling_from_a_network_builds_no_graph():
    layer = nn.Conv2d(2, 2, 1)
    denoise = network_denoiser(lambda z, t, cond: tuple(layer(z_r) for z_r in z))
    assert not any(x.requires_grad for x in denoise(Z, HALF))


# --- guidance ------------------------------------------------------------------------------------


def test_guidance_leads_away_from_the_unconditional_estimate():
    torch.testing.assert_close(guide(3.0, 0.5)[0], led(3.0, 0.5))
    result, calls = guide(1.0, 1.0, rescale=0.7)
    assert result is WITH
    assert calls == ["with"], "weight 1 needs no second estimate"
    assert torch.equal(guide(1.0, 3.0, rescale=0.7)[0][0], WITH[0]), "it stays to the bit"


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
    assert active_weights(HALF, (3.0, 3.0), interval) == active
    result, calls = guide(3.0, 3.0, interval=interval)
    assert calls == ["with" if active == (1.0, 1.0) else "both"]
    torch.testing.assert_close(result, led(*active))


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_rescale_brings_back_the_conditional_spread(share: float):
    result, _ = guide(5.0, 5.0, rescale=share)
    for before, after, c in zip(led(5.0, 5.0), result, WITH, strict=True):
        old, new, conditional = (x.flatten(1).std(1) for x in (before, after, c))
        torch.testing.assert_close(new, (1 - share) * old + share * conditional)


@every_prediction
def test_guiding_the_estimate_is_guiding_the_prediction(prediction: Prediction):
    """x0 is affine in eps and v, so any of them may be guided."""
    guided, plain, both = (
        network_denoiser(lambda z, t, cond, answer=answer: answer, prediction)
        for answer in (led(4.0, 4.0), WITH, BOTH)
    )
    result = Guided(ConditionPair(plain, both), (4.0, 4.0))(Z, HALF)
    torch.testing.assert_close(result, guided(Z, HALF))


# --- thresholds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "dynamic"])
def test_every_level_has_its_own_threshold_and_every_image_its_own_range(name: Threshold):
    wild = tuple(level * torch.tensor([3.0, 5.0, 20.0]).view(3, 1, 1, 1) for level in Z)
    untouched, result = Thresholded(lambda z, now: wild, ("none", name))(Z, HALF)
    assert torch.equal(untouched, wild[0])
    assert result.abs().max() <= 1.0
    torch.testing.assert_close(result[:1], THRESHOLDS[name](wild[1][:1]))


@given(seed=st.integers(0, 1000), scale=st.floats(0.01, 1000.0))
def test_dynamic_thresholding_by_its_definition(seed: int, scale: float):
    x = scale * numbers(3, 2, 9, 9, seed=seed)
    extent = np.quantile(np.abs(x.numpy()).reshape(3, -1), 0.995, axis=1).clip(1.0, 100.0)
    extent = torch.from_numpy(extent).float().view(3, 1, 1, 1)
    expected = torch.minimum(torch.maximum(x, -extent), extent) / extent
    torch.testing.assert_close(dynamic_threshold(x), expected)


@given(
    quantile=st.floats(0.0, 1.0),
    count=st.integers(1, 300),
    ties=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_upper_quantile_is_the_quantile(quantile: float, count: int, ties: bool, seed: int):
    x = numbers(3, count, seed=seed)
    x = x.round() if ties else x
    expected = torch.quantile(x.double(), quantile, dim=1).float()
    torch.testing.assert_close(upper_quantile(x, quantile), expected)
