"""The Inception score: are samples of a clear class each, and of many classes together?"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from matryoshka_diffusion.metrics.checks import finite

SPLITS = 10


class InceptionScore(NamedTuple):
    """Mean and standard deviation over the splits, between 1 and the number of classes."""

    mean: float
    std: float


def inception_score(
    probabilities: Float[np.ndarray, "n classes"], *, splits: int = SPLITS
) -> InceptionScore:
    """IS (Salimans et al. 2016, Section 4): exp E KL(p(y | x) || p(y)), p(y) the mean in a split.

    The samples are cut into `splits` parts in the order in which they come, as in the published
    code, so they must not be sorted by class. Parts with fewer samples than classes bias it
    (`naming.split_flag`).

    Raises:
        ValueError: fewer samples than splits, or a row that is no distribution.
    """
    if len(probabilities) < splits:
        raise ValueError(
            f"the Inception score takes at least {splits} samples, one a split, "
            f"not {len(probabilities)}"
        )
    rows = finite(probabilities)
    wrong = (rows < 0.0).any(axis=1) | (np.abs(rows.sum(axis=1) - 1.0) > 1e-3)
    if wrong.any():
        raise ValueError(f"row {int(wrong.argmax())} of the probabilities is no distribution")
    scores = [_score(part) for part in _parts(rows, splits)]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def _parts(rows: Float[np.ndarray, "n c"], splits: int) -> list[Float[np.ndarray, "_ c"]]:
    bounds = [len(rows) * index // splits for index in range(splits + 1)]
    return [rows[first:last] for first, last in itertools.pairwise(bounds)]


def _score(rows: Float[np.ndarray, "n c"]) -> float:
    marginal = np.broadcast_to(rows.mean(axis=0), rows.shape)
    present = rows > 0.0  # p log p is 0 where p is 0
    divergence = (rows[present] * np.log(rows[present] / marginal[present])).sum() / len(rows)
    return float(np.exp(divergence))
