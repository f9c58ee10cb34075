"""Samples of held-out images: nearest to the held-out image, or to one that was trained on?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from matryoshka_diffusion.metrics.formulas import comparable, row_blocks, squared_distances


class Nearest(NamedTuple):
    """For each sample the nearest of all images, and how many others are as near as its own."""

    image: Int[np.ndarray, " n"]
    nearer: Int[np.ndarray, " n"]  # 0: the nearest image is the sample's own


def nearest_images(
    samples: Float[np.ndarray, "n d"],
    own: Int[np.ndarray, " n"],
    images: Float[np.ndarray, "m e"],
) -> Nearest:
    """Find the image nearest to each sample; `own` is the index of the one that it was made for.

    Among equal distances the own image is last, so one that has a twin (flags that two territories
    share) is never the nearest: its twin may have been trained on. Raises `ValueError` as
    `comparable` does.
    """
    images, samples = comparable(images, samples, metric="unseen", least=1)
    image, nearer = np.empty_like(own), np.empty_like(own)
    for block in row_blocks(len(samples), len(images)):
        index, distances = own[block, None], squared_distances(samples[block], images)
        distance = np.take_along_axis(distances, index, axis=1)
        np.put_along_axis(distances, index, np.inf, axis=1)
        nearer[block] = (distances <= distance).sum(axis=1)
        image[block] = np.where(nearer[block] == 0, own[block], distances.argmin(axis=1))
    return Nearest(image, nearer)
