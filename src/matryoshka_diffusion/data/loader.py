"""Batches: sample n of a run is an image, a cut, a caption, a flip and an augmentation.

A batch is a pure function of (seed, ids), so resuming, another batch size or another number of
processes cannot change what the model sees.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from matryoshka_diffusion.config import ClipStart, Crop, DataConfig, Pixels
from matryoshka_diffusion.data.augment import CENTRE, Cut, augmented, draw_augmentation
from matryoshka_diffusion.data.mix import turn
from matryoshka_diffusion.data.source import Example, Source
from matryoshka_diffusion.philox import send
from matryoshka_diffusion.pyramid import to_float
from matryoshka_diffusion.rng import stream

Item = TypeVar("Item")
Result = TypeVar("Result")

_ORDERS_KEPT = 4  # for each part: threads that look ahead may be in several epochs
_RUN = 32
"""Samples of one shape in a row, so that a batch has few shapes, and enough rows of each."""


@dataclass(frozen=True)
class Batch:
    """Some samples of a run, whose images have one shape."""

    picture: UInt8[Tensor, "b c *frames h w"] | Float[Tensor, "b c *frames h w"]  # bytes, or codes
    captions: tuple[str, ...]  # one a row, "" where the source has none
    labels: Int[Tensor, " b"] | None  # None where the source has no classes
    original_side: Float[Tensor, " b"]  # shorter side of the original images in pixels
    ids: Int[Tensor, " b"]  # global counter n of each sample; everything random depends on it
    keys: tuple[str, ...]  # names of the samples
    augment: Float[Tensor, "b 7"] | None = None  # transformations; None without augmentation
    features: Float[Tensor, "b k y x"] | None = None  # of a frozen network, for the coarsest level
    pixels: Pixels = "symmetric"  # convention by which bytes become numbers

    def numbers(self, device: torch.device | str = "cpu") -> Float[Tensor, "b c *frames h w"]:
        """Pictures as numbers in [-1, 1], or codes, on a device. Bytes become numbers there."""
        x = send(self.picture, device)
        return to_float(x, self.pixels) if x.dtype == torch.uint8 else x


@dataclass(eq=False)
class Loader:
    """Batches of `source` in an order fixed by `seed`: every epoch is a new permutation.

    In it, samples of one shape are gathered (`gathered`). The data sets of a mix take turns by
    their shares, and each has epochs of its own.
    """

    source: Source
    seed: int
    crop: Crop = "centre"  # random: an image longer than the square is cut elsewhere each time
    clip: ClipStart = "start"  # random: a clip begins at another place of its video each time
    flip: bool = False  # mirror left to right with probability 1/2
    augment: float = 0.0  # probability of each geometric transformation
    pixels: Pixels = "symmetric"  # convention by which bytes become numbers

    @classmethod
    def of(cls, source: Source, seed: int, data: DataConfig) -> Loader:
        """Loader of a training run on this data."""
        return cls(source, seed, data.crop, data.clip, data.flip, data.augment, data.pixels)

    def shape_of(self, n: int) -> int:
        """Index of the shape that sample n has among those of the source."""
        return self.source.samples[self._index(n)].shape

    def batch(self, ids: Sequence[int]) -> Batch:
        """Samples with these global numbers n, all of one shape."""
        indices = [self._index(n) for n in ids]
        examples = self.source.many(indices, [self._cut(n) for n in ids])
        pictures = list(map(self._flipped, examples, ids))
        numbers = None
        if self.augment:
            done = [draw_augmentation(self.seed, n, self.augment) for n in ids]
            pictures = list(map(augmented, pictures, done))
            numbers = torch.from_numpy(np.stack([one.numbers() for one in done]))
        return Batch(
            picture=torch.from_numpy(np.stack(pictures)).movedim(-1, 1).contiguous(),
            captions=tuple(map(self._caption, examples, ids)),
            labels=torch.tensor([x.label for x in examples]) if self.source.classes else None,
            original_side=torch.tensor([float(x.original_side) for x in examples]),
            ids=torch.tensor(ids),
            keys=tuple(x.key for x in examples),
            augment=numbers,
            pixels=self.pixels,
        )

    @cached_property
    def _parts(self) -> list[np.ndarray]:
        """Indices of the samples of each data set of a mix."""
        numbers = np.array([sample.part for sample in self.source.samples])
        parts = [np.flatnonzero(numbers == part) for part in range(len(self.source.shares))]
        if empty := [part for part, rows in enumerate(parts) if not len(rows)]:
            raise ValueError(f"data.mix[{empty[0]}] has no sample to train on: omit it")
        return parts

    def _index(self, n: int) -> int:
        part, count = turn(n, self.source.shares)
        epoch, place = divmod(count, len(self._parts[part]))
        return int(self._parts[part][self._order(epoch, part)[place]])

    @cached_property
    def _order(self) -> Callable[[int, int], np.ndarray]:
        """Order of a part in an epoch. The last orders of all parts are kept."""

        @lru_cache(_ORDERS_KEPT * len(self.source.shares))
        def order(epoch: int, part: int) -> np.ndarray:
            rows = self._parts[part]
            permutation = stream(self.seed, "order", epoch, part).permutation(len(rows))
            shapes = np.array([self.source.samples[row].shape for row in rows])
            return permutation[gathered(shapes[permutation])]

        return order

    def _cut(self, n: int) -> Cut:
        place = CENTRE if self.crop == "centre" else stream(self.seed, "crop", n).random()
        return Cut(place, stream(self.seed, "clip", n).random() if self.clip == "random" else None)

    def _caption(self, example: Example, n: int) -> str:
        captions = example.captions
        if len(captions) < 2:
            return captions[0] if captions else ""
        return captions[stream(self.seed, "caption", n).integers(len(captions))]

    def _flipped(self, example: Example, n: int) -> np.ndarray:
        mirrored = self.flip and stream(self.seed, "flip", n).random() < 0.5
        return example.picture[..., ::-1, :] if mirrored else example.picture


@dataclass(frozen=True)
class LoaderWrapper:
    """Base of loaders whose batches are those of another loader, changed."""

    loader: Loader

    def shape_of(self, n: int) -> int:
        """Index of the shape that sample n has."""
        return self.loader.shape_of(n)


def gathered(shapes: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """An order of samples of these shapes in which `_RUN` of a shape follow each other.

    Every run lies where its middle one was, so samples of one shape stay as they are.
    """
    places = np.empty(len(shapes))
    for shape in np.unique(shapes):
        of_shape = np.flatnonzero(shapes == shape)
        for run in np.split(of_shape, range(_RUN, len(of_shape), _RUN)):
            places[run] = run[len(run) // 2]
    return places.argsort(kind="stable")


STOP_SECONDS = 2.0
"""Patience with a result of `look_ahead` after a stop: longer than most reads take."""


def look_ahead(
    f: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    depth: int,
    stop: Callable[[], object] = lambda: False,
) -> Generator[Result, None, None]:
    """Compute `map(f, items)` in `workers` threads, in order, at most `depth` results ahead.

    An exception of `f` is raised at its place in the order. Closing the generator early drops
    items that have not begun and waits for the rest, so no thread outlives it. Only where `stop()`
    holds and a result takes seconds more, the results end there, and its thread is left alone.
    """
    pool, waits = ThreadPoolExecutor(workers, thread_name_prefix="look-ahead"), True
    waiting: deque[Future[Result]] = deque()
    todo = iter(items)
    try:
        while True:
            for item in islice(todo, depth + 1 - len(waiting)):
                waiting.append(pool.submit(f, item))
            waits = not waiting or _is_done(waiting[0], stop)
            if not waiting or not waits:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=waits, cancel_futures=True)


def _is_done(future: Future[Any], stop: Callable[[], object]) -> bool:
    """Wait for a result; once `stop()` holds, for `STOP_SECONDS` more. False: it is not there."""
    while not future.done() and not stop():
        wait([future], timeout=0.2)
    return bool(wait([future], timeout=STOP_SECONDS).done)
