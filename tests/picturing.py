"""Small images in files of every kind, for tests of data."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from matryoshka_diffusion.config import DataConfig, SourceName
from matryoshka_diffusion.data.source import Source, array_source, open_source

COLOURS = [(200, 30, 40), (10, 180, 60), (20, 40, 220), (240, 240, 20), (90, 0, 90), (1, 2, 3)]
SIDE = 16
Parts = list[tuple[str, bytes]]


def noise(height: int, width: int | None = None, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width or height, 3), np.uint8)


def encode(colour=COLOURS[0], size=(20, 24), form="PNG", mode="RGB", **options) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, format=form, **options)
    return file.getvalue()


def save(path: Path, pixels: np.ndarray | None = None, **options) -> Path:
    """An image file of these pixels, or one of 20 x 24 in the first colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (20, 24), COLOURS[0]) if pixels is None else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def save_noise(folder: Path, count: int, height: int = 64, width: int = 64) -> Path:
    """A folder of images of noise, each of its own."""
    for number in range(count):
        save(folder / f"{number}.png", noise(height, width, number))
    return folder


def write_tar(path: Path, parts: Parts, form: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in parts:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def opened(
    path: Path | str, share: float = 0.0, kind: SourceName = "folder", side: int = SIDE, **options
) -> Source:
    """The data at `path`, of which a `share` may be bad."""
    data = DataConfig(source=kind, path=str(path), max_bad_fraction=share, **options)
    return open_source(data, side)


def toy(count: int, side: int = 4, **columns) -> Source:
    array = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
    usual = {
        "captions": [(f"one of {n}", f"two of {n}") for n in range(count)],
        "labels": [n % 2 for n in range(count)],
        "original_sides": [10 + n for n in range(count)],
        "classes": ("even", "odd"),
    }
    return array_source("toy", array, [f"key {n}" for n in range(count)], **{**usual, **columns})


def reasons(source: Source) -> dict[str, str]:
    """Message for each bad sample."""
    return {file.path: str(file).removeprefix(f"{file.path}: ") for file in source.bad}


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bytes(width, height, rows: bytes, depth=8, colour=2, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = (
        chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + body


def icc_profile(space: str, gamma: float, primaries: Sequence[Sequence[float]] = ()) -> bytes:
    """ICC profile of a display: one gamma for all channels, `primaries` in XYZ under D50."""

    def fixed(*numbers: float) -> bytes:
        return struct.pack(f">{len(numbers)}i", *(round(number * 65536) for number in numbers))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    d50 = fixed(0.9642, 1.0, 0.8249)
    tags = {b"wtpt": b"XYZ \0\0\0\0" + d50}
    tags |= (
        {b"kTRC": curve} if space == "GRAY" else dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    )
    names = (b"rXYZ", b"gXYZ", b"bXYZ")
    for name, colour in zip(names, primaries, strict=False):
        tags[name] = b"XYZ \0\0\0\0" + fixed(*colour)
    start, table = 132 + 12 * len(tags), struct.pack(">I", len(tags))
    for name, data in tags.items():
        table += struct.pack(">4sII", name, start, len(data))
        start += len(data)
    head = struct.pack(
        ">II4s4s4s4s12x4s28x",
        start,
        0,
        b"\2\x40\0\0",
        b"mntr",
        f"{space:4}".encode(),
        b"XYZ ",
        b"acsp",
    )
    return (head + d50 + bytes(48)) + table + b"".join(tags.values())


ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
"""Primaries of a wider space, whose gamma is 2.2."""
