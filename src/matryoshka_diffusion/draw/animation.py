"""Samples with frames on sheets: a page for every frame, or still film strips."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from matryoshka_diffusion.draw import sheet
from matryoshka_diffusion.draw.video import FASTEST, save_clip

if TYPE_CHECKING:
    from PIL.Image import Image
else:
    Image = Any

STRIP_FRAMES = 8


def moments(
    levels: Sequence[UInt8[np.ndarray, "b ... _ _ c"]],
) -> Iterator[list[UInt8[np.ndarray, "b _ _ c"]]]:
    """All levels as pictures, once for each frame of the level that has most.

    A level without frames stands still. One with fewer shows each of its frames for as long as
    the group of which D^r made it lasts; levels that are all pictures have one moment.
    """
    counts = [level.shape[1] if level.ndim == 5 else 1 for level in levels]
    for moment in range(max(counts)):
        yield [
            level[:, moment * count // max(counts)] if level.ndim == 5 else level
            for level, count in zip(levels, counts, strict=True)
        ]


def pages(levels: Sequence[UInt8[np.ndarray, "b ... _ _ c"]], **options: Any) -> list[Image]:
    """Every level of every sample side by side, a page for each of `moments`.

    `options` are those of `sheet.grid`, besides what it is made of and the columns' titles.
    """
    titles = sheet.titles_of_levels(levels)
    return [
        sheet.grid(sheet.rows_of_levels(moment), columns_titles=titles, **options)
        for moment in moments(levels)
    ]


def strip(
    clips: UInt8[np.ndarray, "n f h w c"],
    captions: Sequence[str] | None = None,
    most: int = STRIP_FRAMES,
) -> Image:
    """The frames of each clip side by side, every k-th where there are more than `most`."""
    frames = range(0, clips.shape[1], -(-clips.shape[1] // most))
    return sheet.grid(
        [[clip[frame] for frame in frames] for clip in clips],
        captions=captions,
        columns_titles=[f"frame {frame}" for frame in frames],
    )


def save_pages(
    pages: Sequence[Image], path: Path, fps: float, settings: Mapping[str, Any] | None
) -> Path:
    """Write a sheet to `path` with a suffix: `.png` of one page, `.webp` of several in turn.

    Where `fps` is more than a WebP holds, the sheet moves as fast as it can.

    Returns:
        The path with its suffix.

    Raises:
        OSError: with the path, if it cannot be written.
    """
    if len(pages) == 1:
        path = path.with_name(f"{path.name}.png")
        sheet.save_png(pages[0], path, settings)
    else:
        path = path.with_name(f"{path.name}.webp")
        save_clip(map(np.asarray, pages), path, min(fps, FASTEST[".webp"]), settings)
    return path
