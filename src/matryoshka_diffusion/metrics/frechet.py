"""The Fréchet distance between two sets of features, and the moments it needs.

Everything is float64: a covariance of 1,280 features is a difference of large sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from matryoshka_diffusion.metrics.checks import finite, same_width

GATHERED = 2048
"""Rows that moments are taken of at once; with 2,048 features, 32 MB in float64."""


@dataclass(frozen=True)
class Reference:
    """Moments that somebody published, such as `mu` and `sigma` of one of ADM's `.npz` files.

    How many pictures they are of is not known, so they can be compared with and not merged.

    Raises:
        ValueError: shapes that do not belong together, a value that is not finite, or a covariance
            that is not symmetric.
    """

    mean: Float[np.ndarray, " d"]
    covariance: Float[np.ndarray, "e f"]

    def __post_init__(self) -> None:
        width = len(self.mean)
        if self.covariance.shape != (width, width):
            raise ValueError(
                f"a mean of width {width} cannot have a covariance of {self.covariance.shape}"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise ValueError("the reference's mean or covariance has values that are not finite")
        tolerance = 1e-6 * float(np.abs(self.covariance).max(initial=0.0))
        if not np.allclose(self.covariance, self.covariance.T, rtol=0.0, atol=tolerance):
            raise ValueError("the reference's covariance is not symmetric")


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of the rows seen, in a form in which two of them can be merged.

    Attributes:
        count: rows seen.
        mean: their mean.
        scatter: sum over the rows of (x - mean)(x - mean)^T.
    """

    ARRAYS: ClassVar = ("count", "mean", "scatter")

    count: int
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]

    @staticmethod
    def of(features: Float[np.ndarray, "n d"]) -> Moments:
        """The moments of one batch.

        Raises:
            ValueError: no rows, or a value that is not finite.
        """
        rows = finite(features)
        if not len(rows):
            raise ValueError("there are no features to take the moments of")
        mean = rows.mean(axis=0)
        centred = rows - mean
        return Moments(len(rows), mean, centred.T @ centred)

    @staticmethod
    def stream(batches: Iterable[Float[np.ndarray, "_ d"]]) -> Moments:
        """The moments of many batches, of which only some are in memory. Raises as `of` does."""
        moments = map(Moments.of, _gathered(batches))
        first = next(moments, None)
        if first is None:
            raise ValueError("there are no features to take the moments of")
        return reduce(Moments.merge, moments, first)

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets together (Chan, Golub and LeVeque, 1979).

        Raises:
            ValueError: the features have different widths.
        """
        same_width(len(self.mean), len(other.mean))
        count = self.count + other.count
        step = other.mean - self.mean
        between = np.outer(step, step) * (self.count * other.count / count)
        return Moments(
            count, self.mean + step * (other.count / count), self.scatter + other.scatter + between
        )

    def as_arrays(self) -> dict[str, np.ndarray]:
        """What `from_arrays` takes."""
        return {"count": np.array(self.count), "mean": self.mean, "scatter": self.scatter}

    @staticmethod
    def from_arrays(arrays: Mapping[str, np.ndarray]) -> Moments:
        """The moments that `as_arrays` has written down."""
        return Moments(int(arrays["count"]), arrays["mean"], arrays["scatter"])

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """The unbiased estimate. Raises `ValueError` below two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, not {self.count}")
        return self.scatter / (self.count - 1)


def _gathered(batches: Iterable[Float[np.ndarray, "_ d"]]) -> Iterator[Float[np.ndarray, "_ d"]]:
    """Batches joined to `GATHERED` rows or more: merging moments costs as much as many rows do."""
    waiting, rows = [], 0
    for batch in batches:
        waiting.append(batch)
        rows += len(batch)
        if rows >= GATHERED:
            yield np.concatenate(waiting)
            waiting, rows = [], 0
    if waiting:
        yield np.concatenate(waiting)


def frechet_distance(a: Moments | Reference, b: Moments | Reference) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)): the squared 2-Wasserstein distance.

    On Inception's features this is FID (Heusel et al. 2017, Eq. 6).

    The last trace is that of a matrix which is not symmetric. It equals the sum of the singular
    values of S_a^(1/2) S_b^(1/2), whose factors are symmetric roots: real and stable also where
    there are fewer samples than features and S is singular.

    Raises:
        ValueError: fewer than two samples on a side, or features of different widths.
    """
    same_width(len(a.mean), len(b.mean))
    covariances = [side.covariance.astype(np.float64) for side in (a, b)]
    roots = [_symmetric_root(covariance) for covariance in covariances]
    overlap = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    spread = sum(np.trace(covariance) for covariance in covariances) - 2.0 * overlap
    # Between equal sets, rounding may leave less than nothing.
    return max(float(np.square(a.mean - b.mean).sum() + spread), 0.0)


def _symmetric_root(matrix: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
