"""D^r of a source's pictures: what the levels of a model learn from that draws smaller ones."""

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
    """The examples of a source, averaged to `side` pixels. A `Source` itself."""

    source: Source
    side: int

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
        return [example._replace(picture=shrink(example.picture, self.side)) for example in found]


def shrink(
    picture: UInt8[np.ndarray, "*frames H W c"], side: int
) -> UInt8[np.ndarray, "*frames h w c"]:
    """D^r of a picture or of each frame. Raises `ValueError` if `side` does not divide its own."""
    *frames, height, width, channels = picture.shape
    x = torch.from_numpy(picture.astype(np.float32)).reshape(-1, height, width, channels)
    small = down_sample(x.permute(0, 3, 1, 2), Resolution(side, side)).permute(0, 2, 3, 1)
    return small.round().to(torch.uint8).reshape(*frames, side, side, channels).numpy()
