"""Fréchet distance between two sets of features, and the moments that it needs, in float64."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce

import numpy as np
from jaxtyping import Float

from matryoshka_diffusion.metrics.rows import finite, same_width

GATHERED = 2048
"""Rows whose moments are taken together; with 2,048 features, 32 MB in float64."""


@dataclass(frozen=True)
class PublishedMoments:
    """Moments of an unknown number of rows, which can be compared but not merged."""

    mean: Float[np.ndarray, " d"]
    covariance: Float[np.ndarray, "d d"]


@dataclass(frozen=True)
class Moments:
    """Mean of `count` rows and their scatter, the sum of (x - mean)(x - mean)^T."""

    count: int
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]

    @staticmethod
    def of(features: Float[np.ndarray, "n d"]) -> Moments:
        """Take the moments of one batch. Raises `ValueError` without rows or if not finite."""
        rows = finite(features)
        if not len(rows):
            raise ValueError("there are no features to take the moments of")
        mean = rows.mean(axis=0)
        centred = rows - mean
        return Moments(len(rows), mean, centred.T @ centred)

    @staticmethod
    def stream(batches: Iterable[Float[np.ndarray, "_ d"]]) -> Moments:
        """Take the moments of many batches, a few of them in memory. Raises as `of` does."""
        moments = map(Moments.of, _gathered(batches))
        first = next(moments, None)
        if first is None:
            raise ValueError("there are no features to take the moments of")
        return reduce(Moments.merge, moments, first)

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets together (Chan, Golub and LeVeque, 1979).

        Raises `ValueError` if the features have different widths.
        """
        same_width(len(self.mean), len(other.mean))
        count = self.count + other.count
        step = other.mean - self.mean
        scatter = np.outer(step, step) * (self.count * other.count / count)
        mean = self.mean + step * (other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + scatter)

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """Unbiased estimate of the covariance. Raises `ValueError` below two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, not {self.count}")
        return self.scatter / (self.count - 1)


def _gathered(batches: Iterable[Float[np.ndarray, "_ d"]]) -> Iterator[Float[np.ndarray, "_ d"]]:
    """Join batches to at least `GATHERED` rows: one merge costs as much as many rows do."""
    waiting, rows = [], 0
    for batch in batches:
        waiting.append(batch)
        rows += len(batch)
        if rows >= GATHERED:
            yield np.concatenate(waiting)
            waiting, rows = [], 0
    if waiting:
        yield np.concatenate(waiting)


def frechet_distance(a: Moments | PublishedMoments, b: Moments | PublishedMoments) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)): the squared 2-Wasserstein distance.

    On Inception's features this is FID (Heusel et al. 2017, Eq. 6). The last trace is the sum of
    the singular values of S_a^(1/2) S_b^(1/2). Both symmetric roots are real and stable even where
    S is singular, with fewer samples than features.

    Raises `ValueError` for fewer than two samples on a side, or features of different widths.
    """
    same_width(len(a.mean), len(b.mean))
    covariances = [side.covariance.astype(np.float64) for side in (a, b)]
    roots = [_symmetric_root(covariance) for covariance in covariances]
    overlap = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    spread = sum(np.trace(covariance) for covariance in covariances) - 2.0 * overlap
    # Between equal sets, rounding may leave a negative number.
    return max(float(np.square(a.mean - b.mean).sum() + spread), 0.0)


def _symmetric_root(matrix: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
