"""Changes that a user asks for, brought to a model's levels: pictures, masks and seeds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from matryoshka_diffusion.codec import Codec
from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.edit import Edit, Hold
from matryoshka_diffusion.pyramid import build_pyramid, down_sample, to_float, up_sample
from matryoshka_diffusion.samplers import Blend, Seed
from matryoshka_diffusion.sampling import DiffusionModel

if TYPE_CHECKING:
    from matryoshka_diffusion.data.given import Given
else:
    Given = Any


def edit_of(
    model: DiffusionModel,
    codec: Codec | None,
    *,
    keep: Mapping[int | str, Given | Sequence[Given]],
    image: Given | None,
    mask: Given | None,
    strength: float | None,
    until: float,
) -> Edit:
    """The edit of a model's samples by pictures, as `Matryoshka.edit` describes it.

    Raises:
        UsageError: a level, picture, mask or number does not fit.
        OSError: a file cannot be read.
    """
    from matryoshka_diffusion.data.given import read_mask, size_of  # they load Pillow

    for name, value in (("strength", strength), ("until", until)):
        if value is not None and not 0.0 <= value <= 1.0:
            raise UsageError(f"{name} is {value}: give a number from 0 to 1")
    if model.model.hidden:
        raise UsageError(f"{model.config.name} plans in features, not pixels: take another model")
    if image is None and (mask is not None or strength is not None):
        raise UsageError("mask and strength need a picture to change: add it (--image)")
    if image is not None and mask is None and strength is None:
        raise UsageError("image: add a mask (--mask) or a strength (--strength)")
    holds, start, finest = [], None, model.resolutions[-1]
    kept = {level_of(model, name): pictures for name, pictures in keep.items()}
    for level, pictures in sorted(kept.items()):
        known = given_level(model, codec, pictures, level)
        holds.append(Hold(level, known, torch.ones_like(known[:, :1], dtype=torch.bool), until))
    if image is not None:
        x = given_level(model, codec, image, len(model.resolutions) - 1)
        start = build_pyramid(x, model.resolutions)
        if mask is not None:
            sides = tuple(resolution.width for resolution in model.resolutions)
            white = torch.tensor(read_mask(mask, size_of(image), sides)) >= 128
            white = up_sample(white.permute(2, 0, 1)[None].float(), finest, "nearest")
            holds.append(Hold(len(start) - 1, x, white.to(x.device) == 0.0, until))
    return Edit(tuple(holds), start, 1.0 if strength is None else strength)


def level_of(model: DiffusionModel, name: int | str) -> int:
    """The index of the level of this name: its side, or 16x64 for 16 frames of that side.

    Raises:
        UsageError: the model has no such level.
    """
    names = [level.size for level in model.model.levels]
    if str(name) not in names:
        raise UsageError(
            f"{model.config.name} has no level {name}: name another ({', '.join(names)})"
        )
    return names.index(str(name))


def blended_seeds(
    model: DiffusionModel,
    n: int,
    seed: int | Sequence[int],
    *,
    levels: Collection[int | str] | None,
    between: tuple[int, int] | None,
) -> int | Sequence[Seed]:
    """Seeds of `n` samples, of which only some `levels` differ, or that lie `between` two seeds.

    Sample i has the noise of its own seed on those levels, and of the first seed on the others.
    Without both arguments `seed` is as it was.

    Raises:
        UsageError: a level is unknown, or there are too few samples to lie between seeds.
    """
    if levels is None and between is None:
        return seed
    places = range(len(model.model.levels))
    chosen = places if levels is None else [level_of(model, name) for name in levels]
    if between is None:
        several = range(seed, seed + n) if isinstance(seed, int) else seed
        steps = [(several[0], one, 1.0) for one in several]
    elif n < 2 or seed != 0:
        raise UsageError("between goes from seed to seed: draw 2 or more (-n), and omit --seed")
    else:
        steps = [(*between, step / (n - 1)) for step in range(n)]
    return [
        Blend(first, second, tuple(share * (place in chosen) for place in places))
        for first, second, share in steps
    ]


def given_level(
    model: DiffusionModel, codec: Codec | None, given: Given | Sequence[Given], level: int
) -> Float[Tensor, "b c *grid"]:
    """Pictures as images of a level, made as training makes them.

    Raises:
        UsageError: a picture cannot be read, or the level holds clips.
    """
    from matryoshka_diffusion.data.given import read_given

    resolution = model.resolutions[level]
    if resolution.frames is not None:
        raise UsageError(f"{model.config.name} draws clips: keep a level of images instead")
    several = [given] if isinstance(given, str | Path | bytes | np.ndarray) else list(given)
    # Latents are averages of those of whole images.
    side = resolution.width if codec is None else model.picture_side
    channels = model.model.channels if codec is None else 3
    pictures = [read_given(one, side, model.picture_side, channels) for one in several]
    x = [to_float(one, model.config.data.pixels).permute(2, 0, 1)[None] for one in pictures]
    x = x if codec is None else [codec.encode(one) for one in x]
    return torch.cat([down_sample(one, resolution) for one in x]).to(model.device)
