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
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from matryoshka_diffusion.data.bad import PictureError
from matryoshka_diffusion.data.decoded import THREADS, Catalogue
from matryoshka_diffusion.data.folder import MAX_SIDECAR_BYTES, clean, lines, texts_of
from matryoshka_diffusion.data.image import PICTURES, Kind
from matryoshka_diffusion.data.loader import look_ahead
from matryoshka_diffusion.data.remote import attempt, opened, read_range, state_of
from matryoshka_diffusion.data.source import Sample
from matryoshka_diffusion.data.tar import Member, members, read_at
from matryoshka_diffusion.files import cache_folder, digest, write_atomically

MAX_NAMES = 1_000_000  # from one pattern: more is a slip such as {0..99999999}

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_VERSION = 5  # of the index; raise it when the same shard would be indexed in another way
_MAX_BYTES = {".txt": MAX_SIDECAR_BYTES, ".json": 2**20, ".cls": 64}  # of what describes an image
_MAX_ORIGINAL = 10**6  # pixels a side; larger claims are not believed


def shards(pattern: str, kind: Kind = PICTURES) -> Catalogue:
    """Samples of all shards that `pattern` stands for (see `expand`), in their order."""
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

    def load(n: int) -> bytes:
        path, start, size = places[n]
        return read_range(path, start, size)

    return Catalogue(f"shards {pattern}", "\n".join(states), samples, load)


# --- files here and elsewhere ----------------------------------------------------------------


def expand(pattern: str, suffix: str) -> list[str]:
    """Paths that a pattern stands for, or the files of a folder that end in `suffix`, in order.

    `{00..12}` counts, with the zeros of its first number, and may occur several times; `*`, `?`
    and `[...]` match what exists. Raises FileNotFoundError or, for senseless ranges, ValueError.
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
    return attempt(path, _matches)


def _matches(system: Any, pattern: str) -> list[str]:
    return [system.unstrip_protocol(name) for name in sorted(system.glob(pattern))]


def short_names(paths: Sequence[str]) -> list[str]:
    """File names without their folders, or whole paths if those would not tell files apart."""
    names = [os.path.basename(path) for path in paths]
    return names if len(set(names)) == len(paths) else list(paths)


# --- the index -------------------------------------------------------------------------------


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
    size = int(state.split()[0])
    with opened(path, size) as file:
        found = list(_samples(file, size, kind))
    text = json.dumps([_VERSION, state, found]).encode()
    write_atomically(cache, lambda file: file.write(text), needed=len(text))
    return found


def _samples(file: Any, size: int, kind: Kind) -> Iterator[tuple[Sample, int]]:
    keys: set[str] = set()
    used = kind.suffixes | kind.others | _MAX_BYTES.keys()

    def is_used(member: Member) -> bool:
        hidden = member.name.rpartition("/")[2].startswith(".")
        return bool(member.flaw) or (_split(member.name)[1] in used and not hidden)

    def key_of(member: Member) -> str:  # a member that has lost its name is a sample of its own
        return _split(member.name)[0] or f"byte {member.start}"

    for key, group in groupby(filter(is_used, members(file, size)), key_of):
        parts = list(group)
        try:
            if key in keys:
                raise PictureError("its key was used before: members of a sample lie side by side")
            yield _sample(file, key, parts, kind)
        except PictureError as error:
            yield Sample(key, flaw=str(error), offset=parts[0].start), 0
        keys.add(key)


def _split(name: str) -> tuple[str, str]:
    """Key and suffix: `a.b/c.seg.png` is `a.b/c` and `.seg.png`."""
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{suffix}".lower()


def _sample(file: Any, key: str, parts: Sequence[Member], kind: Kind) -> tuple[Sample, int]:
    """Sample from its members, and the size of its file. Raises PictureError."""
    for part in parts:
        if part.flaw:
            raise PictureError(part.flaw)
    whole = _only(parts, kind.suffixes - kind.previews, kind.noun)
    picture = whole or _only(parts, kind.previews, kind.noun)
    if picture is None:
        raise PictureError(f"it has no {kind.formats} {kind.noun}")
    if not 0 < picture.size <= kind.max_bytes:
        raise PictureError(f"its {kind.noun} is {'too large' if picture.size else 'empty'}")
    data, text = _small(file, parts, ".json"), _small(file, parts, ".txt")
    try:
        record = {} if data is None else json.loads(data)
    except (ValueError, RecursionError) as error:
        raise PictureError("its .json is damaged or not UTF-8") from error
    if not isinstance(record, dict):
        raise PictureError("its .json is no object with names")
    texts = texts_of(record) if text is None else lines(text)
    label = _small(file, parts, ".cls")
    if label is not None and not label.strip().isdigit():
        raise PictureError("its .cls is no whole number")
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


def _only(parts: Sequence[Member], suffixes: frozenset[str], noun: str) -> Member | None:
    found = [part for part in parts if _split(part.name)[1] in suffixes]
    if len(found) > 1:
        raise PictureError(f"it has more than one {noun}: its key may be there twice")
    return found[0] if found else None


def _small(file: Any, parts: Sequence[Member], suffix: str) -> bytes | None:
    member, most = _only(parts, frozenset({suffix}), suffix), _MAX_BYTES[suffix]
    if member is not None and member.size > most:
        raise PictureError(f"{suffix} is longer than {most:,} bytes")
    return None if member is None else read_at(file, member.start, member.size)
