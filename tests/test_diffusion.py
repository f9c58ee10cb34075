"""The paper's maths as algebra, in float64: Eq. 1 to 3, conversions, weightings, ragged batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import (
    LevelConfig,
    ModelConfig,
    Prediction,
    ProcessConfig,
    WeightingConfig,
    WeightingName,
)
from matryoshka_diffusion.diffusion import (
    Loss,
    Process,
    diffuse,
    matryoshka_loss,
    per_level,
    prediction_target,
    to_noise,
    to_x0,
)
from matryoshka_diffusion.pyramid import Pyramid, ragged
from matryoshka_diffusion.schedule import Cosine, Shifted, log_snr_rate

SIDES = (2, 4, 8)
SCHEDULES = tuple(Shifted(Cosine(), ratio, 2.0) for ratio in (1.0, 2.0, 4.0))
PREDICTIONS: tuple[Prediction, ...] = ("x0", "eps", "v")
NAMES: tuple[WeightingName, ...] = ("eps", "v", "v_clipped", "min_snr", "sigmoid")

every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
every_weighting = pytest.mark.parametrize("name", NAMES)
some_time = st.floats(0.01, 1.0)


def pyramid(seed: int, rows: int = 4) -> Pyramid:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(rows, 3, side, side, generator=generator, dtype=torch.float64) for side in SIDES
    )


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


TIMES = column(0.03, 0.4, 0.75, 0.98)


def process(
    prediction: Prediction = "x0",
    name: WeightingName = "v_clipped",
    level_weights: tuple[float, ...] = (1.0, 1.0, 1.0),
) -> Process:
    weighting = WeightingConfig(name=name, clip=10.0, gamma=5.0, bias=-0.5)
    return Process(SCHEDULES, prediction, (weighting,) * 3, level_weights)


def fixed(answer: Pyramid):
    """A network that returns the same whatever it sees, cut to the rows that it is shown."""
    return lambda z, t, cond: tuple(y[: len(z_r)] for y, z_r in zip(answer, z, strict=True))


def loss_of(answer: Pyramid, x: Pyramid, t: Tensor, noise: Pyramid, given: Process) -> Loss:
    return matryoshka_loss(fixed(answer), x, Conditioning(), t, noise, process=given)


# --- Eq. 1 and 2 ---------------------------------------------------------------------------------


def test_diffuse_mixes_each_level_by_its_own_schedule():
    x, noise = pyramid(0), pyramid(1)
    z = diffuse(x, noise, TIMES, SCHEDULES)
    for level, shift in enumerate((1.0, 4.0, 16.0)):
        for row, t in enumerate(TIMES.tolist()):
            start, end = math.atan(math.exp(-7.5)), math.atan(math.exp(7.5))
            snr = math.tan(start + t * (end - start)) ** -2 / shift
            alpha, sigma = math.sqrt(snr / (1 + snr)), math.sqrt(1 / (1 + snr))
            torch.testing.assert_close(
                z[level][row], alpha * x[level][row] + sigma * noise[level][row]
            )


def test_diffuse_returns_the_very_picture_at_time_zero():
    x = pyramid(0)
    z = diffuse(x, pyramid(1), torch.zeros(4, dtype=torch.float64), SCHEDULES)
    assert all(torch.equal(z_r, x_r) for z_r, x_r in zip(z, x, strict=True))


def test_diffuse_keeps_the_precision_of_the_pictures():
    x, noise = (tuple(level.float() for level in pyramid(seed)) for seed in (0, 1))
    assert {z_r.dtype for z_r in diffuse(x, noise, TIMES, SCHEDULES)} == {torch.float32}


def test_diffuse_takes_ragged_pyramids():
    x, noise = pyramid(0), pyramid(1)
    rows = (4, 3, 0)
    whole = diffuse(x, noise, TIMES, SCHEDULES)
    part = diffuse(ragged(x, rows), ragged(noise, rows), TIMES, SCHEDULES)
    for got, expected in zip(part, ragged(whole, rows), strict=True):
        assert torch.equal(got, expected)


# --- conversions ---------------------------------------------------------------------------------


@every_prediction
@given(t=some_time, seed=st.integers(0, 100))
def test_a_right_prediction_converts_to_the_picture(prediction: Prediction, t: float, seed: int):
    x, noise = pyramid(seed), pyramid(seed + 1)
    rows = column(t).expand(4)
    z = diffuse(x, noise, rows, SCHEDULES)
    for x_r, noise_r, z_r, schedule in zip(x, noise, z, SCHEDULES, strict=True):
        log_snr = schedule.log_snr(rows)
        target = prediction_target(prediction, x_r, noise_r, log_snr)
        torch.testing.assert_close(to_x0(prediction, target, z_r, log_snr), x_r)
        torch.testing.assert_close(to_noise(x_r, z_r, log_snr), noise_r, rtol=1e-6, atol=1e-9)


@given(t=some_time, seed=st.integers(0, 100))
def test_the_three_names_agree_on_any_prediction(t: float, seed: int):
    """Whatever a network says as x0, eps or v: to x0 and back to its own name is the identity."""
    said, z = pyramid(seed)[-1], pyramid(seed + 1)[-1]
    log_snr = SCHEDULES[-1].log_snr(column(t).expand(4))
    for prediction in PREDICTIONS:
        x = to_x0(prediction, said, z, log_snr)
        again = prediction_target(prediction, x, to_noise(x, z, log_snr), log_snr)
        torch.testing.assert_close(again, said, rtol=1e-6, atol=1e-6)


def test_v_is_alpha_eps_minus_sigma_x():
    x, noise = pyramid(0)[0], pyramid(1)[0]
    log_snr = torch.full((4,), math.log(0.36 / 0.64), dtype=torch.float64)
    torch.testing.assert_close(prediction_target("v", x, noise, log_snr), 0.6 * noise - 0.8 * x)


# --- Eq. 3: weightings ---------------------------------------------------------------------------


@every_prediction
@every_weighting
def test_weights_are_those_of_the_squared_x_error(prediction: Prediction, name: WeightingName):
    """The error is taken where it is predicted, its weight converted: the same as the x-error's."""
    x, noise, said = pyramid(0), pyramid(1), pyramid(2)
    z = diffuse(x, noise, TIMES, SCHEDULES)
    loss = loss_of(said, x, TIMES, noise, process(prediction, name))
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
        x_error = (to_x0(prediction, said[level], z[level], log_snr) - x[level]).square()
        expected = (weight * x_error.mean((1, 2, 3))).mean()
        torch.testing.assert_close(loss.per_level[level], expected)


@every_prediction
@pytest.mark.parametrize("name", ["eps", "v"])
def test_weighting_eps_is_the_squared_eps_error_and_v_the_squared_v_error(
    prediction: Prediction, name: Any
):
    x, noise, said = pyramid(0), pyramid(1), pyramid(2)
    z = diffuse(x, noise, TIMES, SCHEDULES)
    loss = loss_of(said, x, TIMES, noise, process(prediction, name))
    for level, schedule in enumerate(SCHEDULES):
        log_snr = schedule.log_snr(TIMES)
        x_hat = to_x0(prediction, said[level], z[level], log_snr)
        as_name = prediction_target(name, x_hat, to_noise(x_hat, z[level], log_snr), log_snr)
        target = prediction_target(name, x[level], noise[level], log_snr)
        torch.testing.assert_close(loss.per_level[level], (as_name - target).square().mean())


@every_prediction
@every_weighting
def test_the_loss_and_its_gradient_are_finite_wherever_t_is_drawn(
    prediction: Prediction, name: WeightingName
):
    """Also in float32, at pure noise, where alpha all but vanishes."""
    t = torch.tensor([1e-4, 0.001, 0.5, 1.0])
    x, noise, said = (tuple(level.float() for level in pyramid(seed)) for seed in (0, 1, 2))
    answer = tuple(level.requires_grad_() for level in said)
    loss = loss_of(answer, x, t, noise, process(prediction, name))
    loss.total.backward()
    assert loss.total.isfinite()
    for level in answer:
        assert level.grad is not None
        assert level.grad.isfinite().all()


def test_a_right_prediction_costs_nothing():
    x, noise = pyramid(0), pyramid(1)
    loss = loss_of(x, x, TIMES, noise, process("x0"))
    assert loss.total == 0


# --- Eq. 3: levels and rows ----------------------------------------------------------------------


def test_total_is_the_weighted_sum_of_levels_and_the_mean_of_rows():
    x, noise, said = pyramid(0), pyramid(1), pyramid(2)
    weights = (1.0, 4.0, 0.25)
    loss = loss_of(said, x, TIMES, noise, process(level_weights=weights))
    plain = loss_of(said, x, TIMES, noise, process())
    torch.testing.assert_close(loss.per_level, plain.per_level)
    torch.testing.assert_close(loss.total, (column(*weights) * plain.per_level).sum())
    torch.testing.assert_close(loss.total, loss.per_example.mean())


def test_ragged_levels_average_over_the_rows_that_have_them():
    x, noise, said = pyramid(0), pyramid(1), pyramid(2)
    rows, weights = (4, 3, 1), (1.0, 2.0, 3.0)
    given = process("v", "min_snr", weights)
    loss = loss_of(said, ragged(x, rows), TIMES, ragged(noise, rows), given)
    # Row by row, level by level, nothing shared:
    alone = torch.zeros(4, 3, dtype=torch.float64)
    for row in range(4):
        own = slice(row, row + 1)
        one = loss_of(
            tuple(y[own] for y in said),
            tuple(x_r[own] for x_r in x),
            TIMES[own],
            tuple(n[own] for n in noise),
            given,
        )
        alone[row] = one.per_level
    for level, count in enumerate(rows):
        torch.testing.assert_close(loss.per_level[level], alone[:count, level].mean())
    torch.testing.assert_close(loss.total, (column(*weights) * loss.per_level).sum())
    has = torch.arange(4)[:, None] < torch.tensor(rows)
    torch.testing.assert_close(loss.per_example, (alone * has * column(*weights)).sum(1))


def test_a_level_without_rows_adds_nothing():
    x, noise, said = pyramid(0), pyramid(1), pyramid(2)
    rows = (4, 4, 0)
    loss = loss_of(said, ragged(x, rows), TIMES, ragged(noise, rows), process())
    assert loss.per_level[-1] == 0
    torch.testing.assert_close(loss.total, loss.per_level[:2].sum())


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_micro_batches_add_up_to_the_batch(cut: int):
    """With the counts of the whole, losses and gradients of the parts sum to the whole's."""
    x, noise = pyramid(0), pyramid(1)
    rows = (4, 3, 2)
    said = tuple(level.requires_grad_() for level in pyramid(2))

    whole = loss_of(said, ragged(x, rows), TIMES, ragged(noise, rows), process("v"))
    expected = torch.autograd.grad(whole.total, said)

    total = torch.zeros((), dtype=torch.float64)
    levels = torch.zeros(3, dtype=torch.float64)
    for own in (slice(0, cut), slice(cut, 4)):
        counts = [max(0, min(count, own.stop) - own.start) for count in rows]
        part = matryoshka_loss(
            fixed(tuple(y[own] for y in said)),
            ragged(tuple(x_r[own] for x_r in x), counts),
            Conditioning(),
            TIMES[own],
            ragged(tuple(n[own] for n in noise), counts),
            process=process("v"),
            counts=rows,
        )
        total, levels = total + part.total, levels + part.per_level
    torch.testing.assert_close(total, whole.total)
    torch.testing.assert_close(levels, whole.per_level)
    for got, want in zip(torch.autograd.grad(total, said), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_the_loss_is_taken_in_the_precision_of_the_pictures():
    """bf16 predictions are compared in float32: their error is not rounded again."""
    x, noise = (tuple(level.float() for level in pyramid(seed)) for seed in (0, 1))
    said = tuple(level.bfloat16() for level in pyramid(2))
    found = loss_of(said, x, TIMES, noise, process())
    exact = loss_of(tuple(y.float() for y in said), x, TIMES, noise, process())
    assert found.total.dtype == torch.float32
    assert torch.equal(found.total, exact.total)


# --- from a config -------------------------------------------------------------------------------


def model(levels: int) -> ModelConfig:
    core = LevelConfig(side=4, widths=(32,), blocks=(1,), attention=(0,))
    wide: dict[str, Any] = {"widths": (32, 32), "blocks": (1, 0), "attention": (0, 0)}
    outer = [LevelConfig(side=4 * 2**r, shift_ratio=2.0**r, **wide) for r in range(1, levels)]
    return ModelConfig(levels=(core, *outer), embedding=32)


def test_one_entry_stands_for_every_level():
    config = ProcessConfig(prediction="v", weighting=(WeightingConfig(name="eps"),))
    built = Process.from_config(config, model(3))
    assert built.prediction == "v"
    assert [weighting.name for weighting in built.weightings] == ["eps"] * 3
    assert built.level_weights == (1.0, 1.0, 1.0)
    assert len(built.schedules) == 3


def test_fewer_active_levels_take_the_first_entries():
    config = ProcessConfig(
        weighting=(WeightingConfig(name="eps"), WeightingConfig(name="v"), WeightingConfig()),
        level_weights=(1.0, 2.0, 3.0),
    )
    built = Process.from_config(config, model(2))
    assert [weighting.name for weighting in built.weightings] == ["eps", "v"]
    assert built.level_weights == (1.0, 2.0)
    assert per_level(("clip", "none", "dynamic"), 1) == ("clip",)


def test_a_ramp_multiplies_level_weights_and_no_ramp_changes_nothing():
    plain = process(level_weights=(1.0, 2.0, 4.0))
    assert plain.ramped(()) is plain
    assert plain.ramped((1.0, 0.5, 0.25)).level_weights == (1.0, 1.0, 1.0)
