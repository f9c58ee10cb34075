"""From a catalogue of encoded files to a source: decoded once into the cache, or on demand.

The results for a small set lie in one file of bytes, which is memory-mapped; that makes later
epochs cheap. A large set would fill the disk: its files are decoded a batch at a time.
"""

from __future__ import annotations

import json
import math
import os
import warnings
import zlib
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import UInt8

from matryoshka_diffusion.config import Crop, DataConfig
from matryoshka_diffusion.data.augment import Cut, cut_out
from matryoshka_diffusion.data.bad import BadFile, NoneUsable, PictureError, Quarantine
from matryoshka_diffusion.data.image import read_picture, read_size, size_in_head
from matryoshka_diffusion.data.loader import look_ahead
from matryoshka_diffusion.data.shapes import kept, nearest
from matryoshka_diffusion.data.source import Picture, Sample, Source
from matryoshka_diffusion.data.spellings import Unused, sorted_classes
from matryoshka_diffusion.files import (
    cache_folder,
    digest,
    remove_stale,
    sealed,
    unsealed,
    write_atomically,
)
from matryoshka_diffusion.pyramid import Resolution

CACHED_PICTURES = 20_000
"""Largest set of images that is decoded into the cache; at 256 pixels a side it takes 4 GB."""
THREADS = min(os.cpu_count() or 1, 8)
MAX_CLASSES = 100_000

_WHOLE = Cut()
_VERSION = 6  # raise it when the same file decodes to other bytes, or is stored in another way


@dataclass(frozen=True, eq=False)
class Catalogue:
    """Samples of a data set, and where their files are."""

    name: str  # for messages, such as "shards /data/*.tar"
    state: str  # changes when the set does
    samples: Sequence[Sample]  # all of them, with a flaw if unusable
    load: Callable[[int], bytes | Path]  # the file of sample n; any thread may call it
    classes: tuple[str, ...] = ()  # names of numbers; empty if the samples have names, or none
    unused: tuple[Unused, ...] = ()  # other things in the data set
    head: Callable[[int], bytes] | None = None  # its first `image.HEAD` bytes, where that is less


@dataclass(frozen=True)
class Decoder:
    """Way from (file, key, cut) to an image or a clip of which the cut can be made."""

    decode: Callable[[bytes | Path, str, Cut], Picture]  # may raise PictureError
    shapes: tuple[Resolution, ...]  # square first; a result covers the cut's, or else the nearest
    frames: int | None  # of a clip; None for images
    options: str  # everything that the result depends on, for the names of caches
    cached: int  # samples of the largest set that is decoded into the cache
    channels: int = 3


def picture_decoder(shapes: tuple[Resolution, ...], crop: Crop, channels: int = 3) -> Decoder:
    """Decoder of images."""

    def decode(file: bytes | Path, key: str, cut: Cut) -> Picture:
        return read_picture(file, (cut.shape,) if cut.shape else shapes, crop, channels)

    options = f"{shapes[0].height}, {crop}" + (f", {channels} channels" if channels != 3 else "")
    options += "".join(f", {shape}" for shape in shapes[1:])
    return Decoder(decode, shapes, None, options, CACHED_PICTURES, channels)


def open_catalogue(catalogue: Catalogue, decoder: Decoder, data: DataConfig) -> Source:
    """Open the usable samples of a catalogue, in its order; NoneUsable if it has none.

    Too many bad ones are a ValueError: now, or for a set that is decoded on demand while reading.
    """
    _refuse_empty(catalogue)
    name, max_bad_fraction = catalogue.name, data.max_bad_fraction
    samples, classes = _numbered(catalogue, data.classes)
    samples = _with_flaws(samples, len(classes) or MAX_CLASSES)
    bad = [BadFile(sample.key, sample.flaw, sample.offset) for sample in samples if sample.flaw]
    quarantine = Quarantine(name, bad, len(samples), max_bad_fraction)
    quarantine.check()
    # A set may have millions of samples, so what is kept of each is small, and kept once.
    rows = array("q", (n for n, sample in enumerate(samples) if not sample.flaw))
    usable, load = [samples[row] for row in rows], catalogue.load

    def decode(n: int, cut: Cut = _WHOLE) -> Picture:
        return decoder.decode(load(rows[n]), usable[n].key, cut)

    def cut_to_shape(picture: Picture, cut: Cut) -> Picture:
        shape = cut.shape or decoder.shapes[nearest(picture.size, decoder.shapes)]
        return picture._replace(pixels=cut_out(picture.pixels, shape, cut.place))

    def read(n: int, cut: Cut) -> Picture:
        return cut_to_shape(decode(n, cut), cut)

    source = Source(
        name,
        usable,
        read,
        quarantine,
        decoder.shapes,
        frames=decoder.frames,
        channels=decoder.channels,
        classes=_class_names(usable, classes, data.classes),
        threads=THREADS,
        unused=_unused(catalogue, data),
    )
    small = len(usable) <= decoder.cached
    if not small and len(decoder.shapes) == 1:
        return source

    def measure(n: int) -> Picture:
        return Picture(np.empty(0, np.uint8), _size_of(catalogue, rows[n]))

    whole = f"{name} at {decoder.options}" if small else f"{name}, sizes"
    title = f"decoding at {source.side} px" if small else "measuring"
    path = cache_folder("decoded", digest(whole)) / digest(
        "\n".join([str(_VERSION), catalogue.state, *source.keys])
    )
    notes, pixels = _stored_or_made(path, source, decode if small else measure, title)
    offsets = np.cumsum([0, *(math.prod(note.shape) for note in notes)])
    pairs = list(zip(usable, notes, strict=True))
    bad += [BadFile(one.key, note.reason, one.offset) for one, note in pairs if note.reason]
    quarantine = Quarantine(name, bad, len(samples), max_bad_fraction)
    quarantine.check()

    def read_decoded(n: int, cut: Cut) -> Picture:
        if cut.shape is not None:  # it stands in for another
            return read(n, cut)
        note = notes[n]
        stored = pixels[offsets[n] : offsets[n + 1]]
        if zlib.crc32(stored.data) == note.checksum:
            picture = Picture(stored.reshape(note.shape), note.size)
        else:
            picture = Picture(decode(n).pixels, note.size)
            content = picture.pixels.tobytes()
            _mend(path.with_suffix(".bin"), int(offsets[n]), content, note.checksum)
        picture = cut_to_shape(picture, cut)
        return picture._replace(pixels=np.array(picture.pixels))

    good = [n for n, note in enumerate(notes) if not note.reason]
    shaped = [_shaped(one, note.size, decoder.shapes) for one, note in pairs]
    source = replace(source, samples=shaped, quarantine=quarantine)
    source = replace(source, read=read_decoded, threads=1) if small else source
    return source.part(good)


def _refuse_empty(catalogue: Catalogue) -> None:
    if not catalogue.samples:
        unused = f"; not used: {'; '.join(map(str, catalogue.unused))}" if catalogue.unused else ""
        message = f"{catalogue.name} holds no sample: name other data (--data, data.path){unused}"
        raise NoneUsable(message, ())


def _size_of(catalogue: Catalogue, row: int) -> tuple[int, int]:
    """The size of an image, from the first bytes of its file where these have it."""
    head = catalogue.head(row) if catalogue.head else b""
    return size_in_head(head) or read_size(catalogue.load(row))


def _unused(catalogue: Catalogue, data: DataConfig) -> tuple[Unused, ...]:
    """Parts that the catalogue leaves unused; those left out by the config are not missing."""
    ignored = {"caption"} if data.captions == "none" or data.columns.caption == "" else set()
    ignored |= {"label"} if data.columns.label == "" else set()
    return tuple(x._replace(role="") if x.role in ignored else x for x in catalogue.unused)


def _class_names(
    usable: Sequence[Sample], found: tuple[str, ...], given: tuple[str, ...]
) -> tuple[str, ...]:
    """Names of the classes of labels: found in the data, given, or their numbers."""
    labels = [int(sample.label) for sample in usable if sample.label is not None]
    numbers = tuple(map(str, range(max(labels, default=-1) + 1)))
    names = found or (given if len(given) == len(numbers) else numbers)
    return names if labels else ()


def _stored_or_made(
    path: Path, source: Source, decode: Callable[[int], Picture], title: str
) -> _Stored:
    """The cache at `path`, made if it is missing; caches of other states beside it go."""
    stored = _stored(path, len(source))
    if stored is None:
        _decode_all(path, source, decode, title)
        stored = _stored(path, len(source))
    if stored is None:
        raise OSError(f"{path}.bin vanished or changed as soon as it was written: try again")
    for old in path.parent.iterdir():  # unless another process is about to open them
        if old.stem != path.name:
            remove_stale(old)
    return stored


def _shaped(sample: Sample, size: tuple[int, int], shapes: tuple[Resolution, ...]) -> Sample:
    """The sample with the shape of its picture, and the share of the picture that this keeps."""
    if 0 in size:  # of a bad one
        return sample
    shape = nearest(size, shapes)
    return sample._replace(shape=shape, kept=kept(size, shapes[shape]))


def _numbered(
    catalogue: Catalogue, wanted: tuple[str, ...]
) -> tuple[Sequence[Sample], tuple[str, ...]]:
    """Samples with numbers for classes, and the names of these in order; () without any names.

    The names are all `wanted` ones if they have those of the catalogue among them. A model of more
    classes can so be tuned on some. Else their order is that of the catalogue, or the sorted one.
    """
    labels = {sample.label for sample in catalogue.samples} - {None}
    words = {label for label in labels if isinstance(label, str)}
    if words and len(words) < len(labels):
        raise ValueError(
            f"{catalogue.name}: classes are numbers in some of the samples and words in others"
        )
    if not (there := sorted_classes(words) or catalogue.classes if labels else ()):
        return catalogue.samples, ()
    order = wanted if {*there} <= {*wanted} else there
    places: dict[Any, Any] = {name: place for place, name in enumerate(order)}
    if not words:
        places = {number: places[name] for number, name in enumerate(catalogue.classes)}
    samples = [one._replace(label=places.get(one.label, one.label)) for one in catalogue.samples]
    return samples, order


def _with_flaws(samples: Sequence[Sample], classes: int) -> list[Sample]:
    """Samples, with a flaw where one lacks what others have, or has an impossible class.

    Once one sample has a caption (or a class), all need one.
    """
    good = [sample for sample in samples if not sample.flaw]
    captioned = any(sample.captions for sample in good)
    labelled = any(sample.label is not None for sample in good)

    def flaw(sample: Sample) -> str:
        if captioned and not sample.captions:
            return "it has no caption, although others have one"
        if labelled and sample.label is None:
            return "it has no class, although others have one"
        if sample.label is not None and not 0 <= int(sample.label) < classes:
            return f"its class {sample.label} is not one of {classes:,}"
        return ""

    def judged(sample: Sample) -> Sample:
        reason = sample.flaw or flaw(sample)
        return sample._replace(flaw=reason) if reason else sample

    return [judged(sample) for sample in samples]


# --- the cache -------------------------------------------------------------------------------


class _Note(NamedTuple):
    """Result for one file: its shape and a checksum of its bytes, or the reason why it is bad."""

    shape: tuple[int, ...]
    size: tuple[int, int]  # before resizing
    checksum: int = 0
    reason: str = ""


_Stored = tuple[list[_Note], UInt8[np.ndarray, " bytes"]]


def _stored(path: Path, count: int) -> _Stored | None:
    """Results in `path`.bin and `path`.json; None without any, with a warning for damaged ones."""
    binary, notes_file = path.with_suffix(".bin"), path.with_suffix(".json")
    if not binary.exists():
        return None
    try:
        rows = json.loads(unsealed(notes_file.read_bytes()))
        notes = [_Note(tuple(shape), tuple(size), *rest) for shape, size, *rest in rows]
        size = sum(math.prod(note.shape) for note in notes)
        if len(notes) == count and size == binary.stat().st_size:
            mapped = np.memmap(binary, np.uint8, "r") if size else np.empty(0, np.uint8)
            return notes, np.asarray(mapped)
    except (OSError, ValueError, TypeError):
        pass  # reported below
    warnings.warn(f"{binary} or its .json is corrupt and is made again", stacklevel=4)
    return None


def _mend(binary: Path, start: int, data: bytes, checksum: int) -> None:
    """Write an entry anew in which a byte has changed; any process writes the same bytes."""
    warnings.warn(f"{binary}: the entry at byte {start} is corrupt and is made again", stacklevel=4)
    if zlib.crc32(data) == checksum:  # else its file has changed just now
        with suppress(OSError), open(binary, "r+b") as file:  # the cache may be read-only
            file.seek(start)
            file.write(data)


def _decode_all(path: Path, source: Source, decode: Callable[[int], Picture], title: str) -> None:
    """Decode all samples. The notes are written first, so they exist wherever the bytes do."""
    from tqdm import tqdm

    def one(n: int) -> tuple[bytes, _Note]:
        try:
            pixels, size = decode(n)
        except PictureError as error:
            return b"", _Note((0,), (0, 0), reason=str(error))
        data = pixels.tobytes()
        return data, _Note(pixels.shape, size, zlib.crc32(data))

    def write(file: BinaryIO) -> None:
        notes = []
        results = look_ahead(one, range(len(source)), workers=THREADS, depth=4 * THREADS)
        unit = " clips" if source.frames else " pictures"
        for data, note in tqdm(results, desc=title, total=len(source), unit=unit, disable=None):
            file.write(data)
            notes.append(note)
        text = sealed(json.dumps(notes))
        write_atomically(path.with_suffix(".json"), lambda file: file.write(text))

    needed = len(source) * (source.frames or 1) * source.side**2 * source.channels
    write_atomically(path.with_suffix(".bin"), write, needed=needed)
