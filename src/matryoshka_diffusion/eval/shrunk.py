"""D^r of a source's pictures or clips: what a model learns from that draws smaller ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matryoshka_diffusion.data.around import Around
from matryoshka_diffusion.data.batch import Example, Source
from matryoshka_diffusion.data.crop import Cut
from matryoshka_diffusion.pyramid import Resolution, shrink


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
