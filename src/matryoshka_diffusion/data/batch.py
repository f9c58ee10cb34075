"""What data is: examples in a source, batches out of the loader, bytes as numbers in [-1, 1]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from matryoshka_diffusion.config import Pixels
from matryoshka_diffusion.data.bad import BadFile, Quarantine
from matryoshka_diffusion.data.crop import Cut, cut_square
from matryoshka_diffusion.data.film import Film

_TOGETHER = 64


class Example(NamedTuple):
    """One picture or clip and what is known about it.

    Attributes:
        picture: bytes, a square of the source's side; of a source with frames, as many squares.
        captions: alternatives that say the same; empty where there are none.
        label: index into the source's classes.
        key: what the source calls the picture, stable between runs.
        original_side: shorter side of the original in pixels, before it was resized.
    """

    picture: UInt8[np.ndarray, "*frames side side c"]
    captions: tuple[str, ...]
    label: int | None
    key: str
    original_side: int


@runtime_checkable
class Source(Protocol):
    """Square pictures, or clips of such, in a fixed order.

    Where a source has more than the square or the clip, `cuts` say what to cut: the middle of a
    picture, and what the source chooses of a video, if nothing is said. Where a source replaces bad
    pictures by others, `among` says by which: those of a part (their indices, ascending), so that
    what another part holds stays there.

    Attributes:
        frames: how many each clip has; None where there are pictures.
        keys: what each picture is called.
        captions: one tuple a picture, known without decoding any; None where there are none.
        classes: their names; empty where there are none.
        bad: what is left out; pictures that are decoded on demand may still join it.
        quarantine: the same with its limits, for a run to save and restore.
        total: how many files or samples were looked at, good or bad.
    """

    @property
    def name(self) -> str: ...
    @property
    def side(self) -> int: ...
    @property
    def frames(self) -> int | None: ...
    @property
    def channels(self) -> int: ...
    @property
    def keys(self) -> Sequence[str]: ...
    @property
    def captions(self) -> Sequence[tuple[str, ...]] | None: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def bad(self) -> tuple[BadFile, ...]: ...
    @property
    def quarantine(self) -> Quarantine: ...
    @property
    def total(self) -> int: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...
    def many(
        self,
        indices: Sequence[int],
        cuts: Sequence[Cut] | None = None,
        among: Sequence[int] | None = None,
    ) -> list[Example]: ...


@dataclass(frozen=True, eq=False)
class Pictures:
    """A `Source` that is an array or a film, usually memory-mapped, and columns beside it.

    Attributes:
        name: for people, such as "openmoji".
        array: the pictures or clips by number. Those that no entry of `rows` points to are unused.
        rows: where in `array` each picture lies; all columns are aligned with this one.
        captions: one tuple a picture; None where the source has none.
        labels: one index into `classes` a picture; None where the source has none.
    """

    name: str
    array: UInt8[np.ndarray, "n *frames side side channels"] | Film
    rows: Sequence[int]
    keys: Sequence[str]
    original_sides: Sequence[int]
    captions: Sequence[tuple[str, ...]] | None = None
    labels: Sequence[int] | None = None
    classes: tuple[str, ...] = ()
    bad: tuple[BadFile, ...] = ()

    @property
    def side(self) -> int:
        """Height and width of the pictures."""
        return min(self.array[self.rows[0]].shape[-3:-1])

    @property
    def frames(self) -> int | None:
        """Those of a clip; None for pictures."""
        shape = self.array[self.rows[0]].shape
        return shape[0] if len(shape) == 4 else None

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour."""
        return self.array[self.rows[0]].shape[-1]

    @property
    def quarantine(self) -> Quarantine:
        """What was bad from the start; nothing more is found, since all of it was decoded."""
        return Quarantine(self.name, self.bad)

    @property
    def total(self) -> int:
        """Good and bad pictures."""
        return len(self.rows) + len(self.bad)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self._example(index, Cut())

    def many(
        self,
        indices: Sequence[int],
        cuts: Sequence[Cut] | None = None,
        among: Sequence[int] | None = None,
    ) -> list[Example]:
        """The examples at `indices`; all of them are good, so none is replaced."""
        return [self._example(*pair) for pair in with_cuts(indices, cuts)]

    def _example(self, index: int, cut: Cut) -> Example:
        return Example(
            picture=np.array(cut_square(self.array[self.rows[index]], cut.place)),
            captions=() if self.captions is None else self.captions[index],
            label=None if self.labels is None else self.labels[index],
            key=self.keys[index],
            original_side=self.original_sides[index],
        )


def read_all(source: Source, rows: Sequence[int]) -> Iterator[Example]:
    """The examples at `rows`, so many read together that 64 pictures, or frames, are in memory."""
    together = max(1, _TOGETHER // (source.frames or 1))
    for start in range(0, len(rows), together):
        yield from source.many(rows[start : start + together])


def with_cuts(indices: Sequence[int], cuts: Sequence[Cut] | None) -> list[tuple[int, Cut]]:
    """Each index with its cut; the usual one where none was given."""
    return list(zip(indices, cuts or [Cut()] * len(indices), strict=True))


@dataclass(frozen=True)
class Batch:
    """Some samples of a run.

    Attributes:
        picture: numbers in [-1, 1]; clips have their frames before height and width.
        captions: one for each row, "" where the source has none.
        labels: None where the source has no classes.
        original_side: shorter side of the original pictures in pixels.
        ids: the global counter n of each sample; all that is random hangs on it.
        keys: what the source calls the pictures.
        augment: how each picture was transformed; None if none was.
    """

    picture: Float[Tensor, "b c *frames h w"]
    captions: tuple[str, ...]
    labels: Int[Tensor, " b"] | None
    original_side: Float[Tensor, " b"]
    ids: Int[Tensor, " b"]
    keys: tuple[str, ...]
    augment: Float[Tensor, "b 7"] | None = None


def to_float(
    pixels: UInt8[np.ndarray, "*shape"], convention: Pixels = "symmetric"
) -> Float[Tensor, "*shape"]:
    """Bytes as numbers in [-1, 1]: x / 127.5 - 1, or as released weights expect them."""
    x = torch.tensor(pixels, dtype=torch.float32)
    if convention == "released":
        return x.sub_(127.0).div_(128.0)
    return x.div_(127.5).sub_(1.0)


def to_uint8(
    x: Float[Tensor, "*shape"], convention: Pixels = "symmetric"
) -> UInt8[Tensor, "*shape"]:
    """The nearest bytes to numbers in [-1, 1]; what lies outside is clamped.

    The released code cuts off where this rounds; both invert their `to_float` exactly.
    """
    scaled = (x.float() + 1.0) * 127.5
    whole = scaled.floor() if convention == "released" else scaled.round()
    return whole.clamp(0, 255).to(torch.uint8)
