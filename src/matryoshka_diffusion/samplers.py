"""Samplers in the extended space: from noise on every level to images on every level.

Given the estimate of x, the reverse process separates by level: each level takes its own step with
its own log-SNR at the shared time. Samplers are generators of `State`. Each state has the latents
and the present estimate of the images, so previews cost nothing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from matryoshka_diffusion.config import GridName, SamplerName
from matryoshka_diffusion.denoiser import Denoiser, Enlarged
from matryoshka_diffusion.diffusion import to_noise
from matryoshka_diffusion.pyramid import Pyramid
from matryoshka_diffusion.rng import normal_parts
from matryoshka_diffusion.schedule import (
    STEPS,
    Instant,
    NoiseSchedule,
    expand,
    instants,
    time_of,
)

Schedules = Sequence[NoiseSchedule]
Times = Float[Tensor, " n"]
NoiseSource = Callable[[str, int], Pyramid]
"""Noise for (purpose, step): "start" for the first latents, "step" for what a step adds."""
Sampler = Callable[..., Iterator["State"]]
"""Takes (denoise, z, schedules, times, *, noise), and `ddim` also eta."""


class State(NamedTuple):
    """The time and the latents after `step` steps, and the estimate that led to them."""

    step: int
    t: float
    z: Pyramid
    x: Pyramid


class Blend(NamedTuple):
    """A seed between two others, on each level at its own place: 0 is the first, 1 the second.

    Noise goes from one to the other on a sphere, by the weights cos(a) and sin(a) of an angle, so
    that blended noise is standard normal, too. At both ends it is that of a seed, bit for bit.
    """

    first: int
    second: int
    shares: tuple[float, ...]


Seed: TypeAlias = int | Blend


class SeededNoise:
    """Noise from each sample's own seed, so that the rest of the batch changes nothing.

    The same seed gives the same noise on every device. Each `family` has its own streams, so an
    upsampler does not repeat the noise of its base.
    """

    def __init__(
        self,
        seeds: Sequence[Seed],
        shapes: Sequence[tuple[int, ...]],
        device: torch.device | str = "cpu",
        family: str = "sample",
    ) -> None:
        self.family = family
        self.seeds = tuple(seeds)
        self.shapes = shapes
        self.device = device

    def __call__(self, purpose: str, step: int) -> Pyramid:
        """Standard normal numbers, one row for each seed, in the shapes of the levels."""
        blends = {n: seed for n, seed in enumerate(self.seeds) if isinstance(seed, Blend)}
        own = [seed.first if isinstance(seed, Blend) else seed for seed in self.seeds]
        noise = self._drawn(own, purpose, step)
        if blends:
            rows = torch.tensor([*blends], device=self.device)
            others = self._drawn([blend.second for blend in blends.values()], purpose, step)
            shares = torch.tensor([blend.shares for blend in blends.values()], dtype=torch.float64)
            angles = shares * (math.pi / 2)
            weights = (math.pi / 2 - angles).sin(), angles.sin()  # cos(pi / 2) is not quite 0
            for level, (z, other) in enumerate(zip(noise, others, strict=True)):
                first, second = (expand(weight[:, level], other) for weight in weights)
                z[rows] = first * z[rows] + second * other
        return noise

    def _drawn(self, seeds: Sequence[int], purpose: str, step: int) -> Pyramid:
        places = [[(seed, step, level) for level in range(len(self.shapes))] for seed in seeds]
        return normal_parts(f"{self.family} {purpose}", places, self.shapes, self.device)

    def start(self) -> Pyramid:
        """Pure noise on every level, the latents at t = 1."""
        return self("start", 0)


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
    for step, (now, then) in enumerate(pairwise(instants(times, schedules)), start=1):
        x, fresh = denoise(z, now), noise("step", step)
        following = []
        for z_r, x_r, noise_r, t, s in zip(z, x, fresh, now.levels, then.levels, strict=True):
            ratio = t.alpha / s.alpha
            variance = t.sigma**2 - ratio**2 * s.sigma**2
            kept, added = ratio * s.sigma**2 / t.sigma**2, s.alpha * variance / t.sigma**2
            spread = math.sqrt(max(variance * s.sigma**2 / t.sigma**2, 0.0))
            mean = kept * z_r + added * x_r
            following.append(mean + spread * noise_r)
        z = tuple(following)
        yield State(step, then.t, z, x)


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
    for step, (now, then) in enumerate(pairwise(instants(times, schedules)), start=1):
        x = denoise(z, now)
        fresh = noise("step", step) if eta > 0.0 else ()
        following = []
        for level, (z_r, x_r, t, s) in enumerate(zip(z, x, now.levels, then.levels, strict=True)):
            variance = t.sigma**2 - (t.alpha / s.alpha) ** 2 * s.sigma**2
            renewed = eta * math.sqrt(max(variance, 0.0)) * s.sigma / t.sigma
            kept = math.sqrt(max(s.sigma**2 - renewed**2, 0.0))
            latent = s.alpha * x_r + kept * to_noise(x_r, z_r, t)
            if eta > 0.0:
                latent = latent + renewed * fresh[level]
            following.append(latent)
        z = tuple(following)
        yield State(step, then.t, z, x)


def dpmpp_2m(
    denoise: Denoiser, z: Pyramid, schedules: Schedules, times: Times, *, noise: NoiseSource
) -> Iterator[State]:
    """DPM-Solver++(2M) (Lu et al., 2022): a second-order step from the last two estimates.

    With the half log-SNR l = log(alpha / sigma) as time, the linear part of the ODE is solved
    exactly, and the estimate is extrapolated linearly in l. The first step is of first order. So
    is the last one, which ends at infinite l. The solver is deterministic and ignores `noise`.
    """
    before: tuple[Instant, Pyramid] | None = None
    for step, (now, then) in enumerate(pairwise(instants(times, schedules)), start=1):
        x = denoise(z, now)
        following = []
        for level, (z_r, x_r, t, s) in enumerate(zip(z, x, now.levels, then.levels, strict=True)):
            h = (s.log_snr - t.log_snr) / 2.0
            estimate = x_r
            if before is not None and math.isfinite(h):
                past = (t.log_snr - before[0].levels[level].log_snr) / 2.0
                lean = h / (2.0 * past)
                estimate = (1.0 + lean) * x_r - lean * before[1][level]
            following.append(s.sigma / t.sigma * z_r - s.alpha * math.expm1(-h) * estimate)
        z, before = tuple(following), (now, x)
        yield State(step, then.t, z, x)


SAMPLERS: dict[SamplerName, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpmpp-2m": dpmpp_2m,
}


def waking(sampler: Sampler, floors: Sequence[float]) -> Sampler:
    """The sampler with levels that sleep until their log-SNR reaches a floor.

    After a step a sleeping level is at alpha * (its estimate, which is the next coarser one
    enlarged) + sigma * (its noise at the start). When it wakes it goes on from there, and a
    multistep solver has the enlarged estimate as the one before.
    """

    def states(
        denoise: Denoiser, z: Pyramid, schedules: Schedules, times: Times, **options: Any
    ) -> Iterator[State]:
        steps = sampler(Enlarged(denoise, floors), z, schedules, times, **options)
        spans = {then.t: (now, then) for now, then in pairwise(instants(times, schedules))}
        for state in steps:
            now, then = spans[state.t]  # an edit may skip the first steps
            for level in range(len(now.awake(floors).levels), len(z)):
                noise = then.levels[level]
                latent = noise.alpha * state.x[level] + noise.sigma * z[level]
                state.z[level].copy_(latent)  # the sampler goes on from it
            yield state

    return states


JUMP = 10
"""Steps of a stretch that `resampling` takes again, as in RePaint."""


def resampling(sampler: Sampler, passes: int) -> Sampler:
    """The sampler with every stretch of `JUMP` steps taken several times.

    After a stretch, new noise leads back to its beginning, so that levels and pixels that disagree
    come to terms (RePaint, Lugmayr et al., 2022). The states of the last pass are shown.
    """

    def states(
        denoise: Denoiser,
        z: Pyramid,
        schedules: Schedules,
        times: Times,
        *,
        noise: NoiseSource,
        **options: Any,
    ) -> Iterator[State]:
        taken = 0
        for first in range(0, len(times) - 1, JUMP):
            stretch = times[first : first + JUMP + 1]
            begin, end = instants(stretch[[0, -1]], schedules)
            for left in reversed(range(passes)):
                later = partial(_later, noise, taken)
                for state in sampler(denoise, z, schedules, stretch, noise=later, **options):
                    z = state.z
                    if not left:
                        yield state._replace(step=first + state.step)
                taken += len(stretch) - 1
                if left:
                    z = _returned(z, end, begin, noise("return", taken))

    return states


def _later(noise: NoiseSource, steps: int, purpose: str, step: int) -> Pyramid:
    return noise(purpose, steps + step)


def _returned(z: Pyramid, clean: Instant, noisy: Instant, noise: Pyramid) -> Pyramid:
    """A draw from q(z_t | z_s) for an earlier time s, which is cleaner."""
    levels = []
    for z_r, noise_r, s, t in zip(z, noise, clean.levels, noisy.levels, strict=True):
        ratio = t.alpha / s.alpha
        spread = math.sqrt(max(t.sigma**2 - ratio**2 * s.sigma**2, 0.0))
        levels.append(ratio * z_r + spread * noise_r)
    return tuple(levels)


def last(states: Iterator[State]) -> State:
    """Run a sampler to its end.

    Raises:
        ValueError: there is no state, because the time grid has no step.
    """
    final = deque(states, maxlen=1)
    if not final:
        raise ValueError("a time grid needs at least one step")
    return final[0]
