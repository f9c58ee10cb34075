"""The paper's maths as algebra, in float64: Eq. 1 to 3, conversions, weightings, ragged batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import Prediction, ProcessConfig, WeightingConfig, WeightingName
from matryoshka_diffusion.diffusion import (
    Loss,
    Process,
    augment_coarse,
    diffuse,
    matryoshka_loss,
    prediction_target,
    to_noise,
    to_x0,
)
from matryoshka_diffusion.pyramid import Pyramid, Resolution, ragged, up_sample
from matryoshka_diffusion.schedule import (
    Cosine,
    NoiseLevel,
    Shifted,
    alpha_sigma,
    instants,
    log_snr_rate,
)
from nests import nest

SIDES = (2, 4, 8)
SCHEDULES = tuple(Shifted(Cosine(), ratio, 2.0) for ratio in (1.0, 2.0, 4.0))
every_prediction = pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
every_weighting = pytest.mark.parametrize("name", ["eps", "v", "v_clipped", "min_snr", "sigmoid"])


def pyramid(seed: int, rows: int = 4) -> Pyramid:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(rows, 3, side, side, generator=generator, dtype=torch.float64) for side in SIDES
    )


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


TIMES = column(0.03, 0.4, 0.75, 0.98)
X, NOISE, PREDICTED = pyramid(0), pyramid(1), pyramid(2)
SINGLE = [tuple(level.float() for level in part) for part in (X, NOISE, PREDICTED)]
WEIGHTS = (1.0, 4.0, 0.25)


def process(prediction: Prediction = "x0", name: WeightingName = "v_clipped") -> Process:
    weighting = WeightingConfig(name=name, clip=10.0, gamma=5.0, bias=-0.5)
    return Process(SCHEDULES, prediction, (weighting,) * 3, WEIGHTS)


def by_row(convert: Callable[..., Tensor], level: int, *inputs: Tensor) -> Tensor:
    """Row n of the inputs, converted as at time n."""
    rows = zip(instants(TIMES, SCHEDULES), *(x.split(1) for x in inputs), strict=True)
    return torch.cat([convert(*own, now.levels[level]) for now, *own in rows])


def x0_at(prediction: Prediction, value: Tensor, z: Tensor, now: NoiseLevel) -> Tensor:
    """The estimate of x at a noise level."""
    return to_x0(prediction, value, z, now.alpha, now.sigma)


def loss_of(
    answer: Pyramid,
    used: Process,
    x: Pyramid = X,
    noise: Pyramid = NOISE,
    t: Tensor = TIMES,
    counts: tuple[int, ...] | None = None,
) -> Loss:
    """The loss of a network that returns `answer`, cut to the rows of its input."""
    return matryoshka_loss(
        lambda z, t, cond: ragged(answer, [len(z_r) for z_r in z]),
        x, Conditioning(), t, noise, process=used, counts=counts,
    )  # fmt: skip


# --- Eq. 1 and 2 ---------------------------------------------------------------------------------


def test_diffuse_mixes_each_level_by_its_own_schedule():
    z = diffuse(X, NOISE, TIMES, SCHEDULES)
    for level, shift in enumerate((1.0, 4.0, 16.0)):
        for row, t in enumerate(TIMES.tolist()):
            start, end = math.atan(math.exp(-7.5)), math.atan(math.exp(7.5))
            snr = math.tan(start + t * (end - start)) ** -2 / shift
            alpha, sigma = math.sqrt(snr / (1 + snr)), math.sqrt(1 / (1 + snr))
            expected = alpha * X[level][row] + sigma * NOISE[level][row]
            torch.testing.assert_close(z[level][row], expected)


def test_diffuse_is_clean_at_time_zero_keeps_precision_and_takes_ragged_pyramids():
    x, noise, _ = SINGLE
    z = diffuse(x, noise, torch.zeros(4, dtype=torch.float64), SCHEDULES)
    assert all(torch.equal(z_r, x_r) for z_r, x_r in zip(z, x, strict=True))
    rows = (4, 3, 0)
    whole = diffuse(x, noise, TIMES, SCHEDULES)
    part = diffuse(ragged(x, rows), ragged(noise, rows), TIMES, SCHEDULES)
    for result, expected in zip(part, ragged(whole, rows), strict=True):
        assert torch.equal(result, expected)
        assert result.dtype == torch.float32


@pytest.mark.parametrize("t", [0.0, 0.2, 1.0])
def test_a_coarse_image_is_enlarged_and_noised_by_the_schedule_of_its_level(t: float):
    coarse = torch.full((4000, 1, 1, 1), 0.6)
    noise = torch.randn(4000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    times = torch.full((4000,), t, dtype=torch.float64)
    result = augment_coarse(coarse, times, noise, SCHEDULES[2])
    alpha, sigma = (part.item() for part in alpha_sigma(SCHEDULES[2].log_snr(times[:1])))
    assert result.mean().item() == pytest.approx(0.6 * alpha, abs=0.03)
    assert result.std().item() == pytest.approx(sigma, abs=0.03)
    if t == 0.0:
        assert torch.equal(result, up_sample(coarse, Resolution(2, 2)))


# --- conversions ---------------------------------------------------------------------------------


@every_prediction
@given(t=st.floats(0.01, 1.0), seed=st.integers(0, 100))
def test_a_right_prediction_converts_to_the_image_and_back(
    prediction: Prediction, t: float, seed: int
):
    x, noise = pyramid(seed), pyramid(seed + 1)
    rows = column(t).expand(4)
    z = diffuse(x, noise, rows, SCHEDULES)
    [now] = instants(rows[:1], SCHEDULES)
    for x_r, noise_r, z_r, schedule, level in zip(x, noise, z, SCHEDULES, now.levels, strict=True):
        target = prediction_target(prediction, x_r, noise_r, schedule.log_snr(rows))
        result = to_x0(prediction, target, z_r, level.alpha, level.sigma)
        torch.testing.assert_close(result, x_r)
        back = to_noise(result, z_r, level)
        torch.testing.assert_close(back, noise_r, rtol=1e-5, atol=1e-7)


def test_v_is_alpha_eps_minus_sigma_x():
    log_snr = torch.full((4,), math.log(0.36 / 0.64), dtype=torch.float64)
    expected = 0.6 * NOISE[0] - 0.8 * X[0]
    torch.testing.assert_close(prediction_target("v", X[0], NOISE[0], log_snr), expected)


# --- Eq. 3: weightings ---------------------------------------------------------------------------


@every_prediction
@every_weighting
def test_weights_are_those_of_the_squared_x_error(prediction: Prediction, name: WeightingName):
    """Converting the weight of the prediction's error is the same as weighting the x-error."""
    z = diffuse(X, NOISE, TIMES, SCHEDULES)
    loss = loss_of(PREDICTED, process(prediction, name))
    for level, schedule in enumerate(SCHEDULES):
        log_snr = schedule.log_snr(TIMES)
        snr = log_snr.exp()
        weight = {
            "eps": snr,
            "v": snr + 1,
            "v_clipped": (snr + 1).clamp(max=10.0),
            "min_snr": snr.clamp(max=5.0),
            "sigmoid": math.exp(-0.5) / (1 + math.exp(-0.5) / snr) * -log_snr_rate(schedule, TIMES),
        }[name]
        x_hat = by_row(partial(x0_at, prediction), level, PREDICTED[level], z[level])
        expected = (weight * (x_hat - X[level]).square().mean((1, 2, 3))).mean()
        torch.testing.assert_close(loss.per_level[level], expected)
        if name in ("eps", "v"):  # which are named after the plain squared error of that kind
            noise_hat = by_row(to_noise, level, x_hat, z[level])
            result = prediction_target(name, x_hat, noise_hat, log_snr)
            target = prediction_target(name, X[level], NOISE[level], log_snr)
            torch.testing.assert_close(loss.per_level[level], (result - target).square().mean())
    assert loss_of(X, process("x0", name)).total == 0


@every_prediction
@every_weighting
def test_the_loss_and_its_gradient_are_finite_wherever_t_is_drawn(
    prediction: Prediction, name: WeightingName
):
    """Also in float32, at pure noise, where alpha all but vanishes."""
    t = torch.tensor([1e-4, 0.001, 0.5, 1.0])
    x, noise, answer = SINGLE
    answer = tuple(level.clone().requires_grad_() for level in answer)
    loss = loss_of(answer, process(prediction, name), x, noise, t)
    assert loss.total.isfinite()
    assert all(part.isfinite().all() for part in torch.autograd.grad(loss.total, answer))


# --- Eq. 3: levels and rows ----------------------------------------------------------------------


@pytest.mark.parametrize("rows", [(4, 4, 4), (4, 3, 1), (4, 4, 0)])
def test_levels_average_over_the_rows_that_have_them_and_add_up(rows: tuple[int, ...]):
    used = process("v", "min_snr")
    loss = loss_of(PREDICTED, used, ragged(X, rows), ragged(NOISE, rows))
    # Row by row, level by level, nothing shared:
    alone = torch.zeros(4, 3, dtype=torch.float64)
    for row in range(4):
        own = slice(row, row + 1)
        answer, x, noise = (tuple(part[own] for part in whole) for whole in (PREDICTED, X, NOISE))
        alone[row] = loss_of(answer, used, x, noise, TIMES[own]).per_level
    for level, count in enumerate(rows):
        expected = alone[:count, level].sum() / max(count, 1)
        torch.testing.assert_close(loss.per_level[level], expected)
    torch.testing.assert_close(loss.total, (column(*WEIGHTS) * loss.per_level).sum())
    has = torch.arange(4)[:, None] < torch.tensor(rows)
    torch.testing.assert_close(loss.per_example, (alone * has * column(*WEIGHTS)).sum(1))


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_micro_batches_add_up_to_the_batch(cut: int):
    """With the counts of the whole, losses and gradients of the parts sum to the whole's."""
    rows = (4, 3, 2)
    answer = tuple(level.clone().requires_grad_() for level in PREDICTED)
    whole = loss_of(answer, process("v"), ragged(X, rows), ragged(NOISE, rows))
    expected = torch.autograd.grad(whole.total, answer)
    parts = []
    for own in (slice(0, cut), slice(cut, 4)):
        counts = [max(0, min(count, own.stop) - own.start) for count in rows]
        y, x, noise = (tuple(part[own] for part in all_rows) for all_rows in (answer, X, NOISE))
        x, noise = ragged(x, counts), ragged(noise, counts)
        parts.append(loss_of(y, process("v"), x, noise, TIMES[own], rows))
    total = parts[0].total + parts[1].total
    torch.testing.assert_close(total, whole.total)
    torch.testing.assert_close(parts[0].per_level + parts[1].per_level, whole.per_level)
    for result, want in zip(torch.autograd.grad(total, answer), expected, strict=True):
        torch.testing.assert_close(result, want)


def test_the_loss_has_the_precision_of_the_images():
    """bf16 predictions are compared in float32: their error is not rounded again."""
    x, noise, _ = SINGLE
    answer = tuple(level.bfloat16() for level in PREDICTED)
    result = loss_of(answer, process(), x, noise).total
    assert result.dtype == torch.float32
    assert torch.equal(result, loss_of(tuple(y.float() for y in answer), process(), x, noise).total)


# --- from a config -------------------------------------------------------------------------------


def test_one_entry_stands_for_every_level_and_fewer_levels_take_the_first_entries():
    one = Process.from_config(ProcessConfig(weighting=(WeightingConfig(name="eps"),)), nest(3))
    assert [weighting.name for weighting in one.weightings] == ["eps"] * 3
    assert one.level_weights == (1.0, 1.0, 1.0)
    weightings = tuple(WeightingConfig(name=name) for name in ("eps", "v", "v_clipped"))
    config = ProcessConfig(weighting=weightings, level_weights=(1.0, 2.0, 3.0))
    two = Process.from_config(config, nest(2))
    assert [weighting.name for weighting in two.weightings] == ["eps", "v"]
    assert two.level_weights == (1.0, 2.0)
    assert two.ramped((1.0, 0.5)).level_weights == (1.0, 1.0)


def test_the_bias_of_sigmoid_shifts_with_the_schedule():
    weighting = WeightingConfig(name="sigmoid", bias=-1.0)
    built = Process.from_config(ProcessConfig(weighting=(weighting,)), nest(2))
    assert [w.bias for w in built.weightings] == pytest.approx([-1.0, -1.0 - math.log(2.0)])
