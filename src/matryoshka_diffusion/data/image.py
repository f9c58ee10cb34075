"""Image files, decoded safely: RGB bytes of the wanted side, or a reason why not.

The header is judged before any pixel is allocated, only `FORMATS` and HEIC are decoded, and
Pillow's limits bound the text and colour profiles in a file. An animation gives its first frame.
Of what a file holds beside its pixels, orientation and colour profile are used; no fault of it, or
of the rest, makes an image bad.
"""

from __future__ import annotations

import errno
import io
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, PngImagePlugin

from matryoshka_diffusion.config import Crop
from matryoshka_diffusion.data.bad import PictureError
from matryoshka_diffusion.data.colour import to_srgb
from matryoshka_diffusion.data.shapes import nearest, square
from matryoshka_diffusion.data.source import Picture
from matryoshka_diffusion.files import MissingExtra, require, unreadable
from matryoshka_diffusion.pyramid import Resolution

Result = TypeVar("Result")

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".gif", ".bmp"})
SUFFIXES |= {".tif", ".tiff", ".heic", ".heif"}
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
    "PNG, JPEG, WEBP, AVIF, HEIC, GIF, TIFF or BMP",
    SUFFIXES,
    frozenset({".jp2", ".jxl"}),
    MAX_BYTES,
    previews=frozenset({".gif"}),  # a clip, if it lies beside a picture
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
CHANNELS = (1, 2, 3, 4)
"""Numbers of channels of decoded images: grey, grey and opacity, colour, colour and opacity."""
REACH: dict[Crop, int] = {"centre": 1, "random": 4}
"""Parts that are kept around the middle, in lengths of the cropped part; bounds panoramas."""

HEAD = 2**16
"""First bytes of a file in which most JPEGs have their size and orientation."""

_JPEG, _PNG, _ANCILLARY = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", 0x20
_KEPT = (b"tRNS", b"eXIf", b"iCCP")  # ancillary chunks that an image's look depends on
_APPLICATIONS, _COMMENT, _START_OF_SCAN = range(0xE0, 0xF0), 0xFE, 0xDA  # JPEG markers
_KEPT_SEGMENTS = (b"Exif\0\0", b"ICC_PROFILE\0", b"Adobe")
_ADOBE_BYTES = 12  # of the segment that tells the kind of colours
_HEIC = (b"heic", b"heix", b"mif1")  # brands
_COMMENTS = 2**20
"""Bytes that a GIF may have before its first frame: Pillow's time grows with their square."""
_SIDEWAYS = 5  # orientations from this one on
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_DAMAGED = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError)
_DAMAGED += (struct.error, zlib.error, RuntimeError)  # Pillow parses with these, and with slices


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


def read_picture(
    file: Path | bytes,
    shapes: int | tuple[Resolution, ...],
    crop: Crop = "centre",
    channels: int = 3,
) -> Picture:
    """Decode a file or its bytes, turn it upright, and resize it to cover the nearest of `shapes`.

    A number is the side of a square. The image has the number of `channels` (one of `CHANNELS`),
    whatever the file has. The crop "centre" keeps the middle; "random" keeps what the shape leaves
    out along the other side, up to `REACH`.
    Raises as `opened` does.
    """
    known = square(shapes) if isinstance(shapes, int) else shapes
    return _read(file, lambda stream: _decoded(stream, known, crop, channels))


def read_size(file: Path | bytes) -> tuple[int, int]:
    """Width and height of an upright image, from its header where its format allows that.

    Raises as `opened` does.
    """

    def size_of(stream: Any) -> tuple[int, int]:
        image = open_image(stream)
        judge(*image.size)
        width, height = image.size
        return (height, width) if _orientation(image) >= _SIDEWAYS else (width, height)

    return _read(file, size_of)


def size_in_head(head: bytes) -> tuple[int, int] | None:
    """Size as `read_size` tells it from the first bytes of a JPEG; None where they do not suffice.

    Other formats may have their orientation behind the pixels.
    """
    if not head.startswith(_JPEG):
        return None
    try:
        return read_size(head)
    except PictureError:  # of what follows the head, or of the file
        return None


def _read(file: Path | bytes, read: Callable[[Any], Result]) -> Result:
    """Read from a file, and once more without its metadata where these are damaged."""
    with opened(file, PICTURES) as stream:
        try:
            return read(stream)
        except PictureError:
            raise
        except _DAMAGED:
            plain = _without_metadata(stream)
            if plain is None:
                raise
            return read(plain)


def _decoded(stream: Any, shapes: tuple[Resolution, ...], crop: Crop, channels: int) -> Picture:
    image = open_image(stream)
    size = image.size
    judge(*size)
    longest = 4 * max(shapes[nearest(size, shapes)][:2])
    image.draft(None, (longest, longest))  # a JPEG may decode at 1/2 .. 1/8: much faster
    clear = image.info.get("transparency")
    if image.format == "PNG" and clear is not None:
        image.info["transparency"] = _as_pixel(clear, image.mode, _depth(stream))
    image.load()
    if _orientation(image) >= _SIDEWAYS:
        size = (size[1], size[0])
    shape = shapes[nearest(size, shapes)]
    return Picture(resized(upright(image), shape, REACH[crop], channels), size)


def open_image(stream: Any) -> Image.Image:
    """Open an image by its header, of `FORMATS` or HEIC, whose package is loaded for it.

    Raises:
        PictureError: there is no package for it, or no way to bound its pixels or its time. Other
            faults are Pillow's errors, which `opened` translates.
    """
    head, formats = stream.read(32), FORMATS
    stream.seek(0)
    if head[:4] == b"GIF8":
        _judge_gif(stream)
    if head[4:8] == b"ftyp" and any(brand in head for brand in _HEIC) and b"avif" not in head:
        try:
            require("pillow_heif", "heic", "HEIC").register_heif_opener(thumbnails=False)
        except MissingExtra as error:
            raise PictureError(str(error)) from error
        formats = (*FORMATS, "HEIF")
    image = Image.open(stream, formats=formats)
    if image.mode == "F" or (image.format == "TIFF" and image.mode == "I"):
        raise PictureError("its numbers have 32 bits: save it with 8 or 16")
    return image


def _judge_gif(stream: Any) -> None:
    """Raise PictureError for a GIF with more than `_COMMENTS` bytes before its first frame."""
    flags = stream.read(13)[10:11]
    if flags and flags[0] & 0x80:
        stream.seek(3 * 2 ** (flags[0] % 8 + 1), io.SEEK_CUR)  # the palette
    start = stream.tell()
    while stream.read(1) == b"!":
        stream.read(1)
        while (length := stream.read(1)) > b"\0":
            stream.seek(length[0], io.SEEK_CUR)
            if stream.tell() - start > _COMMENTS:
                raise PictureError(f"too large: {_COMMENTS:,} bytes of comments")
    stream.seek(0)


def _depth(stream: Any) -> int:
    """Bits of a PNG's numbers, from its header; the place in the stream stays."""
    place = stream.tell()
    stream.seek(24)
    depth = stream.read(1)[0]
    stream.seek(place)
    return depth


def _as_pixel(clear: Any, mode: str, depth: int) -> Any:
    """A PNG's transparent colour as Pillow's pixels have it: scaled to 8 bits as they are."""
    if mode == "RGB" and depth == 16:
        return tuple(number >> 8 for number in clear)
    return clear * 255 // (2**depth - 1) if mode == "L" and depth in (2, 4) else clear


def _without_metadata(stream: Any) -> io.BytesIO | None:
    """A PNG or JPEG without what its look does not depend on; None for other files."""
    stream.seek(0)
    if (signature := stream.read(8)) == _PNG:
        return _plain_png(stream)
    return _plain_jpeg(stream) if signature.startswith(_JPEG) else None


def _plain_jpeg(stream: Any) -> io.BytesIO:
    """A JPEG without the segments of applications, except whole ones that its look depends on."""
    plain = io.BytesIO()
    stream.seek(0)
    plain.write(stream.read(2))
    while len(head := stream.read(4)) == 4:
        length = int.from_bytes(head[2:], "big")
        if head[0] != 0xFF or head[1] == _START_OF_SCAN or length < 2:
            break
        body = stream.read(length - 2)
        is_kept = body.startswith(_KEPT_SEGMENTS) and len(body) >= _ADOBE_BYTES
        if is_kept or not (head[1] in _APPLICATIONS or head[1] == _COMMENT):
            plain.write(head + body)
    plain.write(head + stream.read())
    plain.seek(0)
    return plain


def _plain_png(stream: Any) -> io.BytesIO:
    """A PNG without the chunks that pixels do not need, except a whole profile and orientation.

    Pillow refuses a file for a chunk that is damaged, or that unpacks to more than 1 MiB.
    """
    plain = io.BytesIO()
    plain.write(_PNG)
    while len(head := stream.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind[0] & _ANCILLARY and kind not in _KEPT:
            stream.seek(length + 4, io.SEEK_CUR)
            continue
        body = stream.read(length + 4)
        if kind != b"iCCP" or _is_small_profile(body[:-4], kind, body[-4:]):
            plain.write(head + body)
    plain.seek(0)
    return plain


def _is_small_profile(data: bytes, kind: bytes, checksum: bytes) -> bool:
    """True for an undamaged iCCP chunk that Pillow unpacks."""
    packed = data.partition(b"\0")[2]
    try:
        unpacker = zlib.decompressobj()
        unpacker.decompress(packed[1:], PngImagePlugin.MAX_TEXT_CHUNK)
    except zlib.error:
        return False
    whole = zlib.crc32(kind + data).to_bytes(4, "big") == checksum and packed[:1] == b"\0"
    return whole and not unpacker.unconsumed_tail


def upright(image: Image.Image) -> Image.Image:
    """Image turned as its EXIF or XMP data says. Nothing else of these is used: it may be bad."""
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """Number of the way in which an image lies, one of `_TURNS`, or 1 for upright."""
    orientation = None
    with suppress(*_DAMAGED):
        image.getexif()
    with suppress(*_DAMAGED):  # the part that was read before a fault
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    return orientation if isinstance(orientation, int) and orientation in _TURNS else 1


def judge(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raise PictureError unless an image of this size is worth decoding, and can be decoded."""
    if min(width, height) < MIN_SIDE:
        raise PictureError(f"too small: {width}x{height}, under {MIN_SIDE} pixels a side")
    if max(width, height) > MAX_SIDE or width * height > max_pixels:
        raise PictureError(
            f"too large: {width}x{height}, over {MAX_SIDE} pixels a side or "
            f"{max_pixels // 10**6} megapixels"
        )


def resized(
    image: Image.Image, shape: Resolution, reach: int, channels: int = 3
) -> UInt8[np.ndarray, "h w {channels}"]:
    """Middle of an image that covers `shape`: one side exactly, the other up to `reach` times.

    Resized with Lanczos, which averages over the whole area of a new pixel at any ratio; a box
    filter weighs source pixels unevenly unless the ratio is whole. 16 bits are scaled to 8 (not
    clipped). Transparency becomes white unless `channels` has it; colours become sRGB.
    """
    mode, wanted = image.mode, (shape.width, shape.height)
    # The side that is filled exactly, in pixels of the image and of the shape.
    edge, side = min(zip(image.size, wanted, strict=True), key=lambda both: both[0] / both[1])
    width, height = (
        min(length, reach * pixels * edge / side)
        for length, pixels in zip(image.size, wanted, strict=True)
    )
    left, top = (image.width - width) // 2, (image.height - height) // 2
    box = (left, top, left + width, top + height)
    profile, clear = image.info.get("icc_profile"), image.info.get("transparency")
    if mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip
        values = np.asarray(image)
        grey = (values.astype(np.float32) / 257.0).round().clip(0, 255).astype(np.uint8)
        if isinstance(clear, int):
            grey[values == clear] = 255
        image = Image.fromarray(grey)
    elif image.has_transparency_data and channels in (2, 4):
        image = image.convert("RGBA")
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
        image = image.getchannel(0) if mode in ("L", "LA") else image.convert("RGB")
    elif mode not in ("L", "CMYK") or (mode == "CMYK" and not profile):
        image = image.convert("RGB")
    size = (round(side * width / edge), round(side * height / edge))
    small = image.resize(size, Image.Resampling.LANCZOS, box, reducing_gap=3.0)
    opacity = small.getchannel("A") if small.mode == "RGBA" else 255
    result = to_srgb(small.convert("RGB") if small.mode == "RGBA" else small, profile)
    result = result.convert("L") if channels < 3 else result
    if channels in (2, 4):
        result.putalpha(opacity)
    return np.asarray(result).reshape(result.height, result.width, channels)
