"""Sets of pictures or clips to be measured: those that a model draws, and those of a source."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from matryoshka_diffusion.cascade import Model
from matryoshka_diffusion.data.source import Source, read_all
from matryoshka_diffusion.eval.protocols import Conditions, spread
from matryoshka_diffusion.eval.store import Column, Store
from matryoshka_diffusion.files import digest
from matryoshka_diffusion.metrics.frechet import Moments
from matryoshka_diffusion.metrics.retrieval import SEED
from matryoshka_diffusion.models.find import Progress
from matryoshka_diffusion.sampling import batch_of
from matryoshka_diffusion.train.distributed import World

FORMAT = 1
"""To be raised when columns hold other numbers of the same pictures."""

SAMPLES = 2
"""To be raised when the same settings give other samples."""

_ALONE = World()


@dataclass(frozen=True)
class PictureSet:
    """The first `count` pictures of a store.

    Attributes:
        name: for people.
        side: of the pictures in pixels.
        open_store: called when the pictures are first needed: pictures of a source have to be
            read for their store to be named, and a text encoder loaded for that of samples; what
            cannot be measured is refused before.
        levels: of each picture.
        captions: of each picture; empty where there are none.
        frames: of each, where they are clips; None for pictures.
        belong_to: the number of the training picture that each one's caption is of, where the
            captions are those of single pictures.
    """

    name: str
    count: int
    side: int
    open_store: Callable[[], Store]
    levels: int = 1
    captions: Sequence[str] = ()
    belong_to: Sequence[int] = ()
    frames: int | None = None

    @property
    def kind(self) -> str:
        """What they are, for people."""
        return "pictures" if self.frames is None else f"clips of {self.frames} frames"

    @property
    def num_frames(self) -> int:
        """How many pictures there are, each frame of a clip counted."""
        return self.count * (self.frames or 1)

    def fill(
        self,
        columns: Sequence[Column],
        *,
        world: World = _ALONE,
        progress: Progress | None = None,
    ) -> None:
        """Make what is missing of the columns; a collective, see `Store.fill`."""
        self.open_store().fill(columns, self.count, world=world, progress=progress)

    def stream(self, column: Column) -> Iterator[np.ndarray]:
        """The rows of a column, a batch at a time."""
        return self.open_store().read(column, self.count)

    def moments(self, column: Column) -> Moments:
        """The moments of a column, which are kept; see `Store.moments`."""
        return self.open_store().moments(column, self.count)

    def all(self, column: Column) -> np.ndarray:
        """The rows of a column."""
        return np.concatenate(list(self.stream(column)))


# --- samples of a model ------------------------------------------------------------------------


class Drawn(NamedTuple):
    """Samples of a model: what is measured, the finest level, and all levels."""

    pictures: UInt8[np.ndarray, "b *frames h w c"]
    levels: Sequence[UInt8[np.ndarray, "b ... c"]]


def drawn(
    model: Model,
    conditions: Conditions,
    count: int,
    root: Path,
    *,
    seed: int = SEED,
    batch_size: int,
    settings: Mapping[str, Any],
) -> PictureSet:
    """Samples 0 .. count - 1, sample i with the seed `seed + i`."""
    given = dict(settings)

    def make(rows: range, progress: Progress) -> Drawn:
        samples = model.sample(
            **conditions.of(rows),
            seed=seed + rows.start,
            batch_size=batch_size,
            progress=progress,
            **given,
        )
        return Drawn(samples.levels[-1], samples.levels)

    @cache
    def store() -> Store:
        about = {"format": FORMAT, "samples": SAMPLES, **model.describe(given)}
        about |= {"seed": seed, "batch_size": batch_size}
        about |= {"conditions": conditions.name, "of": conditions.identity}
        return Store.at(root, about, make, batch_size)

    side = model.picture_side
    captions, belong_to = conditions.captions(count), conditions.pictures[:count]
    levels, frames = len(model.resolutions), model.resolutions[-1].frames
    return PictureSet(model.config.name, count, side, store, levels, captions, belong_to, frames)


# --- pictures of a source ----------------------------------------------------------------------


class Shown(NamedTuple):
    """Pictures or clips of a source, and the shorter sides that they had before."""

    pictures: UInt8[np.ndarray, "b *frames h w c"]
    original_sides: Sequence[int]


ORIGINAL_SIDES: Column = Column(
    "original-sides", lambda shown: np.array(shown.original_sides, np.int64)
)


def shown(source: Source, root: Path) -> PictureSet:
    """All pictures of a source, which are not looked at yet."""

    def make(rows: range, progress: Progress) -> Shown:
        examples = source.many(list(rows))
        pictures = np.stack([example.picture for example in examples])
        return Shown(pictures, [example.original_side for example in examples])

    @cache
    def store() -> Store:
        batch_size = batch_of(source.frames)
        about = {
            "format": FORMAT,
            "source": source.name,
            "side": source.side,
            "pictures": fingerprint(source),
            "batch_size": batch_size,
        }
        if source.frames is not None:
            about["frames"] = source.frames
        return Store.at(root, about, make, batch_size)

    captions = [captions[0] for captions in source.captions or ()]
    return PictureSet(
        source.name, len(source), source.side, store, captions=captions, frames=source.frames
    )


def fingerprint(source: Source) -> str:
    """A hash of the keys, and of the bytes of 4,096 pictures spread evenly (all of a smaller set).

    Hashing every picture of a large set would take about as long as measuring it.
    """
    pictures = (example.picture for example in read_all(source, spread(len(source))))
    hashes = [hashlib.sha256(picture.tobytes()).hexdigest() for picture in pictures]
    return digest("\n".join([*source.keys, *hashes]))
