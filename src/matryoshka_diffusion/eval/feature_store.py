"""Features of images in files, one file a batch: an image is made, measured and dropped.

A folder belongs to one endless sequence of images and is named after everything that they depend
on. A file holds one column (the features of one network, say) of one batch, and is whole or absent.
Existing files are not made again, whoever made them, unless a byte has changed. So an interrupted
evaluation goes on, ranks share the work, and two commands that need the same samples draw them
once. Results are read from the files in their order, so none of this changes a bit of them.
"""

from __future__ import annotations

import hashlib
import json
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from safetensors import SafetensorError
from safetensors.numpy import load, save

from matryoshka_diffusion.cascade import Model
from matryoshka_diffusion.data.source import Sample, Source, read_all
from matryoshka_diffusion.eval.prompts import Conditions, evenly_spread
from matryoshka_diffusion.files import digest, write_atomically
from matryoshka_diffusion.metrics.formulas import Moments
from matryoshka_diffusion.models.find import Progress
from matryoshka_diffusion.pyramid import Resolution
from matryoshka_diffusion.sizes import batch_of
from matryoshka_diffusion.training.distributed import ALONE, World

FORMAT = 2
"""Version of the columns: raise it when they or their files hold other numbers of an image."""

_CHECKSUM = "checksum"

SAMPLES = 2
"""Version of the samples: raise it when the same settings give other samples."""

Report = Callable[[str, int, int], None]
"""Called with (what is measured, images done, images in all)."""


class PictureBatch(NamedTuple):
    """Images or clips to be measured: all levels, coarse to fine, and the sizes of their files.

    Images of a source have one level, samples of a model have no files.
    """

    levels: Sequence[UInt8[np.ndarray, "b ... c"]]
    sizes: Sequence[tuple[int, int]] = ()

    @property
    def pictures(self) -> UInt8[np.ndarray, "b *frames h w c"]:
        """The finest level."""
        return self.levels[-1]


class Column(NamedTuple):
    """One row of numbers for each image. Columns of the same name hold the same numbers."""

    name: str
    of: Callable[[PictureBatch], np.ndarray]


SIZES = Column("sizes", lambda batch: np.array(batch.sizes, np.int64))


def flat(rows: np.ndarray) -> np.ndarray:
    """Features of clips (b, f, d) with one row a frame."""
    return rows.reshape(-1, rows.shape[-1])


def moments_of(batches: Iterable[np.ndarray]) -> Moments:
    """Moments of features, each frame of a clip being a row."""
    return Moments.stream(map(flat, batches))


@dataclass(frozen=True)
class PictureSet:
    """The first `count` images or clips of a sequence, and the columns that are known of them.

    `describe` gives everything that the images depend on, as JSON. It is called when images are
    first needed: it reads some images of a source, or loads a text encoder. `make` draws or reads
    the images of some numbers.
    """

    name: str
    count: int
    side: int
    frames: int | None  # of each clip; None for images
    root: Path  # folder that the sequence has its own folder in
    describe: Callable[[], dict[str, Any]]
    make: Callable[[range, Progress], PictureBatch]
    batch_size: int  # images in memory at a time, and rows in a file
    levels: int = 1
    captions: Sequence[str] = ()
    belong_to: Sequence[int] = ()  # images whose captions the samples have, if known
    samples: Sequence[Sample] = ()  # facts about the images of a source
    label: Callable[[int], int] | None = None  # class that sample i was drawn for, if they are

    @property
    def kind(self) -> str:
        """The word for people: images or clips."""
        return "images" if self.frames is None else f"clips of {self.frames} frames"

    @cached_property
    def about(self) -> dict[str, Any]:
        """Everything that the images depend on, as JSON."""
        return self.describe()

    @cached_property
    def folder(self) -> Path:
        """The folder of the sequence, named after a hash of `about`."""
        return self.root / digest(json.dumps(self.about, sort_keys=True))[:16]

    def fill(
        self, columns: Sequence[Column], *, world: World = ALONE, progress: Progress | None = None
    ) -> None:
        """Make what is missing of the columns; a collective.

        `progress` is called with (images done, images that were missing). Raises `OSError` if a
        file cannot be written, or if ranks do not share the folder.
        """
        missing = world.once(lambda: self._missing(columns, _is_whole))
        if missing:
            text = json.dumps(self.about, indent=1).encode()
            path = self.folder / "about.json"
            world.once(lambda: write_atomically(path, lambda file: file.write(text)))
            mine = [missing[place] for place in world.mine(range(len(missing)))]
            world.each(lambda: self._make(columns, mine, world, progress))
        if missing and world.once(lambda: self._missing(columns, Path.is_file)):
            raise OSError(
                f"{self.folder} lacks files that other ranks have written: put the run's folder "
                "and MDM_CACHE into folders that all ranks share"
            )

    def stream(self, column: Column) -> Iterator[np.ndarray]:
        """Rows of a column, a batch at a time. Raises `ValueError` if a file is damaged."""
        return (_load(self._path(column, rows))["values"] for rows in self._batches())

    def all(self, column: Column) -> np.ndarray:
        """All rows of a column."""
        return np.concatenate(list(self.stream(column)))

    def moments(self, column: Column) -> Moments:
        """Moments of a column, which are kept: a set that is often compared with is large."""
        path = self.folder / column.name / f"moments-{self.count:08d}.safetensors"
        if not _is_whole(path):
            moments = moments_of(self.stream(column))
            _write(path, {**vars(moments), "count": np.array(moments.count)})
        arrays = _load(path)
        return Moments(int(arrays["count"]), arrays["mean"], arrays["scatter"])

    def _batches(self) -> list[range]:
        numbers, size = range(self.count), self.batch_size
        return [numbers[first : first + size] for first in range(0, self.count, size)]

    def _path(self, column: Column, rows: range) -> Path:
        # A last batch of fewer images has its own file: in bf16 an image may depend on the others
        # that it is drawn with.
        return self.folder / column.name / f"{rows.start:08d}-{rows.stop:08d}.safetensors"

    def _missing(self, columns: Sequence[Column], is_there: Callable[[Path], bool]) -> list[range]:
        def known(rows: range) -> bool:
            there = [is_there(self._path(column, rows)) for column in columns]
            return all(there)

        return [rows for rows in self._batches() if not known(rows)]

    def _make(
        self,
        columns: Sequence[Column],
        batches: Sequence[range],
        world: World,
        progress: Progress | None,
    ) -> None:
        total, done = sum(map(len, batches)), 0

        def report(part: int, whole: int) -> None:
            """Report the progress of all ranks, which are about as far as this one."""
            if progress is not None:
                progress((done + len(rows) * part // whole) * world.size, total * world.size)

        for rows in batches:
            batch = self.make(rows, report)
            for column in columns:
                path = self._path(column, rows)
                if not path.is_file():
                    _write(path, {"values": np.ascontiguousarray(column.of(batch))})
            report(1, 1)
            done += len(rows)


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    data = save({**arrays, _CHECKSUM: np.array(_checksum(arrays))})
    write_atomically(path, lambda file: file.write(data), needed=len(data))


def _load(path: Path) -> dict[str, np.ndarray]:
    """Arrays in a file. Raises ValueError if a byte of it has changed."""
    try:
        arrays = load(path.read_bytes())
        if arrays.pop(_CHECKSUM).tolist() != _checksum(arrays):
            raise ValueError("its checksum is another one")
    except (SafetensorError, LookupError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error}); repeat the command") from error
    return arrays


def _is_whole(path: Path) -> bool:
    """Test if a file is there; a damaged one is removed, with a warning."""
    if not path.is_file():
        return False
    try:
        _load(path)
    except ValueError:
        warnings.warn(f"{path} is corrupt and is made again", stacklevel=2)
        path.unlink(missing_ok=True)
        return False
    return True


def _checksum(arrays: Mapping[str, np.ndarray]) -> int:
    checksum = 0
    for name, array in sorted(arrays.items()):
        checksum = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), checksum)
        checksum = zlib.crc32(np.ascontiguousarray(array).data, checksum)
    return checksum


def samples_of(
    model: Model,
    conditions: Conditions,
    count: int,
    root: Path,
    *,
    seed: int,
    batch_size: int,
    settings: Mapping[str, Any],
) -> PictureSet:
    """Samples 0 .. count - 1 of a model; sample i has the seed `seed + i`."""

    def describe() -> dict[str, Any]:
        about = {"format": FORMAT, "samples": SAMPLES, **model.describe(dict(settings))}
        about |= {"seed": seed, "batch_size": batch_size}
        return about | {"conditions": conditions.name, "of": conditions.identity}

    def make(rows: range, progress: Progress) -> PictureBatch:
        how = {**conditions.of(rows), "seed": seed + rows.start, **settings}
        return PictureBatch(model.sample(batch_size=batch_size, progress=progress, **how).levels)

    shape = (count, model.picture_side, model.resolutions[-1].frames)
    about = (len(model.resolutions), conditions.captions(count), conditions.pictures[:count])
    label = conditions.at if conditions.kind == "classes" else None
    return PictureSet(
        model.config.name, *shape, root, describe, make, batch_size, *about, label=label
    )


def pictures_of(source: Source, root: Path) -> PictureSet:
    """All images or clips of a source."""
    batch_size = batch_of(Resolution(source.side, source.side, source.frames))

    def describe() -> dict[str, Any]:
        some = read_all(source, evenly_spread(len(source)))
        hashes = [hashlib.sha256(one.picture.tobytes()).hexdigest() for one in some]
        about = {
            "format": FORMAT,
            "source": source.name,
            "side": source.side,
            "pictures": digest("\n".join([*source.keys, *hashes])),
            "batch_size": batch_size,
        }
        return about if source.frames is None else {**about, "frames": source.frames}

    def make(rows: range, progress: Progress) -> PictureBatch:
        examples = source.many(list(rows))
        pictures = np.stack([example.picture for example in examples])
        return PictureBatch([pictures], [example.size for example in examples])

    shape = (len(source), source.side, source.frames)
    captions = [captions[0] for captions in source.captions or ()]
    about = {"captions": captions, "samples": source.samples}
    return PictureSet(source.name, *shape, root, describe, make, batch_size, **about)
