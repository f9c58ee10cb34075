"""The Fréchet distance between two sets of features, and the moments it needs.

Everything is float64: a covariance of 1,280 features is a difference of large sums.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of the rows seen, in a form in which two of them can be merged.

    Attributes:
        count: rows seen.
        mean: their mean.
        scatter: sum over the rows of (x - mean)(x - mean)^T.
    """

    count: int
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]

    @staticmethod
    def of(features: Float[np.ndarray, "n d"]) -> Moments:
        """The moments of one batch.

        Raises:
            ValueError: no rows, or a value that is not finite.
        """
        rows = features.astype(np.float64)
        if not len(rows):
            raise ValueError("there are no features to take the moments of")
        if not np.isfinite(rows).all():
            bad = int(np.argwhere(~np.isfinite(rows).all(axis=1))[0, 0])
            raise ValueError(f"row {bad} of the features is not finite")
        mean = rows.mean(axis=0)
        centred = rows - mean
        return Moments(len(rows), mean, centred.T @ centred)

    @staticmethod
    def stream(batches: Iterable[Float[np.ndarray, "_ d"]]) -> Moments:
        """The moments of many batches, of which only one is in memory. Raises as `of` does."""
        moments = map(Moments.of, batches)
        first = next(moments, None)
        if first is None:
            raise ValueError("there are no features to take the moments of")
        return reduce(Moments.merge, moments, first)

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets together (Chan, Golub and LeVeque, 1979).

        Raises:
            ValueError: the features have different widths.
        """
        _same_width(self, other)
        count = self.count + other.count
        step = other.mean - self.mean
        between = np.outer(step, step) * (self.count * other.count / count)
        return Moments(
            count, self.mean + step * (other.count / count), self.scatter + other.scatter + between
        )

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """The unbiased estimate. Raises `ValueError` below two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, not {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)): the squared 2-Wasserstein distance.

    The last trace is that of a matrix which is not symmetric. It equals the sum of the singular
    values of S_a^(1/2) S_b^(1/2), whose factors are symmetric roots: real and stable also where
    there are fewer samples than features and S is singular.

    Raises:
        ValueError: fewer than two samples on a side, or features of different widths.
    """
    _same_width(a, b)
    roots = _symmetric_root(a.covariance) @ _symmetric_root(b.covariance)
    overlap = np.linalg.svd(roots, compute_uv=False).sum()
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * overlap
    # Between equal sets, rounding may leave less than nothing.
    return max(float(np.square(a.mean - b.mean).sum() + spread), 0.0)


def _symmetric_root(matrix: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T


def _same_width(a: Moments, b: Moments) -> None:
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of width {len(a.mean)} cannot meet those of {len(b.mean)}")
