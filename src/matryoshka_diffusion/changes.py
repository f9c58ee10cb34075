"""Changes that a user asks for, brought to a model's levels: pictures, masks and seeds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor

from matryoshka_diffusion.codec import Codec
from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.edit import Edit, Hold, Region
from matryoshka_diffusion.pyramid import build_pyramid, down_sample, to_float, up_sample
from matryoshka_diffusion.samplers import Blend, Seed
from matryoshka_diffusion.sampling import DiffusionModel

if TYPE_CHECKING:
    from matryoshka_diffusion.data.given import Given
else:
    Given = Any

Kept: TypeAlias = Mapping[int, Given | Sequence[Given]] | Mapping[str, Given | Sequence[Given]]
"""Pictures by the names of the levels that keep them."""


def edit_of(
    model: DiffusionModel,
    codec: Codec | None,
    *,
    keep: Kept,
    image: Given | None,
    mask: Given | None,
    strength: float | None,
    until: float,
    regions: Sequence[tuple[Given | float, str]] = (),
    correct: int = 0,
    resample: int = 1,
) -> Edit:
    """The edit of a model's samples by pictures, as `Matryoshka.edit` describes it.

    Raises:
        UsageError: a level, picture, mask or number does not fit.
        OSError: a file cannot be read.
    """
    _refuse_idle(keep, image, mask, strength, until, correct=correct, resample=resample)
    if model.model.hidden:
        raise UsageError(f"{model.config.name} plans in features, not pixels: take another model")
    holds, start, last = [], None, len(model.resolutions) - 1
    kept = {level_of(model, name): _several(name, pictures) for name, pictures in keep.items()}
    subject = _subject(model, kept if image is None else {last: [image]})
    white = None if mask is None else _weight(model, mask, subject) >= 0.5
    for level, pictures in sorted(kept.items()):
        known = given_level(model, codec, pictures, level)
        stays = torch.ones_like(known[:, :1], dtype=torch.bool)
        if white is not None and image is None:
            stays &= down_sample(white.float(), model.resolutions[level]) < 0.5
        holds.append(Hold(level, known, stays, until))
    if image is not None:
        x = given_level(model, codec, [image], last)
        start = build_pyramid(x, model.resolutions)
        if white is not None:
            holds.append(Hold(last, x, ~white, until))
    parts = regions_of(model, regions, subject)
    late = 1.0 if strength is None else strength
    return Edit(tuple(holds), start, late, regions=parts, corrections=correct, passes=resample)


def _refuse_idle(
    keep: Kept,
    image: Given | None,
    mask: Given | None,
    strength: float | None,
    until: float,
    *,
    correct: int,
    resample: int,
) -> None:
    """Raise UsageError for a number out of range, or for what changes nothing or has no picture."""
    for name, value in (("strength", strength), ("until", until)):
        if value is not None and not 0.0 <= value <= 1.0:
            raise UsageError(f"{name} is {value}: give a number from 0 to 1")
    for name, number, least in (("correct", correct, 0), ("resample", resample, 1)):
        if not isinstance(number, int) or number < least:
            raise UsageError(f"{name} is {number!r}: give a whole number from {least} on")
    if image is None and strength is not None:
        raise UsageError("strength needs a picture to change: add it (--image)")
    if image is None and not keep and mask is not None:
        raise UsageError("mask needs a picture: one to change (--image) or to keep (--keep)")
    if image is not None and mask is None and strength is None:
        raise UsageError("image: add a mask (--mask) or a strength (--strength)")
    if (correct or resample > 1) and not keep and mask is None:
        raise UsageError("--correct and --resample need something to keep: add --keep or --mask")


def _subject(model: DiffusionModel, pictures: Mapping[int, Sequence[Given]]) -> Given | None:
    """The first picture, or the image that a clip begins with: masks are cut like it."""
    from matryoshka_diffusion.data.given import first_frame  # it loads Pillow

    if not pictures:
        return None
    level = min(pictures)
    first = pictures[level][0]
    return first if model.resolutions[level].frames is None else first_frame(first)


def regions_of(
    model: DiffusionModel, regions: Sequence[tuple[Given | float, str]], subject: Given | None
) -> tuple[Region, ...]:
    """Prompts, or classes, with the weights of their masks; a number is a weight everywhere.

    Where weights sum to more than one they are divided by their sum.

    Raises:
        UsageError: a mask does not fit `subject`, or a weight is not between 0 and 1.
    """
    weights = []
    for mask, text in regions:
        if isinstance(mask, int | float):
            if not 0.0 <= mask <= 1.0:
                raise UsageError(f"region: the weight of {text!r} is {mask}: give 0 to 1")
            finest = model.resolutions[-1]
            weights.append(torch.full((1, *finest.shape(1)), float(mask), device=model.device))
        else:
            weights.append(_weight(model, mask, subject))
    total = sum(weights, torch.zeros(())).clamp(min=1.0)
    result = []
    for (_, text), weight in zip(regions, weights, strict=True):
        asked = (text, None) if model.model.text is not None else (None, text)
        _, cond = model.condition(*asked, 1)
        result.append(Region(cond, build_pyramid(weight / total, model.resolutions)))
    return tuple(result)


def _weight(
    model: DiffusionModel, mask: Given, subject: Given | None
) -> Float[Tensor, "1 1 *grid"]:
    """A mask on the finest level, 1 where it is white, cut as `subject` is if there is one."""
    from matryoshka_diffusion.data.given import read_mask, size_of  # they load Pillow

    size = size_of(mask if subject is None else subject)
    pixels = read_mask(mask, size, model.resolutions)
    white = torch.tensor(pixels).permute(2, 0, 1)[None].to(model.device) / 255.0
    return up_sample(white, model.resolutions[-1], "nearest")


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
    model: DiffusionModel, codec: Codec | None, pictures: Sequence[Given], level: int
) -> Float[Tensor, "b c *grid"]:
    """Pictures or clips as those of a level, made as training makes them.

    Raises:
        UsageError: one of them cannot be read.
    """
    from matryoshka_diffusion.data.given import read_clip, read_given

    resolution, whole = model.resolutions[level], model.resolutions[-1].frames
    # Latents are averages of those of whole images.
    cut = resolution if codec is None else model.picture
    channels = model.model.channels if codec is None else 3
    size = {"level": cut, "finest": model.picture, "channels": channels}
    read = partial(read_given, **size)
    if (frames := resolution.frames) is not None:
        assert whole is not None, "the finest level has frames if any has"
        read = partial(read_clip, **size, frames=frames, whole=whole, data=model.config.data)
    x = [to_float(read(one), model.config.data.pixels).movedim(-1, 0)[None] for one in pictures]
    x = x if codec is None else [codec.encode(one) for one in x]
    return torch.cat([down_sample(one, resolution) for one in x]).to(model.device)


def _several(level: int | str, given: Given | Sequence[Given]) -> list[Given]:
    if isinstance(given, list | tuple) and not given:
        raise UsageError(f"keep: the list for level {level} is empty: add a picture")
    return list(given) if isinstance(given, list | tuple) else [cast("Given", given)]
