"""Pictures and clips that a user gives to be edited: of any size, mode and orientation."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from matryoshka_diffusion.config import DataConfig, UsageError
from matryoshka_diffusion.data.bad import PictureError
from matryoshka_diffusion.data.image import SUFFIXES, read_picture, read_size, resized
from matryoshka_diffusion.data.source import Picture
from matryoshka_diffusion.data.video import choose, open_video
from matryoshka_diffusion.pyramid import Resolution

Given: TypeAlias = str | Path | bytes | np.ndarray | Image.Image
"""A file, its content, an image of Pillow, or uint8 (height, width, channels); grey needs none.

A clip is a file that moves, a folder of pictures, or uint8 (frames, height, width, channels).
"""
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")


def read_given(
    given: Given, level: Resolution, finest: Resolution, channels: int = 3
) -> UInt8[np.ndarray, "y x {channels}"]:
    """Middle of a picture in the shape of `level`, of a size that D^r averages to that.

    Training averages pictures of the size `finest`. A smaller picture is enlarged no more than it
    must be, so a sketch of the level's size keeps each of its pixels.

    Raises:
        UsageError: the file or the array is no picture.
        OSError: the system cannot read the file.
    """
    return _read(given, _times(level, size_of(given), finest), channels).pixels


def _times(level: Resolution, size: tuple[int, int], finest: Resolution) -> Resolution:
    """The largest multiple of a level that a picture of a width and height has, up to `finest`."""
    width, height = size
    times = min(width // level.width, height // level.height, finest.width // level.width)
    return Resolution(level.height * max(1, times), level.width * max(1, times))


def read_clip(
    given: Given,
    level: Resolution,
    finest: Resolution,
    channels: int = 3,
    *,
    frames: int,
    whole: int,
    data: DataConfig,
) -> UInt8[np.ndarray, "frames y x {channels}"]:
    """Frames of a clip, cut and sized as by `read_given`.

    A clip of just so many `frames` keeps each of them. Of a longer one, the first `whole` are
    taken as for training, from its beginning, and every n-th of these.

    Raises:
        UsageError: it is no clip, or too short, or its frames differ in size.
        OSError: the system cannot read a file.
    """
    thinned = slice(None, None, whole // frames)
    small: dict[int, np.ndarray] = {}
    with _faults_of(given):
        if (several := _frames_of(given)) is not None:
            numbers = [*range(frames if len(several) == frames else whole)]
            if len(several) < len(numbers):
                raise PictureError(f"it has {len(several)} frames, a clip needs {len(numbers)}")
            numbers = numbers if len(numbers) == frames else numbers[thinned]
            small = {n: read_given(several[n], level, finest, channels) for n in numbers}
        else:
            with open_video(_file(given)) as video:
                exact = video.count == frames
                numbers = [*range(frames)] if exact else choose(video, data, whole, 0.0)[thinned]
                for number, image in video.frames(sorted({*numbers})):
                    small[number] = resized(image, _times(level, image.size, finest), 1, channels)
        if len({frame.shape for frame in small.values()}) > 1:
            raise PictureError("its frames differ in size")
    return np.stack([small[number] for number in numbers])


def first_frame(given: Given) -> Given:
    """The image that a clip begins with. Raises as `read_clip`."""
    if (several := _frames_of(given)) is not None:
        return several[0]
    with _faults_of(given), open_video(_file(given)) as video:
        [(_, image)] = video.frames([0])
        return np.asarray(image.convert("RGB"))


def _frames_of(given: Given) -> list[Given] | None:
    """Frames that are there one by one; None for a file."""
    if isinstance(given, np.ndarray):
        return [*given]
    if isinstance(given, bytes | Image.Image) or not Path(given).is_dir():
        return None
    return [path for path in sorted(Path(given).iterdir()) if path.suffix.lower() in SUFFIXES]


def read_mask(
    mask: Given, size: tuple[int, int], levels: Sequence[Resolution]
) -> UInt8[np.ndarray, "y x 1"]:
    """The mask of a picture of `size`, cut as that picture is: white where it is drawn anew.

    A mask as large as one of `levels` keeps its size. One as large as the picture gets the last.

    Raises:
        UsageError: the mask is no picture, or has another size.
        OSError: the system cannot read the file.
    """
    own = size_of(mask)
    same = [level for level in levels if (level.width, level.height) == own]
    if own != size and not same:
        raise UsageError(
            f"mask: it has {own[0]}x{own[1]} pixels, and the image has {size[0]}x{size[1]}: give a "
            f"mask as large as the image, or as a level ({', '.join(map(str, levels))})"
        )
    return _read(mask, (same or levels)[-1], 1).pixels


def size_of(given: Given) -> tuple[int, int]:
    """Width and height of a picture that stands upright. Raises as `read_given`."""
    with _faults_of(given):
        return read_size(_file(given))


def _read(given: Given, size: Resolution, channels: int) -> Picture:
    with _faults_of(given):
        return read_picture(_file(given), (size,), channels=channels)


def _file(given: Given) -> Path | bytes:
    given = _png(given) if isinstance(given, np.ndarray | Image.Image) else given
    return Path(given) if isinstance(given, str) else given


@contextmanager
def _faults_of(given: Given) -> Iterator[None]:
    """Name the picture in the message of a fault that is found in it."""
    try:
        yield
    except PictureError as error:
        name = given if isinstance(given, str | Path) else "a picture"
        raise UsageError(f"{name}: {error}") from error


def _png(given: np.ndarray | Image.Image) -> bytes:
    """The pixels as a file, so that they are read as any other picture."""
    buffer = io.BytesIO()
    _image(given).save(buffer, "PNG")
    return buffer.getvalue()


def _image(given: np.ndarray | Image.Image) -> Image.Image:
    """An array as an image of Pillow, and an image in a mode that PNG knows."""
    if isinstance(given, Image.Image):
        return given if given.mode in PNG_MODES else given.convert("RGB")
    if given.dtype not in (np.uint8, np.bool_) or given.ndim not in (2, 3) or not given.size:
        raise PictureError(
            f"{given.dtype} of shape {given.shape}: give uint8 (height, width, channels)"
        )
    try:
        return Image.fromarray(given[..., 0] if given.shape[2:] == (1,) else given)
    except TypeError as error:
        raise PictureError(f"it has {given.shape[-1]} channels: give 1 to 4") from error
