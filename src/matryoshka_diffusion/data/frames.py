"""Which frames of a video make a clip, and how much of a video is looked at to find out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64
from PIL import Image

from matryoshka_diffusion.data.images import PictureError

MAX_BYTES = 2**29
MAX_PIXELS = 10_000_000
"""Of a frame: 4096 x 2304 and a little more. A decoder holds a dozen of them."""
MAX_FRAMES = 100_000
"""An hour at 25 frames per second."""
MAX_SECONDS = 60.0
"""Of a processor's time, for one clip; most take some hundredths of a second."""


class TooShortError(PictureError):
    """The video has fewer frames than a clip needs."""


class Times(NamedTuple):
    """When the frames of a video are shown, in seconds since the first of them.

    Attributes:
        starts: of each frame, ascending.
        end: of the last one.
    """

    starts: Float64[np.ndarray, " count"]
    end: float


@runtime_checkable
class Video(Protocol):
    """A video of which no frame is decoded yet. All of it may raise PictureError.

    Attributes:
        count: how many frames it has.
    """

    @property
    def count(self) -> int: ...
    def times(self) -> Times: ...
    def frames(self, wanted: Sequence[int]) -> Iterator[Image.Image]:
        """The frames of these numbers, which ascend, one at a time and upright."""
        ...


class Deadline:
    """The time of a processor that one clip may take, in the thread that made this.

    A verdict is kept, so it must not tell of a busy machine, or of a job that was stopped.
    """

    def __init__(self) -> None:
        self._end = time.thread_time() + MAX_SECONDS

    def check(self) -> None:
        """Raise PictureError if it is over."""
        if time.thread_time() > self._end:
            raise PictureError(f"it takes longer than {MAX_SECONDS:g} s to decode")


def check_count(count: int) -> None:
    """Raise PictureError if so many frames are too many."""
    if count > MAX_FRAMES:
        raise PictureError(f"it has more than {MAX_FRAMES:,} frames: cut it into shorter videos")


def pick(video: Video, frames: int, stride: int, fps: float | None, start: float) -> list[int]:
    """The numbers of the frames of a clip: every `stride`-th one of the video, ascending.

    Args:
        fps: what the video is brought to before frames are counted, by repeating or leaving out;
            None leaves it as it is.
        start: the clip's place among all that fit, from 0 to below 1.

    Raises:
        TooShortError: no clip fits.
    """
    shown = range(video.count) if fps is None else resampled(video.times(), fps)
    needed = (frames - 1) * stride + 1
    starts = len(shown) - needed + 1
    if starts < 1:
        rate = "" if fps is None else f" at {fps:g} a second"
        plural = "" if len(shown) == 1 else "s"
        raise TooShortError(f"it has {len(shown)} frame{plural}{rate}, a clip needs {needed}")
    first = int(start * starts)
    return [int(shown[first + stride * place]) for place in range(frames)]


def resampled(times: Times, fps: float) -> Sequence[int]:
    """The frame nearest in time to 0, 1/fps, 2/fps, ... as long as the video lasts."""
    count = max(round(times.end * fps), 1)  # some formats round their times
    check_count(count)
    middles = (times.starts[1:] + times.starts[:-1]) / 2
    return np.searchsorted(middles, np.arange(count) / fps, side="left").tolist()
