"""Clips as files: MP4 (h264), animated WebP and GIF, and folders of PNGs.

Pillow encodes the frames of a WebP or GIF, but this module puts them together: Pillow's own writers
merge a frame with an equal one before it, and `mdm eval` counts the frames that it reads back.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from struct import pack
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import UInt8
from PIL import GifImagePlugin, Image
from PIL.ExifTags import Base

from matryoshka_diffusion.config import FASTEST_FPS, SLOWEST_FPS, UsageError
from matryoshka_diffusion.draw.grid import SETTINGS_KEY, save_png, to_image
from matryoshka_diffusion.files import MissingExtra, require, whole_folder, write_atomically

FASTEST = {".mp4": FASTEST_FPS, ".webp": 90.0, ".gif": 50.0, "": FASTEST_FPS}
"""Highest frames per second by suffix; no suffix is a folder of PNGs.

WebP counts milliseconds and GIF hundredths of a second. Browsers show a frame of a hundredth of a
second or less for a tenth.
"""
LARGEST = {".mp4": 16384, ".webp": 16383, ".gif": 65535, "": 2**31 - 1}
"""Longest side in pixels that x264, WebP, GIF and PNG can store, by suffix."""
SUFFIXES = tuple(filter(None, FASTEST))

CRF = "12"  # h264's quantizer at constant quality: 18 is called visually lossless, 0 is lossless
BT709, LIMITED_RANGE = 1, 1  # colours of h264 as its standard numbers them
WEBP_EFFORT = 50  # of lossless compression: 0 is fast, 100 small


def save_clip(
    frames: Iterable[UInt8[np.ndarray, "..."]],
    path: Path,
    fps: float,
    settings: Mapping[str, Any] | None,
) -> None:
    """Write a clip in the form that the suffix of `path` names; it appears whole or not at all.

    - `.mp4` is h264 and loses a little. Even sizes halve the resolution of colours, as every
      player expects (yuv420p); odd sizes do not (yuv444p, which some browsers do not play).
    - `.webp` is lossless, `.gif` up to 256 colours for all its frames. Both repeat forever.
    - No suffix makes a folder of `0000.png`, `0001.png`, ..., which must be new or empty.

    Frames begin at whole milliseconds (WebP) or hundredths of a second (GIF). `settings` travel as
    JSON: in the comment of an MP4 or GIF, the EXIF description of a WebP, and as in `save_png`.

    Args:
        frames: at least one uint8 image (h, w, 3), (h, w, 1) or (h, w), all of one size. All but a
            GIF encode them one by one.
        fps: frames per second.
        settings: how the clip was made, or None.

    Raises:
        UsageError, MissingExtra: as `check_clip`, or the frames are larger than the form can store.
        ValueError: there are no frames, or a frame has another size or shape.
        OSError: the file cannot be written; the message has the path.
    """
    check_clip(path, fps)
    images, suffix, text = _images(frames, path), path.suffix.lower(), None
    if settings is not None:  # in ASCII, the one alphabet that every form of comment has
        text = json.dumps({SETTINGS_KEY: dict(settings)}, sort_keys=True)
    if not suffix:
        with whole_folder(path) as folder:
            for number, image in enumerate(images):
                save_png(image, folder / f"{number:04d}.png", settings)
    elif suffix == ".mp4":
        write_atomically(path, partial(_write_mp4, images, fps, text))
    else:
        content = {".webp": webp, ".gif": gif}[suffix](images, fps, text)
        write_atomically(path, lambda file: file.write(content), needed=len(content))


def check_clip(path: Path, fps: float) -> None:
    """Refuse a path or rate that `save_clip` cannot write, before there is a clip.

    Raises:
        UsageError: an unknown suffix, or a rate that this form cannot store.
        MissingExtra: an MP4, and no package that encodes h264.
    """
    suffix = path.suffix.lower()
    if suffix not in FASTEST:
        known = ", ".join(SUFFIXES)
        raise UsageError(f"{path}: name it {known}, or without a suffix for a folder of PNGs")
    if not SLOWEST_FPS <= fps <= FASTEST[suffix]:
        raise UsageError(
            f"{path}: {fps:g} frames per second; set --fps to {SLOWEST_FPS:g} to "
            f"{FASTEST[suffix]:g} for this form of clip"
        )
    if suffix == ".mp4" and "libx264" not in _av().codecs_available:
        raise MissingExtra(
            f"{path}: the installed package av has no h264 encoder (libx264): install the one of "
            "PyPI, or write .webp or .gif"
        )


def save_pages(
    pages: Sequence[Image.Image], path: Path, fps: float, settings: Mapping[str, Any] | None
) -> Path:
    """Write a sheet to `path` plus a suffix: `.png` for one page, `.webp` for several in turn.

    If `fps` is more than a WebP can store, the sheet moves as fast as a WebP can.

    Returns:
        The path with its suffix.

    Raises:
        OSError: the file cannot be written; the message has the path.
    """
    if len(pages) == 1:
        path = path.with_name(f"{path.name}.png")
        save_png(pages[0], path, settings)
    else:
        path = path.with_name(f"{path.name}.webp")
        save_clip(map(np.asarray, pages), path, min(fps, FASTEST[".webp"]), settings)
    return path


def _av() -> ModuleType:
    return require("av", "video", "writing an MP4")


def _images(frames: Iterable[UInt8[np.ndarray, "..."]], path: Path) -> Iterator[Image.Image]:
    """Convert frames to images in colour or grey, one at a time, all of the first one's size."""
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

    def same_size(image: Image.Image) -> Image.Image:
        if image.size != first.size:
            raise ValueError(
                f"the frames of a clip have one size, not {first.size} and {image.size}"
            )
        return image

    return itertools.chain([first], map(same_size, images))


# --- WebP and GIF: a header, then each frame between two lengths ---------------------------------


def webp(images: Iterable[Image.Image], fps: float, text: str | None) -> bytes:
    """Encode a lossless WebP that repeats forever, with `text` as EXIF description.

    The chunks are those of RFC 9649, section 2.7.
    """
    size, frames = (0, 0), []
    for image, duration in zip(images, _durations(1000 / fps), strict=False):
        size, still = image.size, io.BytesIO()
        image.save(still, format="WEBP", lossless=True, quality=WEBP_EFFORT)
        place = b"".join(map(_three, (0, 0, size[0] - 1, size[1] - 1, duration)))
        replace = b"\x02"  # not blended with the frame before
        frames.append(_chunk(b"ANMF", place + replace + still.getvalue()[12:]))  # without its RIFF
    description = b""
    if text is not None:
        exif = Image.Exif()
        exif[Base.ImageDescription] = text
        description = _chunk(b"EXIF", exif.tobytes().removeprefix(b"Exif\0\0"))
    flags = 0x02 | (0x08 if description else 0)  # an animation, with EXIF
    header = _chunk(b"VP8X", pack("<I", flags) + b"".join(_three(side - 1) for side in size))
    forever = _chunk(b"ANIM", pack("<IH", 0, 0))
    return _chunk(b"RIFF", b"".join([b"WEBP", header, forever, *frames, description]))


def _chunk(name: bytes, content: bytes) -> bytes:
    return name + pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def _three(number: int) -> bytes:
    return number.to_bytes(3, "little")


def gif(images: Iterable[Image.Image], fps: float, text: str | None) -> bytes:
    """Encode a GIF that repeats forever, in 256 colours for all its frames, with `text` as comment.

    The blocks are those of the GIF89a specification. The palette is chosen for all frames together
    by median cut.
    """
    frames = list(images)
    width, height = frames[0].size
    column = Image.new("RGB", (width, height * len(frames)))
    for number, image in enumerate(frames):
        column.paste(image, (0, height * number))
    column = column.quantize(256, method=Image.Quantize.MEDIANCUT)
    palette = bytes(column.getpalette("RGB") or ()).ljust(3 * 256, b"\0")
    blocks = [b"GIF89a" + pack("<HHBBB", width, height, 0xF7, 0, 0) + palette]
    blocks.append(b"\x21\xff\x0bNETSCAPE2.0\x03\x01\0\0\0")  # repeats forever
    if text is not None:
        parts = [text.encode()[start : start + 255] for start in range(0, len(text), 255)]
        blocks += [b"\x21\xfe", *(bytes([len(part)]) + part for part in parts), b"\0"]
    for number, duration in zip(range(len(frames)), _durations(100 / fps), strict=False):
        paletted = column.crop((0, height * number, width, height * (number + 1)))
        blocks.append(b"\x21\xf9\x04" + pack("<BHB", 0, duration, 0) + b"\0")
        blocks += GifImagePlugin.getdata(paletted)
    return b"".join([*blocks, b"\x3b"])


def _durations(units: float) -> Iterator[int]:
    """Yield whole durations of frames, so that frame n begins at `round(n * units)`."""
    for number in itertools.count():
        yield round((number + 1) * units) - round(number * units)


# --- MP4 ---------------------------------------------------------------------------------------


def _write_mp4(images: Iterator[Image.Image], fps: float, text: str | None, file: BinaryIO) -> None:
    # By name: FFmpeg opens the file once more to move the index to the front ("faststart").
    output = _av().open(file.name, "w", format="mp4", options={"movflags": "faststart"})
    first = next(images)
    with output as container:
        if text is not None:
            container.metadata["comment"] = text
        rate = Fraction(fps).limit_denominator(1001)  # 24000/1001 is television's 23.98
        stream = container.add_stream("libx264", rate=rate, options={"crf": CRF})
        stream.width, stream.height = first.size
        stream.pix_fmt = "yuv444p" if any(side % 2 for side in first.size) else "yuv420p"
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        codec.color_range = LIMITED_RANGE
        codec.thread_count = 1  # bytes must not depend on the machine
        for image in itertools.chain([first], images):
            frame = _av().VideoFrame.from_image(image.convert("RGB"))
            frame = frame.reformat(format=stream.pix_fmt, dst_colorspace="ITU709")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
