"""Maximum mean discrepancies between two sets of features: KID and CMMD.

MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y) (Gretton et al. 2012, "A kernel two-sample test").
Unlike the Fréchet distance it assumes no Gaussians, and few samples do not bias it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from matryoshka_diffusion.metrics.rows import comparable, row_blocks, squared_distances, unit
from matryoshka_diffusion.rng import stream

SUBSETS, SUBSET_SIZE = 100, 1000

_Rows = Float[np.ndarray, "_ d"]


class KernelDistance(NamedTuple):
    """Mean and standard deviation of MMD^2 over the subsets."""

    mean: float
    std: float


def kernel_distance(
    real: Float[np.ndarray, "n d"],
    made: Float[np.ndarray, "m e"],
    *,
    subsets: int = SUBSETS,
    size: int = SUBSET_SIZE,
) -> KernelDistance:
    """KID (Bińkowski et al. 2018, "Demystifying MMD GANs") on any features.

    The unbiased MMD^2 with the kernel (x . y / d + 1)^3, averaged over random subsets. The rows of
    subset i depend on i and on the number of rows alone. Between similar sets it may be negative.

    Raises `ValueError` as `rows.comparable` does.
    """
    real, made = comparable(real, made, metric="the kernel distance", least=max(size, 2))

    def subset(rows: _Rows, side: str, index: int) -> _Rows:
        purpose = f"kernel distance {side}"
        return rows[stream(0, purpose, index).choice(len(rows), size, replace=False)]

    values = [
        _unbiased(subset(real, "real", index), subset(made, "made", index))
        for index in range(subsets)
    ]
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def _unbiased(x: _Rows, y: _Rows) -> float:
    """MMD_u^2 (Gretton et al. 2012, Eq. 3): a row is not paired with itself."""
    count = len(x)
    within = sum(k.sum() - k.trace() for k in (_cubic(x, x), _cubic(y, y)))
    return float(within / (count * (count - 1)) - 2.0 * _cubic(x, y).mean())


def _cubic(x: _Rows, y: _Rows) -> Float[np.ndarray, "n m"]:
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def cmmd(real: Float[np.ndarray, "n d"], made: Float[np.ndarray, "m e"]) -> float:
    """CMMD (Jayasumana et al. 2024, "Rethinking FID") on the image embeddings of a CLIP.

    1000 MMD^2 between embeddings of length 1, with the kernel exp(-|x - y|^2 / (2 10^2)). As in
    the published code the estimate is the biased one (Gretton et al. 2012, Eq. 5), which also pairs
    rows with themselves: never negative, and 0 between equal sets. It needs float64, because it is
    a difference of numbers close to 1.

    Raises `ValueError` as `rows.comparable` and `rows.unit` do.
    """
    real, made = comparable(real, made, metric="CMMD", least=1)
    x, y = unit(real), unit(made)
    squared = _mean(_gaussian, x, x) + _mean(_gaussian, y, y) - 2.0 * _mean(_gaussian, x, y)
    return max(1000.0 * squared, 0.0)


def _gaussian(x: _Rows, y: _Rows) -> Float[np.ndarray, "n m"]:
    return np.exp(-squared_distances(x, y) / (2.0 * 10.0**2))


def _mean(kernel: Callable[[_Rows, _Rows], np.ndarray], x: _Rows, y: _Rows) -> float:
    """Mean of the kernel over all pairs, a block of rows at a time."""
    total = sum(kernel(x[block], y).sum() for block in row_blocks(len(x), len(y)))
    return float(total) / (len(x) * len(y))
