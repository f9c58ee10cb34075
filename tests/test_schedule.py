"""Noise schedules: closed forms, shifts, the clean end, and the way back from log-SNR to time."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from matryoshka_diffusion.modelconfig import ScheduleName
from matryoshka_diffusion.pyramid import Resolution, down_sample
from matryoshka_diffusion.schedule import (
    SCHEDULES,
    Cosine,
    NoiseSchedule,
    Shifted,
    Table,
    alpha_sigma,
    build_schedules,
    instants,
    log_snr_rate,
    time_of,
)
from nests import nest

ALL = {name: make() for name, make in SCHEDULES.items()}
ALL |= {f"{name}-shifted": Shifted(base, 4.0, 2.0) for name, base in ALL.items()}
every_schedule = pytest.mark.parametrize("schedule", ALL.values(), ids=ALL.keys())
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
NODES = torch.arange(1001, dtype=torch.float64) / 1000
SOME = torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TIMES = torch.cat([1e-5 + (1 - 2e-5) * SOME, torch.logspace(-5, -3, 50, dtype=torch.float64)])
"""Times in (0, 1), many of them before the first node of the tables."""


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- closed forms --------------------------------------------------------------------------------


def squared_cosine() -> np.ndarray:
    """alpha-bar by the definition of beta, one step after the other."""
    f = [math.cos((k / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(1001)]
    alpha_bar = [1.0]
    for k in range(1, 1001):
        alpha_bar.append(alpha_bar[-1] * (1 - min(1 - f[k] / f[k - 1], 0.999)))
    return np.array(alpha_bar)


def linear_beta() -> np.ndarray:
    beta = 1e-4 + (0.02 - 1e-4) * np.arange(1000) / 999
    return np.array([1.0, *np.cumprod(1 - beta)])


def truncated_cosine() -> np.ndarray:
    """cos^2 of an angle that goes from log-SNR 5 to -5."""
    a, b = math.atan(math.exp(-2.5)), math.atan(math.exp(2.5))
    return np.array([1.0, *(math.cos(a + (b - a) * k / 999) ** 2 for k in range(1000))])


@both_precisions
@pytest.mark.parametrize("closed_form", [squared_cosine, linear_beta, truncated_cosine])
def test_tables_are_exact_at_their_nodes(closed_form: Callable, dtype: torch.dtype):
    schedule = ALL[closed_form.__name__.replace("_", "-")]
    result = torch.sigmoid(schedule.log_snr(NODES.to(dtype))).double()
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    np.testing.assert_allclose(result.numpy(), closed_form(), rtol=0, atol=tolerance)


def test_a_table_is_linear_in_log_snr_between_nodes_and_in_variance_before_the_first():
    left, middle, right = ALL["linear-beta"].log_snr(times(0.3, 0.30025, 0.301))
    torch.testing.assert_close(middle, 0.75 * left + 0.25 * right)
    variance = torch.sigmoid(-ALL["squared-cosine"].log_snr(times(0.00025, 0.0005, 0.001)))
    torch.testing.assert_close(variance, variance[-1] * times(0.25, 0.5, 1.0))


def test_cosine_is_a_quarter_turn():
    log_snr = Cosine().log_snr(times(1e-9, 0.5, 1.0))
    torch.testing.assert_close(log_snr, times(15.0, 0.0, -15.0), rtol=0, atol=1e-4)
    alpha, sigma = alpha_sigma(Cosine(bound=60.0).log_snr(NODES[1:]))  # angle from 0 to pi / 2
    torch.testing.assert_close(alpha, torch.cos(NODES[1:] * math.pi / 2))
    torch.testing.assert_close(sigma, torch.sin(NODES[1:] * math.pi / 2))


@every_schedule
def test_instants_have_the_schedules_own_numbers_for_every_level(schedule: NoiseSchedule):
    levels = (schedule, Shifted(schedule, 4.0, 2.0))
    steps = instants(torch.tensor([1.0, 0.5, 0.0]), levels)
    assert [now.t for now in steps] == [1.0, 0.5, 0.0]
    for now in steps:
        for own, (alpha, sigma, log_snr) in zip(levels, now.levels, strict=True):
            exact = own.log_snr(times(now.t))
            assert log_snr == pytest.approx(exact.item(), rel=1e-12)
            expected = [part.item() for part in alpha_sigma(exact)]
            assert [alpha, sigma] == pytest.approx(expected, rel=1e-12)


# --- properties ----------------------------------------------------------------------------------


@every_schedule
@both_precisions
def test_time_zero_is_exactly_clean_and_no_time_is_nan(schedule: NoiseSchedule, dtype: torch.dtype):
    t = torch.cat([torch.zeros(1), torch.logspace(-30, -3, 200), torch.tensor([0.00099999])])
    log_snr = schedule.log_snr(t.to(dtype))
    assert log_snr[0] == math.inf
    assert [part[0].item() for part in alpha_sigma(log_snr)] == [1.0, 0.0]
    assert log_snr[1:].isfinite().all()
    assert (log_snr >= schedule.log_snr(torch.tensor([0.0011], dtype=dtype))).all()


@every_schedule
def test_log_snr_falls_all_the_way(schedule: NoiseSchedule):
    t = torch.linspace(0.0, 1.0, 20_001, dtype=torch.float64)
    assert (schedule.log_snr(t).diff() < 0).all()
    assert (schedule.log_snr(t.float()).diff() <= 1e-3).all(), "in float32 up to rounding"


@every_schedule
def test_the_variance_is_preserved(schedule: NoiseSchedule):
    log_snr = schedule.log_snr(TIMES)
    alpha, sigma = alpha_sigma(log_snr)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(TIMES), rtol=0, atol=1e-15)
    torch.testing.assert_close(torch.log(alpha**2 / sigma**2), log_snr, rtol=0, atol=1e-9)


@every_schedule
def test_the_rate_is_the_slope(schedule: NoiseSchedule):
    step = 1e-7 * TIMES
    slope = (schedule.log_snr(TIMES - step) - schedule.log_snr(TIMES + step)) / (2 * step)
    with torch.no_grad():  # it differentiates for itself
        near = [-log_snr_rate(schedule, TIMES + side * step) for side in (-2, 0, 2)]
    # A node of a table may lie in between, where the slope jumps.
    low, high = torch.stack(near).aminmax(dim=0)
    assert (slope >= low * (1 - 1e-3) - 1e-3).all()
    assert (slope <= high * (1 + 1e-3) + 1e-3).all()
    for dtype in (torch.float32, torch.float64):
        rate = log_snr_rate(schedule, torch.cat([times(1e-6, 1e-4), NODES[1:]]).to(dtype))
        assert rate.isfinite().all()
        assert (rate < 0).all()


@every_schedule
def test_time_of_is_the_inverse(schedule: NoiseSchedule):
    result = time_of(schedule, schedule.log_snr(TIMES))
    torch.testing.assert_close(result, TIMES, rtol=1e-7, atol=0)
    beyond = time_of(schedule, times(math.inf, -80.0))
    torch.testing.assert_close(beyond, times(0.0, 1.0))


# --- shifts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("ratio", [0.25, 1.0, 3.0, 16.0])
def test_shifts_divide_the_snr_compose_and_undo(ratio: float, power: float):
    base = ALL["squared-cosine"]
    shifted = Shifted(base, ratio, power)
    snr = torch.exp(base.log_snr(TIMES))
    torch.testing.assert_close(torch.exp(shifted.log_snr(TIMES)), snr / ratio**power)
    twice = Shifted(shifted, 3.0, power).log_snr(TIMES)
    torch.testing.assert_close(twice, Shifted(base, 3.0 * ratio, power).log_snr(TIMES))
    back = Shifted(shifted, 1 / ratio, power).log_snr(TIMES)
    torch.testing.assert_close(back, base.log_snr(TIMES))


def test_power_two_makes_the_pooled_level_as_noisy_as_the_coarse_one():
    """Pooling 4 x 4 independent pixels divides their variance by 16."""
    noise = torch.randn(1, 1, 512, 512, generator=torch.Generator().manual_seed(0))
    pooled = down_sample(noise, Resolution(128, 128)).var()
    assert float(pooled) == pytest.approx(1 / 16, rel=0.03)
    coarse, fine = Cosine(), Shifted(Cosine(), 4.0, 2.0)
    torch.testing.assert_close(fine.log_snr(TIMES) + math.log(16), coarse.log_snr(TIMES))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_model_names_the_schedule_and_the_shift_of_every_level(name: ScheduleName):
    model = nest(2, schedule=name, core={"shift_ratio": 3.0, "shift_power": 1.5})
    for schedule, shift in zip(
        build_schedules(model), (1.5 * math.log(3), math.log(2)), strict=True
    ):
        torch.testing.assert_close(schedule.log_snr(TIMES), ALL[name].log_snr(TIMES) - shift)


def test_a_table_built_for_a_network_without_storage_keeps_its_numbers():
    """`mdm info` builds networks on the meta device. A table is no weight and stays real."""
    with torch.device("meta"):
        table = SCHEDULES["squared-cosine"]()
    assert isinstance(table, Table)
    assert table.nodes.device.type == "cpu"
