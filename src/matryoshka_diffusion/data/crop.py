"""What is shown of a file that holds more: a square of a picture, a clip of a video."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

CENTRE = 0.5


class Cut(NamedTuple):
    """What to cut out. Evenly spread numbers in [0, 1) make all possible cuts equally likely.

    Attributes:
        place: of the square along the longer side: 0 its beginning, towards 1 its end.
        start: of the clip among all that fit into the video: 0 the first one, towards 1 the last.
            None leaves it to the source. A picture has no such thing.
    """

    place: float = CENTRE
    start: float | None = None


def cut_square(
    picture: UInt8[np.ndarray, "*frames h w c"], place: float = CENTRE
) -> UInt8[np.ndarray, "*frames side side c"]:
    """The largest square at `place` along the longer side, the same one of all frames."""
    height, width, _ = picture.shape[-3:]
    side = min(height, width)
    top, left = (int(place * (length - side + 1)) for length in (height, width))
    return picture[..., top : top + side, left : left + side, :]
