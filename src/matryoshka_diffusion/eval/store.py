"""Numbers about pictures in files, one for each batch: a picture is looked at and dropped.

A folder belongs to one endless sequence of pictures and is named after all that they depend on. A
file holds one column (the features of one network, say) of one batch, and is whole or absent. What
is there is not made again, whoever made it: so an interrupted evaluation goes on, ranks share the
work, and two commands that want the same samples draw them once. Results are read from the files in
order, so none of this changes a bit of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from matryoshka_diffusion.files import digest, write_atomically
from matryoshka_diffusion.metrics.frechet import Moments
from matryoshka_diffusion.models.find import Progress
from matryoshka_diffusion.train.distributed import World

ABOUT = "about.json"
_VALUES = "values"
_ALONE = World()


class Column(NamedTuple):
    """What is kept of pictures: a row of numbers each.

    Attributes:
        name: of a folder; two columns with the same name hold the same numbers.
        of: a batch of pictures, in whatever form the store makes them, to its rows.
    """

    name: str
    of: Callable[[Any], np.ndarray]


def rows_of(features: np.ndarray) -> np.ndarray:
    """One row a picture, or a frame of a clip."""
    return features.reshape(-1, features.shape[-1])


def moments_of(batches: Iterable[np.ndarray]) -> Moments:
    """The moments of features, of which a clip has a row for each frame."""
    return Moments.stream(map(rows_of, batches))


@dataclass(frozen=True)
class Store:
    """The columns of pictures 0, 1, 2, ...

    Attributes:
        folder: of this sequence alone; see `at`.
        about: all that its pictures depend on, as JSON.
        make: the pictures of consecutive numbers; called with (pictures done, pictures in all) as
            it proceeds.
        batch_size: pictures in memory at a time, and rows in a file.
    """

    folder: Path
    about: dict[str, Any]
    make: Callable[[range, Progress], Any]
    batch_size: int

    @staticmethod
    def at(
        root: Path, about: dict[str, Any], make: Callable[[range, Progress], Any], batch_size: int
    ) -> Store:
        """The store in the folder inside `root` that is named after `about`."""
        name = digest(json.dumps(about, sort_keys=True))[:16]
        return Store(root / name, about, make, batch_size)

    def fill(
        self,
        columns: Sequence[Column],
        count: int,
        *,
        world: World = _ALONE,
        progress: Progress | None = None,
    ) -> None:
        """Make what is missing of the columns of pictures 0 .. count - 1; a collective.

        `progress` is called with (pictures done, pictures that were missing).

        Raises:
            OSError: a file cannot be written, or ranks do not share the folder.
        """
        missing = world.once(lambda: self._missing(columns, count))
        if missing:
            world.once(self._describe)
            mine = [missing[place] for place in world.mine(range(len(missing)))]
            world.each(lambda: self._make(columns, mine, world, progress))
            world.once(lambda: self._refuse_elsewhere(columns, count))

    def read(self, column: Column, count: int) -> Iterator[np.ndarray]:
        """The rows of pictures 0 .. count - 1 in order, a batch at a time.

        Raises:
            ValueError: a file is damaged.
        """
        return (self._read(self._path(column, rows)) for rows in self._batches(count))

    def moments(self, column: Column, count: int) -> Moments:
        """The moments of the rows of pictures 0 .. count - 1, a clip's frames being rows.

        They are computed once and kept beside the rows: a set that much is compared with is large.

        Raises:
            OSError: they cannot be written.
            ValueError: a file is damaged.
        """
        path = self.folder / column.name / f"moments-{count:08d}.safetensors"
        if not path.is_file():
            data = save(moments_of(self.read(column, count)).as_arrays())
            write_atomically(path, lambda file: file.write(data))
        return Moments.from_arrays(self._load(path, *Moments.ARRAYS))

    def _batches(self, count: int) -> list[range]:
        numbers = range(count)
        return [
            numbers[first : first + self.batch_size] for first in range(0, count, self.batch_size)
        ]

    def _path(self, column: Column, rows: range) -> Path:
        # The last batch of fewer pictures is a file of its own: in bf16 a picture may depend on
        # those that it is drawn with.
        return self.folder / column.name / f"{rows.start:08d}-{rows.stop:08d}.safetensors"

    def _missing(self, columns: Sequence[Column], count: int) -> list[range]:
        return [
            rows
            for rows in self._batches(count)
            if not all(self._path(column, rows).is_file() for column in columns)
        ]

    def _make(
        self,
        columns: Sequence[Column],
        batches: Sequence[range],
        world: World,
        progress: Progress | None,
    ) -> None:
        total, done = sum(map(len, batches)), 0

        def told(part: int, whole: int) -> None:
            """All ranks are about as far as this one."""
            if progress is not None:
                progress((done + size * part // whole) * world.size, total * world.size)

        for rows in batches:
            size = len(rows)
            pictures = self.make(rows, told)
            for column in columns:
                path = self._path(column, rows)
                if not path.is_file():
                    values = column.of(pictures)
                    assert len(values) == size, f"{column.name} has a row for each picture"
                    data = save({_VALUES: np.ascontiguousarray(values)})
                    write_atomically(path, lambda file, data=data: file.write(data))
            told(1, 1)
            done += size

    def _describe(self) -> None:
        text = json.dumps(self.about, indent=1).encode()
        write_atomically(self.folder / ABOUT, lambda file: file.write(text))

    def _refuse_elsewhere(self, columns: Sequence[Column], count: int) -> None:
        if self._missing(columns, count):
            raise OSError(
                f"{self.folder} lacks what other ranks have written: the run's folder and "
                "MDM_CACHE must be folders that all ranks share"
            )

    def _read(self, path: Path) -> np.ndarray:
        return self._load(path, _VALUES)[_VALUES]

    @staticmethod
    def _load(path: Path, *names: str) -> dict[str, np.ndarray]:
        try:
            found = load(path.read_bytes())
            return {name: found[name] for name in names}
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"{path}: damaged ({error}); remove it and repeat the command"
            ) from error
