"""The formulas of metrics, from arrays to numbers.

Distances between two sets of features, and how much the sets overlap; then metrics of the pixels
themselves: agreement of levels, motion of clips, prompt retrieval. Features are rows, computed with
in float64. Where a metric looks at pairs of rows, it does so a block at a time, so that n x m
numbers never lie in memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8

from matryoshka_diffusion.pyramid import down_sample, resolution_of
from matryoshka_diffusion.rng import stream

BLOCK_PAIRS = 1 << 24  # pairs of rows at a time: 128 MiB
SUBSETS, SUBSET_SIZE = 100, 1000  # of a kernel distance
CLOSED_K, OPEN_K = 3, 5  # neighbours in the balls of precision and recall, density and coverage
SLIGHT = 1.0 / 255.0
"""Half a byte, on the scale of [-1, 1]: below it a clip is still, or little of it moves."""

SIDE = 16  # of the averages that prompt retrieval compares
NEAREST = 5

_Rows = Float[np.ndarray, "_ d"]


class Estimate(NamedTuple):
    """Mean and standard deviation over subsets or splits of the samples."""

    mean: float
    std: float


def finite(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Convert to float64. Raises `ValueError` with the first row that is not finite."""
    rows = features.astype(np.float64)
    if not np.isfinite(rows).all():
        bad = int(np.argwhere(~np.isfinite(rows).all(axis=1))[0, 0])
        raise ValueError(f"row {bad} of the features is not finite")
    return rows


def comparable(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m e"], *, metric: str, least: int
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "m d"]]:
    """Convert two sets to float64.

    Raises `ValueError` for fewer than `least` rows, different widths or values that are not finite.
    """
    if min(len(a), len(b)) < least:
        counts = f"not {len(a):,} and {len(b):,}"
        raise ValueError(f"{metric} takes at least {least:,} samples on each side, {counts}")
    _refuse_widths(a.shape[1], b.shape[1])
    return finite(a), finite(b)


def _refuse_widths(a: int, b: int) -> None:
    if a != b:
        raise ValueError(f"features of width {a} cannot be compared with features of width {b}")


def unit(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Divide each row by its length. Raises `ValueError` if one is zero or not finite."""
    rows = finite(features)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not lengths.all():
        raise ValueError(f"row {int(lengths.argmin())} of the features is zero")
    return rows / lengths


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Cut `rows` into slices, each with at most `BLOCK_PAIRS` pairs with `columns`."""
    size = max(1, BLOCK_PAIRS // max(columns, 1))
    return (slice(first, min(first + size, rows)) for first in range(0, rows, size))


def squared_distances(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]
) -> Float[np.ndarray, "n m"]:
    """|a_i - b_j|^2 by one matrix product; in float64 its rounding does not matter."""
    squares = a @ b.T
    squares *= -2.0  # in place from here on: a block is large
    squares += np.square(a).sum(axis=1)[:, None]
    squares += np.square(b).sum(axis=1)
    return np.maximum(squares, 0.0, out=squares)


# --- Fréchet distance --------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Mean of `count` rows and their scatter, the sum of (x - mean)(x - mean)^T.

    Published moments, of an unknown number of rows, have the count 2 and their covariance as the
    scatter.
    """

    count: int
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]

    @staticmethod
    def of(features: Float[np.ndarray, "n d"]) -> Moments:
        """Take the moments of features in memory. Raises as `stream` does."""
        return Moments.stream([features])

    @staticmethod
    def stream(batches: Iterable[Float[np.ndarray, "_ d"]]) -> Moments:
        """Take the moments of many batches, one of them in memory.

        Sums are taken about the mean of the first batch: a large mean would cost digits. Raises
        `ValueError` without rows, for different widths or values that are not finite.
        """
        count, shift, sums, squares = 0, np.empty(0), np.empty(0), np.empty(0)
        for rows in map(finite, batches):
            if not count:
                shift = rows.mean(axis=0) if len(rows) else np.zeros(rows.shape[1])
                sums, squares = np.zeros(len(shift)), np.zeros((len(shift), len(shift)))
            _refuse_widths(len(shift), rows.shape[1])
            centred = rows - shift
            count += len(rows)
            sums += centred.sum(axis=0)
            squares += centred.T @ centred
        if not count:
            raise ValueError("there are no features to take the moments of")
        return Moments(count, shift + sums / count, squares - np.outer(sums, sums / count))

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """Unbiased estimate of the covariance. Raises `ValueError` below two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, not {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)): the squared 2-Wasserstein distance.

    On Inception's features this is FID (Heusel et al. 2017, Eq. 6). The last trace is the sum of
    the singular values of S_a^(1/2) S_b^(1/2). Both symmetric roots are real and stable even where
    S is singular, with fewer samples than features.

    Raises `ValueError` for fewer than two samples on a side, or features of different widths.
    """
    _refuse_widths(len(a.mean), len(b.mean))
    covariances = [side.covariance for side in (a, b)]
    roots = [symmetric_root(covariance) for covariance in covariances]
    overlap = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    spread = sum(np.trace(covariance) for covariance in covariances) - 2.0 * overlap
    # Between equal sets, rounding may leave a negative number.
    return max(float(np.square(a.mean - b.mean).sum() + spread), 0.0)


def symmetric_root(matrix: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    """The symmetric square root of a covariance; eigenvalues below zero are rounding."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T


# --- kernel distances --------------------------------------------------------------------------
# MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y) (Gretton et al. 2012, "A kernel two-sample test")
# assumes no Gaussians, and few samples do not bias it.


def kernel_distance(
    real: Float[np.ndarray, "n d"],
    made: Float[np.ndarray, "m e"],
    *,
    subsets: int = SUBSETS,
    size: int = SUBSET_SIZE,
) -> Estimate:
    """KID (Bińkowski et al. 2018, "Demystifying MMD GANs") on any features.

    The unbiased MMD^2 with the kernel (x . y / d + 1)^3, averaged over random subsets. The rows of
    subset i depend on i and on the number of rows alone. Between similar sets it may be negative.

    Raises `ValueError` as `comparable` does.
    """
    real, made = comparable(real, made, metric="the kernel distance", least=max(size, 2))
    values = []
    for index in range(subsets):
        x, y = (
            rows[stream(0, f"kernel distance {side}", index).choice(len(rows), size, replace=False)]
            for rows, side in ((real, "real"), (made, "made"))
        )
        # MMD_u^2 (Gretton et al. 2012, Eq. 3): a row is not paired with itself.
        within = sum(k.sum() - k.trace() for k in (cubic(x, x), cubic(y, y)))
        values.append(float(within / (size * (size - 1)) - 2.0 * cubic(x, y).mean()))
    return Estimate(float(np.mean(values)), float(np.std(values)))


def cubic(x: _Rows, y: _Rows) -> Float[np.ndarray, "n m"]:
    """The kernel of KID, (x . y / d + 1)^3."""
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def gaussian(x: _Rows, y: _Rows) -> Float[np.ndarray, "n m"]:
    """The kernel of CMMD, exp(-|x - y|^2 / (2 10^2))."""
    return np.exp(-squared_distances(x, y) / (2.0 * 10.0**2))


def cmmd(real: Float[np.ndarray, "n d"], made: Float[np.ndarray, "m e"]) -> float:
    """CMMD (Jayasumana et al. 2024, "Rethinking FID") on the image embeddings of a CLIP.

    1000 MMD^2 between embeddings of length 1, with the kernel exp(-|x - y|^2 / (2 10^2)). As in
    the published code the estimate is the biased one (Gretton et al. 2012, Eq. 5), which also pairs
    rows with themselves: never negative, and 0 between equal sets. It needs float64, because it is
    a difference of numbers close to 1.

    Raises `ValueError` as `comparable` and `unit` do.
    """
    x, y = map(unit, comparable(real, made, metric="CMMD", least=1))

    def mean(a: _Rows, b: _Rows) -> float:
        """Mean of the kernel over all pairs."""
        blocks = row_blocks(len(a), len(b))
        return float(sum(gaussian(a[block], b).sum() for block in blocks)) / (len(a) * len(b))

    return max(1000.0 * (mean(x, x) + mean(y, y) - 2.0 * mean(x, y)), 0.0)


# --- overlap -----------------------------------------------------------------------------------


class Overlap(NamedTuple):
    """Shares of points of one set in balls around points of the other.

    Attributes:
        precision: share of the samples in a closed ball around a real image.
        recall: share of the real images in a closed ball around a sample.
        density: number of open balls around real images that hold a sample, over k; may exceed 1.
        coverage: share of the real images that have a sample in their open ball.
        density_error: standard error of the density, which is no share.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    density_error: float


def overlap(
    real: Float[np.ndarray, "n d"],
    made: Float[np.ndarray, "m e"],
    *,
    closed_k: int = CLOSED_K,
    open_k: int = OPEN_K,
) -> Overlap:
    """Improved precision and recall (Kynkäänniemi et al. 2019, Eq. 1 and 2), density and coverage.

    The radius of a ball is the distance of its centre to its k-th nearest neighbour in its own set.
    Precision and recall grow with the number of points, so compare results of equal counts only.
    For density and coverage (Naeem et al. 2020) only balls around real images count, so outliers
    among the samples do no harm. As in their code the balls are open, which makes the density of a
    set in itself exactly 1: a ball holds its centre and k - 1 neighbours.

    Raises `ValueError` as `comparable` does, for at most k rows on a side.
    """
    real, made = comparable(real, made, metric="overlap", least=max(closed_k, open_k) + 1)
    closed, opened = radii(real, (closed_k, open_k))
    (made_radii,) = radii(made, (closed_k,))
    precise, recalled = np.zeros(len(made), dtype=bool), np.zeros(len(real), dtype=bool)
    inside, covered = np.zeros(len(made)), 0
    for block in row_blocks(len(real), len(made)):
        distances = squared_distances(real[block], made)
        precise |= (distances <= closed[block, None]).any(axis=0)
        recalled[block] = (distances <= made_radii).any(axis=1)
        within = distances < opened[block, None]
        inside += within.sum(axis=0)
        covered += int(within.any(axis=1).sum())
    shares = float(precise.mean()), float(recalled.mean())
    balls = inside / open_k  # around real images, that hold a sample
    error = float(balls.std(ddof=1)) / math.sqrt(len(made))
    return Overlap(*shares, float(balls.mean()), covered / len(real), error)


def radii(points: _Rows, ks: tuple[int, ...]) -> Float[np.ndarray, "k n"]:
    """Squared distances of each point to its k-th nearest neighbours, itself not counted."""
    radii = np.empty((len(ks), len(points)))
    for block in row_blocks(len(points), len(points)):
        distances = squared_distances(points[block], points)
        distances.partition(ks, axis=1)
        radii[:, block] = distances[:, ks].T
    return radii


# --- pixels -------------------------------------------------------------------------------------


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

    Raises `ValueError` as `comparable` does, or if none of the real clips moves.
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
    _, first, twins = np.unique(training, axis=0, return_index=True, return_inverse=True)
    wanted = first[twins.reshape(-1)[prompted]]  # of the twins the one with the lowest index
    places, nearer = np.arange(len(training)), np.empty(len(samples), np.int64)
    for block in row_blocks(len(samples), len(training)):
        distances, index = squared_distances(samples[block], training), wanted[block, None]
        own = np.take_along_axis(distances, index, axis=1)
        nearer[block] = ((distances < own) | ((distances == own) & (places < index))).sum(axis=1)
    return Retrieval(float((nearer == 0).mean()), float((nearer < NEAREST).mean()))


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
