"""D^r of a source's pictures or clips: what a model learns from that draws smaller ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8

from matryoshka_diffusion.data.around import Around
from matryoshka_diffusion.data.batch import Example, Source
from matryoshka_diffusion.data.crop import Cut
from matryoshka_diffusion.pyramid import Resolution, down_sample


@dataclass(frozen=True)
class Shrunk(Around):
    """The examples of a source, brought down to `side` pixels and `frames`. A `Source` itself."""

    source: Source
    side: int
    frames: int | None

    @property
    def keys(self) -> Sequence[str]:
        return self.source.keys

    @property
    def captions(self) -> Sequence[tuple[str, ...]] | None:
        return self.source.captions

    def __len__(self) -> int:
        return len(self.source)

    def many(
        self,
        indices: Sequence[int],
        cuts: Sequence[Cut] | None = None,
        among: Sequence[int] | None = None,
    ) -> list[Example]:
        """The examples at `indices`, their pictures rounded to bytes."""
        found = self.source.many(indices, cuts, among)
        grid = Resolution(self.side, self.side, self.frames)
        return [example._replace(picture=shrink(example.picture, grid)) for example in found]


def shrink(
    picture: UInt8[np.ndarray, "*fine c"], resolution: Resolution
) -> UInt8[np.ndarray, "*grid c"]:
    """D^r of a picture or clip. Raises `ValueError` if the grid does not divide its own."""
    x = torch.from_numpy(picture.astype(np.float32)).movedim(-1, 0)[None]
    small = down_sample(x, resolution)[0].movedim(0, -1)
    return small.round().to(torch.uint8).numpy()
