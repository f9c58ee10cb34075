"""Animated WEBP and GIF as videos, through Pillow."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from matryoshka_diffusion.data.frames import MAX_PIXELS, Deadline, Times, check_count
from matryoshka_diffusion.data.images import PictureError, judge

_QUICKEST, _USUAL = 0.010, 0.100
"""Seconds. A frame that is to be shown for no longer than the first is shown for the second by all
browsers, since animations say 0 where they mean nothing in particular."""
_CHUNK, _FRAME = 8, b"ANMF"
_DURATION_AT, _DURATION_BYTES = 12, 3  # inside an ANMF chunk
_IMAGE, _EXTENSION, _TRAILER = b",", b"!", b";"  # what the blocks of a GIF begin with


class Animation:
    """A `Video`. Frames are put together from the first on, since each changes what was before."""

    def __init__(self, file: BinaryIO | io.BytesIO, form: str, deadline: Deadline) -> None:
        self._file, self._form, self._deadline = file, form, deadline
        if form == "GIF":
            self._find_trailer()
        file.seek(0)
        self._image = Image.open(file, formats=(form,))
        judge(*self._image.size, MAX_PIXELS)
        self.count: int = getattr(self._image, "n_frames", 1)
        check_count(self.count)

    def times(self) -> Times:
        durations = self._webp_durations() if self._form == "WEBP" else self._gif_durations()
        shown = [seconds if seconds > _QUICKEST else _USUAL for seconds in durations]
        ends = np.cumsum([0.0, *shown])
        return Times(ends[:-1], float(ends[-1]))

    def frames(self, wanted: Sequence[int]) -> Iterator[Image.Image]:
        for number in range(max(wanted) + 1):
            self._deadline.check()
            self._image.seek(number)
            self._image.load()
            if number in wanted:
                judge(*self._image.size, MAX_PIXELS)
                yield ImageOps.exif_transpose(self._image)

    def _webp_durations(self) -> Iterator[float]:
        """From the headers: Pillow tells the duration of a frame that it has decoded."""
        self._file.seek(12)
        found = 0
        while found < self.count and len(head := self._file.read(_CHUNK)) == _CHUNK:
            self._deadline.check()
            size = int.from_bytes(head[4:], "little")
            begun = self._file.tell()
            if head[:4] == _FRAME:
                self._file.seek(begun + _DURATION_AT)
                yield int.from_bytes(self._file.read(_DURATION_BYTES), "little") / 1000
                found += 1
            self._file.seek(begun + size + size % 2)
        yield from [0.0] * (self.count - found)

    def _find_trailer(self) -> None:
        """Raise PictureError if a GIF (GIF89a, 17 to 27) ends before its last block.

        Pillow counts the frames that it finds: one that is cut off would only be shorter.
        """
        self._file.seek(10)
        colours = _bytes_of_colours(self._next())
        self._file.seek(2 + colours, io.SEEK_CUR)
        while (mark := self._next()) != _TRAILER:
            if not mark:
                raise PictureError("truncated: the end marker of a GIF is missing")
            if mark == _IMAGE:
                self._file.seek(8, io.SEEK_CUR)
                self._file.seek(_bytes_of_colours(self._next()), io.SEEK_CUR)
            if mark in (_IMAGE, _EXTENSION):  # after a byte of their own, parts with their sizes
                self._file.seek(1, io.SEEK_CUR)
                while (size := self._next()) > b"\0":
                    self._file.seek(size[0], io.SEEK_CUR)

    def _next(self) -> bytes:
        """The next byte; none at the end of the file."""
        self._deadline.check()
        return self._file.read(1)

    def _gif_durations(self) -> Iterator[float]:
        for number in range(self.count):
            self._deadline.check()
            self._image.seek(number)
            yield self._image.info.get("duration", 0) / 1000


def _bytes_of_colours(packed: bytes) -> int:
    """How long the table of colours is that a byte of a GIF's header announces."""
    byte = int.from_bytes(packed, "big")
    return 3 * 2 ** (1 + (byte & 7)) if byte & 0x80 else 0
