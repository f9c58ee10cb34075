"""Noise schedules as curves of log-SNR over time, and their shift by resolution.

A schedule is lambda(t) = log(alpha_t^2 / sigma_t^2) for times t in [0, 1], where t = 0 is clean.
All schedules preserve the variance: alpha^2 + sigma^2 = 1. The shift by resolution (Section 3.1,
after f-DM) is then a subtraction. Times and log-SNRs always have the shape (b,).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from matryoshka_diffusion.config import ModelConfig
from matryoshka_diffusion.philox import send

STEPS = 1000
"""Steps of a tabulated schedule. Node k is at t = k / STEPS."""


@runtime_checkable
class NoiseSchedule(Protocol):
    """A decreasing curve with log_snr(0) = +inf."""

    def log_snr(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """log(alpha_t^2 / sigma_t^2), in the precision of `t`."""
        ...


class NoiseLevel(NamedTuple):
    """The noise of one level of the pyramid at one time."""

    alpha: float
    sigma: float
    log_snr: float


class Instant(NamedTuple):
    """One time for all rows, and the noise of every level then, coarse to fine.

    All are numbers of the host, from float64. A GPU gets them with the operations that they are
    for, so neither waits for the other, as it would for a tensor that is copied.
    """

    t: float
    levels: tuple[NoiseLevel, ...]

    def awake(self, floors: Sequence[float]) -> Instant:
        """The instant of the levels at or above their floors of log-SNR, and of the coarsest.

        Floors let no level wake before a coarser one (`ModelConfig.wake_problems`).
        """
        finer = zip(self.levels[1:], floors[1:], strict=True)
        count = 1 + sum(level.log_snr >= floor for level, floor in finer)
        return self._replace(levels=self.levels[:count])


def instants(times: Float[Tensor, " n"], schedules: Sequence[NoiseSchedule]) -> list[Instant]:
    """The instants of a time grid, for schedules from coarse to fine."""
    times = times.double()
    levels = []
    for schedule in schedules:
        log_snr = schedule.log_snr(times)
        columns = (part.tolist() for part in (*alpha_sigma(log_snr), log_snr))
        levels.append([NoiseLevel(*row) for row in zip(*columns, strict=True)])
    return [Instant(t, tuple(row)) for t, *row in zip(times.tolist(), *levels, strict=True)]


def alpha_sigma(log_snr: Float[Tensor, " b"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """(alpha, sigma) of the latent z = alpha x + sigma eps; exactly (1, 0) at log-SNR +inf."""
    return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()


def expand(per_row: Float[Tensor, " b"], like: Tensor) -> Tensor:
    """Reshape numbers (b,) to (b, 1, ..., 1), with the precision and device of `like`."""
    return send(per_row.to(like.dtype), like.device).view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class Cosine:
    """The continuous cosine schedule: alpha = cos(angle), and the angle is linear in time.

    The angle stops short of 0 and pi/2, so that log-SNR stays within `bound`. Beyond it float32
    cannot tell alpha from 1 or 0. At t = 0 itself log-SNR is infinite.
    """

    bound: float = 15.0

    def log_snr(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """-2 log tan(angle)."""
        start, end = math.atan(math.exp(-self.bound / 2)), math.atan(math.exp(self.bound / 2))
        curve = -2.0 * torch.log(torch.tan(start + t * (end - start)))
        return torch.where(t > 0, curve, math.inf)


@dataclass(frozen=True, eq=False)
class Table:
    """A schedule tabulated at the nodes t = 1/n, ..., n/n.

    Between nodes log-SNR is linear. Below the first node the noise variance is linear instead,
    because log-SNR is infinite at t = 0 and its interpolation would form 0 * inf.
    """

    nodes: Float[Tensor, " n"] = field(repr=False)

    def log_snr(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Interpolated log-SNR."""
        nodes = _placed(self.nodes, t.device, t.dtype)
        position = t * len(nodes)
        lower = position.detach().floor().clamp(1, len(nodes) - 1)
        between = torch.lerp(nodes[lower.long() - 1], nodes[lower.long()], position - lower)
        variance = torch.sigmoid(-nodes[0]) * position.clamp(0, 1)
        return torch.where(position < 1, torch.log1p(-variance) - torch.log(variance), between)


@lru_cache(maxsize=16)
def _placed(
    nodes: Float[Tensor, " n"], device: torch.device, dtype: torch.dtype
) -> Float[Tensor, " n"]:
    """The nodes of a table on another device, copied there once: for a copy the host waits."""
    return nodes.to(device, dtype)


@dataclass(frozen=True)
class Shifted:
    """A schedule with SNR divided by ratio^power: finer levels get more noise.

    The ratio s is the side of a level over the side of the coarsest one. Pooling s x s pixels
    divides the noise variance by s^2. With power 2 every level therefore shows the coarse image
    equally well; with power 1 a finer level shows it better.
    """

    base: NoiseSchedule
    ratio: float
    power: float

    def log_snr(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The base curve less power * log(ratio)."""
        return self.base.log_snr(t) - self.power * math.log(self.ratio)


def squared_cosine_table() -> Table:
    """The released models' table: 1000 steps of a squared-cosine alpha-bar (s = 0.008)."""
    k = torch.arange(STEPS + 1, dtype=torch.float64, device="cpu")
    curve = torch.cos((k / STEPS + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = (1.0 - curve[1:] / curve[:-1]).clamp(max=0.999)
    return _from_alpha_bar(torch.cumprod(1.0 - beta, 0))


def linear_beta_table() -> Table:
    """DDPM's table: 1000 steps of beta from 1e-4 to 0.02."""
    beta = torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64, device="cpu")
    return _from_alpha_bar(torch.cumprod(1.0 - beta, 0))


def truncated_cosine_table() -> Table:
    """The released code's `cosine`: 1000 steps of a cosine with log-SNR from 5 to -5."""
    start, end = math.atan(math.exp(-2.5)), math.atan(math.exp(2.5))
    u = torch.linspace(0.0, 1.0, STEPS, dtype=torch.float64, device="cpu")
    return Table(-2.0 * torch.log(torch.tan(start + u * (end - start))))


def _from_alpha_bar(alpha_bar: Float[Tensor, " n"]) -> Table:
    return Table(torch.log(alpha_bar) - torch.log1p(-alpha_bar))


SCHEDULES: dict[str, Callable[[], NoiseSchedule]] = {
    "cosine": Cosine,
    "squared-cosine": squared_cosine_table,
    "linear-beta": linear_beta_table,
    "truncated-cosine": truncated_cosine_table,
}


def build_schedules(model: ModelConfig) -> tuple[NoiseSchedule, ...]:
    """The schedule of every level, coarse to fine."""
    base = SCHEDULES[model.schedule]()
    return tuple(Shifted(base, level.shift_ratio, level.shift_power) for level in model.levels)


def log_snr_rate(schedule: NoiseSchedule, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """d log_snr / d t by automatic differentiation. It is finite for t > 0."""
    with torch.enable_grad():
        time = t.detach().requires_grad_()
        (rate,) = torch.autograd.grad(schedule.log_snr(time).sum(), time)
    return rate


def time_of(schedule: NoiseSchedule, log_snr: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """The time at which a schedule has the given log-SNR, by bisection."""
    low, high = torch.zeros_like(log_snr), torch.ones_like(log_snr)
    for _ in range(60):
        middle = (low + high) / 2
        too_clean = schedule.log_snr(middle) > log_snr
        low, high = torch.where(too_clean, middle, low), torch.where(too_clean, high, middle)
    return (low + high) / 2


def wakes_at(schedule: NoiseSchedule, floor: float) -> float:
    """The time from which a level is at or above its floor of log-SNR; t falls from 1 to 0."""
    if schedule.log_snr(torch.ones(1, dtype=torch.float64)).item() >= floor:
        return 1.0
    return time_of(schedule, torch.tensor([floor], dtype=torch.float64)).item()
