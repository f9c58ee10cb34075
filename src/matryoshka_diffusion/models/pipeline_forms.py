"""Forms that a pipeline of diffusers takes and gives: generators as seeds, and images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from matryoshka_diffusion.config import Pixels
from matryoshka_diffusion.pyramid import to_uint8

FORMS = ("pil", "np", "pt", "latent")
Images: TypeAlias = list[Image.Image] | Float[np.ndarray, "n _ _ c"] | Float[Tensor, "n c _ _"]
"""All images of one level."""


def in_form(z: Float[Tensor, "n c h w"], pixels: Pixels, form: str) -> Images:
    """Latents of one level in the form `output_type`; all forms but `latent` hold equal bytes."""
    if form == "latent":
        return z
    data = to_uint8(z, pixels)
    if form == "pt":
        return data.float() / 255.0
    rows = data.permute(0, 2, 3, 1).cpu()
    if form == "np":
        return (rows.float() / 255.0).numpy()
    return [Image.fromarray(row[:, :, 0] if row.shape[2] == 1 else row) for row in rows.numpy()]


def seeds_of(
    generator: torch.Generator | Sequence[torch.Generator] | None, count: int
) -> tuple[int, ...]:
    """Seeds of `count` images; every generator is advanced by one draw.

    One generator, by default torch's global one, gives consecutive seeds; several give one each.
    A fresh generator stands for the seed it was made with, so `torch.Generator().manual_seed(7)`
    gives the images 7, 8, ...; a used one, and the global one, give a seed that they draw.

    Raises:
        ValueError: there are several generators, but not one for each image.
    """

    def seed(one: torch.Generator) -> int:
        first, state = one.initial_seed(), one.get_state()
        draw = int(torch.randint(2**63 - 1, (), generator=one, device=one.device))
        fresh = torch.Generator(one.device).manual_seed(first).get_state()
        return first if generator is not None and torch.equal(state, fresh) else draw

    if generator is None or isinstance(generator, torch.Generator):
        first = seed(generator or torch.default_generator)
        return tuple(range(first, first + count))
    if len(generator) != count:
        raise ValueError(f"generator: {len(generator)} generators for {count} images")
    return tuple(map(seed, generator))
