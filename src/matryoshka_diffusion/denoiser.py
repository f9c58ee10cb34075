"""From a network to an estimate of the picture: the one thing that samplers see.

A `Denoiser` maps a noisy pyramid and a time to an estimate of the clean pyramid, E[x | z_t], and
nothing else. Guidance, thresholds and levels that were not trained to predict wrap a denoiser in
another one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import Threshold
from matryoshka_diffusion.diffusion import Network, Process, to_x0
from matryoshka_diffusion.pyramid import Pyramid, down_sample, resolution_of
from matryoshka_diffusion.schedule import NoiseSchedule, expand

MOST_NUMBERS = 2**24
"""That torch takes the quantile of; clips may have more."""


@runtime_checkable
class Denoiser(Protocol):
    """The estimate of x on every level. `z` has equally many rows on all levels."""

    def __call__(self, z: Pyramid, t: Float[Tensor, " b"]) -> Pyramid: ...


@dataclass(frozen=True)
class NetworkDenoiser:
    """A network under fixed conditions, read as estimates of x; no gradients flow through it."""

    net: Network
    process: Process
    cond: Conditioning

    @torch.no_grad()
    def __call__(self, z: Pyramid, t: Float[Tensor, " b"]) -> Pyramid:
        predictions = self.net(z, t.to(z[0]), self.cond)
        return tuple(
            to_x0(self.process.prediction, predicted.to(z_r), z_r, schedule.log_snr(t))
            for predicted, z_r, schedule in zip(predictions, z, self.process.schedules, strict=True)
        )


@dataclass(frozen=True)
class Guided:
    """Classifier-free guidance: u + w (c - u), with u the estimate without conditions.

    The estimate is affine in what a network predicts, so guiding x0 is guiding eps or v.

    Attributes:
        conditional: estimates with conditions.
        unconditional: estimates without; not called where no level has a weight other than 1.
        schedules: one for each level, which the interval is measured by.
        weights: w of each level.
        interval: the log-SNRs (low, high) within which a level is guided (arXiv 2404.07724).
        rescale: share by which the guided estimate's standard deviation is brought back to the
            conditional one's (arXiv 2305.08891).
    """

    conditional: Denoiser
    unconditional: Denoiser
    schedules: Sequence[NoiseSchedule]
    weights: Sequence[float]
    interval: tuple[float, float] = (-math.inf, math.inf)
    rescale: float = 0.0

    def __call__(self, z: Pyramid, t: Float[Tensor, " b"]) -> Pyramid:
        weights = self.active_weights(t)
        conditional = self.conditional(z, t)
        if all(weight == 1.0 for weight in weights):
            return conditional
        unconditional = self.unconditional(z, t)
        return tuple(
            self._rescaled(u + weight * (c - u), c)
            for u, c, weight in zip(unconditional, conditional, weights, strict=True)
        )

    def active_weights(self, t: Float[Tensor, " b"]) -> tuple[float, ...]:
        """Each level's weight at this time, which all rows share while sampling."""
        return active_weights(t[:1], self.schedules, self.weights, self.interval)

    def _rescaled(self, guided: Tensor, conditional: Tensor) -> Tensor:
        if self.rescale == 0.0:
            return guided
        axes = tuple(range(1, guided.ndim))
        ratio = conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
        return guided * (1.0 + self.rescale * (ratio - 1.0))


def active_weights(
    t: Float[Tensor, " 1"],
    schedules: Sequence[NoiseSchedule],
    weights: Sequence[float],
    interval: tuple[float, float],
) -> tuple[float, ...]:
    """Each level's weight of guidance at one time: 1 outside of the interval of log-SNRs."""
    low, high = interval
    return tuple(
        weight if low <= float(schedule.log_snr(t)) <= high else 1.0
        for schedule, weight in zip(schedules, weights, strict=True)
    )


@dataclass(frozen=True)
class Thresholded:
    """A denoiser whose estimates are kept inside the range of pixels, each level in its way."""

    denoiser: Denoiser
    thresholds: Sequence[Threshold]

    def __call__(self, z: Pyramid, t: Float[Tensor, " b"]) -> Pyramid:
        estimates = self.denoiser(z, t)
        return tuple(
            THRESHOLDS[name](x) for name, x in zip(self.thresholds, estimates, strict=True)
        )


@dataclass(frozen=True)
class Pooled:
    """A denoiser whose untrained levels take D^r of the finest estimate for their own.

    E[D^r x | z] is D^r E[x | z], since D^r is linear: with the finest level's estimate right, all
    are, and samplers keep every latent where training saw it. So a nest that was trained with the
    finest loss only is sampled in the extended space like any other.

    Attributes:
        untrained: one for each level, coarse to fine; the finest is trained.
    """

    denoiser: Denoiser
    untrained: Sequence[bool]

    def __call__(self, z: Pyramid, t: Float[Tensor, " b"]) -> Pyramid:
        estimates = self.denoiser(z, t)
        return tuple(
            down_sample(estimates[-1], resolution_of(x)) if pooled else x
            for x, pooled in zip(estimates, self.untrained, strict=True)
        )


def dynamic_threshold(
    x: Float[Tensor, "b ..."], quantile: float = 0.995, ceiling: float = 100.0
) -> Float[Tensor, "b ..."]:
    """Clip each picture to a quantile of its own |x|, at least 1, and scale that back to 1.

    Saturated pixels are pushed inwards instead of being cut off (Saharia et al., 2022).
    """
    extent = expand(_quantile(x.abs().flatten(1).float(), quantile).clamp(1.0, ceiling), x)
    return x.clamp(-extent, extent) / extent


def _quantile(rows: Float[Tensor, "b n"], q: float) -> Float[Tensor, " b"]:
    """The quantile of each row; of more numbers than torch takes, the nearest one of them."""
    count = rows.shape[1]
    if count <= MOST_NUMBERS:
        return torch.quantile(rows, q, dim=1)
    return rows.kthvalue(1 + round(q * (count - 1)), dim=1).values


THRESHOLDS: dict[Threshold, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "clip": lambda x: x.clamp(-1.0, 1.0),
    "dynamic": dynamic_threshold,
}
