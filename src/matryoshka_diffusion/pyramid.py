"""The pyramid: one picture as a tuple of resolutions, coarse to fine, and D^r that makes it.

`pyramid[0]` is the coarsest level and `pyramid[-1]` the picture itself: the paper's r = 1..R.
Growing a pyramid appends, so the index of a level never changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from matryoshka_diffusion.config import ModelConfig

Pyramid: TypeAlias = tuple[Tensor, ...]
"""Levels coarse to fine, each (b_r, c, h_r, w_r) or, of clips, (b_r, c, f_r, h_r, w_r).

A finer level may hold fewer rows, a prefix.
"""


class Resolution(NamedTuple):
    """The grid of one level: pixels and, where it holds clips, frames."""

    height: int
    width: int
    frames: int | None = None

    def shape(self, channels: int) -> tuple[int, ...]:
        """The shape of a picture (c, h, w), or of a clip (c, f, h, w)."""
        clip = () if self.frames is None else (self.frames,)
        return (channels, *clip, self.height, self.width)


def resolution_of(x: Float[Tensor, "b c *grid"]) -> Resolution:
    """The grid of pictures or clips."""
    *frames, height, width = x.shape[2:]
    return Resolution(height, width, *frames)


def resolutions_of(model: ModelConfig) -> tuple[Resolution, ...]:
    """The grid of every level of a nest, coarse to fine."""
    return tuple(Resolution(level.side, level.side, level.frames) for level in model.levels)


def down_sample(
    x: Float[Tensor, "b c *fine"], resolution: Resolution
) -> Float[Tensor, "b c *grid"]:
    """D^r of Section 3.1: in time the first frame, in space the area average on a coarser grid.

    An average (not bi-linear interpolation, which skips pixels beyond a factor of two) is what
    makes pooled noise smaller by exactly the pooled area, the fact that schedule shifts rest on.
    In time the paper indexes: a level with fewer frames has the first of every so many, and one
    without frames the first of all.

    Raises:
        ValueError: the picture's side is no multiple of the level's, or its frames are not.
    """
    return _average(_first_frames(x, resolution.frames), resolution)


def shrink(
    picture: UInt8[np.ndarray, "*fine c"], resolution: Resolution
) -> UInt8[np.ndarray, "*grid c"]:
    """D^r of one picture or clip of bytes, rounded to bytes. Raises as `down_sample` does."""
    x = torch.from_numpy(picture.astype(np.float32)).movedim(-1, 0)[None]
    return down_sample(x, resolution)[0].movedim(0, -1).round().to(torch.uint8).numpy()


def _first_frames(x: Float[Tensor, "b c *fine"], frames: int | None) -> Tensor:
    given = resolution_of(x).frames
    if given == frames:
        return x
    if given is None or given % (frames or 1):
        raise ValueError(
            f"a level of {frames} frames cannot be made of {given or 'no'} frames: there must be a "
            "multiple of the level's"
        )
    return x[:, :, 0] if frames is None else x[:, :, :: given // frames]


def _average(x: Float[Tensor, "b c *fine"], resolution: Resolution) -> Tensor:
    height, width = x.shape[-2:]
    if height % resolution.height or width % resolution.width:
        raise ValueError(
            f"a picture of {height}x{width} cannot be averaged to "
            f"{resolution.height}x{resolution.width}: its sides must be multiples of the level's"
        )
    window = (height // resolution.height, width // resolution.width)
    return (
        x
        if window == (1, 1)
        else F.avg_pool2d(x.flatten(1, -3), window).view(len(x), *resolution.shape(x.shape[1]))
    )


def up_sample(x: Float[Tensor, "b c h w"], resolution: Resolution) -> Float[Tensor, "b c H W"]:
    """`x` on a finer grid, by bilinear interpolation between the centres of its pixels.

    The paper upsamples what a cascade's second network sees and does not say how; nearest pixels
    would show that network edges that no picture has.
    """
    size = (resolution.height, resolution.width)
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear")


def build_pyramid(x: Float[Tensor, "b c *grid"], resolutions: Sequence[Resolution]) -> Pyramid:
    """[D^1(x), ..., D^R(x)] for `resolutions` given coarse to fine.

    Example:
        >>> build_pyramid(torch.ones(2, 3, 8, 8), [Resolution(4, 4), Resolution(8, 8)])[0].shape
        torch.Size([2, 3, 4, 4])
        >>> build_pyramid(torch.ones(2, 3, 6, 8, 8), [Resolution(4, 4)])[0].shape  # of a clip
        torch.Size([2, 3, 4, 4])
    """
    return tuple(down_sample(x, resolution) for resolution in resolutions)


def ragged(pyramid: Pyramid, rows: Sequence[int]) -> Pyramid:
    """The pyramid in which level r keeps only its first `rows[r]` rows (mixed resolution)."""
    assert all(a >= b for a, b in itertools.pairwise(rows)), "finer levels hold a prefix"
    return tuple(level[:count] for level, count in zip(pyramid, rows, strict=True))


def rows_of_mix(mix: Sequence[float], first: int, count: int) -> tuple[int, ...]:
    """How many of the samples `first .. first + count - 1` hold each level, for shares `mix`.

    What is rounded are the counts since the start of the run, so the shares are exact over a run
    although every batch holds whole rows, and they do not depend on how it is cut into batches.
    """
    before, after = (_rows_since_start(mix, total) for total in (first, first + count))
    return tuple(b - a for a, b in zip(before, after, strict=True))


def _rows_since_start(mix: Sequence[float], total: int) -> list[int]:
    """Of the first `total` samples, how many hold each level.

    The finest level takes its share of all; each coarser one its share of what is left. Every
    part only grows with `total`, so in any batch a finer level holds no more rows than a coarser.
    """
    rows = [0] * len(mix)
    taken, share_left = 0, 1.0
    for level in reversed(range(1, len(mix))):
        share = mix[level] / share_left if share_left > 0 else 0.0
        taken += _floor((total - taken) * min(share, 1.0))
        share_left -= mix[level]
        rows[level] = taken
    rows[0] = total
    return rows


def _floor(x: float) -> int:
    """Floor that forgives the last bits of a product such as 0.3 * 10."""
    return int(x + 1e-6)


def frames_as_rows(x: Float[Tensor, "b c *grid"]) -> Float[Tensor, "n c h w"]:
    """Every frame of a clip as a row of its own, the clips one after the other; pictures stay.

    What works in space alone need not know of time.
    """
    return x if resolution_of(x).frames is None else x.transpose(1, 2).flatten(0, 1)


def rows_as_frames(x: Float[Tensor, "n c h w"], frames: int | None) -> Float[Tensor, "b c *grid"]:
    """The clips whose frames are these rows; without frames, rows are pictures."""
    return x if frames is None else x.unflatten(0, (len(x) // frames, frames)).transpose(1, 2)


def pad_rows(x: Tensor, rows: int) -> Tensor:
    """Append zero rows until there are `rows`: what a coarser doll receives from a finer one."""
    missing = rows - x.shape[0]
    return x if missing == 0 else torch.cat([x, x.new_zeros(missing, *x.shape[1:])])
