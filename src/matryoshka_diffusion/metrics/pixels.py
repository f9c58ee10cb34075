"""Metrics of the pixels themselves: agreement of levels, motion of clips, prompt retrieval."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8

from matryoshka_diffusion.metrics.distances import comparable, squared_distances
from matryoshka_diffusion.pyramid import down_sample, resolution_of

SLIGHT = 1.0 / 255.0
"""Half a byte, on the scale of [-1, 1]: below it a clip is still, or little of it moves."""

SIDE = 16  # of the averages that prompt retrieval compares
NEAREST = 5


def level_agreement(
    levels: Sequence[UInt8[np.ndarray, "b ... c"]],
) -> Float[np.ndarray, "b coarser"]:
    """mean |D^r(x_R) - x_r| of every image or clip, for the levels r = 1 .. R - 1, coarse to fine.

    D^r is the area average that training images are reduced by (`pyramid.down_sample`). Levels
    that show one image differ by rounding alone, at most 1/510. Differences are in units of the
    full range (255). Raises `ValueError` for a level that does not divide the finest.
    """
    *coarse, finest = [torch.from_numpy(np.moveaxis(x, -1, 1) / 255.0) for x in levels]
    gaps = [(down_sample(finest, resolution_of(x)) - x).abs() for x in coarse]
    means = [gap.mean(dim=tuple(range(1, gap.ndim))).numpy() for gap in gaps]
    return np.stack(means, axis=1) if means else np.zeros((len(finest), 0))


def motion(clips: UInt8[np.ndarray, "b f h w c"]) -> Float[np.ndarray, " b"]:
    """mean |x_{t+1} - x_t| of every clip of two frames or more, over its pixels and frames.

    The differences are on the scale of [-1, 1], so in [0, 2].
    """
    count, frames = clips.shape[:2]
    total = np.zeros(count)
    for earlier, later in itertools.pairwise(clips.swapaxes(0, 1)):
        # The larger byte less the smaller: bytes cannot be negative.
        gaps = np.maximum(earlier, later) - np.minimum(earlier, later)
        total += gaps.reshape(count, -1).mean(axis=1)
    return total / (frames - 1) * (2.0 / 255.0)


class Motion(NamedTuple):
    """Two sets of clips compared by how much they move.

    Attributes:
        distance: 1-Wasserstein distance between the motions of both sets.
        ratio: mean motion of the samples over that of the real clips; 0 for still images.
        slight: share of the samples that move by less than `SLIGHT`; `slight_real` of the real.
    """

    distance: float
    ratio: float
    slight: float
    slight_real: float


def compare_motion(real: Float[np.ndarray, " n"], made: Float[np.ndarray, " m"]) -> Motion:
    """Compare the motions of samples with those of real clips.

    Raises `ValueError` as `distances.comparable` does, or if none of the real clips moves.
    """
    columns = comparable(real[:, None], made[:, None], metric="motion", least=1)
    real, made = (column[:, 0] for column in columns)
    if not real.any():
        raise ValueError("none of the real clips moves: there is nothing to compare motion with")
    slight, slight_real = (float((side < SLIGHT).mean()) for side in (made, real))
    return Motion(wasserstein(real, made), float(made.mean() / real.mean()), slight, slight_real)


def wasserstein(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " m"]) -> float:
    """1-Wasserstein distance of two sets of numbers: the integral of |F_a(x) - F_b(x)|."""
    values = np.sort(np.concatenate([a, b]))  # between neighbours, F is constant
    below = [np.searchsorted(np.sort(x), values[:-1], side="right") / len(x) for x in (a, b)]
    return float((np.abs(below[0] - below[1]) * np.diff(values)).sum())


class Retrieval(NamedTuple):
    """Shares of samples whose nearest training image, or one of the five nearest, is prompted."""

    first: float
    among_five: float


def prompt_retrieval(
    samples: Float[np.ndarray, "n d"],
    prompted: Int[np.ndarray, " n"],
    training: Float[np.ndarray, "m d"],
) -> Retrieval:
    """Find the training images nearest to each sample, for a model that learns them by heart.

    `samples` and `training` are `averages`; `prompted` is the index in `training` of the image that
    each sample's prompt belongs to. Among equal distances the lower index is nearer. Some images
    are identical (flags that two territories share): a twin of the prompted image is a hit.
    """
    order = np.argsort(squared_distances(samples, training), axis=1, kind="stable")
    twins = np.unique(training, axis=0, return_inverse=True)[1].reshape(-1)
    hits = twins[order[:, :NEAREST]] == twins[prompted][:, None]
    return Retrieval(float(hits[:, 0].mean()), float(hits.any(axis=1).mean()))


def averages(pictures: UInt8[np.ndarray, "n *frames s s c"]) -> Float[np.ndarray, "n d"]:
    """Average images to 16 pixels, one row each; a clip has those of all its frames.

    At 16 pixels the distance is about shape and colour, not about single pixels. For windows of
    2, 4, 8... pixels all of it is exact in float64, so that ties are ties. Raises `ValueError` if
    the side is no multiple of 16.
    """
    count, *frames, side, _, channels = pictures.shape
    if side % SIDE:
        raise ValueError(f"images of side {side} cannot be averaged to {SIDE} pixels")
    window = side // SIDE
    tiles = pictures.reshape(count, *frames, SIDE, window, SIDE, window, channels)
    small = tiles.mean(axis=(-4, -2), dtype=np.float64)
    return small.reshape(count, math.prod(small.shape[1:]))
