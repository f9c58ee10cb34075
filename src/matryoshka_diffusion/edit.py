"""Editing: samplers whose images keep a level or some pixels, or that begin with a noised image.

An edit wraps a sampler. Every sampler, guidance and seed therefore works as without it, and no
network is trained for it. D^r is linear, so the estimate of x can be moved until D^r of it is the
image that was given: the range-null-space step of DDNM (Wang et al., 2022).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from matryoshka_diffusion.codec import Codec
from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.denoiser import Denoiser
from matryoshka_diffusion.diffusion import diffuse
from matryoshka_diffusion.pyramid import (
    Pyramid,
    build_pyramid,
    down_sample,
    resolution_of,
    to_float,
    up_sample,
)
from matryoshka_diffusion.samplers import Sampler, Schedules, State, Times
from matryoshka_diffusion.sampling import DiffusionModel
from matryoshka_diffusion.schedule import Instant

if TYPE_CHECKING:
    from matryoshka_diffusion.data.given import Given
else:
    Given = Any

SMOOTH_PASSES = 3
"""Bicubic passes of `enlarged_exactly`. After three the rest is a few percent."""


@dataclass(frozen=True)
class Hold:
    """Pixels of one level that every sample keeps.

    Attributes:
        level: index of the level, from 0, the coarsest.
        image: the level's images or clips, one for all samples or one for each.
        mask: true for pixels that are kept, of the shape of one channel of `image`.
        until: time from which the sampler is free. 0 keeps the pixels to the end.
    """

    level: int
    image: Float[Tensor, "b c *grid"]
    mask: Bool[Tensor, "b 1 *grid"]
    until: float = 0.0

    def moved(self, x: Pyramid) -> Pyramid:
        """Images with the pixels in place, coarse to fine, the other levels moved to agree.

        A finer level is moved until D^r of it has the pixels. A coarser level is D^r of this one
        wherever it covers a kept pixel.
        """
        held = torch.where(self.mask, self.image, x[self.level])
        coarser = tuple(self._pooled(held, x_r) for x_r in x[: self.level])
        finer = tuple(self._shifted(x_r) for x_r in x[self.level + 1 :])
        return (*coarser, held, *finer)

    def _pooled(self, held: Tensor, x: Tensor) -> Tensor:
        resolution = resolution_of(x)
        known = down_sample(self.mask.to(held), resolution) > 0.0
        return torch.where(known, down_sample(held, resolution), x)

    def _shifted(self, x: Tensor) -> Tensor:
        missing = self.image - down_sample(x, resolution_of(self.image))
        return x + enlarged_exactly(torch.where(self.mask, missing, 0.0), x)

    def rows(self, rows: Int[Tensor, " n"]) -> Hold:
        """The hold of some samples."""
        return replace(self, image=_rows(self.image, rows), mask=_rows(self.mask, rows))


@dataclass(frozen=True)
class Edit:
    """A wrapper of samplers: what the images keep, and the images to begin with.

    Attributes:
        holds: kept pixels. Where two disagree the later one has its way.
        start: a clean pyramid from whose noised levels the sampler starts, or None: pure noise.
        strength: time to start at: the first one of the sampler's grid that is not above it. 0
            returns `start`, and 1 hides it.
    """

    holds: tuple[Hold, ...] = ()
    start: Pyramid | None = None
    strength: float = 1.0

    def rows(self, rows: Int[Tensor, " n"]) -> Edit:
        """The edit of some samples."""
        start = self.start and tuple(_rows(level, rows) for level in self.start)
        return replace(self, holds=tuple(hold.rows(rows) for hold in self.holds), start=start)

    def check(self, count: int) -> None:
        """Raise UsageError unless there is one kept image, or one for each of `count` samples."""
        for hold in self.holds:
            if len(hold.image) not in (1, count):
                raise UsageError(
                    f"keep: {len(hold.image)} pictures for {count} samples: give one, or one each"
                )

    def __call__(self, sampler: Sampler) -> Sampler:
        """The sampler with this edit. Without holds and start it is the same to the last bit."""

        def states(
            denoise: Denoiser, z: Pyramid, schedules: Schedules, times: Times, **options: Any
        ) -> Iterator[State]:
            late = times[times <= self.strength + 1e-9]
            skipped = len(times) - len(late)
            z = self.begun(z, schedules, late[:1])
            if len(late) == 1:
                yield State(len(times) - 1, 0.0, z, z)
            for state in sampler(Held(denoise, self.holds), z, schedules, late, **options):
                yield state._replace(step=skipped + state.step)

        return states

    def begun(self, noise: Pyramid, schedules: Schedules, t: Times) -> Pyramid:
        """Latents at the first time: the noise of each sample, around whatever is known then.

        A kept pixel has the latent alpha x + sigma eps from the start. Every sampler takes it to
        the same x and eps at each later time, because the estimate there is always x.
        """
        z = noise
        t = t.expand(len(noise[0]))
        if self.start is not None:
            x = tuple(x_r.expand_as(eps) for x_r, eps in zip(self.start, noise, strict=True))
            z = diffuse(x, noise, t, schedules)
        for hold in self.holds:
            if t[0] > hold.until:
                r = slice(hold.level, hold.level + 1)
                image = hold.image.expand_as(noise[hold.level])
                (held,) = diffuse((image,), noise[r], t, schedules[r])
                z = (*z[: r.start], torch.where(hold.mask, held, z[hold.level]), *z[r.stop :])
        return z


UNCHANGED = Edit()
"""Plain sampling."""


@dataclass(frozen=True)
class Held:
    """Estimates with kept pixels in place, and all other levels moved to agree with them."""

    denoiser: Denoiser
    holds: tuple[Hold, ...]

    def __call__(self, z: Pyramid, now: Instant) -> Pyramid:
        x = self.denoiser(z, now)
        for hold in self.holds:
            if now.t > hold.until:
                x = hold.moved(x)
        return x


def _rows(x: Tensor, rows: Int[Tensor, " n"]) -> Tensor:
    return x if len(x) == 1 else x[rows.to(x.device)]


def enlarged_exactly(
    x: Float[Tensor, "b c *grid"], like: Float[Tensor, "b c *fine"]
) -> Float[Tensor, "b c *fine"]:
    """Enlarge to the size of `like` so that D^r of the result is `x`, as smoothly as that allows.

    D^r of a bicubic enlargement is not quite `x`. What is missing is enlarged in turn, and the
    small rest of it is spread evenly, which is exact but shows the pixels of `x`.
    """
    fine, coarse = resolution_of(like), resolution_of(x)
    result = up_sample(x, fine, "bicubic")
    for mode in ("bicubic",) * (SMOOTH_PASSES - 1) + ("nearest",):
        result = result + up_sample(x - down_sample(result, coarse), fine, mode)
    return result


# --- pictures that a user gives ----------------------------------------------------------------


def edit_of(
    model: DiffusionModel,
    codec: Codec | None,
    *,
    keep: Mapping[int, Given | Sequence[Given]],
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
    for side, pictures in sorted(keep.items()):
        level = level_of(model, side)
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


def level_of(model: DiffusionModel, side: int) -> int:
    """The index of the level of images of this side.

    Raises:
        UsageError: the model has no such level.
    """
    sides = {grid.width: level for level, grid in enumerate(model.resolutions) if not grid.frames}
    if side not in sides:
        named = ", ".join(map(str, sides)) or "none"
        raise UsageError(
            f"keep: {model.config.name} has no level of images of {side} pixels: name another "
            f"({named})"
        )
    return sides[side]


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
    several = [given] if isinstance(given, str | Path | np.ndarray) else list(given)
    # Latents are averages of those of whole images.
    side = resolution.width if codec is None else model.picture_side
    channels = model.model.channels if codec is None else 3
    pictures = [read_given(one, side, model.picture_side, channels) for one in several]
    x = [to_float(one, model.config.data.pixels).permute(2, 0, 1)[None] for one in pictures]
    x = x if codec is None else [codec.encode(one) for one in x]
    return torch.cat([down_sample(one, resolution) for one in x]).to(model.device)
