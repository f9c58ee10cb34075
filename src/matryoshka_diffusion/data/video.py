"""Videos: one clip of a file, decoded safely, through PyAV (FFmpeg) or Pillow (WEBP, GIF).

The first bytes of a file decide its format. Only what a clip needs is decoded, and only
the small version of a frame is kept, so memory does not depend on the length of a video.
"""

from __future__ import annotations

import io
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64
from PIL import Image

from matryoshka_diffusion.config import DataConfig
from matryoshka_diffusion.data.augment import Cut
from matryoshka_diffusion.data.bad import PictureError
from matryoshka_diffusion.data.decoded import Catalogue, Decoder
from matryoshka_diffusion.data.folder import folder, holds
from matryoshka_diffusion.data.image import (
    CONTAINERS,
    REACH,
    VIDEOS,
    judge,
    opened,
    resized,
    unknown,
    upright,
)
from matryoshka_diffusion.data.shapes import square
from matryoshka_diffusion.data.shards import shards
from matryoshka_diffusion.data.source import Picture
from matryoshka_diffusion.files import fraction, require

MAX_PIXELS = 10_000_000  # of a frame: 4096 x 2304 and a little more; a decoder holds a dozen
MAX_FRAMES = 100_000  # of a video: an hour at 25 frames per second
MAX_SECONDS = 60.0  # of a processor for one clip; most take some hundredths of a second
CACHED_BYTES = 2**30  # of the largest set of clips that is decoded into the cache

_VERSION = 4  # raise it when the same file would give another clip
_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"})


class TooShortError(PictureError):
    """A video with fewer frames than a clip needs."""


class Times(NamedTuple):
    """Times in seconds since the first frame."""

    starts: Float64[np.ndarray, " count"]  # at which frames begin, ascending
    end: float  # of the last one


class Deadline:
    """Processor time of this thread that one clip may take; a busy machine does not count."""

    def __init__(self) -> None:
        self._end = time.thread_time() + MAX_SECONDS

    def check(self) -> None:
        """Raise PictureError if it is over."""
        if time.thread_time() > self._end:
            raise PictureError(f"it takes longer than {MAX_SECONDS:g} s to decode")


def _check_count(count: int) -> None:
    if count > MAX_FRAMES:
        raise PictureError(f"it has more than {MAX_FRAMES:,} frames: cut it into shorter videos")


# --- animated WEBP and GIF -------------------------------------------------------------------

_QUICKEST, _USUAL = 0.010, 0.100  # seconds: browsers show a frame of 0 to 0.010 s for 0.100 s


class Animation:
    """A WEBP or GIF. Its frames are composed from the first one on."""

    def __init__(self, file: Any, form: str, deadline: Deadline) -> None:
        self._deadline = deadline
        if form == "GIF":
            _check_trailer(file, deadline)
        file.seek(0)
        self._image = Image.open(file, formats=(form,))
        judge(*self._image.size, MAX_PIXELS)
        self.count: int = getattr(self._image, "n_frames", 1)
        _check_count(self.count)

    def times(self) -> Times:
        durations = [image.info.get("duration", 0) / 1000 for image in self._all(self.count)]
        ends = np.cumsum([0.0, *(x if x > _QUICKEST else _USUAL for x in durations)])
        return Times(ends[:-1], float(ends[-1]))

    def frames(self, wanted: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
        """Frames of these numbers, each with its number, one at a time and upright."""
        for number, image in enumerate(self._all(max(wanted) + 1)):
            if number in wanted:
                judge(*image.size, MAX_PIXELS)
                yield number, upright(image)

    def _all(self, count: int) -> Iterator[Image.Image]:
        for number in range(count):
            self._deadline.check()
            self._image.seek(number)
            self._image.load()  # which tells the duration of a WEBP's frame, too
            yield self._image


def _check_trailer(file: Any, deadline: Deadline) -> None:
    """Raise PictureError if a GIF (GIF89a, 17 to 27) ends before its last block.

    Pillow counts the frames that it finds, so a truncated GIF would only be shorter.
    """

    def skip_colours(more: int = 0) -> None:
        """Skip a byte, the table of colours that it announces, and `more` bytes."""
        byte = int.from_bytes(file.read(1), "big")
        file.seek(more + (3 * 2 ** (1 + (byte & 7)) if byte & 0x80 else 0), io.SEEK_CUR)

    file.seek(10)
    skip_colours(2)
    while (mark := file.read(1)) != b";":
        if not mark:
            raise PictureError("truncated: the end marker of a GIF is missing")
        if mark == b",":  # an image
            file.seek(8, io.SEEK_CUR)
            skip_colours()
        if mark in b",!":  # or an extension: after a byte of their own, parts with their sizes
            file.seek(1, io.SEEK_CUR)
            while (size := file.read(1)) > b"\0":
                deadline.check()
                file.seek(size[0], io.SEEK_CUR)
        deadline.check()


# --- MP4, MOV, WEBM, MKV and AVI -------------------------------------------------------------

_VP8_SHOWN = 0x10  # in a packet's first byte (RFC 6386, 9.1); VP8 stores other frames, too
_LATEST = 16  # frames, the most that H.264 keeps back
_WIDEST = 4.0  # width of a pixel over its height; claims beyond this, or its inverse, are ignored


def pyav() -> Any:
    """The package PyAV. Raises `MissingExtra`."""
    return require("av", "video", "reading videos")


class Container:
    """A video in a container of FFmpeg, which receives bytes and the name of the format.

    It receives no path, so nothing in a file can make it read another one. A first pass collects
    the times of the packets and decodes none, so frames are counted and a stated number is not
    believed. Where time stamps can be trusted, decoding begins at the last key frame before the
    first wanted frame; in AVI it begins at the first frame.
    """

    def __init__(self, file: Any, demuxer: str, deadline: Deadline) -> None:
        self._file, self._demuxer, self._deadline = file, demuxer, deadline
        stamps, self._keys = [], {}  # of key frames: when they are shown, and decoded
        with self._opened() as (container, stream):
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
                _check_count(len(stamps))
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

    def frames(self, wanted: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
        """Frames of these numbers, each with its number, one at a time and upright.

        Some decoders give frames early, against the file's promise, so a missing one is awaited.
        """
        left, later = set(wanted), 0
        with self._opened() as (container, stream):
            for number, frame in self._from(container, stream, min(wanted)):
                if frame.is_corrupt:
                    raise PictureError(f"corrupt: frame {number} of {self.count} is damaged")
                later += number > max(wanted)
                if number in left:
                    left.remove(number)
                    yield number, _image(frame, stream)
                if not left or later > _LATEST:
                    break
        if left:
            raise PictureError(f"frame {min(left)} of {self.count} cannot be decoded")

    def _from(self, container: Any, stream: Any, first: int) -> Iterator[tuple[int, Any]]:
        """Frames with their numbers, from the first wanted one or an earlier one on."""
        if self._stamps is None or self._demuxer == "avi":
            yield from enumerate(self._decoded(container, stream))
            return
        numbers = {stamp: number for number, stamp in enumerate(self._stamps)}
        if (key := self._key_before(self._stamps[first])) is not None:
            container.seek(self._keys[key], stream=stream)
            # A frame that is shown before its key frame refers to frames that were skipped.
            pairs = ((numbers.get(x.pts, -1), x) for x in self._decoded(container, stream))
            whole = (pair for pair in pairs if pair[0] >= numbers[key])
            if (pair := next(whole, None)) is not None and pair[0] <= first:
                yield pair
                yield from whole
                return
            container.seek(min(self._keys.values()), stream=stream)  # the first seek led too far
        decoded = self._decoded(container, stream)
        yield from ((numbers[frame.pts], frame) for frame in decoded if frame.pts in numbers)

    def _key_before(self, stamp: int) -> int | None:
        """Time of the key frame to begin at; None for the file's beginning."""
        keys = sorted(self._keys)
        place = bisect_right(keys, stamp) - 1
        return None if place < 1 else keys[place]

    def _decoded(self, container: Any, stream: Any) -> Iterator[Any]:
        for packet in container.demux(stream):
            self._deadline.check()  # packets without a frame take their time, too
            yield from packet.decode()

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """Open the container and its video stream; report damage inside as a PictureError."""
        self._file.seek(0)
        options = {"max_pixels": str(MAX_PIXELS)}
        about = {"format": self._demuxer, "metadata_errors": "ignore", "options": options}
        try:
            with pyav().open(self._file, **about) as container:
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
        except pyav().error.FFmpegError as error:
            raise PictureError(f"corrupt or truncated ({error.strerror})") from error


def _image(frame: Any, stream: Any) -> Image.Image:
    """Frame upright, with square pixels and its transparency."""
    judge(frame.width, frame.height, MAX_PIXELS)
    wide = float(stream.sample_aspect_ratio or 1.0)
    width = round(frame.width * wide) if 1 / _WIDEST <= wide <= _WIDEST else frame.width
    clear = any(component.is_alpha for component in frame.format.components)
    image = Image.fromarray(frame.to_ndarray(format="rgba" if clear else "rgb24", width=width))
    turned = frame.rotation and frame.rotation % 90 == 0  # noted by a camera, in degrees
    return image.rotate(frame.rotation, expand=True) if turned else image


# --- from a file to a clip -------------------------------------------------------------------

Video = Animation | Container
"""A video whose frames are not decoded yet. All of it may raise PictureError."""


@contextmanager
def open_video(file: bytes | Path) -> Iterator[Video]:
    """Open the video in a file. Faults inside the `with` are separated as by `image.opened`."""
    with opened(file, VIDEOS) as stream:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        head = stream.read(12)
        deadline, stated = Deadline(), 0
        if head[:4] == b"RIFF":
            stated = 8 + int.from_bytes(head[4:8], "little")
        elif head[4:8] in _BOXES:
            stated = _end_of_boxes(stream, size, deadline)
        if size < stated != 8 + 2**32 - 1:  # the largest number stands for no length
            raise PictureError(f"truncated: it has {size:,} of {stated:,} bytes")
        if head[:4] == b"RIFF" and head[8:] == b"WEBP":
            yield Animation(stream, "WEBP", deadline)
        elif head[:8] == b"\x89PNG\r\n\x1a\n":
            yield Animation(stream, "PNG", deadline)
        elif head[:3] == b"GIF":
            yield Animation(stream, "GIF", deadline)
        elif head[:4] == b"RIFF" and head[8:11] == b"AVI":
            yield Container(stream, "avi", deadline)
        elif head[4:8] in _BOXES:
            yield Container(stream, "mov", deadline)
        elif head[:4] == b"\x1a\x45\xdf\xa3":
            yield Container(stream, "matroska", deadline)
        else:
            raise unknown(VIDEOS)


def _end_of_boxes(file: Any, size: int, deadline: Deadline) -> int:
    """End of the last of an MP4's outermost boxes, according to their headers."""
    end = 0
    while end < size:
        deadline.check()
        file.seek(end)
        length, long = int.from_bytes(file.read(4), "big"), file.read(12)[4:]
        length = int.from_bytes(long, "big") if length == 1 else length
        end += max(length, 8) if length else size - end
    return end


def videos(path: str, data: DataConfig) -> Catalogue:
    """Videos in a folder, or in shards, which may have animations beside them."""
    pyav()  # now and not after hours, when the first video is decoded
    place = Path(path)
    is_folder = "://" not in path and place.is_dir()
    if is_folder and (holds(place, CONTAINERS) or not any(place.glob("*.tar"))):
        return folder(place, data, VIDEOS, "clips")
    return shards(path, data, VIDEOS)


def choose(video: Video, data: DataConfig, length: int, start: float) -> list[int]:
    """Numbers of the `length` frames of a clip, ascending: each `data.frame_stride`-th at `fps`.

    `start` is the clip's place among all that fit, from 0 to below 1. Raises TooShortError if
    none fits.
    """
    fps, stride = data.fps, data.frame_stride
    frames = range(video.count) if fps is None else resampled(video.times(), fps)
    needed = (length - 1) * stride + 1
    starts = len(frames) - needed + 1
    if starts < 1:
        rate = "" if fps is None else f" at {fps:g} a second"
        plural = "" if len(frames) == 1 else "s"
        raise TooShortError(f"it has {len(frames)} frame{plural}{rate}, a clip needs {needed}")
    first = int(start * starts)
    return [int(frames[first + stride * place]) for place in range(length)]


def resampled(times: Times, fps: float) -> Sequence[int]:
    """Frames nearest in time to 0, 1/fps, 2/fps, ... as long as the video lasts."""
    count = max(round(times.end * fps), 1)  # some formats round their times
    _check_count(count)
    middles = (times.starts[1:] + times.starts[:-1]) / 2
    return np.searchsorted(middles, np.arange(count) / fps, side="left").tolist()


def clip_decoder(data: DataConfig, side: int, frames: int | None, channels: int = 3) -> Decoder:
    """Decoder of clips of `frames`, or of their first frames as images without `frames`."""
    length, (shape,) = frames or data.clip_frames, square(side)

    def decode(file: bytes | Path, key: str, cut: Cut) -> Picture:
        start = cut.start
        if start is None:  # "random" too has a usual place, for readers without a sample number
            start = 0.0 if data.clip == "start" else fraction(f"clip {key}")
        with open_video(file) as video:
            numbers = choose(video, data, length, start)[: frames or 1]
            small, size = {}, (0, 0)
            for number, image in video.frames(sorted(set(numbers))):
                size = image.size
                small[number] = resized(image, shape, REACH[data.crop], channels)
        if len({pixels.shape for pixels in small.values()}) > 1:
            raise PictureError("its frames change their shape")
        clip = np.stack([small[number] for number in numbers])
        return Picture(clip if frames else clip[0], size)

    # By `length` for images too, so that bad files are found at the same time in both.
    cached = CACHED_BYTES // (length * side**2 * REACH[data.crop] * 3)
    options = (side, data.crop, frames, length, data.frame_stride, data.fps, data.clip)
    name = f"{', '.join(map(str, options))}, version {_VERSION}"
    name += f", {channels} channels" if channels != 3 else ""
    return Decoder(decode, (shape,), frames, name, cached if data.clip != "random" else 0, channels)
