"""Clips as files: MP4 (h264), animated WebP and GIF, and folders of PNGs.

What a clip was made with travels in it as JSON: in an MP4's and a GIF's comment, in a WebP's EXIF
description, and in each PNG as in any other of ours (`sheet.save_png`).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from jaxtyping import UInt8

from matryoshka_diffusion.config import FASTEST_FPS, SLOWEST_FPS, UsageError
from matryoshka_diffusion.draw.flipbook import gif, webp
from matryoshka_diffusion.draw.sheet import SETTINGS_KEY, save_png, to_image
from matryoshka_diffusion.files import MissingExtra, require, whole_folder, write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image
else:
    Image = Any

FASTEST = {".mp4": FASTEST_FPS, ".webp": 90.0, ".gif": 50.0, "": FASTEST_FPS}
"""Frames per second that a form of clip can hold, by its suffix; none is a folder of PNGs.

WebP counts milliseconds and GIF hundredths of a second; browsers show a frame of a hundredth or
less for ten.
"""
LARGEST = {".mp4": 16384, ".webp": 16383, ".gif": 65535, "": 2**31 - 1}
"""Pixels a side that x264, WebP, GIF and PNG can hold, by the suffix."""
SUFFIXES = tuple(filter(None, FASTEST))

CRF = "12"  # h264's quantizer at constant quality: 18 is called visually lossless, 0 loses nothing
BT709, LIMITED_RANGE = 1, 1  # colours of h264 as its standard numbers them


def save_clip(
    frames: Iterable[UInt8[np.ndarray, "..."]],
    path: Path,
    fps: float,
    settings: Mapping[str, Any] | None,
) -> None:
    """Write a clip in the form that the suffix of `path` names; it appears whole or not at all.

    `.mp4` is h264, which loses a little; the colours of an even size are halved in resolution, as
    everything plays them (yuv420p), those of an odd size are not (yuv444p, which not every browser
    plays). `.webp` loses nothing, `.gif` nothing up to 256 colours: all its frames share one
    palette and no dither, so that what stands still does not flicker. Both repeat forever. A path
    without a suffix becomes a folder of `0000.png`, `0001.png`, ..., which must be new or empty.

    Times are rounded where frames begin, to milliseconds in a WebP and to hundredths of a second
    in a GIF: how long a frame is shown varies by that much, the length of the clip does not.

    Args:
        frames: uint8 pictures (h, w, 3), (h, w, 1) or (h, w) of one size, at least one; an array
            (f, h, w, c) is such frames. They are encoded one by one, but for a GIF, whose palette
            is made of all.
        fps: frames per second.
        settings: what the clip was made with, or None.

    Raises:
        UsageError, MissingExtra: as `check_clip`, or the frames are larger than the form can hold.
        ValueError: there are no frames, or none that a picture can be made of.
        OSError: with the path, if it cannot be written.
    """
    check_clip(path, fps)
    images, text, suffix = _images(frames, path), _as_text(settings), path.suffix.lower()
    if not suffix:
        _save_pngs(images, path, settings)
    elif suffix == ".mp4":
        write_atomically(path, partial(_write_mp4, images, fps, text))
    else:
        content = {".webp": webp, ".gif": gif}[suffix](images, fps, text)
        write_atomically(path, lambda file: file.write(content), needed=len(content))


def check_clip(path: Path, fps: float) -> None:
    """Refuse what `save_clip` cannot write, before there is a clip.

    Raises:
        UsageError: an unknown suffix, or a rate that this form cannot hold.
        MissingExtra: an MP4, and no package that encodes h264.
    """
    suffix = path.suffix.lower()
    if suffix not in FASTEST:
        raise UsageError(
            f"{path}: clips are written as {', '.join(SUFFIXES)}, or without a suffix as a folder "
            "of PNGs"
        )
    if not SLOWEST_FPS <= fps <= FASTEST[suffix]:
        raise UsageError(
            f"{path}: {fps:g} frames per second; this form of clip can have {SLOWEST_FPS:g} to "
            f"{FASTEST[suffix]:g}"
        )
    if suffix == ".mp4" and "libx264" not in _av().codecs_available:
        raise MissingExtra(
            f"{path}: the package av that is installed has no h264 encoder (libx264), as those of "
            "PyPI have; .webp and .gif need none"
        )


def _av() -> ModuleType:
    return require("av", "video", "writing an MP4")


def _images(frames: Iterable[UInt8[np.ndarray, "..."]], path: Path) -> Iterator[Image]:
    """The frames as pictures in colour or grey, one at a time.

    Raises:
        ValueError: at once if there are none; at the first of another size.
        UsageError: at once if the file cannot hold their size.
    """
    images = map(to_image, frames)
    first = next(images, None)
    if first is None:
        raise ValueError("a clip needs at least one frame")
    largest = LARGEST[path.suffix.lower()]
    if max(first.size) > largest:
        raise UsageError(
            f"{path}: frames of {first.width} x {first.height} pixels; this form of clip can have "
            f"{largest} a side"
        )

    def alike(image: Image) -> Image:
        if image.size != first.size:
            raise ValueError(
                f"the frames of a clip have one size, not {first.size} and {image.size}"
            )
        return image

    return itertools.chain([first], map(alike, images))


def _as_text(settings: Mapping[str, Any] | None) -> str | None:
    """Settings in ASCII, the one alphabet that every form of comment has."""
    return None if settings is None else json.dumps({SETTINGS_KEY: dict(settings)}, sort_keys=True)


# --- one writer for each form ------------------------------------------------------------------


def _save_pngs(images: Iterator[Image], path: Path, settings: Mapping[str, Any] | None) -> None:
    with whole_folder(path) as folder:
        for number, image in enumerate(images):
            save_png(image, folder / f"{number:04d}.png", settings)


def _write_mp4(images: Iterator[Image], fps: float, text: str | None, file: BinaryIO) -> None:
    # By name: to bring the index to the front ("faststart"), FFmpeg opens the file once more.
    output = _av().open(file.name, "w", format="mp4", options={"movflags": "faststart"})
    first = next(images)
    with output as container:
        if text is not None:
            container.metadata["comment"] = text
        stream = _add_h264(container, first.size, fps)
        for image in itertools.chain([first], images):
            frame = _av().VideoFrame.from_image(image.convert("RGB"))
            frame = frame.reformat(format=stream.pix_fmt, dst_colorspace="ITU709")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _add_h264(container: Any, size: tuple[int, int], fps: float) -> Any:
    """A stream for frames of this width and height; one thread, so that bytes do not depend on
    the machine."""
    rate = Fraction(fps).limit_denominator(1001)  # 24000/1001 is what television calls 23.98
    stream = container.add_stream("libx264", rate=rate, options={"crf": CRF})
    stream.width, stream.height = size
    stream.pix_fmt = "yuv444p" if any(side % 2 for side in size) else "yuv420p"
    codec = stream.codec_context
    codec.colorspace = codec.color_primaries = codec.color_trc = BT709
    codec.color_range = LIMITED_RANGE
    codec.thread_count = 1
    return stream
