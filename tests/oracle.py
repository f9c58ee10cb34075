"""Truth without a network: Gaussian images, whose posterior mean has a closed form.

For x ~ N(mu, S) and z^r = alpha^r D^r x + sigma^r eps^r, the posterior of x given *all* levels is
Gaussian, and its mean is affine in z. Every sampler that uses this mean is an affine map of its
noise. Pushing 0 and the unit vectors through the map gives the mean and the covariance of its
samples exactly. Everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import Prediction
from matryoshka_diffusion.diffusion import Network
from matryoshka_diffusion.pyramid import Pyramid, Resolution, build_pyramid
from matryoshka_diffusion.schedule import Instant, NoiseSchedule, Shifted


@dataclass(frozen=True)
class GaussianImages:
    """Images or clips of one channel, x ~ N(mean, covariance), with a schedule for each level.

    It is a `Denoiser`: E[D^r x | z^1..z^R] for every level. The rows of `features` are a linear map
    that takes the place of D^1.
    """

    mean: Tensor
    covariance: Tensor
    resolutions: tuple[Resolution, ...]
    schedules: tuple[NoiseSchedule, ...]
    features: Tensor | None = None

    @cached_property
    def pools(self) -> tuple[Tensor, ...]:
        """D^r as matrices, from its values at the unit vectors."""
        units = torch.eye(len(self.mean), dtype=torch.float64)
        return tuple(level.flatten(1).T for level in self.pyramid(units))

    def pyramid(self, numbers: Tensor) -> Pyramid:
        """All levels of images whose pixels are the rows of a matrix."""
        x = numbers.reshape(len(numbers), *self.resolutions[-1].shape(1))
        if self.features is None:
            return build_pyramid(x, self.resolutions)
        first = (numbers @ self.features.T).view(len(x), *self.resolutions[0].shape(1))
        return build_pyramid(x, self.resolutions, first)

    @cached_property
    def precision(self) -> Tensor:
        """S^-1."""
        return self.covariance.inverse()

    def posterior_covariance(self, t: Tensor, levels: int | None = None) -> Tensor:
        """Cov[x | z_t], (b, n, n): prior precision plus that of each level's observation."""
        precision = self.precision
        for pool, schedule in zip(self.pools[:levels], self.schedules, strict=False):
            precision = precision + schedule.log_snr(t).exp()[:, None, None] * (pool.T @ pool)
        return precision.inverse()

    def __call__(self, z: Pyramid, now: Instant) -> Pyramid:
        return self.posterior_mean(z, torch.full((len(z[0]),), now.t, dtype=torch.float64))

    def posterior_mean(self, z: Pyramid, t: Tensor) -> Pyramid:
        """The estimate from the levels in `z`, for rows that each have a time of their own."""
        times, which = t.unique(return_inverse=True)  # one solve for each time, however many rows
        evidence = (self.precision @ self.mean).expand(len(t), -1)
        for z_r, pool, schedule in zip(z, self.pools, self.schedules, strict=False):
            log_snr = schedule.log_snr(t)
            gain = log_snr.sigmoid().sqrt() / (-log_snr).sigmoid()  # alpha / sigma^2
            evidence = evidence + gain[:, None] * (z_r.flatten(1) @ pool)
        spread = self.posterior_covariance(times, len(z))[which]
        x = torch.einsum("bij,bj->bi", spread, evidence)
        return tuple((x @ pool.T).view_as(z_r) for z_r, pool in zip(z, self.pools, strict=False))

    def as_network(self, prediction: Prediction) -> Network:
        """A network of this kind of prediction with the same estimates."""

        def net(z: Pyramid, t: Tensor, cond: Conditioning) -> Pyramid:
            return tuple(
                prediction_of(prediction, x_r, z_r, schedule.log_snr(t))
                for x_r, z_r, schedule in zip(
                    self.posterior_mean(z, t), z, self.schedules, strict=True
                )
            )

        return net


def prediction_of(kind: Prediction, x: Tensor, z: Tensor, log_snr: Tensor) -> Tensor:
    """An estimate of x written as an estimate of x, eps or v = alpha eps - sigma x."""
    alpha, sigma = (
        part.sqrt().view(-1, *[1] * (z.ndim - 1))
        for part in (log_snr.sigmoid(), (-log_snr).sigmoid())
    )
    eps = (z - alpha * x) / sigma
    return {"x0": x, "eps": eps, "v": alpha * eps - sigma * x}[kind]


def small_world(base: NoiseSchedule) -> GaussianImages:
    """Levels of 1, 2 and 4 pixels; neighbours are correlated, the mean is not zero."""
    place = torch.arange(4, dtype=torch.float64)
    return GaussianImages(
        mean=torch.tensor([0.5, -0.2, 0.1, 0.3], dtype=torch.float64),
        covariance=0.25 * torch.exp(-(place[:, None] - place).abs() / 2),
        resolutions=(Resolution(1, 1), Resolution(1, 2), Resolution(1, 4)),
        schedules=tuple(Shifted(base, ratio, power=2.0) for ratio in (1.0, 2.0, 4.0)),
    )


def small_clips(base: NoiseSchedule) -> GaussianImages:
    """A pixel, two frames of a pixel, two frames of two pixels: refined in time, then in space.

    The first frame is at rest more often than the second one, so they differ for D^r.
    """
    world = small_world(base)
    spread = torch.tensor([0.5, 0.5, 1.5, 1.5], dtype=torch.float64)
    return replace(
        world,
        covariance=spread[:, None] * world.covariance * spread,
        resolutions=(Resolution(1, 1), Resolution(1, 1, 2), Resolution(1, 2, 2)),
    )


def small_features(base: NoiseSchedule) -> GaussianImages:
    """A feature of four pixels, which runs ahead of levels of 2 and 4 pixels.

    It is no mean of them, and no finer level determines it but the finest.
    """
    world = small_world(base)
    return replace(
        world,
        schedules=(Shifted(base, 0.5, power=2.0), *world.schedules[1:]),
        features=torch.tensor([[0.8, -1.1, 0.4, 0.6]], dtype=torch.float64),
    )


# --- pushing Gaussians through samplers ---------------------------------------------------------


class UnitNoise:
    """A `NoiseSource` whose row i is unit vector i - 1 of all numbers that a sampler draws.

    Row 0 is all zeros. With `steps = 0` only the start is counted, and steps add nothing.
    """

    def __init__(self, resolutions: Sequence[Resolution], steps: int) -> None:
        self.shapes = [resolution.shape(1) for resolution in resolutions]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.steps = steps
        self.rows = 1 + sum(self.sizes) * (1 + steps)

    def __call__(self, purpose: str, step: int) -> Pyramid:
        return tuple(self._units(step, level) for level in range(len(self.sizes)))

    def _units(self, step: int, level: int) -> Tensor:
        noise = torch.zeros(self.rows, self.sizes[level], dtype=torch.float64)
        if step <= self.steps:
            first = 1 + sum(self.sizes) * step + sum(self.sizes[:level])
            noise[first : first + self.sizes[level]].fill_diagonal_(1.0)
        return noise.view(-1, *self.shapes[level])

    def start(self) -> Pyramid:
        return self("start", 0)


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of an affine map of standard normal numbers, from its values at units."""
    flat = rows.flatten(1)
    columns = flat[1:] - flat[0]
    return flat[0], columns.T @ columns


def stacked(pyramid: Pyramid) -> Tensor:
    """All levels of each row in one vector."""
    return torch.cat([level.flatten(1) for level in pyramid], dim=1)


def no_noise(purpose: str, step: int) -> Pyramid:
    """A `NoiseSource` for samplers that must not draw."""
    raise AssertionError(f"a deterministic sampler drew noise at step {step}")
