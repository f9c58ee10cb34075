"""A share of the pictures that training never sees, so that learning by heart shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matryoshka_diffusion.config import ConfigError
from matryoshka_diffusion.data.around import Around
from matryoshka_diffusion.data.batch import Example, Source
from matryoshka_diffusion.data.crop import Cut
from matryoshka_diffusion.files import fraction


@dataclass(frozen=True)
class Part(Around):
    """Some examples of a source, in its order: `indices` ascend. A `Source` itself."""

    source: Source
    indices: Sequence[int]

    @property
    def side(self) -> int:
        return self.source.side

    @property
    def frames(self) -> int | None:
        return self.source.frames

    @property
    def captions(self) -> Sequence[tuple[str, ...]] | None:
        captions = self.source.captions
        return None if captions is None else [captions[index] for index in self.indices]

    @property
    def keys(self) -> Sequence[str]:
        return [self.source.keys[index] for index in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def many(
        self,
        indices: Sequence[int],
        cuts: Sequence[Cut] | None = None,
        among: Sequence[int] | None = None,
    ) -> list[Example]:
        """The examples at `indices`; what stands in for a bad one is of this part, too."""
        allowed = self.indices if among is None else self._whole(among)
        return self.source.many(self._whole(indices), cuts, allowed)

    def _whole(self, indices: Sequence[int]) -> list[int]:
        """Indices into the source."""
        return [self.indices[index] for index in indices]


def split(source: Source, share: float) -> tuple[Source, Source | None]:
    """The pictures to learn from, and about a `share` of all that are held out (None for 0).

    The key of a picture decides alone, so it stays on its side when others come or go, in any
    order and on any machine.

    Raises:
        ConfigError: a side would be empty.
    """
    if share == 0.0:
        return source, None
    held = [fraction(key) < share for key in source.keys]
    seen, unseen = ([n for n, is_held in enumerate(held) if is_held == side] for side in (0, 1))
    if not seen or not unseen:
        raise ConfigError(
            f"data.held_out is {share:g}, which takes {len(unseen)} of the {len(source):,} "
            f"pictures of {source.name}: there must be some on either side "
            "(--set data.held_out=0 trains on all)"
        )
    return Part(source, seen), Part(source, unseen)
