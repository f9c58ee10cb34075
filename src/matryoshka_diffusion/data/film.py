"""Many pictures in one array on disk: one after the other, each along its longer side.

They share their shorter side and nothing else, so squares and panoramas lie in the same file, and
none takes more room than its pixels.
"""

from __future__ import annotations

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
    """Pictures by their number.

    Attributes:
        rows: all pictures; those that are wider than high lie on their side.
        shapes: one a picture, (0, 0) where there is none.
    """

    rows: UInt8[np.ndarray, "length side channels"]
    shapes: Sequence[Shape]

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *(max(shape) for shape in self.shapes)])

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "h w c"]:
        height, width = self.shapes[index]
        start = self._starts[index]
        strip = self.rows[start : start + max(height, width)]
        return strip if height >= width else strip.transpose(1, 0, 2)


def write_film(
    path: Path,
    pictures: Iterable[UInt8[np.ndarray, "h w c"]],
    side: int,
    channels: int,
    *,
    needed: int,
) -> None:
    """Write pictures whose shorter side is `side` as they come; what is empty is passed over.

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
            height, width = picture.shape[:2]
            upright = picture if height >= width else picture.transpose(1, 0, 2)
            file.write(upright.tobytes())
            length += max(height, width)
        file.seek(0)
        _write_header(file, (length, side, channels))
        assert file.tell() == begun, "numpy leaves room in a header for a longer first axis"

    write_atomically(path, write, needed=needed)


def _write_header(file: BinaryIO, shape: tuple[int, int, int]) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def open_film(path: Path, side: int, channels: int, shapes: Sequence[Shape]) -> Film | None:
    """The film that `write_film` wrote, memory-mapped; None, with a warning, if it is another."""
    rows = open_array(path, (sum(max(shape) for shape in shapes), side, channels))
    return None if rows is None else Film(rows, shapes)
