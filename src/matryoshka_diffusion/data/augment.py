"""Crops, and geometric augmentation that does not leak into samples.

Augmentation follows Karras et al. 2022, Appendix F.2, with quarter turns in place of rotations.
Each image is mirrored, turned, zoomed, stretched and moved, each with the same probability. The
network receives which of these happened and by how much. It receives zeros when it samples, and so
draws images as they are in the set.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch.nn import functional as F

from matryoshka_diffusion.conditioning import AUGMENT_NUMBERS
from matryoshka_diffusion.pyramid import Resolution
from matryoshka_diffusion.rng import stream

CENTRE = 0.5
ZOOM = STRETCH = 0.2  # standard deviations in octaves
MOVE = 1 / 8  # standard deviation as a share of the side, in each direction
_COSINES, _SINES = (1.0, 0.0, -1.0, 0.0), (0.0, 1.0, 0.0, -1.0)


class Cut(NamedTuple):
    """Part of a file to show. Uniform numbers in [0, 1) make all parts equally likely.

    Attributes:
        place: of what is cut out along the side that is longer: 0 is its beginning, towards 1 its
            end.
        start: of the clip among all that fit into the video; None for the source's usual place.
        shape: of the part, for an image that stands in for one of another shape; None for its own.
    """

    place: float = CENTRE
    start: float | None = None
    shape: Resolution | None = None


def cut_out(
    picture: UInt8[np.ndarray, "*frames h w c"], shape: Resolution, place: float = CENTRE
) -> UInt8[np.ndarray, "*frames y x c"]:
    """Part of this shape at `place` along the longer side, the same one of all frames."""
    height, width, _ = shape
    top = int(place * (picture.shape[-3] - height + 1))
    left = int(place * (picture.shape[-2] - width + 1))
    return picture[..., top : top + height, left : left + width, :]


class Augmentation(NamedTuple):
    """Transformations of an image, in the order in which they are applied."""

    mirrored: bool = False  # left to right
    quarter_turns: int = 0  # 0 to 3, anticlockwise
    zoom: float = 0.0  # log2 of the magnification
    stretch: float = 0.0  # log2 of how much wider, and how much less high
    right: float = 0.0  # movement as a share of the side
    down: float = 0.0

    def numbers(self) -> Float[np.ndarray, "7"]:
        """Condition for the network: numbers of order 1, all 0 without a transformation."""
        turned = _COSINES[self.quarter_turns] - 1.0, _SINES[self.quarter_turns]
        scaled = self.zoom / ZOOM, self.stretch / STRETCH, self.right / MOVE, self.down / MOVE
        numbers = np.array((float(self.mirrored), *turned, *scaled), np.float32)
        assert len(numbers) == AUGMENT_NUMBERS
        return numbers


def draw_augmentation(seed: int, n: int, share: float) -> Augmentation:
    """Draw the augmentation of sample n: each transformation has the probability `share`."""
    random = stream(seed, "augment", n)
    mirror, turn, zoom, stretch, move = (random.random(5) < share).tolist()
    turns = int(random.integers(1, 4))
    zoomed, stretched, right, down = random.standard_normal(4).tolist()
    return Augmentation(
        mirrored=mirror,
        quarter_turns=turns if turn else 0,
        zoom=ZOOM * zoomed if zoom else 0.0,
        stretch=STRETCH * stretched if stretch else 0.0,
        right=MOVE * right if move else 0.0,
        down=MOVE * down if move else 0.0,
    )


def augmented(
    picture: UInt8[np.ndarray, "side side c"], done: Augmentation
) -> UInt8[np.ndarray, "side side c"]:
    """Transform an image. Mirrors and turns move pixels; the rest is bicubic interpolation.

    Beyond its edge the image is reflected.
    """
    picture = np.rot90(picture[:, ::-1] if done.mirrored else picture, done.quarter_turns)
    if not any(done[2:]):
        return picture
    wider, higher = 2.0 ** (done.zoom + done.stretch), 2.0 ** (done.zoom - done.stretch)
    # Each row maps a new pixel to its origin; the image reaches from -1 to 1.
    back = [[1 / wider, 0.0, -2 * done.right / wider], [0.0, 1 / higher, -2 * done.down / higher]]
    x = torch.tensor(picture.copy(), dtype=torch.float32).permute(2, 0, 1)[None]
    places = F.affine_grid(torch.tensor([back]), list(x.shape), align_corners=False)
    new = F.grid_sample(x, places, mode="bicubic", padding_mode="reflection", align_corners=False)
    return new[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()
