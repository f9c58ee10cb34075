"""D^r of a source's pictures: what the levels of a model learn from that draws smaller ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8

from matryoshka_diffusion.data.around import Around
from matryoshka_diffusion.data.batch import Example, Source
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
        places: Sequence[float] | None = None,
        among: Sequence[int] | None = None,
    ) -> list[Example]:
        """The examples at `indices`, their pictures rounded to bytes."""
        found = self.source.many(indices, places, among)
        return [example._replace(picture=shrink(example.picture, self.side)) for example in found]


def shrink(picture: UInt8[np.ndarray, "H W c"], side: int) -> UInt8[np.ndarray, "h w c"]:
    """D^r of one picture. Raises `ValueError` if `side` does not divide its own."""
    x = torch.from_numpy(picture.astype(np.float32)).permute(2, 0, 1)[None]
    small = down_sample(x, Resolution(side, side))[0].permute(1, 2, 0)
    return small.round().to(torch.uint8).numpy()
