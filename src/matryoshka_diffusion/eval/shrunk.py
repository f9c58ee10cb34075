"""D^r of a source's images or clips, to compare with a model that draws smaller ones."""

from __future__ import annotations

from dataclasses import replace

from matryoshka_diffusion.data.augment import Cut
from matryoshka_diffusion.data.source import Picture, Source
from matryoshka_diffusion.pyramid import Resolution, shrink


def shrunk(source: Source, side: int, frames: int | None) -> Source:
    """Source of the same examples at `side` pixels and `frames`, rounded to bytes."""
    grid = Resolution(side, side, frames)

    def read(index: int, cut: Cut) -> Picture:
        picture = source.read(index, cut)
        return picture._replace(pixels=shrink(picture.pixels, grid))

    return replace(source, read=read, side=side, frames=frames)
