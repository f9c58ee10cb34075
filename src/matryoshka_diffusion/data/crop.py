"""Where the square is cut out of a picture that is longer on one side."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8

CENTRE = 0.5


def cut_square(
    picture: UInt8[np.ndarray, "h w c"], place: float = CENTRE
) -> UInt8[np.ndarray, "side side c"]:
    """The largest square at `place` along the longer side: 0 its beginning, towards 1 its end.

    Evenly spread places in [0, 1) make all possible squares equally likely.
    """
    side = min(picture.shape[:2])
    top, left = (int(place * (length - side + 1)) for length in picture.shape[:2])
    return picture[top : top + side, left : left + side]
