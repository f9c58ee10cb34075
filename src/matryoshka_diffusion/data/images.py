"""One picture file, read safely: RGB bytes of the wanted side or a reason why not.

The header is judged before any pixel is allocated, only PNG, JPEG and WEBP are decoded, and
Pillow's own limits bound the text and colour profiles that a file may carry. Of an animation the
first frame is taken.
"""

from __future__ import annotations

import errno
import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeGuard

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from matryoshka_diffusion.config import Crop
from matryoshka_diffusion.files import unreadable

FORMATS = ("PNG", "JPEG", "WEBP")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jfif", ".webp"})
OTHER_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".heic", ".heif", ".tif", ".tiff"})
"""Pictures, too, but refused: they are reported, not passed over."""
MIN_SIDE = 8
MAX_SIDE = 20_000
MAX_PIXELS = 64_000_000
MAX_BYTES = 4 * MAX_PIXELS
"""What an uncompressed picture of `MAX_PIXELS` would take: no honest file is larger."""


class Kind(NamedTuple):
    """The files that a set is made of, and what they are called.

    Attributes:
        noun: for one of them.
        formats: what is read.
        suffixes: of such files.
        others: of files that are refused, which is reported; what has neither is passed over.
        max_bytes: of one file.
        previews: those of the suffixes that are passed over beside another of them, as a thumbnail
            of the same name is.
    """

    noun: str
    formats: str
    suffixes: frozenset[str]
    others: frozenset[str]
    max_bytes: int
    previews: frozenset[str] = frozenset()


PICTURES = Kind("picture", "PNG, JPEG or WEBP", SUFFIXES, OTHER_SUFFIXES, MAX_BYTES)
REACH: dict[Crop, int] = {"centre": 1, "random": 4}
"""How many times its shorter side is kept of a picture's longer one, around the middle.

A random crop needs more than the square; the bound is for panoramas, which would fill the memory.
"""

_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_DAMAGED = (  # what Pillow raises on damaged files, which it parses with struct, zlib and slices
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
)
_UNKNOWN = "not a PNG, JPEG or WEBP picture, or damaged at its start"


class PictureError(ValueError):
    """A picture file that cannot be used; the message is the reason, without the path."""


def _of_system(error: Exception) -> TypeGuard[OSError]:
    """Whether the disk, the permissions, ... are to blame, and not what is in a file.

    "Invalid argument" is of the file: it gives that which leads to a place that no file has.
    """
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


@contextmanager
def judging(file: Path | bytes, unknown: str) -> Iterator[None]:
    """Tell what is wrong with the file, which may be remembered, from what is with the system.

    The second may be over the next time.

    Args:
        unknown: the reason where the file is of no known format.

    Raises:
        PictureError: instead of whatever else is raised inside.
        UnreadableError: the system cannot read the file.
    """
    try:
        yield
    except PictureError:
        raise
    except _TOO_LARGE as error:
        raise PictureError(f"too large: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise PictureError(unknown) from error
    except _DAMAGED as error:
        if _of_system(error) and isinstance(file, Path):
            raise unreadable(file, error) from error
        raise PictureError(f"corrupt or truncated ({error})") from error


class Picture(NamedTuple):
    """A decoded file: what may be shown of it, and the shorter side it had before."""

    pixels: UInt8[np.ndarray, "*frames h w 3"]
    original_side: int


def read_picture(path: Path, side: int, crop: Crop = "centre") -> Picture:
    """Decode the file, turn it upright, and resize its shorter side to `side`.

    For a centre crop the picture is cut to the square; for a random one the longer side is kept,
    up to `REACH`.

    Raises:
        PictureError: corrupt, truncated, too large, too small or of another format.
        UnreadableError: the system cannot read it.
    """
    with judging(path, _UNKNOWN), open(path, "rb") as file:
        if path.stat().st_size > MAX_BYTES:
            raise PictureError(f"the file is larger than {MAX_BYTES // 10**6} MB")
        return _decode(file, side, crop)


def decode_picture(data: bytes, side: int, crop: Crop = "centre") -> Picture:
    """`read_picture` for the bytes of a file.

    Raises:
        PictureError: as of `read_picture`.
    """
    if not data:
        raise PictureError("it is empty")
    if len(data) > MAX_BYTES:
        raise PictureError(f"the file is larger than {MAX_BYTES // 10**6} MB")
    with judging(data, _UNKNOWN):
        return _decode(io.BytesIO(data), side, crop)


def _decode(file: BinaryIO | io.BytesIO, side: int, crop: Crop) -> Picture:
    image = Image.open(file, formats=FORMATS)
    judge(*image.size)
    original_side = min(image.size)
    image.draft(None, (4 * side, 4 * side))  # a JPEG may decode at 1/2 .. 1/8: much faster
    image.load()
    upright = ImageOps.exif_transpose(image)
    return Picture(resized(upright, side, REACH[crop]), original_side)


def judge(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raise PictureError unless a picture of this size is worth decoding, and can be."""
    if min(width, height) < MIN_SIDE:
        raise PictureError(f"too small: {width}x{height}, under {MIN_SIDE} pixels a side")
    if max(width, height) > MAX_SIDE or width * height > max_pixels:
        raise PictureError(
            f"too large: {width}x{height}, over {MAX_SIDE} pixels a side or "
            f"{max_pixels // 10**6} megapixels"
        )


def resized(image: Image.Image, side: int, reach: int) -> UInt8[np.ndarray, "h w 3"]:
    """The middle of the picture: one side of it is `side`, the other at most `reach` times that.

    Resized with Lanczos: it averages over the whole area that a new pixel covers at any ratio,
    where a box filter weighs source pixels unevenly unless the ratio is whole; it also enlarges.
    """
    edge = min(image.size)
    width, height = (min(length, reach * edge) for length in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    box = (left, top, left + width, top + height)
    size = (round(side * width / edge), round(side * height / edge))
    flat = _on_white(image)
    return np.asarray(flat.resize(size, Image.Resampling.LANCZOS, box, reducing_gap=3.0))


def _on_white(image: Image.Image) -> Image.Image:
    """RGB of any mode: 16 bits are scaled to 8 (not clipped), what is transparent shows white."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip
        grey = np.asarray(image).astype(np.float32) / 257.0
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
