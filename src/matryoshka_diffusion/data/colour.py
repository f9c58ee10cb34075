"""Colours of images: from the ICC profile in a file to sRGB, which models learn and draw."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

MAX_PROFILE_BYTES = 4 * 2**20
"""A larger profile is ignored; those of printers take up to 3 MB."""

_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}  # mode -> the profile's own word for it
_SAME = 2  # of 255: a profile that changes no colour by more is sRGB, which has many spellings
_TRANSFORMS = 16
_LEVELS = np.arange(256, dtype=np.uint8)[None]
_COLOURS = np.stack(np.meshgrid(*[_LEVELS[0, ::51]] * 3), -1).reshape(1, -1, 3)


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Image of mode RGB, L or CMYK in sRGB; one whose profile is sRGB keeps its numbers.

    A profile that is damaged, or of another mode, is ignored.
    """
    if profile and len(profile) <= MAX_PROFILE_BYTES:
        transform = _transform(bytes(profile), image.mode)
        if transform is not None:
            return transform.apply(image)
    return image.convert("RGB")


@lru_cache(_TRANSFORMS)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Transform to sRGB; None where there is none, or where it would change nothing."""
    try:
        own: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if own.profile.xcolor_space.strip() != _SPACES[mode]:
            return None
        srgb = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(own, srgb, mode, "RGB")
        if mode == "CMYK":
            return transform
        colours = Image.fromarray(_LEVELS if mode == "L" else _COLOURS)
        before, after = (
            np.asarray(one, np.int16) for one in (colours.convert("RGB"), transform.apply(colours))
        )
        return None if np.abs(after - before).max() <= _SAME else transform
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
