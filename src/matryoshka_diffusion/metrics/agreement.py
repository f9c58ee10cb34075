"""Do the levels of a sample agree? D^r of its finest picture against what level r drew."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8

from matryoshka_diffusion.pyramid import down_sample, resolution_of


def level_agreement(
    levels: Sequence[UInt8[np.ndarray, "b ... c"]],
) -> Float[np.ndarray, "b coarser"]:
    """mean |D^r(x_R) - x_r| of every picture or clip, for the levels r = 1 .. R - 1.

    D^r is the area average that training pictures come down by (`pyramid.down_sample`). A picture
    whose levels are one picture has 0, but for the rounding to bytes, up to 1/510. One row a
    picture, so means over many pictures add up however they are cut into batches.

    Args:
        levels: one batch a level, coarse to fine, as `sample` returns them.

    Returns:
        Differences in units of the full range (255 bytes), in [0, 1].

    Raises:
        ValueError: no levels, batches of different sizes, or a level that does not divide the
            finest.
    """
    if not levels:
        raise ValueError("there are no levels to compare")
    if len({len(level) for level in levels}) > 1:
        raise ValueError(f"levels of {', '.join(str(len(level)) for level in levels)} pictures")
    finest = _float(levels[-1])
    gaps = [_gap(finest, _float(level)) for level in levels[:-1]]
    return np.stack(gaps, axis=1) if gaps else np.zeros((len(levels[-1]), 0))


def _float(pictures: UInt8[np.ndarray, "b *grid c"]) -> Float[torch.Tensor, "b c *grid"]:
    return torch.from_numpy(np.moveaxis(pictures, -1, 1) / 255.0)


def _gap(
    finest: Float[torch.Tensor, "b c *fine"], level: Float[torch.Tensor, "b c *grid"]
) -> Float[np.ndarray, " b"]:
    gaps = (down_sample(finest, resolution_of(level)) - level).abs()
    return gaps.mean(dim=tuple(range(1, gaps.ndim))).numpy()
