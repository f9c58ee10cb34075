"""Noise schedules: closed forms, shifts, the clean end, and the way back from log-SNR to time."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from matryoshka_diffusion.config import LevelConfig, ModelConfig, ScheduleName
from matryoshka_diffusion.pyramid import Resolution, down_sample
from matryoshka_diffusion.schedule import (
    SCHEDULES,
    Cosine,
    NoiseSchedule,
    Shifted,
    Table,
    alpha_sigma,
    build_schedules,
    expand,
    log_snr_rate,
    time_of,
)

ALL = {name: make() for name, make in SCHEDULES.items()}
ALL |= {f"{name}-shifted": Shifted(base, 4.0, 2.0) for name, base in ALL.items()}
every_schedule = pytest.mark.parametrize("schedule", ALL.values(), ids=ALL.keys())
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
NODES = torch.arange(1001, dtype=torch.float64) / 1000


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- closed forms -------------------------------------------------------------------------------


def squared_cosine() -> np.ndarray:
    """alpha-bar by the definition of beta, one step after the other."""
    f = [math.cos((k / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(1001)]
    alpha_bar = [1.0]
    for k in range(1, 1001):
        alpha_bar.append(alpha_bar[-1] * (1 - min(1 - f[k] / f[k - 1], 0.999)))
    return np.array(alpha_bar)


def linear_beta() -> np.ndarray:
    alpha_bar = [1.0]
    for k in range(1000):
        alpha_bar.append(alpha_bar[-1] * (1 - (1e-4 + (0.02 - 1e-4) * k / 999)))
    return np.array(alpha_bar)


def truncated_cosine() -> np.ndarray:
    """cos^2 of an angle that goes from log-SNR 5 to -5."""
    a, b = math.atan(math.exp(-2.5)), math.atan(math.exp(2.5))
    return np.array([1.0, *(math.cos(a + (b - a) * k / 999) ** 2 for k in range(1000))])


@both_precisions
@pytest.mark.parametrize("closed_form", [squared_cosine, linear_beta, truncated_cosine])
def test_tables_are_exact_at_their_nodes(closed_form: Callable, dtype: torch.dtype):
    schedule = ALL[closed_form.__name__.replace("_", "-")]
    found = torch.sigmoid(schedule.log_snr(NODES.to(dtype))).double()
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    np.testing.assert_allclose(found.numpy(), closed_form(), rtol=0, atol=tolerance)


def test_a_table_is_linear_in_log_snr_between_nodes():
    schedule = ALL["linear-beta"]
    left, middle, right = schedule.log_snr(times(0.3, 0.30025, 0.301))
    torch.testing.assert_close(middle, 0.75 * left + 0.25 * right)


def test_a_table_is_linear_in_noise_variance_before_its_first_node():
    schedule = ALL["squared-cosine"]
    variance = torch.sigmoid(-schedule.log_snr(times(0.00025, 0.0005, 0.001)))
    torch.testing.assert_close(variance, variance[-1] * times(0.25, 0.5, 1.0))


def test_cosine_is_a_quarter_turn():
    log_snr = Cosine().log_snr(times(1e-9, 0.5, 1.0))
    torch.testing.assert_close(log_snr, times(15.0, 0.0, -15.0), rtol=0, atol=1e-4)
    alpha, sigma = alpha_sigma(Cosine(bound=60.0).log_snr(NODES[1:]))  # angle from 0 to pi / 2
    torch.testing.assert_close(alpha, torch.cos(NODES[1:] * math.pi / 2))
    torch.testing.assert_close(sigma, torch.sin(NODES[1:] * math.pi / 2))


# --- properties ---------------------------------------------------------------------------------


@every_schedule
@both_precisions
def test_time_zero_is_exactly_clean(schedule: NoiseSchedule, dtype: torch.dtype):
    log_snr = schedule.log_snr(torch.zeros(2, dtype=dtype))
    assert torch.equal(log_snr, torch.full((2,), math.inf, dtype=dtype))
    alpha, sigma = alpha_sigma(log_snr)
    assert torch.equal(alpha, torch.ones(2, dtype=dtype))
    assert torch.equal(sigma, torch.zeros(2, dtype=dtype))


@every_schedule
@both_precisions
def test_no_nan_below_the_first_node(schedule: NoiseSchedule, dtype: torch.dtype):
    t = torch.cat([torch.zeros(1), torch.logspace(-30, -3, 200), torch.tensor([0.00099999])])
    log_snr = schedule.log_snr(t.to(dtype))
    assert not log_snr.isnan().any()
    assert log_snr[1:].isfinite().all()
    assert (log_snr >= schedule.log_snr(torch.tensor([0.0011], dtype=dtype))).all()


@every_schedule
def test_log_snr_falls_all_the_way(schedule: NoiseSchedule):
    t = torch.linspace(0.0, 1.0, 20_001, dtype=torch.float64)
    assert (schedule.log_snr(t).diff() < 0).all()
    assert (schedule.log_snr(t.float()).diff() <= 1e-3).all(), "in float32 up to rounding"


@every_schedule
@given(t=st.floats(1e-9, 1.0))
def test_the_variance_is_preserved(schedule: NoiseSchedule, t: float):
    log_snr = schedule.log_snr(times(t))
    alpha, sigma = alpha_sigma(log_snr)
    assert float(alpha**2 + sigma**2) == pytest.approx(1.0, abs=1e-15)
    assert float(torch.log(alpha**2 / sigma**2)) == pytest.approx(float(log_snr), abs=1e-9)


@every_schedule
@given(t=st.floats(2e-6, 1.0 - 1e-6))
def test_the_rate_is_the_slope(schedule: NoiseSchedule, t: float):
    step = 1e-7 * t
    left, right = schedule.log_snr(times(t - step, t + step))
    before, here, after = -log_snr_rate(schedule, times(t - 2 * step, t, t + 2 * step))
    assert float(here) > 0
    slope = float(left - right) / (2 * step)
    # A node of a table may lie in between, where the slope jumps.
    low, high = sorted((float(before), float(after)))
    assert low * (1 - 1e-3) - 1e-3 <= slope <= high * (1 + 1e-3) + 1e-3


@every_schedule
@both_precisions
def test_the_rate_is_finite_and_negative_after_time_zero(
    schedule: NoiseSchedule, dtype: torch.dtype
):
    t = torch.cat([torch.tensor([1e-6, 1e-4]), NODES[1:]]).to(dtype)
    with torch.no_grad():  # it differentiates for itself
        rate = log_snr_rate(schedule, t)
    assert rate.isfinite().all()
    assert (rate < 0).all()


@every_schedule
@given(t=st.floats(1e-5, 1.0))
def test_time_of_is_the_inverse(schedule: NoiseSchedule, t: float):
    assert float(time_of(schedule, schedule.log_snr(times(t)))) == pytest.approx(t, rel=1e-7)


def test_time_of_reaches_both_ends():
    beyond = time_of(Cosine(), times(math.inf, 40.0, -40.0))
    torch.testing.assert_close(beyond, times(0.0, 0.0, 1.0))


# --- shifts -------------------------------------------------------------------------------------

ratios = st.floats(0.25, 16.0)
powers = st.floats(0.0, 2.0)


@given(t=st.floats(0.0, 1.0), ratio=ratios, power=powers)
def test_a_shift_divides_the_snr(t: float, ratio: float, power: float):
    base = Cosine()
    shifted = torch.exp(Shifted(base, ratio, power).log_snr(times(t)))
    torch.testing.assert_close(shifted, torch.exp(base.log_snr(times(t))) / ratio**power)


@given(t=st.floats(0.0, 1.0), one=ratios, two=ratios, power=powers)
def test_shifts_compose_and_undo(t: float, one: float, two: float, power: float):
    base = ALL["squared-cosine"]
    twice = Shifted(Shifted(base, one, power), two, power)
    torch.testing.assert_close(
        twice.log_snr(times(t)), Shifted(base, one * two, power).log_snr(times(t))
    )
    back = Shifted(Shifted(base, one, power), 1 / one, power)
    torch.testing.assert_close(back.log_snr(times(t)), base.log_snr(times(t)))


def test_power_two_makes_the_pooled_level_as_noisy_as_the_coarse_one():
    """The reason for the shift: pooling 4 x 4 independent pixels divides their variance by 16."""
    noise = torch.randn(1, 1, 512, 512, generator=torch.Generator().manual_seed(0))
    pooled = down_sample(noise, Resolution(128, 128)).var()
    assert float(pooled) == pytest.approx(1 / 16, rel=0.03)
    t = times(0.1, 0.5, 0.9)
    coarse, fine = Cosine(), Shifted(Cosine(), 4.0, 2.0)
    torch.testing.assert_close(fine.log_snr(t) + math.log(16), coarse.log_snr(t))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_model_names_the_schedule_and_the_shift_of_every_level(name: ScheduleName):
    levels = tuple(
        LevelConfig(
            side=side, widths=widths, blocks=(1,) * len(widths), attention=(0,) * len(widths),
            shift_ratio=ratio, shift_power=power,
        )
        for side, widths, ratio, power in ((8, (32,), 1.0, 1.0), (16, (32, 32), 3.0, 1.5))
    )  # fmt: skip
    model = ModelConfig(levels=levels, embedding=32, schedule=name)
    coarse, fine = build_schedules(model)
    t = times(0.2, 0.8)
    torch.testing.assert_close(coarse.log_snr(t), ALL[name].log_snr(t))
    torch.testing.assert_close(fine.log_snr(t), ALL[name].log_snr(t) - 1.5 * math.log(3.0))


# --- small things -------------------------------------------------------------------------------


def test_expand_brings_rows_to_the_shape_precision_and_place_of_pictures():
    pictures = torch.zeros(2, 3, 4, 5)
    expanded = expand(times(0.25, 0.5), pictures)
    assert expanded.shape == (2, 1, 1, 1)
    assert expanded.dtype == torch.float32
    assert expanded.flatten().tolist() == [0.25, 0.5]


def test_a_table_built_for_a_network_without_storage_keeps_its_numbers():
    """`mdm info` builds networks on the meta device; a table is no weight and stays real."""
    with torch.device("meta"):
        table = SCHEDULES["squared-cosine"]()
    assert isinstance(table, Table)
    assert table.nodes.device.type == "cpu"
