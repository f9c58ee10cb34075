"""Sources of images: what they hold, how a part is held out, and how a config opens one."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import UInt8

from matryoshka_diffusion.config import (
    VIDEO_SOURCES,
    ConfigError,
    DataConfig,
    DataIdentity,
    DataPlace,
    RunConfig,
    SourceName,
)
from matryoshka_diffusion.data.augment import Cut
from matryoshka_diffusion.data.bad import BadFile, NoneUsable, PictureError, Quarantine
from matryoshka_diffusion.data.shapes import shapes_of_data, square
from matryoshka_diffusion.data.spellings import Unused
from matryoshka_diffusion.files import fraction
from matryoshka_diffusion.pyramid import Resolution

HUGGING_FACE = "hf:"
PACKAGED: tuple[SourceName, ...] = ("openmoji", "fashion-mnist")  # they need no path

Place = TypeVar("Place", bound=DataPlace)

_FRAMES_IN_MEMORY = 64
_SHARD = re.compile(
    r"\.(tar(\.(?!parquet)\w+)?|tgz|tsv)$"
)  # compressed ones too: shards.py says what to do


class Sample(NamedTuple):
    """Facts about an image or a video that are known without decoding it."""

    key: str  # stable between runs: a path in a folder, SHARD:KEY or FILE:ROW elsewhere
    captions: tuple[str, ...] = ()  # alternatives
    label: int | str | None = None  # index into the classes; in a catalogue also a name
    original_side: int | None = None  # shorter side in pixels before the set was made, if recorded
    flaw: str = ""  # the reason why it cannot be used
    offset: int | None = None  # its place in the shard, in bytes
    part: int = 0  # number of its data set where there are several
    shape: int = 0  # index of its shape among those of the source
    kept: float = 1.0  # share of the picture that the shape leaves of it, where that is known
    concept: str = ""  # what it shows, where the set shows one thing in several styles


class Picture(NamedTuple):
    """A decoded image or clip, and its upright width and height before cutting and resizing."""

    pixels: UInt8[np.ndarray, "*frames h w c"]
    size: tuple[int, int]


class Example(NamedTuple):
    """One image, or as many as a clip has frames, with the facts of its `Sample`."""

    picture: UInt8[np.ndarray, "*frames h w c"]
    captions: tuple[str, ...]
    label: int | None
    key: str
    original_side: int
    size: tuple[int, int]  # of the file that was read


@dataclass(frozen=True, eq=False)
class Source:
    """Images, or clips of square frames, in a fixed order; all are squares, or each has a shape.

    A sample that turns out bad on reading is replaced by the next good one of the same shape, or
    else of any shape, which is cut to it; in a mix by one of the same part. So the example at an
    index depends on the data alone: not on earlier reads, nor on the number of threads.
    """

    name: str  # for messages, such as "openmoji"
    samples: Sequence[Sample]  # the usable ones
    read: Callable[[int, Cut], Picture]  # in the cut's shape or its own; raises PictureError
    quarantine: Quarantine  # samples that are left out, also those found bad on reading
    shapes: tuple[Resolution, ...]  # in pixels, the square first; samples have their indices
    frames: int | None = None  # of each clip; None for images
    channels: int = 3  # as in `image.CHANNELS`
    classes: tuple[str, ...] = ()  # names; empty without labels
    threads: int = 1  # samples that are read at the same time
    unused: tuple[Unused, ...] = ()  # other things in the data set
    shares: tuple[float, ...] = (1.0,)  # of the parts of a mix, as a run draws from them

    @property
    def side(self) -> int:
        """Height and width of squares in pixels."""
        return self.shapes[0].height

    @property
    def usual_shape(self) -> Resolution:
        """The shape that most samples have."""
        return self.shapes[Counter(sample.shape for sample in self.samples).most_common(1)[0][0]]

    @cached_property
    def keys(self) -> list[str]:
        """Names of the samples."""
        return [sample.key for sample in self.samples]

    @cached_property
    def captions(self) -> list[tuple[str, ...]] | None:
        """Captions of each sample, known without decoding; None without captions."""
        captions = [sample.captions for sample in self.samples]
        return captions if captions[0] else None

    @property
    def bad(self) -> tuple[BadFile, ...]:
        """Samples that are left out."""
        return self.quarantine.bad

    @property
    def total(self) -> int:
        """Number of samples in the data set, good and bad."""
        return self.quarantine.total

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Example:
        return self._example(range(len(self))[index], Cut())

    def many(self, indices: Sequence[int], cuts: Sequence[Cut] | None = None) -> list[Example]:
        """Examples at `indices`, cut as `cuts` say; by default from the middle."""
        cuts = cuts or [Cut()] * len(indices)
        if self.threads == 1:
            return list(map(self._example, indices, cuts))
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(self._example, indices, cuts))

    def part(self, rows: Sequence[int]) -> Source:
        """Source of the samples `rows`. A bad one is replaced by another one of this part."""
        samples = [self.samples[row] for row in rows]
        return replace(self, samples=samples, read=lambda n, cut: self.read(rows[n], cut))

    def _example(self, index: int, cut: Cut) -> Example:
        part, shape = self.samples[index].part, self.samples[index].shape
        for n in chain(self._after(index, of_shape=True), self._after(index, of_shape=False)):
            sample = self.samples[n]
            if sample.key in self.quarantine:
                continue
            forced = None if sample.shape == shape else self.shapes[shape]
            try:
                picture = self.read(n, cut._replace(shape=forced))
            except PictureError as error:
                self.quarantine.add(BadFile(sample.key, str(error), sample.offset))
                continue
            side = sample.original_side or min(picture.size)
            label = None if sample.label is None else int(sample.label)
            facts = (sample.captions, label, sample.key, side, picture.size)
            return Example(picture.pixels, *facts)
        count = sum(one.part == part for one in self.samples)
        place = f"data.mix[{part}]: " if len(self.shares) > 1 else ""
        raise ValueError(f"{place}{self.name}: not one of {count:,} samples can be read")

    def _after(self, index: int, *, of_shape: bool) -> Iterator[int]:
        """Samples of the same part from `index` on and around: those of its shape, or others."""
        first = self.samples[index]
        for step in range(len(self)):
            n = (index + step) % len(self)
            same = self.samples[n].shape == first.shape
            if self.samples[n].part == first.part and same == of_shape:
                yield n


def array_source(
    name: str,
    array: UInt8[np.ndarray, "n *frames side side channels"],
    keys: Sequence[str],
    *,
    captions: Sequence[tuple[str, ...]] | None = None,
    labels: Sequence[int] | None = None,
    original_sides: Sequence[int] | None = None,
    classes: tuple[str, ...] = (),
) -> Source:
    """Source of the images or clips in an array, which may be memory-mapped, and columns for it."""
    *frames, side, _, channels = array.shape[1:]
    count = len(keys)
    columns = captions or [()] * count, labels or [None] * count, original_sides or [side] * count
    return Source(
        name,
        [Sample(*row) for row in zip(keys, *columns, strict=True)],
        lambda index, _: Picture(np.array(array[index]), (side, side)),
        Quarantine(name, total=count),
        square(side),
        frames=frames[0] if frames else None,
        channels=channels,
        classes=classes,
    )


def read_all(source: Source, rows: Sequence[int]) -> Iterator[Example]:
    """Examples at `rows`, read 64 images or frames at a time."""
    together = max(1, _FRAMES_IN_MEMORY // (source.frames or 1))
    for start in range(0, len(rows), together):
        yield from source.many(rows[start : start + together])


def split(source: Source, share: float) -> tuple[Source, Source | None]:
    """Training part and held-out part of about `share` of all samples (None for 0).

    A sample's part depends on its key alone, except that one sample of each concept is in training:
    that of the highest number. Raises ConfigError if a part would be empty.
    """
    if share == 0.0:
        return source, None
    numbers, highest = [fraction(key) for key in source.keys], dict[str, float]()
    for sample, number in zip(source.samples, numbers, strict=True):
        highest[sample.concept] = max(number, highest.get(sample.concept, 0.0))
    held = [
        number < share and not (sample.concept and number == highest[sample.concept])
        for sample, number in zip(source.samples, numbers, strict=True)
    ]
    train, held_out = ([n for n, is_held in enumerate(held) if is_held == side] for side in (0, 1))
    if not train or not held_out:
        raise ConfigError(
            f"data.held_out is {share:g}, which takes {len(held_out)} of the {len(source):,} "
            f"pictures of {source.name}: there must be some on either side "
            "(--set data.held_out=0 trains on all)"
        )
    return source.part(train), source.part(held_out)


def joined(first: Source, second: Source) -> Source:
    """Source of the samples of both parts of a `split`."""

    def read(n: int, cut: Cut) -> Picture:
        return first.read(n, cut) if n < len(first) else second.read(n - len(first), cut)

    return replace(first, samples=[*first.samples, *second.samples], read=read)


def identity(source: Source) -> DataIdentity:
    """Hash what a run depends on: the keys of the usable samples, their conditions and shapes."""
    keys, conditions, shapes = (hashlib.blake2b(digest_size=8) for _ in range(3))
    for sample in source.samples:
        keys.update(repr(sample.key).encode())
        conditions.update(repr((sample.captions, sample.label)).encode())
        shapes.update(f"{source.shapes[sample.shape]} ".encode())
    return DataIdentity(
        images=len(source),
        keys=keys.hexdigest(),
        conditions=conditions.hexdigest(),
        shapes=shapes.hexdigest() if len(source.shapes) > 1 else None,
    )


# --- from a config to a source ---------------------------------------------------------------


def open_source(
    config: DataConfig,
    side: int,
    frames: int | None = None,
    channels: int = 3,
    shapes: tuple[Resolution, ...] = (),
) -> Source:
    """Open the data that `config` names, at the finest level's `side`; videos as clips of `frames`.

    Images are cut to squares, or with `shapes` of this area each to the nearest of these.

    Images and videos get the number of `channels`, whatever their files have: grey, colour, or
    either with opacity (`image.CHANNELS`). Fashion-MNIST is always grey.

    Without `frames`, a video gives the first frame of its clip. A source of images gives images in
    either case. The first call for a set and side may take long: it decodes into the cache.

    Raises:
        ConfigError: a path is missing, or the data does not have this side.
        ValueError, OSError: the data is missing or unusable; the message says what to do.
        MissingExtra: an optional package is not installed. So do all functions of this folder.
    """
    from matryoshka_diffusion.data import emoji, fashion_mnist, folder, image, shards, tables, video
    from matryoshka_diffusion.data import emoji_styles as styles
    from matryoshka_diffusion.data.decoded import open_catalogue, picture_decoder

    shapes = shapes or square(side)
    if config.mix:
        from matryoshka_diffusion.data.mix import mixed

        names, alone = DataPlace.model_fields, {"mix": (), "classes": ()}
        places = [{name: getattr(part, name) for name in names} for part in config.mix]
        parts = [config.model_copy(update={**place, **alone}) for place in places]
        return mixed([open_source(part, side, frames, channels, shapes) for part in parts], config)
    path, source = config.path, config.source
    if channels not in image.CHANNELS:
        forms = "1 (grey), 2 (grey and opacity), 3 (colour) or 4 (colour and opacity)"
        raise ConfigError(f"model.channels is {channels}: pictures have {forms}")
    if source == "openmoji":
        if path is not None:
            raise ConfigError("data.path: OpenMoji comes from its package, omit --data")
        return open_catalogue(
            emoji.openmoji(side), picture_decoder(shapes, "centre", channels), config
        )
    if source == "fashion-mnist":
        return fashion_mnist.fashion_mnist(side, None if path is None else _expanded(path))
    if path is None:
        remedy = {
            "fluent-emoji": f"give the folder of the unpacked npm package {emoji.FLUENT_EMOJI}",
            "emoji-styles": f"give the folder of the unpacked npm package {styles.FLUENT_3D}",
            "clips": f"give a folder ({folder.forms(image.VIDEOS)}), or tar shards,",
        }
        own = f"give a folder ({folder.forms(image.PICTURES)}), or tar shards, parquet or hf:NAME"
        raise ConfigError(f"data.path is not set: {remedy.get(source, own)} with --data")
    catalogues: dict[str, Callable[[], Any]] = {
        "folder": lambda: folder.folder(_expanded(path), config),
        "emoji-styles": lambda: styles.emoji_styles(_expanded(path), side),
        "shards": lambda: shards.shards(absolute(path), config),
        "parquet": lambda: tables.parquet(absolute(path), config),
        "datasets": lambda: tables.hugging_face(absolute(path), config),
        "clips": lambda: video.videos(absolute(path), config),
        "fluent-emoji": lambda: emoji.fluent_emoji(_expanded(path), config, frames),
    }
    if source in VIDEO_SOURCES:
        decoder = video.clip_decoder(config, side, frames, channels)
    else:
        decoder = picture_decoder(shapes, config.crop, channels)
    try:
        return open_catalogue(catalogues[source](), decoder, config)
    except NoneUsable as error:
        if source != "clips" or frames is None:
            raise
        why = f"clips of {frames} frames, as the model's finest level has them, are made of videos"
        raise NoneUsable(f"{error}; {why}", error.bad) from error


def open_data(config: RunConfig) -> Source:
    """Open the data of a run, as its levels are made of it. See `open_source`."""
    data, frames, channels = config.data, config.data_frames, config.data_channels
    return open_source(data, config.data_side, frames, channels, shapes_of_data(config))


# --- from a path to a kind of source ---------------------------------------------------------


def with_source(config: RunConfig) -> RunConfig:
    """Run config whose data source is recognised from its path. See `sourced`."""
    clips = config.data_frames is not None
    return config.model_copy(update={"data": sourced(config.data, clips=clips)})


def sourced(data: DataConfig, *, clips: bool = False) -> DataConfig:
    """Data config with the source at its path if it names a folder.

    For a model of `clips`, folders and shards are read as videos.
    """
    if data.mix:
        parts = [
            part.model_copy(update={"path": part.path and absolute(part.path)}) for part in data.mix
        ]
        mix = tuple(_recognised(part, clips) for part in parts)
        return data.model_copy(update={"mix": mix, "source": mix[0].source})
    return _recognised(data, clips)


def _recognised(place: Place, clips: bool) -> Place:
    if place.source != "folder" or place.path is None:
        return place
    kind = kind_of(place.path)
    source: SourceName = "clips" if clips and kind in ("folder", "shards") else kind
    return place.model_copy(update={"source": source})


def kind_of(path: str) -> SourceName:
    """Kind of the data at `path`. In a folder, images count before videos, shards and parquet."""
    from matryoshka_diffusion.data.folder import holds
    from matryoshka_diffusion.data.image import CONTAINERS, SUFFIXES

    if path.startswith(HUGGING_FACE):
        return "datasets"
    folder, names = _expanded(path), [path]
    if folder.is_dir():
        if holds(folder, SUFFIXES):
            return "folder"
        if holds(folder, CONTAINERS):
            return "clips"
        inside = (name for name in folder.glob("*/*") if not name.parent.name.startswith("."))
        names = [*os.listdir(folder), *(name.name for name in inside)]
        names = [x for x in names if x.endswith((".tar", ".parquet")) and not x.startswith(".")]
    if any(_SHARD.search(name) for name in names):
        return "shards"
    return "parquet" if any(name.endswith(".parquet") for name in names) else "folder"


def absolute(path: str) -> str:
    """Name of the same data from any working folder; addresses and hub names stay as they are."""
    if "://" in path:
        return path
    if not path.startswith(HUGGING_FACE):
        return str(_expanded(path).resolve())
    from matryoshka_diffusion.data.tables import split_of

    place, split = split_of(path.removeprefix(HUGGING_FACE))
    folder = _expanded(place)
    resolved = str(folder.resolve()) if folder.is_dir() else place
    return f"{HUGGING_FACE}{resolved}{'@' if split else ''}{split}"


def _expanded(path: str) -> Path:
    return Path(path).expanduser()
