"""Editing: samplers whose images keep a level or some pixels, or that begin with a noised image.

An edit wraps a sampler. Every sampler, guidance and seed therefore works as without it, and no
network is trained for it. D^r is linear, so the estimate of x can be moved until D^r of it is the
image that was given: the range-null-space step of DDNM (Wang et al., 2022).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.denoiser import Denoiser
from matryoshka_diffusion.diffusion import diffuse
from matryoshka_diffusion.pyramid import Pyramid, down_sample, resolution_of, up_sample
from matryoshka_diffusion.samplers import Sampler, Schedules, State, Times
from matryoshka_diffusion.schedule import Instant

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
