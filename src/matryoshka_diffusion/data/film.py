"""Many pictures in one array on disk: one after the other, each along its longer side.

They share their shorter side and nothing else, so squares and panoramas lie in the same file, and
none takes more room than its pixels. A clip is its frames, one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import UInt8

from matryoshka_diffusion.data.store import open_array
from matryoshka_diffusion.files import write_atomically

Shape = tuple[int, int]
"""Height and width."""


@dataclass(frozen=True, eq=False)
class Film:
    """Pictures, or clips, by their number.

    Attributes:
        rows: all pictures; those that are wider than high lie on their side.
        shapes: one a picture or clip, (0, 0) where there is none.
        frames: of each clip; None for pictures.
    """

    rows: UInt8[np.ndarray, "length side channels"]
    shapes: Sequence[Shape]
    frames: int | None = None

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *(max(shape) for shape in self.shapes)])

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "*frames h w c"]:
        (height, width), count = self.shapes[index], self.frames or 1
        length = max(height, width)
        start = count * self._starts[index]
        strip = self.rows[start : start + count * length]
        strip = strip.reshape(count, length, *strip.shape[1:])
        upright = strip if height >= width else strip.swapaxes(1, 2)
        return upright[0] if self.frames is None else upright


def write_film(
    path: Path,
    pictures: Iterable[UInt8[np.ndarray, "*frames h w c"]],
    side: int,
    channels: int,
    *,
    needed: int,
) -> None:
    """Write pictures or clips whose shorter side is `side` as they come, but not what is empty.

    Args:
        needed: bytes that it will take at least, for the error of a full disk.

    Raises:
        OSError: the file cannot be written.
    """

    def write(file: BinaryIO) -> None:
        length = 0
        _write_header(file, (0, side, channels))
        begun = file.tell()
        for picture in pictures:
            *frames, height, width, _ = picture.shape
            upright = picture if height >= width else picture.swapaxes(-3, -2)
            file.write(upright.tobytes())
            length += math.prod(frames) * max(height, width)
        file.seek(0)
        _write_header(file, (length, side, channels))
        assert file.tell() == begun, "numpy leaves room in a header for a longer first axis"

    write_atomically(path, write, needed=needed)


def _write_header(file: BinaryIO, shape: tuple[int, int, int]) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def open_film(
    path: Path, side: int, channels: int, shapes: Sequence[Shape], frames: int | None = None
) -> Film | None:
    """The film that `write_film` wrote, memory-mapped; None, with a warning, if it is another."""
    length = (frames or 1) * sum(max(shape) for shape in shapes)
    rows = open_array(path, (length, side, channels))
    return None if rows is None else Film(rows, shapes, frames)
