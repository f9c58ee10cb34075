"""A user's own small pictures, for an upsampler to enlarge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.data.images import SUFFIXES, PictureError, read_picture


def read_coarse(path: Path, side: int, channels: int) -> UInt8[np.ndarray, "n side side channels"]:
    """The picture at `path`, or all of a folder by name, each exactly `side` x `side`.

    They are not resized: how a picture was made small decides what is there to enlarge.

    Raises:
        FileNotFoundError: there is no picture.
        UsageError: one is of another size, or no picture that can be read.
    """
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files or not path.exists():
        raise FileNotFoundError(f"{path}: no picture here to enlarge (PNG, JPEG or WEBP)")
    return np.stack([_read(file, side, channels) for file in files])


def _read(file: Path, side: int, channels: int) -> UInt8[np.ndarray, "side side channels"]:
    try:
        pixels, original_side = read_picture(file, side, "random")  # which cuts nothing off
    except PictureError as error:
        raise UsageError(f"{file}: {error}") from error
    if pixels.shape[:2] != (side, side) or original_side != side:
        raise UsageError(f"{file}: the upsampler takes pictures of exactly {side}x{side} pixels")
    return pixels if channels == 3 else np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
