"""Image files, decoded safely: RGB bytes of the wanted side, or a reason why not.

The header is judged before any pixel is allocated, only PNG, JPEG and WEBP are decoded, and
Pillow's limits bound the text and colour profiles in a file. An animation gives its first frame.
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
from matryoshka_diffusion.data.bad import PictureError
from matryoshka_diffusion.data.source import Picture
from matryoshka_diffusion.files import unreadable

FORMATS = ("PNG", "JPEG", "WEBP")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jfif", ".webp"})
MIN_SIDE = 8
MAX_SIDE = 20_000
MAX_PIXELS = 64_000_000
MAX_BYTES = 4 * MAX_PIXELS
"""Size of a file: no honest one is larger than an uncompressed image of `MAX_PIXELS`."""


class Kind(NamedTuple):
    """Files that a data set is made of.

    Attributes:
        noun: name for one of them.
        formats: names of the accepted formats.
        suffixes: of accepted files.
        others: suffixes of files that are refused with a report; all other files are ignored.
        max_bytes: of one file.
        previews: suffixes that are ignored beside a file of another accepted suffix.
    """

    noun: str
    formats: str
    suffixes: frozenset[str]
    others: frozenset[str]
    max_bytes: int
    previews: frozenset[str] = frozenset()


PICTURES = Kind(
    "picture",
    "PNG, JPEG or WEBP",
    SUFFIXES,
    frozenset({".avif", ".bmp", ".gif", ".heic", ".heif", ".tif", ".tiff"}),
    MAX_BYTES,
)
ANIMATIONS = frozenset({".webp", ".gif"})
CONTAINERS = frozenset({".mp4", ".m4v", ".webm", ".avi", ".mov", ".mkv"})
VIDEOS = Kind(
    "video",
    "MP4, WEBM, AVI, MOV, MKV, WEBP or GIF",
    ANIMATIONS | CONTAINERS,
    frozenset({".3gp", ".apng", ".flv", ".mpeg", ".mpg", ".ogv", ".ts", ".wmv"}),
    2**29,
    previews=ANIMATIONS,
)
REACH: dict[Crop, int] = {"centre": 1, "random": 4}
"""Longest side that is kept, in units of the shorter one, around the middle.

A random crop needs more than the square; the bound keeps panoramas from filling the memory.
"""

_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_DAMAGED = (  # exceptions of Pillow on damaged files, which it parses with struct, zlib and slices
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


def _is_of_system(error: Exception) -> TypeGuard[OSError]:
    """Test if a disk or a permission is at fault, and not the file.

    "Invalid argument" is a fault of a file that leads to a place which no file has.
    """
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


@contextmanager
def judging(file: Path | bytes, unknown: str) -> Iterator[None]:
    """Separate faults of the file, which may be remembered, from faults of the system.

    Args:
        unknown: the reason for a file of no known format.

    Raises:
        PictureError: in place of whatever a damaged file raises inside.
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
        if isinstance(file, Path) and _is_of_system(error):
            raise unreadable(file, error) from error
        raise PictureError(f"corrupt or truncated ({error})") from error


def read_picture(file: Path | bytes, side: int, crop: Crop = "centre") -> Picture:
    """Decode a file or its bytes, turn it upright, and resize its shorter side to `side`.

    The crop "centre" keeps the middle square; "random" keeps the longer side, up to `REACH`.

    Raises:
        PictureError: corrupt, truncated, too large, too small or of another format.
        UnreadableError: the system cannot read the file.
    """
    with (
        judging(file, _UNKNOWN),
        open(file, "rb") if isinstance(file, Path) else io.BytesIO(file) as opened,
    ):
        size = opened.seek(0, io.SEEK_END)
        if not size:
            raise PictureError("it is empty")
        if size > MAX_BYTES:
            raise PictureError(f"the file is larger than {MAX_BYTES // 10**6} MB")
        opened.seek(0)
        return _decode(opened, side, crop)


def _decode(file: BinaryIO | io.BytesIO, side: int, crop: Crop) -> Picture:
    image = Image.open(file, formats=FORMATS)
    judge(*image.size)
    original_side = min(image.size)
    image.draft(None, (4 * side, 4 * side))  # a JPEG may decode at 1/2 .. 1/8: much faster
    image.load()
    upright = ImageOps.exif_transpose(image)
    return Picture(resized(upright, side, REACH[crop]), original_side)


def judge(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raise PictureError unless an image of this size is worth decoding, and can be decoded."""
    if min(width, height) < MIN_SIDE:
        raise PictureError(f"too small: {width}x{height}, under {MIN_SIDE} pixels a side")
    if max(width, height) > MAX_SIDE or width * height > max_pixels:
        raise PictureError(
            f"too large: {width}x{height}, over {MAX_SIDE} pixels a side or "
            f"{max_pixels // 10**6} megapixels"
        )


def resized(image: Image.Image, side: int, reach: int) -> UInt8[np.ndarray, "h w 3"]:
    """Middle of an image as RGB: the shorter side is `side`, the longer one at most `reach` sides.

    Resized with Lanczos, which averages over the whole area of a new pixel at any ratio; a box
    filter weighs source pixels unevenly unless the ratio is whole.
    """
    edge = min(image.size)
    width, height = (min(length, reach * edge) for length in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    box = (left, top, left + width, top + height)
    size = (round(side * width / edge), round(side * height / edge))
    flat = _on_white(image)
    return np.asarray(flat.resize(size, Image.Resampling.LANCZOS, box, reducing_gap=3.0))


def _on_white(image: Image.Image) -> Image.Image:
    """RGB of any mode: 16 bits are scaled to 8 (not clipped), transparency becomes white."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip
        grey = np.asarray(image).astype(np.float32) / 257.0
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
