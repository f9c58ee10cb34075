"""Memorisation: samples that lie nearer to a training image than training images to each other."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from matryoshka_diffusion.metrics.formulas import comparable, radii, row_blocks, squared_distances


def memorised(real: Float[np.ndarray, "n d"], made: Float[np.ndarray, "m e"]) -> float:
    """The share of samples that are not authentic.

    The measure is of Alaa et al. (2022), "How Faithful is your Synthetic Data?". A sample counts
    if it is nearer to its nearest training image than that image is to the nearest other one.
    Identical training images are one image, since a distance of 0 would hide every copy.

    Fresh images of the training distribution do not give 0: they count if they and their nearest
    training image are each other's nearest, which has the probability 2/3 in one dimension, 0.6215
    in two, and 1/2 in very many. Raises `ValueError` as `comparable` does, or if all training
    images are equal.
    """
    real, made = comparable(real, made, metric="memorised", least=2)
    real = np.unique(real, axis=0)
    if len(real) < 2:
        raise ValueError("memorised compares distances between training images, but all are equal")
    (own,) = radii(real, (1,))
    copies = 0
    for block in row_blocks(len(made), len(real)):
        distances = squared_distances(made[block], real)
        nearest = distances.argmin(axis=1)
        copies += int((distances.min(axis=1) < own[nearest]).sum())
    return copies / len(made)
