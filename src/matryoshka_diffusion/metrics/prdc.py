"""Precision, recall, density and coverage: how two sets of features overlap.

All four count points of one set inside balls around points of the other. The radius of a ball is
the distance of its centre to its k-th nearest neighbour in its own set.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from matryoshka_diffusion.metrics.rows import comparable, row_blocks, squared_distances

PRECISION_RECALL_K, DENSITY_COVERAGE_K = 3, 5


class PrecisionRecall(NamedTuple):
    """Shares of the samples in a ball around a real image, and of the real ones around a sample."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Both are about 1 where the sets come from one distribution.

    Attributes:
        density: number of balls around real images that hold a sample, over k; may exceed 1.
        coverage: share of the real images that have a sample in their ball.
    """

    density: float
    coverage: float


def precision_recall(
    real: Float[np.ndarray, "n d"], made: Float[np.ndarray, "m e"], *, k: int = PRECISION_RECALL_K
) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, Eq. 1 and 2), with closed balls.

    Both grow with the number of points, so compare results of equal counts only.
    Raises `ValueError` as `rows.comparable` does, for at most k rows on a side.
    """
    real, made = comparable(real, made, metric="precision and recall", least=k + 1)
    real_radii, made_radii = _radii(real, k), _radii(made, k)
    precise, recalled = np.zeros(len(made), dtype=bool), np.zeros(len(real), dtype=bool)
    for block in row_blocks(len(real), len(made)):
        distances = squared_distances(real[block], made)
        precise |= (distances <= real_radii[block, None]).any(axis=0)
        recalled[block] = (distances <= made_radii).any(axis=1)
    return PrecisionRecall(float(precise.mean()), float(recalled.mean()))


def density_coverage(
    real: Float[np.ndarray, "n d"], made: Float[np.ndarray, "m e"], *, k: int = DENSITY_COVERAGE_K
) -> DensityCoverage:
    """Density and coverage (Naeem et al. 2020), with open balls as in their code.

    Only balls around real images count, so outliers among the samples do no harm. Open balls make
    the density of a set in itself exactly 1: a ball holds its centre and k - 1 neighbours.
    Raises `ValueError` as `rows.comparable` does, for at most k rows on a side.
    """
    real, made = comparable(real, made, metric="density and coverage", least=k + 1)
    radii, inside, covered = _radii(real, k), 0, 0
    for block in row_blocks(len(real), len(made)):
        within = squared_distances(real[block], made) < radii[block, None]
        inside += int(within.sum())
        covered += int(within.any(axis=1).sum())
    return DensityCoverage(inside / (k * len(made)), covered / len(real))


def _radii(points: Float[np.ndarray, "n d"], k: int) -> Float[np.ndarray, " n"]:
    """Squared distance of each point to its k-th nearest neighbour, itself not counted."""
    radii = np.empty(len(points))
    for block in row_blocks(len(points), len(points)):
        distances = squared_distances(points[block], points)
        distances.partition(k, axis=1)
        radii[block] = distances[:, k]
    return radii
