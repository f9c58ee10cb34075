"""WebDataset shards: tar files of samples, read in place by byte ranges, here or through fsspec.

A sample is the neighbouring members that share a key, their name up to the first dot after the
last slash: `cat/0001.jpg`, `cat/0001.txt`, `cat/0001.cls`. An index of each shard is made once,
from the headers and the small members, and kept in the cache. Every image can then be read at any
time, so an epoch is a permutation of all samples, not of shards.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import fsspec

from matryoshka_diffusion.data.decoded import THREADS, Catalogue
from matryoshka_diffusion.data.folder import (
    MAX_SIDECAR_BYTES,
    CaptionError,
    clean,
    lines,
    texts_of,
)
from matryoshka_diffusion.data.image import PICTURES, Kind
from matryoshka_diffusion.data.loader import look_ahead
from matryoshka_diffusion.data.source import Sample
from matryoshka_diffusion.data.tar import Member, members, read_at
from matryoshka_diffusion.files import (
    MissingExtra,
    UnreadableError,
    cache_folder,
    digest,
    unreadable,
    write_atomically,
)

MAX_NAMES = 1_000_000
"""Names from one pattern: more is a slip such as {0..99999999}."""

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_READ_AHEAD = 4 * 2**20
_VERSION = 4  # of the index; raise it when the same shard would be indexed in another way
_TEXT, _RECORD, _CLASS = frozenset({".txt"}), frozenset({".json"}), frozenset({".cls"})
_MAX_RECORD_BYTES = 2**20
_MAX_CLASS_BYTES = 64
_MAX_ORIGINAL = 10**6  # pixels a side; larger claims are not believed


def shards(pattern: str, kind: Kind = PICTURES) -> Catalogue:
    """Samples of all shards that `pattern` stands for (see `expand`), in their order.

    Raises:
        OSError: a shard is not there or cannot be read.
        ValueError: a shard is compressed.
        MissingExtra: fsspec lacks a package for this address.
    """
    from tqdm import tqdm

    paths = expand(pattern, ".tar")
    for path in paths:
        if not path.endswith(".tar"):
            raise ValueError(f"{path}: decompress it, shards are plain .tar files")

    def index(path: str) -> tuple[str, list[tuple[Sample, int]]]:
        state = state_of(path)
        return state, _index(path, state, kind)

    results = look_ahead(index, paths, workers=THREADS, depth=4 * THREADS)
    bar = tqdm(results, "indexing shards", len(paths), unit=" shards", leave=False, disable=None)
    states, samples, places = [], [], []
    for path, name, (state, found) in zip(paths, short_names(paths), bar, strict=True):
        states.append(f"{path} {state}")
        samples += [sample._replace(key=f"{name}:{sample.key}") for sample, _ in found]
        places += [(path, sample.offset, size) for sample, size in found]
    return Catalogue(
        f"shards {pattern}", "\n".join(states), samples, lambda n: read_range(*places[n])
    )


# --- files here and elsewhere ----------------------------------------------------------------


def expand(pattern: str, suffix: str) -> list[str]:
    """Paths that a pattern stands for, or the files of a folder that end in `suffix`, in order.

    `{00..12}` counts, with the zeros of its first number, and may occur several times; `*`, `?`
    and `[...]` match what exists.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a range runs backwards or gives too many names.
    """
    names = [pattern]
    while (match := _RANGE.search(names[0])) is not None:
        first, last = int(match[1]), int(match[2])
        count = last - first + 1
        if count < 1 or count * len(names) > MAX_NAMES:
            raise ValueError(f"{pattern}: {match[0]} is no range, or gives too many names")
        numbers = [f"{n:0{len(match[1])}}" for n in range(first, last + 1)]
        names = [name.replace(match[0], n, 1) for name in names for n in numbers]
    paths = [path for name in names for path in _existing(name, suffix)]
    if not paths:
        raise FileNotFoundError(f"{pattern}: no {suffix} file is there")
    return paths


def _existing(path: str, suffix: str) -> list[str]:
    if os.path.isdir(path):
        return sorted(glob.glob(os.path.join(glob.escape(path), f"*{suffix}")))
    if not glob.has_magic(path):
        return [path]
    if "://" not in path:
        return sorted(glob.glob(path))
    with _system(path) as (system, inside):
        return [system.unstrip_protocol(name) for name in sorted(system.glob(inside))]


def short_names(paths: Sequence[str]) -> list[str]:
    """File names without their folders, or whole paths if those would not tell files apart."""
    names = [os.path.basename(path) for path in paths]
    return names if len(set(names)) == len(paths) else list(paths)


def state_of(path: str) -> str:
    """Size and time (or etag) of a file, which change when it is written again.

    Raises:
        OSError: it is not there or cannot be reached.
    """
    with _system(path) as (system, inside):
        info = system.info(inside)
    if info.get("size") is None:
        raise OSError(f"{path}: its server does not tell its size, so parts cannot be read")
    stamps = (info.get(key) for key in ("ETag", "etag", "LastModified", "mtime", "created"))
    return f"{info['size']} {next((stamp for stamp in stamps if stamp is not None), '')}"


@contextmanager
def opened(path: str) -> Iterator[Any]:
    """Open a file for reading from front to back with seeks. Raises `OSError`."""
    with (
        _system(path) as (system, inside),
        system.open(inside, "rb", block_size=_READ_AHEAD, cache_type="readahead") as file,
    ):
        yield file


def read_range(path: str, start: int, size: int) -> bytes:
    """Read `size` bytes from `start` on; fewer where the file ends. Any thread may call it.

    Raises:
        UnreadableError: the file cannot be read.
    """
    with _system(path) as (system, inside):
        return system.cat_file(inside, start=start, end=start + size)


@contextmanager
def _system(path: str) -> Iterator[tuple[Any, str]]:
    """Open the file system of a path; report its failures as errors that name the path."""
    try:
        yield fsspec.core.url_to_fs(path)
    except ImportError as error:
        remedy = 'pip install "matryoshka-diffusion[remote]", or the package it names'
        raise MissingExtra(f"reading {path}: {error}: {remedy}") from error
    except ValueError:
        raise  # an address of an unknown service, or damage that the caller judges
    except FileNotFoundError as error:
        raise UnreadableError(f"{path}: not found") from error
    except Exception as error:  # each service has errors of its own
        if isinstance(error, OSError) and error.strerror:
            raise unreadable(path, error) from error
        raise UnreadableError(f"{path}: {str(error) or type(error).__name__}") from error


# --- the index -------------------------------------------------------------------------------


class _FlawError(ValueError):
    """A sample that cannot be used; the message says why."""


def _index(path: str, state: str, kind: Kind) -> list[tuple[Sample, int]]:
    """Samples of a shard in order, and the sizes of their files; bad samples have a flaw.

    A sample's `offset` is where its file begins, or where the flaw is.
    """
    cache = cache_folder("shards") / f"{digest(f'{kind.noun}s of {path}')}.json"
    try:
        version, cached_state, rows = json.loads(cache.read_bytes())
        if (version, cached_state) == (_VERSION, state):
            return [
                (Sample(key, tuple(captions), label, side, flaw, int(offset)), int(size))
                for (key, captions, label, side, flaw, offset), size in rows
            ]
    except (OSError, ValueError, TypeError):
        pass  # there is no index yet, or it is damaged
    with opened(path) as file:
        found = list(_samples(file, int(state.split()[0]), kind))
    text = json.dumps([_VERSION, state, found]).encode()
    write_atomically(cache, lambda file: file.write(text), needed=len(text))
    return found


def _samples(file: Any, size: int, kind: Kind) -> Iterator[tuple[Sample, int]]:
    keys: set[str] = set()
    used = kind.suffixes | kind.others | _TEXT | _RECORD | _CLASS
    wanted = (member for member in members(file, size) if member.flaw or _is_used(member, used))
    for key, group in groupby(wanted, lambda member: _split(member.name)[0] or _nameless(member)):
        parts = list(group)
        try:
            if key in keys:
                raise _FlawError("its key was used before: members of a sample lie side by side")
            yield _sample(file, key, parts, kind)
        except (_FlawError, CaptionError) as error:
            yield Sample(key, flaw=str(error), offset=parts[0].start), 0
        keys.add(key)


def _nameless(member: Member) -> str:
    """Key of a member that has lost its name: a sample of its own."""
    return f"byte {member.start}"


def _split(name: str) -> tuple[str, str]:
    """Key and suffix: `a.b/c.seg.png` is `a.b/c` and `.seg.png`."""
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{suffix}".lower()


def _is_used(member: Member, suffixes: frozenset[str]) -> bool:
    hidden = member.name.rpartition("/")[2].startswith(".")
    return _split(member.name)[1] in suffixes and not hidden


def _sample(file: Any, key: str, parts: Sequence[Member], kind: Kind) -> tuple[Sample, int]:
    """Sample from its members, and the size of its file. Raises _FlawError or CaptionError."""
    for part in parts:
        if part.flaw:
            raise _FlawError(part.flaw)
    whole = _only(parts, kind.suffixes - kind.previews, kind.noun)
    picture = whole or _only(parts, kind.previews, kind.noun)
    if picture is None:
        raise _FlawError(f"it has no {kind.formats} {kind.noun}")
    if not 0 < picture.size <= kind.max_bytes:
        raise _FlawError(f"its {kind.noun} is {'too large' if picture.size else 'empty'}")
    record = _record(_small(file, _only(parts, _RECORD, ".json"), _MAX_RECORD_BYTES))
    text = _small(file, _only(parts, _TEXT, ".txt"), MAX_SIDECAR_BYTES)
    texts = texts_of(record) if text is None else lines(text)
    label = _small(file, _only(parts, _CLASS, ".cls"), _MAX_CLASS_BYTES)
    if label is not None and not label.strip().isdigit():
        raise _FlawError("its .cls is no whole number")
    sides: list[Any] = [record.get(name) for name in ("original_width", "original_height")]
    known = all(isinstance(side, int) and 0 < side <= _MAX_ORIGINAL for side in sides)
    sample = Sample(
        key=key,
        captions=clean(texts) if texts or text is not None else (),
        label=None if label is None else int(label),
        original_side=min(sides) if known else None,
        offset=picture.start,
    )
    return sample, picture.size


def _only(parts: Sequence[Member], suffixes: frozenset[str], what: str) -> Member | None:
    found = [part for part in parts if _split(part.name)[1] in suffixes]
    if len(found) > 1:
        raise _FlawError(f"it has more than one {what}: its key may be there twice")
    return found[0] if found else None


def _small(file: Any, member: Member | None, most: int) -> bytes | None:
    if member is None:
        return None
    if member.size > most:
        raise _FlawError(f"{_split(member.name)[1]} is longer than {most:,} bytes")
    return read_at(file, member.start, member.size)


def _record(data: bytes | None) -> Mapping[str, Any]:
    try:
        record = {} if data is None else json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _FlawError("its .json is damaged or not UTF-8") from error
    if not isinstance(record, dict):
        raise _FlawError("its .json is no object with names")
    return record
