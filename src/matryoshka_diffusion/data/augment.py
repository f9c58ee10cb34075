"""Geometric augmentation that does not leak into samples (after Karras et al. 2022, Appendix F.2,
with quarter turns in the place of its rotations).

Mirroring, quarter turns, zooming, stretching and moving happen to a share of the pictures each,
independently, and the network is told which and by how much. So it learns from more pictures than
there are, but what it learns of turned ones stays with turned ones: told that nothing was done, it
draws pictures as they are in the set.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch.nn import functional as F

from matryoshka_diffusion.conditioning import AUGMENT_NUMBERS
from matryoshka_diffusion.rng import stream

ZOOM = STRETCH = 0.2
"""Standard deviations in octaves."""
MOVE = 1 / 8
"""Standard deviation as a share of the side, in each direction."""

_COSINES, _SINES = (1.0, 0.0, -1.0, 0.0), (0.0, 1.0, 0.0, -1.0)


class Augmentation(NamedTuple):
    """What is done to a picture, in this order.

    Attributes:
        mirrored: left to right.
        quarter_turns: 0 to 3, anticlockwise.
        zoom: log2 of how much larger everything becomes.
        stretch: log2 of how much wider, and how much less high.
        right: how far everything moves, as a share of the side.
        down: the same.
    """

    mirrored: bool = False
    quarter_turns: int = 0
    zoom: float = 0.0
    stretch: float = 0.0
    right: float = 0.0
    down: float = 0.0

    def numbers(self) -> Float[np.ndarray, "7"]:
        """What the network is told: of order 1, and all 0 if nothing is done."""
        told = (
            float(self.mirrored),
            _COSINES[self.quarter_turns] - 1.0,
            _SINES[self.quarter_turns],
            self.zoom / ZOOM,
            self.stretch / STRETCH,
            self.right / MOVE,
            self.down / MOVE,
        )
        assert len(told) == AUGMENT_NUMBERS
        return np.array(told, np.float32)


def draw_augmentation(seed: int, n: int, share: float) -> Augmentation:
    """The augmentation of sample n: each transformation happens with probability `share`."""
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
    """The picture after `done`. Mirrors and turns move pixels; the rest samples between them."""
    picture = picture[:, ::-1] if done.mirrored else picture
    picture = np.rot90(picture, done.quarter_turns)
    return _resampled(picture, done) if any(done[2:]) else picture


def _resampled(picture: UInt8[np.ndarray, "side side c"], done: Augmentation) -> np.ndarray:
    """Zoom, stretch and move by bicubic interpolation; beyond the edge the picture is reflected."""
    wider, higher = 2.0 ** (done.zoom + done.stretch), 2.0 ** (done.zoom - done.stretch)
    # Where each new pixel comes from; the picture reaches from -1 to 1.
    back = [[1 / wider, 0.0, -2 * done.right / wider], [0.0, 1 / higher, -2 * done.down / higher]]
    x = torch.tensor(picture.copy(), dtype=torch.float32).permute(2, 0, 1)[None]
    places = F.affine_grid(torch.tensor([back]), list(x.shape), align_corners=False)
    new = F.grid_sample(x, places, mode="bicubic", padding_mode="reflection", align_corners=False)
    return new[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()
