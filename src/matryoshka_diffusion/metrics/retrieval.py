"""Prompt retrieval: does a sample look like the picture its prompt belongs to?

For a model that learns captioned pictures by heart there is a plain answer: find the training
picture nearest to the sample and see whether it is the prompted one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from matryoshka_diffusion.metrics.pairs import squared_distances
from matryoshka_diffusion.rng import choose

SIDE = 16
NEAREST = 5
CAPTIONS = 128
SEED = 1_000_000
"""Of samples that are measured: far from what people try, so that nobody tunes on them."""


class Retrieval(NamedTuple):
    """Shares of the samples, each in [0, 1].

    Attributes:
        first: those whose nearest training picture is the prompted one.
        among_five: those that have the prompted picture among their five nearest.
        count: how many samples there were.
    """

    first: float
    among_five: float
    count: int

    def __str__(self) -> str:
        return (
            f"prompt retrieval over {self.count} captions: {self.first:.3f} nearest, "
            f"{self.among_five:.3f} among the five nearest"
        )


def choose_captions(
    captions: Sequence[tuple[str, ...]],
) -> tuple[Int[np.ndarray, " n"], list[str]]:
    """128 pictures (all, of fewer) and a caption of each, the same ones for every model.

    Args:
        captions: those of each picture.
    """
    chosen = choose(len(captions), min(CAPTIONS, len(captions)), "retrieval")
    return chosen, [captions[index][0] for index in chosen]


def prompt_retrieval(
    samples: UInt8[np.ndarray, "n *frames s s c"],
    prompted: Int[np.ndarray, " n"],
    training: UInt8[np.ndarray, "m *frames t t c"],
) -> Retrieval:
    """Compare every sample with all training pictures, by squared distance at 16 pixels.

    Both are averaged down to 16 pixels, where the distance is about shape and colour and not about
    single pixels. Among equal distances the lower index is nearer. Some pictures are bit-identical
    (flags that two territories share): no picture can tell their captions apart, so finding a twin
    of the prompted picture is a hit.

    Args:
        samples: one sample for each prompt; any side that is a multiple of 16.
        prompted: the index in `training` of the picture that each prompt belongs to.
        training: all pictures; any side that is a multiple of 16.

    Raises:
        ValueError: no samples, an index outside `training`, or a side that is no multiple of 16.
    """
    return retrieval_of_averages(averages(samples), prompted, averages(training))


def retrieval_of_averages(
    drawn: Float[np.ndarray, "n d"],
    prompted: Int[np.ndarray, " n"],
    known: Float[np.ndarray, "m d"],
) -> Retrieval:
    """`prompt_retrieval` of samples and training pictures of which only `averages` are left."""
    if not len(drawn):
        raise ValueError("prompt retrieval needs at least one sample")
    if prompted.min() < 0 or prompted.max() >= len(known):
        raise ValueError(f"prompted has indices outside 0 .. {len(known) - 1}")
    order = np.argsort(squared_distances(drawn, known), axis=1, kind="stable")
    twins = np.unique(known, axis=0, return_inverse=True)[1].reshape(-1)
    hits = twins[order[:, :NEAREST]] == twins[prompted][:, None]
    return Retrieval(float(hits[:, 0].mean()), float(hits.any(axis=1).mean()), len(drawn))


def averages(pictures: UInt8[np.ndarray, "n *frames s s c"]) -> Float[np.ndarray, "n d"]:
    """Area averages at 16 pixels, one row for each picture; of a clip those of all its frames.

    For windows of 2, 4, 8... pixels they and all that is computed from them here are exact in
    float64, so that ties are ties.
    """
    count, *frames, side, _, channels = pictures.shape
    if side % SIDE:
        raise ValueError(f"pictures of side {side} cannot be averaged to {SIDE} pixels")
    window = side // SIDE
    tiles = pictures.reshape(count, *frames, SIDE, window, SIDE, window, channels)
    small = tiles.mean(axis=(-4, -2), dtype=np.float64)
    return small.reshape(count, math.prod(small.shape[1:]))
