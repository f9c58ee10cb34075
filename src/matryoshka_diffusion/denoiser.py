"""Denoisers: estimates of the clean image, E[x | z_t], which are all that samplers see.

A `Denoiser` maps a noisy pyramid and an instant to an estimate of the clean pyramid. Guidance,
thresholds, sleeping levels and untrained levels are denoisers that wrap another one.
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
from matryoshka_diffusion.pyramid import Pyramid, down_sample, resolution_of, up_sample
from matryoshka_diffusion.schedule import Instant, expand


@runtime_checkable
class Denoiser(Protocol):
    """An estimate of x on every level of `z` and `now`, which may be the first ones alone.

    All levels of `z` have the same number of rows.
    """

    def __call__(self, z: Pyramid, now: Instant) -> Pyramid: ...


@dataclass(frozen=True)
class NetworkDenoiser:
    """The estimate of x of a network under fixed conditions, without gradients.

    Predictions are copied: a compiled network may write its next ones over them (CUDA graphs).
    """

    net: Network
    process: Process
    cond: Conditioning

    @torch.no_grad()
    def __call__(self, z: Pyramid, now: Instant) -> Pyramid:
        t = z[0].new_full((len(z[0]),), now.t)
        predictions = self.net(z, t, self.cond)
        return tuple(
            to_x0(
                self.process.prediction, predicted.to(z_r, copy=True), z_r, level.alpha, level.sigma
            )
            for predicted, z_r, level in zip(predictions, z, now.levels, strict=True)
        )


@runtime_checkable
class Pair(Protocol):
    """A good and a weak estimate of x; the weak one may be of the first levels only."""

    @property
    def good(self) -> Denoiser: ...

    def __call__(self, z: Pyramid, now: Instant) -> tuple[Pyramid, Pyramid]: ...


@dataclass(frozen=True)
class ConditionPair:
    """The pair of one network with and without conditions.

    It is one call with twice the rows, which was measured to be no slower than two calls, and
    faster where batches are small: weights are read once, and a GPU gets its kernels once.

    Attributes:
        good: estimates with conditions.
        both: estimates of two copies of the rows, the first with and the second without conditions.
    """

    good: Denoiser
    both: Denoiser

    def __call__(self, z: Pyramid, now: Instant) -> tuple[Pyramid, Pyramid]:
        estimates = self.both(tuple(torch.cat([z_r, z_r]) for z_r in z), now)
        good, weak = zip(*(x.chunk(2) for x in estimates), strict=True)
        return good, weak


@dataclass(frozen=True)
class TwoModelPair:
    """The pair of a model and of a weaker one, which has only the first `levels` levels."""

    good: Denoiser
    weak: Denoiser
    levels: int

    def __call__(self, z: Pyramid, now: Instant) -> tuple[Pyramid, Pyramid]:
        first = now._replace(levels=now.levels[: self.levels])
        return self.good(z, now), self.weak(z[: self.levels], first)


@dataclass(frozen=True)
class Guided:
    """Guidance: weak + w (good - weak) for a good and a weak estimate of x.

    The weak estimate is that without conditions (classifier-free guidance), or that of a weaker
    model under the same ones (autoguidance, arXiv 2406.02507).

    The estimate of x is affine in the prediction, so guiding x0 is the same as guiding eps or v.

    Attributes:
        pair: both estimates; the good one alone for instants at which every weight is 1.
        weights: w of each level. Levels that the weak estimate lacks are not guided.
        interval: log-SNRs (low, high) of a level between which it is guided (arXiv 2404.07724).
        rescale: how far the standard deviation of the guided estimate returns to that of the
            good one, from 0 to 1 (arXiv 2305.08891).
    """

    pair: Pair
    weights: Sequence[float]
    interval: tuple[float, float] = (-math.inf, math.inf)
    rescale: float = 0.0

    def __call__(self, z: Pyramid, now: Instant) -> Pyramid:
        weights = active_weights(now, self.weights, self.interval)
        if all(weight == 1.0 for weight in weights):
            return self.pair.good(z, now)
        good, weak = self.pair(z, now)
        guided = tuple(
            x if weight == 1.0 else self._rescaled(u + weight * (x - u), x)
            for x, u, weight in zip(good, weak, weights, strict=False)
        )
        return guided + good[len(guided) :]

    def _rescaled(self, guided: Tensor, good: Tensor) -> Tensor:
        if self.rescale == 0.0:
            return guided
        axes = tuple(range(1, guided.ndim))
        ratio = good.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
        return guided * (1.0 + self.rescale * (ratio - 1.0))


def active_weights(
    now: Instant, weights: Sequence[float], interval: tuple[float, float]
) -> tuple[float, ...]:
    """The guidance weight of each level at an instant: 1 outside of the interval of log-SNRs."""
    low, high = interval
    return tuple(
        weight if low <= level.log_snr <= high else 1.0
        for level, weight in zip(now.levels, weights, strict=False)
    )


@dataclass(frozen=True)
class Thresholded:
    """Estimates kept inside the range of pixels, by one threshold for each level.

    The first `hidden` levels are of features, which have no range.
    """

    denoiser: Denoiser
    thresholds: Sequence[Threshold]
    hidden: int = 0

    def __call__(self, z: Pyramid, now: Instant) -> Pyramid:
        estimates = self.denoiser(z, now)
        pixels = zip(self.thresholds[self.hidden :], estimates[self.hidden :], strict=False)
        return (*estimates[: self.hidden], *(THRESHOLDS[name](x) for name, x in pixels))


@dataclass(frozen=True)
class Pooled:
    """Estimates of untrained levels replaced by D^r of the finest estimate.

    D^r is linear, so E[D^r x | z] = D^r E[x | z]: if the finest estimate is right, all are. A nest
    that was trained on the finest loss only is then sampled in the extended space as any other.

    Attributes:
        untrained: a flag for each level, coarse to fine. The finest level is trained.
    """

    denoiser: Denoiser
    untrained: Sequence[bool]

    def __call__(self, z: Pyramid, now: Instant) -> Pyramid:
        estimates = self.denoiser(z, now)
        return tuple(
            down_sample(estimates[-1], resolution_of(x)) if pooled else x
            for x, pooled in zip(estimates, self.untrained, strict=False)
        )


@dataclass(frozen=True)
class Regional:
    """Estimates under several conditions, each with its own weight at every pixel.

    Attributes:
        denoiser: estimates of as many copies of the rows as there are weights, each under its own
            condition. It is one call for all of them.
        weights: a pyramid for each condition, of one channel. They sum to one.
    """

    denoiser: Denoiser
    weights: Sequence[Pyramid]

    def __call__(self, z: Pyramid, now: Instant) -> Pyramid:
        copies = len(self.weights)
        estimates = self.denoiser(tuple(torch.cat([z_r] * copies) for z_r in z), now)
        return tuple(
            torch.stack([w * part for w, part in zip(weights, x.chunk(copies), strict=True)]).sum(0)
            for x, weights in zip(estimates, zip(*self.weights, strict=True), strict=False)
        )


@dataclass(frozen=True)
class Enlarged:
    """Estimates of sleeping levels replaced by the next coarser one, enlarged.

    The latent of a level below its floor is nearly pure noise, so the coarser levels know nearly
    all that is known about its image. The network works on the others only.

    Attributes:
        floors: the log-SNR from which each level is awake. The coarsest level always is.
    """

    denoiser: Denoiser
    floors: Sequence[float]

    def __call__(self, z: Pyramid, now: Instant) -> Pyramid:
        now = now.awake(self.floors)
        estimates = [*self.denoiser(z[: len(now.levels)], now)]
        for z_r in z[len(estimates) :]:
            estimates.append(up_sample(estimates[-1], resolution_of(z_r)))
        return tuple(estimates)


def dynamic_threshold(
    x: Float[Tensor, "b ..."], quantile: float = 0.995, ceiling: float = 100.0
) -> Float[Tensor, "b ..."]:
    """Clip each image to a quantile of its own |x|, at least 1, and divide by that quantile.

    Saturated pixels move inwards instead of being cut off (Saharia et al., 2022).
    """
    extent = upper_quantile(x.abs().flatten(1).float(), quantile)
    extent = expand(extent.clamp(1.0, ceiling), x)
    return x.clamp(-extent, extent) / extent


def upper_quantile(x: Float[Tensor, "b n"], quantile: float) -> Float[Tensor, " b"]:
    """A quantile of each row, as `torch.quantile`, which sorts whole rows of at most 2^24 numbers.

    It lies between two numbers of the row: the two least of those above the share of `quantile`.
    """
    place = quantile * (x.shape[1] - 1)
    first = math.floor(place)
    above = x.topk(x.shape[1] - first, dim=1, sorted=False).values
    two = above.topk(min(2, above.shape[1]), dim=1, largest=False).values
    return torch.lerp(two[:, 0], two[:, -1], place - first)


THRESHOLDS: dict[Threshold, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "clip": lambda x: x.clamp(-1.0, 1.0),
    "dynamic": dynamic_threshold,
}
