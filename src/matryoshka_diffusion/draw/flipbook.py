"""Animated WebP and GIF, put together from stills: every frame is there, as long as it should be.

Pillow's own writers leave out a frame that equals the one before it. Of each frame the rectangle
that differs from the one before is stored, and a pixel where nothing does.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator
from struct import pack
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from PIL.Image import Image
else:
    Image = Any

LOSSLESS_EFFORT = 50  # 0 fast .. 100 small


class _Patch(NamedTuple):
    """What changes with a frame, and how long the frame is shown."""

    image: Image
    left: int
    top: int
    duration: int


def webp(images: Iterable[Image], fps: float, text: str | None) -> bytes:
    """An animated WebP that repeats forever and loses nothing, with `text` as EXIF description.

    Frames begin at whole milliseconds. The chunks are those of RFC 9649, section 2.7.
    """
    from PIL.ExifTags import Base
    from PIL.Image import Exif

    patches = _patches(images, 1000 / fps)
    first = next(patches)
    width, height = first.image.size
    frames = [_webp_frame(patch) for patch in itertools.chain([first], patches)]
    description = b""
    if text is not None:
        exif = Exif()
        exif[Base.ImageDescription] = text
        description = _chunk(b"EXIF", exif.tobytes().removeprefix(b"Exif\0\0"))
    flags = 0x02 | (0x08 if description else 0)  # an animation, with EXIF
    header = _chunk(b"VP8X", pack("<I", flags) + _three(width - 1) + _three(height - 1))
    forever = _chunk(b"ANIM", pack("<IH", 0, 0))
    return _chunk(b"RIFF", b"".join([b"WEBP", header, forever, *frames, description]))


def _webp_frame(patch: _Patch) -> bytes:
    still = io.BytesIO()
    patch.image.save(still, format="WEBP", lossless=True, quality=LOSSLESS_EFFORT)
    place = (patch.left // 2, patch.top // 2, *(side - 1 for side in patch.image.size))
    replacing = b"\x02"  # not blended with what was there, which stays around it
    start = b"".join(map(_three, (*place, patch.duration))) + replacing
    return _chunk(b"ANMF", start + still.getvalue()[12:])  # without its own RIFF header


def _chunk(name: bytes, content: bytes) -> bytes:
    return name + pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def _three(number: int) -> bytes:
    return number.to_bytes(3, "little")


def gif(images: Iterable[Image], fps: float, text: str | None) -> bytes:
    """A GIF that repeats forever, in 256 colours for all its frames, with `text` as comment.

    Frames begin at whole hundredths of a second. The blocks are those of the GIF89a specification.
    """
    paletted = _with_one_palette(list(images))
    palette = bytes(paletted[0].getpalette("RGB") or ()).ljust(3 * 256, b"\0")
    header = b"GIF89a" + pack("<HHBBB", *paletted[0].size, 0xF7, 0, 0) + palette
    forever = b"\x21\xff\x0bNETSCAPE2.0\x03\x01\0\0\0"
    comment = b"" if text is None else b"\x21\xfe" + b"".join(_blocks(text.encode())) + b"\0"
    frames = map(_gif_frame, _patches(paletted, 100 / fps))
    return b"".join([header, forever, comment, *frames, b"\x3b"])


def _gif_frame(patch: _Patch) -> bytes:
    from PIL.GifImagePlugin import getdata

    keep = 1 << 2  # what this frame has drawn, under the next
    control = b"\x21\xf9\x04" + pack("<BHB", keep, patch.duration, 0) + b"\0"
    return control + b"".join(getdata(patch.image, (patch.left, patch.top)))


def _blocks(content: bytes) -> Iterator[bytes]:
    for start in range(0, len(content), 255):
        part = content[start : start + 255]
        yield bytes([len(part)]) + part


def _with_one_palette(images: list[Image]) -> list[Image]:
    """The frames in 256 colours that are chosen for all of them together (median cut)."""
    from PIL import Image as pictures

    width, height = images[0].size
    column = pictures.new("RGB", (width, height * len(images)))
    for number, image in enumerate(images):
        column.paste(image, (0, height * number))
    column = column.quantize(256, method=pictures.Quantize.MEDIANCUT)
    tops = range(0, column.height, height)
    return [column.crop((0, top, width, top + height)) for top in tops]


def _patches(images: Iterable[Image], duration: float) -> Iterator[_Patch]:
    """What each frame changes; the times at which frames begin are rounded, not how long they last.

    Places are even, as WebP counts them in steps of two.
    """
    from PIL import ImageChops

    before: Image | None = None
    for number, image in enumerate(images):
        shown = round((number + 1) * duration) - round(number * duration)
        left, top, right, low = 0, 0, *image.size
        if before is not None:
            difference = ImageChops.difference(image.convert("RGB"), before.convert("RGB"))
            left, top, right, low = difference.getbbox() or (0, 0, 1, 1)
            left, top = left - left % 2, top - top % 2
        yield _Patch(image.crop((left, top, right, low)), left, top, shown)
        before = image
