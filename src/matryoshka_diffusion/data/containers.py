"""MP4, MOV, WEBM, MKV and AVI as videos, through PyAV (FFmpeg).

A first pass over the file collects when its frames are shown and decodes none of them, so their
number is counted and not believed. Then, in formats whose time stamps can be trusted, decoding
begins at the last key frame before the first frame that is wanted; in AVI it begins at the first
frame, and frames are counted.
"""

from __future__ import annotations

import io
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from matryoshka_diffusion.data.frames import MAX_PIXELS, Deadline, Times, check_count
from matryoshka_diffusion.data.images import PictureError, judge
from matryoshka_diffusion.files import require

_SEEKABLE = frozenset({"mov", "matroska"})
_VP8_SHOWN = 0x10
"""In a packet's first byte (RFC 6386, 9.1). VP8 also stores frames that are only referred to; later
codecs put those into the packet of one that is shown."""
_LATEST = 16  # frames, the most that H.264 keeps back
_WIDEST = 4.0  # pixels: what claims to be wider or narrower than that is not believed
_UPRIGHT = {
    90: Image.Transpose.ROTATE_90,
    -90: Image.Transpose.ROTATE_270,
    180: Image.Transpose.ROTATE_180,
    -180: Image.Transpose.ROTATE_180,
}
"""What undoes the rotation that a camera has noted: degrees anticlockwise."""


def pyav() -> Any:
    """The package. Raises `MissingExtra`."""
    return require("av", "video", "reading videos")


class _Key(NamedTuple):
    """A key frame: which one of the video it is, and when it is decoded, in the stream's units."""

    number: int
    decoded: int


class Container:
    """A `Video`.

    Args:
        demuxer: what FFmpeg calls the format. It is named and not guessed, and it is given bytes
            and no path: so nothing in a file can make it read another one.
    """

    def __init__(self, file: BinaryIO | io.BytesIO, demuxer: str, deadline: Deadline) -> None:
        self._file, self._demuxer, self._deadline = file, demuxer, deadline
        stamps, self._keys = [], {}
        with _reported(), self._opened() as (container, stream):
            self._unit = stream.time_base
            self._rate = stream.average_rate or stream.guessed_rate
            hides = stream.codec_context.codec.canonical_name == "vp8"
            for packet in container.demux(stream):
                deadline.check()
                if not packet.size or packet.is_discard:  # the end, or outside of an edit
                    continue
                if hides and not memoryview(packet)[0] & _VP8_SHOWN:
                    continue
                stamp = packet.dts if packet.pts is None else packet.pts
                stamps.append(stamp)
                check_count(len(stamps))
                self._last = packet.duration
                if packet.is_keyframe and packet.dts is not None:
                    self._keys[stamp] = packet.dts
        self.count = len(stamps)
        if not stamps:
            raise PictureError("it has no frames")
        distinct = None not in stamps and len(set(stamps)) == len(stamps)
        self._stamps: list[int] | None = sorted(stamps) if distinct else None

    def times(self) -> Times:
        if self._stamps is None:
            if not self._rate:
                raise PictureError("it does not say how many frames a second it has")
            starts = np.arange(self.count) / float(self._rate)
            return Times(starts, self.count / float(self._rate))
        unit = float(self._unit)
        starts = (np.array(self._stamps, np.float64) - self._stamps[0]) * unit
        last = self._last * unit if self._last else 1 / float(self._rate or 25)
        return Times(starts, float(starts[-1]) + last)

    def frames(self, wanted: Sequence[int]) -> Iterator[Image.Image]:
        left = list(reversed(wanted))
        with _reported(), self._opened() as (container, stream):
            for number, frame in self._from(container, stream, wanted[0]):
                if frame.is_corrupt:
                    raise PictureError(f"corrupt: frame {number} of {self.count} is damaged")
                if number > left[-1]:
                    break
                if number == left[-1]:
                    yield _image(frame, stream)
                    left.pop()
                if not left:
                    return
        raise PictureError(f"frame {left[-1]} of {self.count} cannot be decoded")

    def _from(self, container: Any, stream: Any, first: int) -> Iterator[tuple[int, Any]]:
        """Frames with their numbers, from the first that is wanted or an earlier one on."""
        if (key := self._key_before(first)) is not None:
            container.seek(key.decoded, stream=stream)
            # What is shown before its key frame refers to what was passed over.
            begun = self._numbered(self._decoded(container, stream))
            whole = (pair for pair in begun if pair[0] >= key.number)
            if (pair := next(whole, None)) is not None and pair[0] <= first:
                yield pair
                yield from whole
                return
            container.seek(min(self._keys.values()), stream=stream)  # it has led beyond
        yield from self._numbered(self._decoded(container, stream))

    def _key_before(self, first: int) -> _Key | None:
        """The key frame to begin at; None for the beginning of the file."""
        if self._stamps is None or self._demuxer not in _SEEKABLE:
            return None
        keys = sorted(self._keys)
        place = bisect_right(keys, self._stamps[first]) - 1
        if place < 1:
            return None
        return _Key(bisect_left(self._stamps, keys[place]), self._keys[keys[place]])

    def _numbered(self, frames: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        if self._stamps is None or self._demuxer not in _SEEKABLE:
            yield from enumerate(frames)
            return
        numbers = {stamp: number for number, stamp in enumerate(self._stamps)}
        yield from _in_turn((numbers[x.pts], x) for x in frames if x.pts in numbers)

    def _decoded(self, container: Any, stream: Any) -> Iterator[Any]:
        """All frames from here on; some packets give none, and take their time, too."""
        for packet in container.demux(stream):
            self._deadline.check()
            yield from packet.decode()

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """The container and its video stream, at the beginning."""
        self._file.seek(0)
        options = {"max_pixels": str(MAX_PIXELS)}
        with pyav().open(
            self._file, format=self._demuxer, metadata_errors="ignore", options=options
        ) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise PictureError("it has no pictures, only sound or text")
            if stream.codec_context is None:
                raise PictureError("its codec is not known to FFmpeg")
            if not stream.width:  # FFmpeg, too, keeps to the bound
                raise PictureError(f"it has no size, or more than {MAX_PIXELS:,} pixels")
            judge(stream.width, stream.height, MAX_PIXELS)
            stream.codec_context.options = options
            stream.codec_context.thread_count = 1  # clips are decoded side by side
            yield container, stream


def _in_turn(numbered: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """Frames by their numbers: some decoders give them as soon as they have them.

    That is where a file says that fewer are kept back than it needs. What is due is passed on at
    once, and what is early waits, but for no more than `_LATEST` others.
    """
    early: dict[int, Any] = {}
    due = -1
    for number, frame in numbered:
        early[number] = frame
        due = number if due < 0 else due
        while early and ((first := min(early)) <= due or len(early) > _LATEST):
            due = max(due, first + 1)
            yield first, early.pop(first)
    yield from sorted(early.items(), key=lambda pair: pair[0])


@contextmanager
def _reported() -> Iterator[None]:
    """What FFmpeg says of damage as a PictureError."""
    try:
        yield
    except pyav().error.FFmpegError as error:
        raise PictureError(f"corrupt or truncated ({error.strerror})") from error


def _image(frame: Any, stream: Any) -> Image.Image:
    """The frame upright, of square pixels, with its transparency."""
    judge(frame.width, frame.height, MAX_PIXELS)
    wide = float(stream.sample_aspect_ratio or 1.0)
    width = round(frame.width * wide) if 1 / _WIDEST <= wide <= _WIDEST else frame.width
    clear = any(component.is_alpha for component in frame.format.components)
    pixels = frame.to_ndarray(format="rgba" if clear else "rgb24", width=width)
    image = Image.fromarray(pixels)
    turn = _UPRIGHT.get(frame.rotation)
    return image if turn is None else image.transpose(turn)
