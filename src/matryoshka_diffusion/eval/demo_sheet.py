"""The sheet that ends the demo: prompts, samples at every level, and the real pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from matryoshka_diffusion.draw import grid

if TYPE_CHECKING:
    from PIL.Image import Image
else:
    Image = Any

UNSEEN = "unseen combination"
UNSEEN_PROMPTS = ("purple apple", "blue banana", "green elephant", "pink airplane")
"""Things and colours that OpenMoji's captions have, but not together."""

_BLOCKS = 2  # 24 rows in one column would be three times as high as wide


def demo_sheet(
    levels: Sequence[UInt8[np.ndarray, "b _ _ c"]],
    captions: Sequence[str],
    real: Sequence[UInt8[np.ndarray, "_ _ c"] | None],
    *,
    title: str,
) -> Image:
    """All levels of every sample, side by side, with the real picture of its caption.

    Args:
        levels: the samples, coarse to fine, one batch a level.
        captions: their prompts.
        real: the training picture of each prompt; None marks the prompt as an unseen combination.
        title: one line above everything.

    Raises:
        ValueError: the lists do not have the same length.
    """
    rows = [[*row, picture] for row, picture in zip(zip(*levels, strict=True), real, strict=True)]
    return grid.grid(
        rows,
        captions=captions,
        marks=[UNSEEN if picture is None else None for picture in real],
        columns_titles=[*grid.titles_of_levels(levels), "real picture"],
        title=title,
        blocks=_BLOCKS,
    )
