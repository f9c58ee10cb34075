"""Levels of samples in the forms that diffusers offers: `output_type`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from matryoshka_diffusion.config import Pixels
from matryoshka_diffusion.data.loader import to_uint8

Pictures: TypeAlias = list[Image.Image] | Float[np.ndarray, "n _ _ c"] | Float[Tensor, "n c _ _"]
"""All pictures of one level."""


def as_latent(z: Float[Tensor, "n c h w"], pixels: Pixels) -> Float[Tensor, "n c h w"]:
    """The sampler's own numbers, about -1 to 1."""
    return z


def as_pt(z: Float[Tensor, "n c h w"], pixels: Pixels) -> Float[Tensor, "n c h w"]:
    """Bytes / 255: all forms of a picture hold the same bytes."""
    return to_uint8(z, pixels).float() / 255.0


def as_np(z: Float[Tensor, "n c h w"], pixels: Pixels) -> Float[np.ndarray, "n h w c"]:
    """Bytes / 255 with the channels last."""
    return as_pt(z, pixels).permute(0, 2, 3, 1).cpu().numpy()


def as_pil(z: Float[Tensor, "n c h w"], pixels: Pixels) -> list[Image.Image]:
    """RGB, or grey where there is one channel."""
    rows = to_uint8(z, pixels).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(row[:, :, 0] if row.shape[2] == 1 else row) for row in rows]


FORMS: dict[str, Callable[[Tensor, Pixels], Pictures]] = {
    "pil": as_pil,
    "np": as_np,
    "pt": as_pt,
    "latent": as_latent,
}
