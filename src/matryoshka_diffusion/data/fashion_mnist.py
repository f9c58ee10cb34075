"""Fashion-MNIST: 60,000 grey images of garments in ten classes, from its idx files."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from matryoshka_diffusion.config import ConfigError
from matryoshka_diffusion.data.source import Source, array_source

CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist

_SIDE = 28
_UNSIGNED_BYTES = 0x08
_MAX_VALUES = 2**30


def fashion_mnist(side: int, folder: Path | None = None) -> Source:
    """Training set, padded with black from 28 to `side` pixels (32 halves well)."""
    if side < _SIDE:
        raise ConfigError(
            f"Fashion-MNIST has {_SIDE} pixels a side and is only padded, never shrunk: "
            f"the finest level needs a side of 32, not {side}"
        )
    folder = folder or FOLDER
    images = _read(folder / "train-images-idx3-ubyte.gz", rank=3)
    labels = _read(folder / "train-labels-idx1-ubyte.gz", rank=1)
    if images.shape != (len(labels), _SIDE, _SIDE) or len(labels) == 0:
        raise ValueError(f"{folder}: images {images.shape} do not match {len(labels)} labels")
    if labels.max() >= len(CLASSES):
        raise ValueError(f"{folder}: label {labels.max()} is not one of {len(CLASSES)} classes")
    before = (side - _SIDE) // 2
    margin = (before, side - _SIDE - before)
    return array_source(
        "fashion-mnist",
        np.pad(images, ((0, 0), margin, margin))[..., None],
        keys=[f"train-{n:05}" for n in range(len(images))],
        labels=labels.tolist(),
        original_sides=[_SIDE] * len(images),
        classes=CLASSES,
    )


def _read(path: Path, rank: int) -> UInt8[np.ndarray, "..."]:
    """Values of an idx file of bytes: 0 0 type rank, big-endian sizes, then the values."""
    try:
        with gzip.open(path) as file:
            header = file.read(4 + 4 * rank)
            shape = struct.unpack(f">{rank}I", header[4:])
            if header[:4] != bytes((0, 0, _UNSIGNED_BYTES, rank)):
                raise ValueError(f"it does not begin as {rank}-dimensional idx bytes do")
            if math.prod(shape) > _MAX_VALUES:
                raise ValueError(f"its sizes {shape} are beyond reason")
            data = file.read(math.prod(shape) + 1)
        return np.frombuffer(data, np.uint8).reshape(shape)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} is missing: apt-get install dataset-fashion-mnist, or put Fashion-MNIST's "
            "train-*.gz files into a folder and name it with --data (data.path)"
        ) from error
    except (ValueError, struct.error, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is corrupt ({error}): fetch it again") from error
