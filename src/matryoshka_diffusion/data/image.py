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
from typing import Any, NamedTuple

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
MAX_BYTES = 4 * MAX_PIXELS  # no honest file is larger than an uncompressed image


class Kind(NamedTuple):
    """Files that a data set is made of."""

    noun: str  # name for one of them
    formats: str  # names of the accepted formats
    suffixes: frozenset[str]  # of accepted files
    others: frozenset[str]  # suffixes that are refused with a report; all others are ignored
    max_bytes: int  # of one file
    previews: frozenset[str] = frozenset()  # suffixes ignored beside a file of another suffix


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
"""Longest side that is kept around the middle, in units of the shorter one; bounds panoramas."""

_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_DAMAGED = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError)
_DAMAGED += (struct.error, zlib.error)  # Pillow parses files with these, and with slices


@contextmanager
def opened(file: Path | bytes, kind: Kind) -> Iterator[Any]:
    """Open a file or its bytes; separate its faults, which are remembered, from the system's.

    Raises:
        PictureError: in place of whatever a damaged, empty or too large file raises inside.
        UnreadableError: the system cannot read the file.
    """
    try:
        with open(file, "rb") if isinstance(file, Path) else io.BytesIO(file) as stream:
            size = stream.seek(0, io.SEEK_END)
            if not size:
                raise PictureError("it is empty")
            if size > kind.max_bytes:
                raise PictureError(f"the file is larger than {kind.max_bytes // 10**6} MB")
            stream.seek(0)
            yield stream
    except PictureError:
        raise
    except _TOO_LARGE as error:
        raise PictureError(f"too large: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise unknown(kind) from error
    except _DAMAGED as error:
        # "Invalid argument" is a fault of a file that leads to a place which no file has.
        code = error.errno if isinstance(file, Path) and isinstance(error, OSError) else None
        if isinstance(error, OSError) and code not in (None, errno.EINVAL):
            raise unreadable(str(file), error) from error
        raise PictureError(f"corrupt or truncated ({error})") from error


def unknown(kind: Kind) -> PictureError:
    """Make the error for a file of another format."""
    return PictureError(f"not {kind.formats}, or damaged at its start")


def read_picture(file: Path | bytes, side: int, crop: Crop = "centre") -> Picture:
    """Decode a file or its bytes, turn it upright, and resize its shorter side to `side`.

    The crop "centre" keeps the middle square; "random" keeps the longer side, up to `REACH`.
    Raises as `opened` does.
    """
    with opened(file, PICTURES) as stream:
        image = Image.open(stream, formats=FORMATS)
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
    filter weighs source pixels unevenly unless the ratio is whole. 16 bits are scaled to 8 (not
    clipped), transparency becomes white.
    """
    edge = min(image.size)
    width, height = (min(length, reach * edge) for length in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    box = (left, top, left + width, top + height)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip
        grey = np.asarray(image).astype(np.float32) / 257.0
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    size = (round(side * width / edge), round(side * height / edge))
    lanczos = Image.Resampling.LANCZOS
    return np.asarray(image.convert("RGB").resize(size, lanczos, box, reducing_gap=3.0))
