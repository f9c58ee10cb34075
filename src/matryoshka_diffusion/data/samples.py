"""What is known of a sample while its picture is still encoded, and which samples may stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from matryoshka_diffusion.data.images import Picture

MAX_CLASSES = 100_000


class Sample(NamedTuple):
    """One sample of a set whose pictures lie inside larger files.

    Attributes:
        key: where it is from, such as "00003.tar:kitten".
        captions: alternatives that say the same; empty where there are none.
        label: index of its class.
        original_side: shorter side in pixels before the set was made, if the set remembers it.
        flaw: why it cannot be used; empty for a good one.
        offset: where it lies in its shard, in bytes.
    """

    key: str
    captions: tuple[str, ...] = ()
    label: int | None = None
    original_side: int | None = None
    flaw: str = ""
    offset: int | None = None


@dataclass(frozen=True, eq=False)
class Catalogue:
    """A set of samples and where their pictures, or videos, are.

    Attributes:
        name: for people, such as "shards /data/*.tar".
        state: changes when the set does; pictures that were decoded before are kept for it.
        load: (n) -> the file of sample n, or its bytes. Any thread may call it.
        classes: their names; empty if the set knows numbers only.
    """

    name: str
    state: str
    samples: Sequence[Sample]
    load: Callable[[int], bytes | Path]
    classes: tuple[str, ...] = ()


@runtime_checkable
class Decoder(Protocol):
    """What is made of a file: a picture or a clip whose shorter side is `side`.

    Attributes:
        frames: of a clip; None for pictures.
        options: all that its results depend on besides the file, for the names of caches.
    """

    @property
    def side(self) -> int: ...
    @property
    def frames(self) -> int | None: ...
    @property
    def options(self) -> str: ...
    def decodes_once(self, count: int) -> bool:
        """Whether the results for `count` files are always the same, and few enough to be kept."""
        ...

    def __call__(self, file: bytes | Path, key: str, start: float | None = None) -> Picture:
        """The picture, or the clip that begins at `start` (see `crop.Cut`). Raises PictureError."""
        ...


def judged(samples: Sequence[Sample], classes: Sequence[str]) -> list[Sample]:
    """The samples with a flaw wherever one lacks what others have, or has an impossible class.

    Once one sample has a caption (or a class), all need one.
    """
    good = [sample for sample in samples if not sample.flaw]
    captioned = any(sample.captions for sample in good)
    labelled = any(sample.label is not None for sample in good)
    count = len(classes) or MAX_CLASSES

    def flaw(sample: Sample) -> str:
        if captioned and not sample.captions:
            return "it has no caption, although others have one"
        if labelled and sample.label is None:
            return "it has no class, although others have one"
        if sample.label is not None and not 0 <= sample.label < count:
            return f"its class {sample.label} is not one of {count:,}"
        return ""

    return [sample if sample.flaw else sample._replace(flaw=flaw(sample)) for sample in samples]


def class_names(samples: Sequence[Sample], classes: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the classes: those that are known, else the numbers up to the largest one."""
    labels = [sample.label for sample in samples if sample.label is not None]
    if not labels:
        return ()
    return classes or tuple(str(number) for number in range(max(labels) + 1))
