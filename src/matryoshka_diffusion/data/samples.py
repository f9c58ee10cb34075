"""What is known of a sample while its picture is still encoded, and which samples may stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from matryoshka_diffusion.config import Crop
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
    """A set of samples and how to read their pictures.

    Attributes:
        name: for people, such as "shards /data/*.tar".
        state: changes when the set does; pictures that were decoded before are kept for it.
        read: (n, side, crop) -> the picture of sample n, as `images.read_picture` gives it; raises
            PictureError. Any thread may call it.
        classes: their names; empty if the set knows numbers only.
    """

    name: str
    state: str
    samples: Sequence[Sample]
    read: Callable[[int, int, Crop], Picture]
    classes: tuple[str, ...] = ()


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
