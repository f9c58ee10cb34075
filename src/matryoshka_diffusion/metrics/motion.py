"""How much do clips move, and do samples move as much as real clips?

Distances per frame look at one picture at a time: to them frames in any order, or one frame
repeated, are as good. Differences of neighbouring frames tell these apart.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from matryoshka_diffusion.metrics.checks import comparable

SLIGHT = 1.0 / 255.0
"""Half a byte. A clip that moves by less is still, or little of it moves: an eye that blinks."""

_SCALE = 2.0 / 255.0  # from bytes to [-1, 1]


class Motion(NamedTuple):
    """Two sets of clips by how much they move.

    Attributes:
        distance: 1-Wasserstein between the motions of both sets; 0 if they are distributed alike.
        ratio: mean motion of the samples over that of the real clips: 0 for still pictures.
        slight: the share of samples that move by less than `SLIGHT`.
        slight_real: the share of real clips that do.
    """

    distance: float
    ratio: float
    slight: float
    slight_real: float


def motion(clips: UInt8[np.ndarray, "b f h w c"]) -> Float[np.ndarray, " b"]:
    """mean |x_{t+1} - x_t| of every clip, over its pixels and pairs of neighbouring frames.

    One number a clip, so means over many clips add up however they are cut into batches.

    Returns:
        Differences on the scale of [-1, 1], so in [0, 2].

    Raises:
        ValueError: clips of fewer than two frames.
    """
    count, frames = clips.shape[:2]
    if frames < 2:
        raise ValueError("nothing moves in clips of one frame")
    total = np.zeros(count)
    for earlier, later in itertools.pairwise(clips.swapaxes(0, 1)):
        # The larger byte less the smaller: bytes cannot be negative.
        gaps = np.maximum(earlier, later) - np.minimum(earlier, later)
        total += gaps.reshape(count, -1).mean(axis=1)
    return total / (frames - 1) * _SCALE


def compare_motion(real: Float[np.ndarray, " n"], made: Float[np.ndarray, " m"]) -> Motion:
    """The motions of samples against those of real clips.

    Raises:
        ValueError: no clips on a side, a value that is not finite, or real clips none of which
            moves.
    """
    columns = comparable(real[:, None], made[:, None], metric="motion", least=1)
    real, made = (column[:, 0] for column in columns)
    refuse_still(real)
    return Motion(
        distance=wasserstein(real, made),
        ratio=float(made.mean() / real.mean()),
        slight=float((made < SLIGHT).mean()),
        slight_real=float((real < SLIGHT).mean()),
    )


def refuse_still(real: Float[np.ndarray, " n"]) -> None:
    """Raise ValueError if none of the real clips moves, whatever is compared with them."""
    if not real.any():
        raise ValueError("none of the real clips moves: there is nothing to compare motion with")


def wasserstein(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " m"]) -> float:
    """The 1-Wasserstein distance of two sets of numbers: the integral of |F_a(x) - F_b(x)|.

    Between two neighbours of all values the distribution functions are constant.

    Example:
        >>> wasserstein(np.array([0.0, 1.0]), np.array([3.0]))
        2.5
    """
    values = np.sort(np.concatenate([a, b]))
    shares = [_share_up_to(values[:-1], side) for side in (a, b)]
    return float((np.abs(shares[0] - shares[1]) * np.diff(values)).sum())


def _share_up_to(
    values: Float[np.ndarray, " k"], of: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " k"]:
    return np.searchsorted(np.sort(of), values, side="right") / len(of)
