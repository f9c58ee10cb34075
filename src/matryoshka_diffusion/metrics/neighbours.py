"""How two sets of features overlap: precision and recall, density and coverage.

All four ask whether points of one set lie in balls around points of the other, each as large as
the distance to its k-th nearest neighbour in its own set. Distances are taken a block of rows at a
time.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from matryoshka_diffusion.metrics.checks import comparable
from matryoshka_diffusion.metrics.pairs import row_blocks, squared_distances

PRECISION_RECALL_K = 3
DENSITY_COVERAGE_K = 5


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1].

    Attributes:
        precision: of the samples, how many lie in a ball around a real picture.
        recall: of the real pictures, how many lie in a ball around a sample.
    """

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Expected to be 1 and near 1 where both sets come from one distribution.

    Attributes:
        density: how many balls around real pictures a sample lies in, over k; not bounded by 1.
        coverage: of the real pictures, how many have a sample in their ball.
    """

    density: float
    coverage: float


def precision_recall(
    real: Float[np.ndarray, "n d"],
    made: Float[np.ndarray, "m e"],
    *,
    k: int = PRECISION_RECALL_K,
) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, Eq. 1 and 2), with closed balls.

    Compare numbers of equal counts only: both grow with the number of points.

    Raises:
        ValueError: not more than k rows on a side, different widths, or a value that is not finite.
    """
    real, made = comparable(real, made, metric="precision and recall", least=k + 1)
    real_radii, made_radii = _radii(real, k), _radii(made, k)
    precise = np.zeros(len(made), dtype=bool)
    recalled = np.zeros(len(real), dtype=bool)
    for block in row_blocks(len(real), len(made)):
        distances = squared_distances(real[block], made)
        precise |= (distances <= real_radii[block, None]).any(axis=0)
        recalled[block] = (distances <= made_radii).any(axis=1)
    return PrecisionRecall(float(precise.mean()), float(recalled.mean()))


def density_coverage(
    real: Float[np.ndarray, "n d"],
    made: Float[np.ndarray, "m e"],
    *,
    k: int = DENSITY_COVERAGE_K,
) -> DensityCoverage:
    """Density and coverage (Naeem et al. 2020), with open balls as in their code.

    Only balls around real pictures count, so that an outlier among the samples spoils nothing.
    Open balls make the density of a set in itself exactly 1: a ball holds its centre and k - 1
    neighbours.

    Raises:
        ValueError: not more than k rows on a side, different widths, or a value that is not finite.
    """
    real, made = comparable(real, made, metric="density and coverage", least=k + 1)
    radii = _radii(real, k)
    inside, covered = 0, 0
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
