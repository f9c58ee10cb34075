"""One clip of a video file, read safely: its frames as RGB bytes, or a reason why not.

What a file is, is judged by its first bytes. Only what is needed is decoded, and of a frame nothing
is kept but its small version, so memory does not depend on the length of a video.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from matryoshka_diffusion.config import ClipStart, Crop, DataConfig
from matryoshka_diffusion.data.animations import Animation
from matryoshka_diffusion.data.containers import Container
from matryoshka_diffusion.data.frames import MAX_BYTES, Deadline, Video, pick
from matryoshka_diffusion.data.images import (
    REACH,
    Kind,
    Picture,
    PictureError,
    judging,
    resized,
)
from matryoshka_diffusion.files import fraction

ANIMATIONS = frozenset({".webp", ".gif"})
CONTAINERS = frozenset({".mp4", ".m4v", ".webm", ".avi", ".mov", ".mkv"})
VIDEOS = Kind(
    "video",
    "MP4, WEBM, AVI, MOV, MKV, WEBP or GIF",
    ANIMATIONS | CONTAINERS,
    frozenset({".3gp", ".apng", ".flv", ".mpeg", ".mpg", ".ogv", ".ts", ".wmv"}),
    MAX_BYTES,
    previews=ANIMATIONS,
)
DECODED_ONCE = 2**30
"""Bytes of clips that are always the same."""

_CHANNELS = 3
_HEAD = 12
_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"})
_ENDLESS = 2**32 - 1
_UNKNOWN = f"no {VIDEOS.formats}, or damaged at its start"
_VERSION = 3  # to be raised when the same file would give another clip


@dataclass(frozen=True)
class ClipDecoder:
    """Makes a clip of a file, or its first frame as a picture. A `samples.Decoder`.

    Attributes:
        frames: of the clip; None for the picture, which begins where a clip of `length` frames
            would.
        length: how many frames have to fit.
        stride: of so many frames of the video one is taken.
        fps: what videos are brought to before that; None leaves them as they are.
        clip: where it begins, if nobody says.
    """

    side: int
    crop: Crop
    frames: int | None
    length: int
    stride: int
    fps: float | None
    clip: ClipStart

    @property
    def options(self) -> str:
        parts = (self.side, self.crop, self.frames, self.length, self.stride, self.fps, self.clip)
        return f"{', '.join(map(str, parts))}, version {_VERSION}"

    def decodes_once(self, count: int) -> bool:
        """By `length`, also of pictures, so that bad files are treated alike in both."""
        bytes_of_clip = self.length * self.side**2 * REACH[self.crop] * _CHANNELS
        return self.clip != "random" and count * bytes_of_clip <= DECODED_ONCE

    def pick(self, video: Video, start: float) -> list[int]:
        """The frames of a clip at that place. Raises TooShortError."""
        return pick(video, self.length, self.stride, self.fps, start)

    def __call__(self, file: bytes | Path, key: str, start: float | None = None) -> Picture:
        if start is None:  # "random", too, has a usual place: it is asked for where nothing varies
            start = 0.0 if self.clip == "start" else fraction(f"clip {key}")
        with open_video(file) as video:
            chosen = self.pick(video, start)[: self.frames or 1]
            small, original_side = {}, 0
            wanted = sorted(set(chosen))
            for number, image in zip(wanted, video.frames(wanted), strict=True):
                original_side = min(image.size)
                small[number] = resized(image, self.side, REACH[self.crop])
        if len({pixels.shape for pixels in small.values()}) > 1:
            raise PictureError("its frames change their shape")
        clip = np.stack([small[number] for number in chosen])
        return Picture(clip[0] if self.frames is None else clip, original_side)


def clip_decoder(data: DataConfig, side: int, frames: int | None) -> ClipDecoder:
    """The decoder that the config asks for."""
    return ClipDecoder(
        side,
        data.crop,
        frames,
        length=frames or data.clip_frames,
        stride=data.frame_stride,
        fps=data.fps,
        clip=data.clip,
    )


@contextmanager
def open_video(file: bytes | Path) -> Iterator[Video]:
    """The video in the file. What goes wrong with it, then or later, is as `judging` says."""
    with (
        judging(file, _UNKNOWN),
        open(file, "rb") if isinstance(file, Path) else io.BytesIO(file) as opened,
    ):
        yield _video(opened)


def _video(file: BinaryIO | io.BytesIO) -> Video:
    size = file.seek(0, io.SEEK_END)
    if size > MAX_BYTES:
        raise PictureError(f"the file is larger than {MAX_BYTES // 2**20} MiB")
    file.seek(0)
    head = file.read(_HEAD)
    if not head:
        raise PictureError("it is empty")
    deadline = Deadline()
    if head[:4] == b"RIFF":
        _check_whole(8 + int.from_bytes(head[4:8], "little"), size)
    if head[:4] == b"RIFF" and head[8:] == b"WEBP":
        return Animation(file, "WEBP", deadline)
    if head[:4] == b"RIFF" and head[8:11] == b"AVI":
        return Container(file, "avi", deadline)
    if head[:3] == b"GIF":
        return Animation(file, "GIF", deadline)
    if head[4:8] in _BOXES:
        _check_whole(_end_of_boxes(file, size, deadline), size)
        return Container(file, "mov", deadline)
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return Container(file, "matroska", deadline)
    raise PictureError(_UNKNOWN)


def _check_whole(stated: int, size: int) -> None:
    """Raise PictureError if the file says that it is longer than it is."""
    if size < stated != 8 + _ENDLESS:
        raise PictureError(f"truncated: it has {size:,} of {stated:,} bytes")


def _end_of_boxes(file: BinaryIO | io.BytesIO, size: int, deadline: Deadline) -> int:
    """Where the last of an MP4's outermost boxes ends, according to their headers."""
    end = 0
    while end < size:
        deadline.check()
        file.seek(end)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:  # a long box
            length = int.from_bytes(head[8:16], "big")
        end += max(length, 8) if length else size - end
    return end
