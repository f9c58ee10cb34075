"""Samplers in the extended space: from noise on every level to images on every level.

Given the estimate of x, the reverse process separates by level: each level takes its own step with
its own log-SNR at the shared time. Samplers are generators of `State`. Each state has the latents
and the present estimate of the images, so previews cost nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from matryoshka_diffusion.config import GridName, SamplerName
from matryoshka_diffusion.denoiser import Denoiser
from matryoshka_diffusion.diffusion import to_noise
from matryoshka_diffusion.pyramid import Pyramid, Resolution
from matryoshka_diffusion.rng import normal
from matryoshka_diffusion.schedule import STEPS, NoiseSchedule, alpha_sigma, time_of

Schedules = Sequence[NoiseSchedule]
Times = Float[Tensor, " n"]
NoiseSource = Callable[[str, int, int], Tensor]
"""Noise for (purpose, step, level): "start" for the first latents, "step" for what a step adds."""


class State(NamedTuple):
    """The time and the latents after `step` steps, and the estimate that led to them."""

    step: int
    t: float
    z: Pyramid
    x: Pyramid


class SeededNoise:
    """Noise from each sample's own seed, so that the rest of the batch changes nothing.

    The same seed gives the same noise on every device. Each `family` has its own streams, so an
    upsampler does not repeat the noise of its base.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        resolutions: Sequence[Resolution],
        channels: int = 3,
        device: torch.device | str = "cpu",
        family: str = "sample",
    ) -> None:
        self.family = family
        self.seeds = tuple(seeds)
        self.shapes = [resolution.shape(channels) for resolution in resolutions]
        self.device = device

    def __call__(self, purpose: str, step: int, level: int) -> Tensor:
        """Standard normal numbers, one row for each seed, in the shape of the level."""
        places = [(seed, step, level) for seed in self.seeds]
        return normal(f"{self.family} {purpose}", places, self.shapes[level], self.device)

    def start(self) -> Pyramid:
        """Pure noise on every level, the latents at t = 1."""
        return tuple(self("start", 0, level) for level in range(len(self.shapes)))


# --- time grids --------------------------------------------------------------------------------
# A grid is n + 1 decreasing float64 times that end at 0. Step k goes from time k to time k + 1.


def trailing_grid(steps: int, schedule: NoiseSchedule) -> Times:
    """Even times from 1 to 0. The first step starts at pure noise."""
    return torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)


def log_snr_grid(steps: int, schedule: NoiseSchedule, ceiling: float = 12.0) -> Times:
    """Times that are even in log-SNR, from its value at t = 1 up to `ceiling`, then 0."""
    ends = torch.tensor([1.0, 1.0 / STEPS], dtype=torch.float64)
    # Beyond +-ceiling there is nothing left to resolve, and a table does not describe times before
    # its first node.
    first, end = schedule.log_snr(ends).clamp(-ceiling, ceiling).tolist()
    times = time_of(schedule, torch.linspace(first, end, steps, dtype=torch.float64))
    return torch.cat([times.new_ones(1), times[1:], times.new_zeros(1)])


def released_grid(steps: int, schedule: NoiseSchedule) -> Times:
    """The released code's re-spacing of 1000 steps. It starts below t = 1: 0.91 for 10 steps."""
    return torch.tensor(
        [round(k * 1001 / (steps + 1)) / 1000 for k in range(steps, -1, -1)], dtype=torch.float64
    )


GRIDS: dict[GridName, Callable[[int, NoiseSchedule], Times]] = {
    "trailing": trailing_grid,
    "log-snr": log_snr_grid,
    "released": released_grid,
}


# --- samplers ----------------------------------------------------------------------------------


def ddpm(
    denoise: Denoiser, z: Pyramid, schedules: Schedules, times: Times, *, noise: NoiseSource
) -> Iterator[State]:
    """Ancestral sampling (Ho et al., 2020): draw from q(z_s | z_t, x) with the estimate for x.

    With a = alpha_t / alpha_s and v = sigma_t^2 - a^2 sigma_s^2 (Eq. 1), it is a Gaussian with
    mean (a sigma_s^2 z + alpha_s v x) / sigma_t^2 and variance v sigma_s^2 / sigma_t^2.
    """
    for step, (t, s) in enumerate(pairwise(times), start=1):
        x = denoise(z, t.expand(len(z[0])))
        following = []
        for level, (z_r, x_r, schedule) in enumerate(zip(z, x, schedules, strict=True)):
            alpha_t, sigma_t, alpha_s, sigma_s = _coefficients(schedule, t, s)
            ratio = alpha_t / alpha_s
            variance = sigma_t**2 - ratio**2 * sigma_s**2
            mean = _mix(ratio * sigma_s**2 / sigma_t**2, z_r, alpha_s * variance / sigma_t**2, x_r)
            spread = (variance * sigma_s**2 / sigma_t**2).clamp(min=0.0).sqrt()
            following.append(_mix(1.0, mean, spread, noise("step", step, level)))
        z = tuple(following)
        yield State(step, float(s), z, x)


def ddim(
    denoise: Denoiser,
    z: Pyramid,
    schedules: Schedules,
    times: Times,
    *,
    noise: NoiseSource,
    eta: float = 0.0,
) -> Iterator[State]:
    """DDIM (Song et al., 2021): keep the noise in z, or renew a share `eta` of it.

    eta = 0 is deterministic. eta = 1 has the variance of ancestral sampling.
    """
    for step, (t, s) in enumerate(pairwise(times), start=1):
        rows = t.expand(len(z[0]))
        x = denoise(z, rows)
        following = []
        for level, (z_r, x_r, schedule) in enumerate(zip(z, x, schedules, strict=True)):
            alpha_t, sigma_t, alpha_s, sigma_s = _coefficients(schedule, t, s)
            variance = sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2
            renewed = eta * (variance.clamp(min=0.0)).sqrt() * sigma_s / sigma_t
            kept = (sigma_s**2 - renewed**2).clamp(min=0.0).sqrt()
            held = to_noise(x_r, z_r, schedule.log_snr(rows))
            latent = _mix(alpha_s, x_r, kept, held)
            if eta > 0.0:
                latent = _mix(1.0, latent, renewed, noise("step", step, level))
            following.append(latent)
        z = tuple(following)
        yield State(step, float(s), z, x)


def dpmpp_2m(
    denoise: Denoiser, z: Pyramid, schedules: Schedules, times: Times, *, noise: NoiseSource
) -> Iterator[State]:
    """DPM-Solver++(2M) (Lu et al., 2022): a second-order step from the last two estimates.

    With the half log-SNR l = log(alpha / sigma) as time, the linear part of the ODE is solved
    exactly, and the estimate is extrapolated linearly in l. The first step is of first order. So
    is the last one, which ends at infinite l. The solver is deterministic and ignores `noise`.
    """
    previous_x: Pyramid | None = None
    previous_t = torch.tensor(1.0, dtype=torch.float64)
    for step, (t, s) in enumerate(pairwise(times), start=1):
        x = denoise(z, t.expand(len(z[0])))
        following = []
        for level, (z_r, x_r, schedule) in enumerate(zip(z, x, schedules, strict=True)):
            _, sigma_t, alpha_s, sigma_s = _coefficients(schedule, t, s)
            h = _half_log_snr(schedule, s) - _half_log_snr(schedule, t)
            estimate = x_r
            if previous_x is not None and torch.isfinite(h):
                past = _half_log_snr(schedule, t) - _half_log_snr(schedule, previous_t)
                lean = h / (2.0 * past)
                estimate = _mix(1.0 + lean, x_r, -lean, previous_x[level])
            following.append(_mix(sigma_s / sigma_t, z_r, -alpha_s * torch.expm1(-h), estimate))
        z, previous_x, previous_t = tuple(following), x, t
        yield State(step, float(s), z, x)


SAMPLERS: dict[SamplerName, Callable[..., Iterator[State]]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpmpp-2m": dpmpp_2m,
}


def last(states: Iterator[State]) -> State:
    """Run a sampler to its end.

    Raises:
        ValueError: there is no state, because the time grid has no step.
    """
    final = deque(states, maxlen=1)
    if not final:
        raise ValueError("a time grid needs at least one step")
    return final[0]


def _coefficients(
    schedule: NoiseSchedule, t: Tensor, s: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(alpha_t, sigma_t, alpha_s, sigma_s)."""
    alpha, sigma = alpha_sigma(schedule.log_snr(torch.stack([t, s])))
    return alpha[0], sigma[0], alpha[1], sigma[1]


def _half_log_snr(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    return schedule.log_snr(t[None])[0] / 2.0


def _mix(a: Tensor | float, x: Tensor, b: Tensor | float, y: Tensor) -> Tensor:
    """a x + b y in the precision of x. The coefficients are float64."""
    return float(a) * x + float(b) * y
