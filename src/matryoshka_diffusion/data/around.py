"""A source around another one: what both have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from matryoshka_diffusion.data.bad import BadFile, Quarantine
from matryoshka_diffusion.data.batch import Example, Source
from matryoshka_diffusion.data.crop import Cut


class Around(ABC):
    """What is the same in a source and in one that is made of it, such as its name and classes."""

    source: Source

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def frames(self) -> int | None:
        return self.source.frames

    @property
    def channels(self) -> int:
        return self.source.channels

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes

    @property
    def bad(self) -> tuple[BadFile, ...]:
        return self.source.bad

    @property
    def quarantine(self) -> Quarantine:
        return self.source.quarantine

    @property
    def total(self) -> int:
        return self.source.total

    def __getitem__(self, index: int) -> Example:
        return self.many([index])[0]

    @abstractmethod
    def many(
        self,
        indices: Sequence[int],
        cuts: Sequence[Cut] | None = None,
        among: Sequence[int] | None = None,
    ) -> list[Example]: ...
