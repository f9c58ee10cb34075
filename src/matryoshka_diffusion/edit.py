"""Editing: samplers whose images keep a level or some pixels, or that begin with a noised image.

An edit wraps a sampler. Every sampler, guidance and seed therefore works as without it, and no
network is trained for it. D^r is linear, so the estimate of x can be moved until D^r of it is the
image that was given: the range-null-space step of DDNM (Wang et al., 2022).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from matryoshka_diffusion.conditioning import Conditioning, equally_long
from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.denoiser import Denoiser, Regional
from matryoshka_diffusion.diffusion import diffuse
from matryoshka_diffusion.pyramid import Pyramid, down_sample, resolution_of, up_sample
from matryoshka_diffusion.samplers import Sampler, Schedules, State, Times, resampling
from matryoshka_diffusion.schedule import Instant, expand

SMOOTH_PASSES = 3
"""Bicubic passes of `enlarged_exactly`. After three the rest is a few percent."""
PROBE = 0.5
"""Length of a correction's way in latents, in units of their noise."""
REACH = 4.0
"""*measured* on openmoji: more gains nothing for a fitting prompt, and harms another."""
TINY = 1e-30


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
        missing = self.gap(down_sample(x, resolution_of(self.image)))
        return x + enlarged_exactly(missing, x)

    def gap(self, x: Tensor) -> Tensor:
        """The kept pixels minus an estimate of the level; 0 where none is kept."""
        return torch.where(self.mask, self.image - x, 0.0)

    def rows(self, rows: Int[Tensor, " n"]) -> Hold:
        """The hold of some samples."""
        return replace(self, image=_rows(self.image, rows), mask=_rows(self.mask, rows))


@dataclass(frozen=True)
class Region:
    """A prompt or class that holds in a part of the images.

    Attributes:
        cond: the condition, one row.
        weights: its weight at each pixel of every level, 0 to 1, one channel. Those of all regions
            sum to at most one.
    """

    cond: Conditioning
    weights: Pyramid

    def of(self, cond: Conditioning) -> Conditioning:
        """The conditions of all rows with the text or the label of the region."""
        like = cond.labels if cond.tokens is None else cond.tokens
        assert like is not None, "a region has a text or a label, as all samples then have"
        own = self.cond.rows(torch.zeros(len(like), dtype=torch.long))
        return replace(cond, labels=own.labels, tokens=own.tokens, mask=own.mask)


@dataclass(frozen=True)
class Edit:
    """A wrapper of samplers: what the images keep, and the images to begin with.

    Attributes:
        holds: kept pixels. Where two disagree the later one has its way.
        start: a clean pyramid from whose noised levels the sampler starts, or None: pure noise.
        strength: time to start at: the first one of the sampler's grid that is not above it. 0
            returns `start`, and 1 hides it.
        regions: prompts that hold in a part of the images; the samples' own ones hold in the rest.
        corrections, reach: those of `Held`.
        passes: how often each stretch of steps is taken (`samplers.resampling`).
    """

    holds: tuple[Hold, ...] = ()
    start: Pyramid | None = None
    strength: float = 1.0
    regions: tuple[Region, ...] = ()
    corrections: int = 0
    reach: float = REACH
    passes: int = 1

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

        if self.passes > 1:
            sampler = resampling(sampler, self.passes)

        def states(
            denoise: Denoiser, z: Pyramid, schedules: Schedules, times: Times, **options: Any
        ) -> Iterator[State]:
            denoise = Held(self._regional(denoise), self.holds, self.corrections, self.reach)
            late = times[times <= self.strength + 1e-9]
            skipped = len(times) - len(late)
            z = self.begun(z, schedules, late[:1])
            if len(late) == 1:
                yield State(len(times) - 1, 0.0, z, z)
            for state in sampler(denoise, z, schedules, late, **options):
                yield state._replace(step=skipped + state.step)

        return states

    def conditions(self, cond: Conditioning) -> Conditioning:
        """Conditions of the rows, followed by those of the rows in each region."""
        every = cond
        for region in self.regions:
            own, every = equally_long(region.of(cond), every)
            every = every.followed_by(own)
        return every

    def _regional(self, denoise: Denoiser) -> Denoiser:
        if not self.regions:
            return denoise
        weights = [region.weights for region in self.regions]
        rest = tuple(1.0 - torch.stack(parts).sum(0) for parts in zip(*weights, strict=True))
        return Regional(denoise, [rest, *weights])

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
    """Estimates with kept pixels in place, and all other levels moved to agree with them.

    With corrections, all levels first learn what the latents of the kept ones do not say yet: the
    difference between an estimate and the kept pixels leads the latents a little way, and the
    estimate goes on along what that changes until it is nearest to the pixels. It is reconstruction
    guidance (Song et al., 2023) by finite differences: without gradients, for any denoiser.

    Attributes:
        corrections: how often that is done, each time with a call of the denoiser.
        reach: how far an estimate may go on, in units of the change that was seen. An estimate that
            does not believe the pixels hardly changes, and would go too far.
    """

    denoiser: Denoiser
    holds: tuple[Hold, ...]
    corrections: int = 0
    reach: float = REACH

    def __call__(self, z: Pyramid, now: Instant) -> Pyramid:
        x = self.denoiser(z, now)
        if holds := [hold for hold in self.holds if now.t > hold.until]:
            x = self._corrected(x, z, now, holds)
        for hold in holds:
            x = hold.moved(x)
        return x

    def _corrected(self, x: Pyramid, z: Pyramid, now: Instant, holds: list[Hold]) -> Pyramid:
        first = x
        for _ in range(self.corrections):
            gaps = [hold.gap(x[hold.level]) for hold in holds]
            gap, led = _flat(gaps), [*z]
            count = _flat([hold.mask.expand_as(z[hold.level]).to(gap) for hold in holds]).sum(1)
            per_gap = PROBE * (count / gap.square().sum(1).clamp(min=TINY)).sqrt()
            for hold, part in zip(holds, gaps, strict=True):
                step = expand(now.levels[hold.level].sigma * per_gap, part) * part
                led[hold.level] = led[hold.level] + step
            change = [a - b for a, b in zip(self.denoiser(tuple(led), now), first, strict=True)]
            seen = _flat([torch.where(hold.mask, change[hold.level], 0.0) for hold in holds])
            share = (gap * seen).sum(1) / seen.square().sum(1).clamp(min=TINY)
            share = share.clamp(-self.reach, self.reach)
            x = tuple(x_r + expand(share, x_r) * d for x_r, d in zip(x, change, strict=True))
        return x


def _flat(parts: Sequence[Tensor]) -> Float[Tensor, "b _"]:
    return torch.cat([part.flatten(1) for part in parts], dim=1)


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
