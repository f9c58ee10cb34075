"""A user's own small pictures, for an upsampler to enlarge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.data.images import SUFFIXES, PictureError, read_picture
from matryoshka_diffusion.draw.grid import SHEETS


def read_coarse(path: Path, side: int, channels: int) -> UInt8[np.ndarray, "n side side channels"]:
    """The picture at `path`, or all of a folder by name, each exactly `side` x `side`.

    They are not resized: how a picture was made small decides what is there to enlarge. Of a folder
    that samples were saved to, the sheets (`grid.png`, ...) are left out.

    Raises:
        FileNotFoundError: there is no picture.
        UsageError: one is of another size, or no picture that can be read.
    """
    files = [path]
    if path.is_dir():
        pictures = (file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        files = sorted(file for file in pictures if file.name not in SHEETS)
    if not files or not path.exists():
        raise FileNotFoundError(f"{path}: no picture here to enlarge (PNG, JPEG or WEBP)")
    return np.stack([_read(file, side, channels) for file in files])


def for_each(
    pictures: UInt8[np.ndarray, "p side side channels"], asked: int, n: int
) -> tuple[UInt8[np.ndarray, "samples side side channels"], int]:
    """What to enlarge for each sample, and how many there are of each prompt or class.

    One picture goes with every prompt, and one prompt with every picture; several of both are
    pairs. Each is enlarged `n` times, by seeds that follow one another.

    Args:
        asked: how many prompts or classes there are, 1 where there is neither.

    Raises:
        UsageError: there are several of both, and not as many.
    """
    if len(pictures) != asked and 1 not in (len(pictures), asked):
        raise UsageError(
            f"--coarse: {len(pictures)} pictures for {asked} prompts or classes; give one picture, "
            "or one prompt or class, or as many of either"
        )
    each = pictures if len(pictures) > 1 else pictures.repeat(asked, axis=0)
    return each.repeat(n, axis=0), n * len(each) // asked


def _read(file: Path, side: int, channels: int) -> UInt8[np.ndarray, "side side channels"]:
    try:
        pixels, original_side = read_picture(file, side, "random")  # which cuts nothing off
    except PictureError as error:
        raise UsageError(f"{file}: {error}") from error
    if pixels.shape[:2] != (side, side) or original_side != side:
        raise UsageError(f"{file}: the upsampler takes pictures of exactly {side}x{side} pixels")
    return pixels if channels == 3 else np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
