"""Sizes of images that a model can draw, and how many of them go into a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matryoshka_diffusion.config import RunConfig, UsageError
from matryoshka_diffusion.files import memory_bytes
from matryoshka_diffusion.pyramid import Resolution, shapes_of

BATCH, PIXELS = 64, 2**22
"""Samples of a batch, and pixels of their finest level, at most: unless a batch size is set."""


def batch_of(size: Resolution) -> int:
    """The number of images or clips in a batch, by their pixels: as memory and time go with those.

    Examples:
        >>> batch_of(Resolution(256, 256)), batch_of(Resolution(512, 1024))
        (64, 8)
        >>> batch_of(Resolution(256, 256, frames=16))
        4
    """
    return max(1, min(BATCH, PIXELS // (size.height * size.width * (size.frames or 1))))


def on_grid(
    config: RunConfig, square: Resolution, height: int | None, width: int | None
) -> Resolution:
    """The resolution of this height and width in pixels; None is the side of the `square`.

    On the grid, every position of the coarsest level is whole; then those of finer levels are.

    Raises:
        UsageError: a number is not on the grid, or the model draws squares alone.
    """
    model, name = config.model, config.name
    size = {"height": height, "width": width}
    size = {axis: pixels for axis, pixels in size.items() if pixels is not None}
    result = square._replace(**size)
    for unfit, kind in (
        (square.frames is not None, "draws clips"),
        (model.coarse is not None, "enlarges squares"),
        (model.hidden > 0, "plans in the features of squares"),
    ):
        if unfit and result != square:
            raise UsageError(f"{name} {kind}: omit height and width")
    step = square.height // model.levels[0].stem_side
    for axis, pixels in size.items():
        if pixels < step or pixels % step:
            near = max(step, pixels // step * step)
            raise UsageError(
                f"{axis} is {pixels}: {name} draws multiples of {step} pixels, such as {near} or "
                f"{near + step}"
            )
    return result


def refuse_more_than_fit(config: RunConfig, levels: Sequence[Resolution], count: int) -> None:
    """Raise UsageError if the bytes of `count` samples and of their text exceed the memory."""
    model = config.model.first(len(levels))
    each = sum(map(math.prod, shapes_of(model, levels))) * config.pixels_per_side**2
    each += 0 if model.text is None else 4 * model.text.features  # of one token
    needed, memory = count * each, memory_bytes()
    if needed > memory:
        raise UsageError(
            f"{count:,} samples take {needed / 1e9:,.1f} GB or more, and this machine has "
            f"{memory / 1e9:,.1f} GB: draw fewer at a time (-n), the next ones with another seed "
            "(--seed)"
        )
