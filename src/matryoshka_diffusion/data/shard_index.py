"""The index of a tar shard: which samples it holds and where the bytes of their pictures lie.

A sample is the neighbouring members that share a key, their name up to the first dot after the last
slash: `cat/0001.jpg`, `cat/0001.txt`, `cat/0001.cls`. The index is made once, from the headers and
the small members (captions and classes are needed before any picture), and kept in the cache.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from matryoshka_diffusion.data.blobs import Blob, Readable, opened
from matryoshka_diffusion.data.captions import (
    MAX_SIDECAR_BYTES,
    CaptionError,
    clean,
    lines,
    texts_of,
)
from matryoshka_diffusion.data.images import PICTURES, Kind
from matryoshka_diffusion.data.samples import Sample
from matryoshka_diffusion.data.tar import Member, members
from matryoshka_diffusion.files import cache_folder, digest, write_atomically

VERSION = 3
"""To be raised when the same shard would be indexed in another way than before."""

_TEXT, _RECORD, _CLASS = frozenset({".txt"}), frozenset({".json"}), frozenset({".cls"})
_NOTES = _TEXT | _RECORD | _CLASS
_MAX_RECORD_BYTES = 2**20
_MAX_CLASS_BYTES = 64
_MAX_ORIGINAL = 10**6  # pixels a side; what claims more is not believed


class Located(NamedTuple):
    """A sample, whose `offset` is where the bytes of its picture begin, and how many they are."""

    sample: Sample
    size: int


class _FlawError(ValueError):
    """The sample cannot be used; the message says why."""


def shard_index(blob: Blob, kind: Kind = PICTURES) -> list[Located]:
    """The samples of a shard with files of that kind in order, bad ones with flaws and offsets.

    Raises:
        OSError: the shard cannot be read, or the cache not written.
    """
    what = blob.path if kind is PICTURES else f"{kind.noun}s of {blob.path}"
    cache = cache_folder("shards") / f"{digest(what)}.json"
    state = {"version": VERSION, "size": blob.size, "stamp": blob.stamp}
    try:
        return _parsed(json.loads(cache.read_bytes()), state)
    except (OSError, ValueError, TypeError, KeyError):
        pass  # it is not there, of an older state or damaged: it is made again
    with opened(blob.path) as file:
        found = list(_samples(file, blob.size, kind))
    samples = [[*located.sample, located.size] for located in found]
    text = json.dumps({**state, "samples": samples})
    write_atomically(cache, lambda file: file.write(text.encode()), needed=len(text))
    return found


def _parsed(data: Any, state: Mapping[str, Any]) -> list[Located]:
    """Raises ValueError, TypeError or KeyError unless this is an index of that state."""
    if any(data[key] != value for key, value in state.items()):
        raise ValueError("the shard has changed")
    return [
        Located(Sample(key, tuple(captions), label, side, flaw, int(start)), int(size))
        for key, captions, label, side, flaw, start, size in data["samples"]
    ]


# --- from members to samples -----------------------------------------------------------------


def _samples(file: Readable, size: int, kind: Kind) -> Iterator[Located]:
    seen: set[str] = set()
    used = kind.suffixes | kind.others | _NOTES
    wanted = (x for x in members(file, size) if x.flaw or _is_used(x.name, used))
    for key, group in groupby(wanted, _key):
        parts = list(group)
        try:
            if key in seen:
                raise _FlawError("its key was used before: members of a sample lie side by side")
            yield _sample(file, key, parts, kind)
        except (_FlawError, CaptionError) as error:
            yield Located(Sample(key, flaw=str(error), offset=parts[0].start), 0)
        seen.add(key)


def _key(member: Member) -> str:
    """What its sample is called; a member that has lost its name is a sample of its own."""
    return _split(member.name)[0] or f"byte {member.start}"


def _split(name: str) -> tuple[str, str]:
    """Key and suffix: `a.b/c.seg.png` is `a.b/c` and `.seg.png`."""
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{suffix}".lower()


def _is_used(name: str, suffixes: frozenset[str]) -> bool:
    """Other columns are passed over, and so are hidden files."""
    return _split(name)[1] in suffixes and not name.rpartition("/")[2].startswith(".")


def _sample(file: Readable, key: str, parts: Sequence[Member], kind: Kind) -> Located:
    """Raises _FlawError or CaptionError."""
    for part in parts:
        if part.flaw:
            raise _FlawError(part.flaw)
    chosen = _only(parts, kind.suffixes - kind.previews, kind.noun)
    picture = chosen or _only(parts, kind.previews, kind.noun)
    if picture is None:
        raise _FlawError(f"it has no {kind.formats} {kind.noun}")
    if not 0 < picture.size <= kind.max_bytes:
        raise _FlawError(f"its {kind.noun} is {'too large' if picture.size else 'empty'}")
    record = _record(file, _only(parts, _RECORD, ".json"))
    text = _only(parts, _TEXT, ".txt")
    texts = texts_of(record) if text is None else lines(_small(file, text, MAX_SIDECAR_BYTES))
    sides = [_side(record.get(name)) for name in ("original_width", "original_height")]
    sample = Sample(
        key=key,
        captions=clean(texts) if texts or text is not None else (),
        label=_label(file, _only(parts, _CLASS, ".cls")),
        original_side=min(sides) or None,
        offset=picture.start,
    )
    return Located(sample, picture.size)


def _side(value: Any) -> int:
    """Pixels of a side that a record states, or 0 if that makes no sense."""
    return value if isinstance(value, int) and 0 < value <= _MAX_ORIGINAL else 0


def _only(parts: Sequence[Member], suffixes: frozenset[str], what: str) -> Member | None:
    found = [part for part in parts if _split(part.name)[1] in suffixes]
    if len(found) > 1:
        raise _FlawError(f"it has more than one {what}: its key may be there twice")
    return found[0] if found else None


def _small(file: Readable, member: Member, most: int) -> bytes:
    if member.size > most:
        raise _FlawError(f"{_split(member.name)[1]} is longer than {most:,} bytes")
    file.seek(member.start)
    return file.read(member.size)


def _record(file: Readable, member: Member | None) -> Mapping[str, Any]:
    if member is None:
        return {}
    try:
        record = json.loads(_small(file, member, _MAX_RECORD_BYTES))
    except _FlawError:
        raise
    except (ValueError, RecursionError) as error:
        raise _FlawError("its .json is damaged or not UTF-8") from error
    if not isinstance(record, dict):
        raise _FlawError("its .json is no object with names")
    return record


def _label(file: Readable, member: Member | None) -> int | None:
    if member is None:
        return None
    digits = _small(file, member, _MAX_CLASS_BYTES).strip()
    if not digits.isdigit():
        raise _FlawError("its .cls is no whole number")
    return int(digits)
