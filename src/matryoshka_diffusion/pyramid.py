"""The pyramid: one image at several resolutions, coarse to fine, and D^r, which makes a level.

`pyramid[0]` is the coarsest level and `pyramid[-1]` the image itself: the paper's r = 1..R.
Growing a pyramid appends, so the index of a level never changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from matryoshka_diffusion.config import ModelConfig, Pixels

Pyramid: TypeAlias = tuple[Tensor, ...]
"""Levels coarse to fine: images (b_r, c, h_r, w_r) or clips (b_r, c, f_r, h_r, w_r).

A finer level may have fewer rows. They are then the first rows of the batch.
"""
Interpolation: TypeAlias = Literal["nearest", "bilinear", "bicubic"]


class Resolution(NamedTuple):
    """The size of one level in pixels and, for clips, in frames."""

    height: int
    width: int
    frames: int | None = None

    def __str__(self) -> str:
        """Width and height, as sizes of images are usually written: 640x480."""
        return f"{self.width}x{self.height}"

    def shape(self, channels: int) -> tuple[int, ...]:
        """The shape of an image (c, h, w) or of a clip (c, f, h, w)."""
        frames = () if self.frames is None else (self.frames,)
        return (channels, *frames, self.height, self.width)


def resolution_of(x: Float[Tensor, "b c *grid"]) -> Resolution:
    """The resolution of images or clips."""
    *frames, height, width = x.shape[2:]
    return Resolution(height, width, *frames)


def resolutions_of(
    model: ModelConfig, image: Resolution | None = None, side: int = 1
) -> tuple[Resolution, ...]:
    """The resolution of every level of a model, coarse to fine: squares, unless of an `image`.

    `side` is that of the square in the place of the image.

    Examples:
        >>> from matryoshka_diffusion.presets import preset
        >>> [str(level) for level in resolutions_of(preset("openmoji").model)]
        ['16x16', '32x32', '64x64']
        >>> [str(x) for x in resolutions_of(preset("openmoji").model, Resolution(48, 80), 64)]
        ['20x12', '40x24', '80x48']
    """
    height, width, _ = image or Resolution(side, side)
    return tuple(
        Resolution(height * level.side // side, width * level.side // side, level.frames)
        for level in model.levels
    )


def shapes_of(
    model: ModelConfig, resolutions: Sequence[Resolution] | None = None
) -> tuple[tuple[int, ...], ...]:
    """The shape of one row of every level of a model, coarse to fine; by default of squares."""
    grids = zip(model.levels, resolutions or resolutions_of(model), strict=True)
    return tuple(grid.shape(model.channels_of(level)) for level, grid in grids)


# --- D^r -----------------------------------------------------------------------------------------


def build_pyramid(
    x: Float[Tensor, "b c *grid"],
    resolutions: Sequence[Resolution],
    features: Float[Tensor, "b k y x"] | None = None,
) -> Pyramid:
    """[D^1(x), ..., D^R(x)] for `resolutions` from coarse to fine, or with features as D^1(x).

    Examples:
        >>> build_pyramid(torch.ones(2, 3, 8, 8), [Resolution(4, 4), Resolution(8, 8)])[0].shape
        torch.Size([2, 3, 4, 4])
        >>> build_pyramid(torch.ones(2, 3, 6, 8, 8), [Resolution(4, 4)])[0].shape  # from clips
        torch.Size([2, 3, 4, 4])
    """
    if features is not None:
        return (features, *build_pyramid(x, resolutions[1:]))
    return tuple(down_sample(x, resolution) for resolution in resolutions)


def down_sample(
    x: Float[Tensor, "b c *fine"], resolution: Resolution
) -> Float[Tensor, "b c *grid"]:
    """D^r of Section 3.1: the area average in space, every n-th frame from the first in time.

    An average makes pooled noise smaller by exactly the pooled area, and the shift of schedules
    rests on that. Bi-linear interpolation skips pixels beyond a factor of two. In time the paper
    indexes: a level without frames is the first frame.

    Raises:
        ValueError: the sides or the frames of `x` are not multiples of the level's.
    """
    x = _first_frames(x, resolution.frames)
    height, width = x.shape[-2:]
    if height % resolution.height or width % resolution.width:
        raise ValueError(
            f"an image of {height}x{width} cannot be averaged to "
            f"{resolution.height}x{resolution.width}: its sides must be multiples of the level's"
        )
    window = (height // resolution.height, width // resolution.width)
    if window == (1, 1):
        return x
    return F.avg_pool2d(x.flatten(1, -3), window).view(len(x), *resolution.shape(x.shape[1]))


def _first_frames(x: Float[Tensor, "b c *fine"], frames: int | None) -> Tensor:
    source = resolution_of(x).frames
    if source == frames:
        return x
    if source is None or source % (frames or 1):
        raise ValueError(
            f"a level of {frames} frames cannot be made of {source or 'no'} frames: their number "
            "must be a multiple of the level's"
        )
    return x[:, :, 0] if frames is None else x[:, :, :: source // frames]


def up_sample(
    x: Float[Tensor, "b c *grid"], resolution: Resolution, mode: Interpolation = "bilinear"
) -> Float[Tensor, "b c *fine"]:
    """Enlarge images by interpolation between the centres of pixels.

    The paper enlarges the coarse image of a cascade and does not say how. Repeated pixels would
    show the network edges that no image has. A frame lasts until the next one that D^r keeps.
    """
    size, frames = (resolution.height, resolution.width), resolution_of(x).frames
    if x.shape[-2:] != size:
        x = rows_as_frames(F.interpolate(frames_as_rows(x), size, mode=mode), frames)
    if frames == resolution.frames:
        return x
    x = x.unsqueeze(2) if frames is None else x
    return x.repeat_interleave((resolution.frames or 1) // x.shape[2], dim=2)


# --- images as bytes -----------------------------------------------------------------------------


def to_float(
    pixels: UInt8[np.ndarray, "*shape"] | UInt8[Tensor, "*shape"], convention: Pixels = "symmetric"
) -> Float[Tensor, "*shape"]:
    """Bytes as numbers in [-1, 1]: x / 127.5 - 1, or (x - 127) / 128 for released weights."""
    x = pixels.float() if isinstance(pixels, Tensor) else torch.tensor(pixels, dtype=torch.float32)
    if convention == "released":
        return x.sub_(127.0).div_(128.0)
    return x.div_(127.5).sub_(1.0)


def to_uint8(
    x: Float[Tensor, "*shape"], convention: Pixels = "symmetric"
) -> UInt8[Tensor, "*shape"]:
    """Nearest bytes to numbers in [-1, 1], clamped.

    The released code truncates here; both conventions invert their `to_float` exactly.
    """
    scaled = (x.float() + 1.0) * 127.5
    whole = scaled.floor() if convention == "released" else scaled.round()
    return whole.clamp(0, 255).to(torch.uint8)


def shrink(
    image: UInt8[np.ndarray, "*fine c"], resolution: Resolution
) -> UInt8[np.ndarray, "*grid c"]:
    """D^r of one image or clip of bytes, rounded to bytes. Raises as `down_sample` does."""
    x = torch.from_numpy(image.astype(np.float32)).movedim(-1, 0)[None]
    return down_sample(x, resolution)[0].movedim(0, -1).round().to(torch.uint8).numpy()


# --- ragged pyramids: rows of a batch that end at different levels -------------------------------


def ragged(pyramid: Pyramid, rows: Sequence[int]) -> Pyramid:
    """The pyramid whose level r has only the first `rows[r]` rows (mixed resolutions)."""
    assert all(a >= b for a, b in itertools.pairwise(rows)), "finer levels hold a prefix"
    return tuple(level[:count] for level, count in zip(pyramid, rows, strict=True))


def pad_rows(x: Tensor, rows: int | torch.SymInt) -> Tensor:
    """Append zero rows until there are `rows`: the features of finer levels that are missing."""
    missing = rows - x.shape[0]
    return x if missing == 0 else torch.cat([x, x.new_zeros(missing, *x.shape[1:])])


def rows_of_mix(mix: Sequence[float], first: int, count: int) -> tuple[int, ...]:
    """Rows of each level among the samples `first .. first + count - 1`, for shares `mix`.

    `mix[r]` is the share of samples whose finest level is r. Rounding acts on the counts since the
    start of the run. The shares are therefore exact over a run, although every batch has whole
    rows, and they do not depend on the batch size.
    """
    before, after = (_rows_since_start(mix, total) for total in (first, first + count))
    return tuple(b - a for a, b in zip(before, after, strict=True))


def _rows_since_start(mix: Sequence[float], total: int) -> list[int]:
    """Rows of each level among the first `total` samples.

    The finest level takes its share of all samples, each coarser one its share of the rest. Every
    part only grows with `total`, so in any batch a finer level has no more rows than a coarser.
    """
    rows = [0] * len(mix)
    taken, share_left = 0, 1.0
    for level in reversed(range(1, len(mix))):
        share = mix[level] / share_left if share_left > 0 else 0.0
        # 1e-6 forgives the last bits of a product such as 0.3 * 10.
        taken += int((total - taken) * min(share, 1.0) + 1e-6)
        share_left -= mix[level]
        rows[level] = taken
    rows[0] = total
    return rows


# --- clips as rows of frames, for layers that work in space alone --------------------------------


def frames_as_rows(x: Float[Tensor, "b c *grid"]) -> Float[Tensor, "n c h w"]:
    """Clips with every frame as a row, clip after clip. Images stay as they are."""
    return x if resolution_of(x).frames is None else x.transpose(1, 2).flatten(0, 1)


def rows_as_frames(x: Float[Tensor, "n c h w"], frames: int | None) -> Float[Tensor, "b c *grid"]:
    """The reverse of `frames_as_rows`. Without `frames` the rows are images and stay."""
    return x if frames is None else x.unflatten(0, (len(x) // frames, frames)).transpose(1, 2)


def refuse_nan(images: Pyramid, seeds: Sequence[object]) -> None:
    """Raise `ValueError` naming the first sample with NaN, which bytes would hide."""
    for level, batch in enumerate(images):
        bad = batch.isnan().flatten(1).any(dim=1)
        if bad.any():
            seed = seeds[int(bad.nonzero()[0])]
            raise ValueError(
                f"the sample of seed {seed} has NaN at level {level}, as {int(bad.sum())} of the "
                f"{len(seeds)} samples in its batch have: the weights are broken, or the "
                "arithmetic overflows (set --precision fp32)"
            )
