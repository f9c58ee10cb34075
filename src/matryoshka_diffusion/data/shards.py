"""WebDataset shards: tar files of samples, read in place by byte ranges, here or through fsspec.

A sample is the neighbouring members that share a key, their name up to the first dot after the
last slash: `cat/0001.jpg`, `cat/0001.txt`, `cat/0001.cls`. An index of each shard is made once,
from the headers and the small members, and kept in the cache. Every image can then be read at any
time, so an epoch is a permutation of all samples, not of shards.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from functools import cache, partial
from itertools import groupby
from typing import Any, NamedTuple

from matryoshka_diffusion.config import DataConfig
from matryoshka_diffusion.data.bad import PictureError
from matryoshka_diffusion.data.decoded import THREADS, Catalogue
from matryoshka_diffusion.data.image import HEAD, PICTURES, Kind
from matryoshka_diffusion.data.loader import look_ahead
from matryoshka_diffusion.data.patterns import count_others, expand, of_split, short_names
from matryoshka_diffusion.data.remote import opened, read_range, state_of
from matryoshka_diffusion.data.source import Sample
from matryoshka_diffusion.data.spellings import (
    CAPTION,
    CAPTION_SUFFIXES,
    FILE,
    MAX_BYTES,
    MAX_TEXT_BYTES,
    Reader,
    Tally,
    captions_in,
    clean,
    decoded,
    find_columns,
    is_about_many,
    json_object,
    read_table,
    suffixes_of,
)
from matryoshka_diffusion.data.tar import Member, members, read_at
from matryoshka_diffusion.files import cache_folder, digest, sealed, unsealed, write_atomically

_VERSION = 10  # of the index; raise it when the same shard would be indexed in another way
_SIDES = ("original_width", "original_height")  # in .json
_MAX_ORIGINAL = 10**6  # pixels a side; larger claims are not believed


def shards(pattern: str, data: DataConfig, kind: Kind = PICTURES) -> Catalogue:
    """Samples of all shards that `pattern` stands for (`patterns.expand`), in their order.

    A file `NAME.tsv` has captions for shards that have none: its columns are tar, file and caption,
    or it lists such files under filename. It lies beside a shard here, or `pattern` names it.
    """
    from tqdm import tqdm

    tally = Tally(form="shards")
    lists = _read_lists(expand(pattern, ".tsv"), data) if pattern.endswith(".tsv") else {}
    paths = [*lists] or of_split(pattern, expand(pattern, ".tar"), data)
    for path in paths:
        if not path.endswith(".tar"):
            raise ValueError(f"{path}: decompress it, shards are plain .tar files")

    def index(path: str) -> tuple[str, _Index]:
        state = state_of(path)
        return state, _index(path, state, data, kind)

    results = look_ahead(index, paths, workers=THREADS, depth=4 * THREADS)
    bar = tqdm(results, "indexing shards", len(paths), unit=" shards", leave=False, disable=None)
    states, samples, used = [f"images {data.columns.image}"], [], {*paths}
    shard_of, starts, sizes = array("q"), array("q"), array("q")  # 24 bytes a sample
    for number, (path, name, (state, (rows, shard_tally))) in enumerate(
        zip(paths, short_names(paths), bar, strict=True)
    ):
        states.append(f"{path} {state}")
        tally.merge(shard_tally)
        beside = f"{path.removesuffix('.tar')}.tsv"
        if path in lists:
            rows = _captioned(rows, lists[path], tally)
        elif (
            data.captions != "none"
            and not any(x.captions for x, _ in rows)
            and os.path.isfile(beside)  # not on a server: it would take a request for each shard
        ):
            rows = _captioned(rows, _beside(path, beside, data), tally)
            used.add(beside)
            if not any(x.captions for x, _ in rows):
                raise ValueError(
                    f"{beside} names no sample of {path}: correct its columns tar and file, or "
                    "rename it (data.captions=none does not read it)"
                )
        samples += [sample._replace(key=f"{name}:{sample.key}") for sample, _ in rows]
        shard_of.extend(number for _ in rows)
        starts.extend(sample.offset or 0 for sample, _ in rows)
        sizes.extend(size for _, size in rows)

    def load(n: int) -> bytes:
        return read_range(paths[shard_of[n]], starts[n], sizes[n])

    def head(n: int) -> bytes:
        return read_range(paths[shard_of[n]], starts[n], min(sizes[n], HEAD))

    count_others(pattern, used, tally)
    unused = tally.unused("keys of .json")
    return Catalogue(
        f"shards {pattern}", "\n".join(states), samples, load, unused=unused, head=head
    )


# --- lists of captions -----------------------------------------------------------------------

_Captions = dict[str, list[str]]  # by key


def _read_lists(
    paths: Sequence[str], data: DataConfig, list_path: str = ""
) -> dict[str, _Captions]:
    """Captions by shard, from tables of tar, file and caption, or from lists of such tables.

    `list_path` is the list that names these tables: one that names lists could go on for ever.
    """
    lists: dict[str, _Captions] = {}
    for path in paths:
        placed = cache(partial(_placed, path))  # thousands of rows name the same shard
        with opened(path, int(state_of(path).split()[0])) as file:
            names, rows = read_table(path, decoded(file.read()))
        files, captions = find_columns(FILE, names, data), find_columns(CAPTION, names, data)
        if not files or ("tar" in names and not captions and data.captions != "none"):
            raise ValueError(
                f"{path} needs the columns tar, file and caption, or filename in a list of such "
                f"tables, and has {', '.join(names)}"
            )
        if list_path and "tar" not in names:
            raise ValueError(f"{list_path} names {path}, which is a list, too: name its tables")
        tables: dict[str, None] = {}
        for line, row, flaw in rows:
            if flaw:
                raise ValueError(f"{path}, line {line}: {flaw}")
            place = placed(row.get("tar", row[files[0]]))
            if "tar" not in names:
                tables[place] = None
                continue
            key = _split(row[files[0]].removeprefix("./"))[0]
            lists.setdefault(place, {}).setdefault(key, []).extend(row[name] for name in captions)
        for shard, texts in _read_lists([*tables], data, path).items():
            lists.setdefault(shard, {}).update(texts)
    return lists


def _placed(table: str, name: str) -> str:
    """Path of a file that a table names; a name that leads nowhere is that of a file beside it."""
    folder, base = os.path.dirname(table), re.split(r"[/\\]", name)[-1]
    if "://" in name:
        return name
    if "://" in folder:
        return f"{folder}/{base if os.path.isabs(name) else name.removeprefix('./')}"
    path, beside = (os.path.normpath(os.path.join(folder, one)) for one in (name, base))
    return beside if os.path.isfile(beside) and not os.path.exists(path) else path


def _beside(path: str, table: str, data: DataConfig) -> _Captions:
    """Captions of a shard in the table beside it; of another path, its last part has to agree."""
    lists = _read_lists([table], data)
    named = {os.path.basename(place): captions for place, captions in lists.items()}
    return lists.get(path) or named.get(os.path.basename(path), {})


def _captioned(
    rows: Sequence[tuple[Sample, int]], captions: _Captions, tally: Tally
) -> list[tuple[Sample, int]]:
    """Samples with the captions of a table; those that it does not name are left out."""
    samples, absent = [], dict(captions)
    for sample, size in rows:
        texts = absent.pop(sample.key, None)
        if texts is None and not sample.flaw:
            tally.add("samples that the .tsv does not name", sample.key)
            continue
        try:
            sample = sample._replace(captions=clean(texts) if texts else ())
        except PictureError as error:
            sample = sample._replace(flaw=sample.flaw or str(error))
        samples.append((sample, size))
    flaw = "its .tsv names it, and the shard has no such sample"
    return [*samples, *((Sample(key, flaw=flaw), 0) for key in absent)]


# --- the index -------------------------------------------------------------------------------


class _Index(NamedTuple):
    """Samples of a shard in order, with the sizes of their files, and what has no use."""

    samples: list[tuple[Sample, int]]  # a flawed sample's `offset` is where the flaw is
    tally: Tally


def _index(path: str, state: str, data: DataConfig, kind: Kind) -> _Index:
    settings = data.model_dump_json(include={"columns", "captions", "caption_suffixes"})
    cache = cache_folder("shards") / f"{digest(f'{kind.noun}s of {path}, {settings}')}.json"
    try:
        version, cached_state, rows, files, names = json.loads(unsealed(cache.read_bytes()))
        if (version, cached_state) == (_VERSION, state):
            samples = [
                (Sample(key, tuple(captions), label, side, flaw, int(offset), *others), int(size))
                for (key, captions, label, side, flaw, offset, *others), size in rows
            ]
            return _Index(samples, Tally(dict(files), dict(names)))
    except (OSError, ValueError, TypeError, IndexError):
        pass  # there is no index yet, or it is damaged
    size = int(state.split()[0])
    with opened(path, size) as file:
        reader = _ShardReader(file, data, kind)
        samples = list(reader.samples(size))
    tally = reader.tally
    content = sealed(json.dumps([_VERSION, state, samples, tally.files, tally.names]))
    write_atomically(cache, lambda file: file.write(content), needed=len(content))
    return _Index(samples, tally)


class _ShardReader:
    """Reader of the samples of one open shard; `tally` has what it holds besides."""

    def __init__(self, file: Any, data: DataConfig, kind: Kind) -> None:
        self.tally = Tally(form="shards")
        self._file, self._data, self._kind = file, data, kind
        self._records = Reader(data, self.tally)
        self._images, self._previews = kind.suffixes - kind.previews, kind.previews
        if data.columns.image is not None:  # the suffix of a sample's image
            image = f".{data.columns.image.removeprefix('.').lower()}"
            self._images, self._previews = frozenset({image}), frozenset()
        self._texts = [one.lower() for one in suffixes_of(data) if one != ".json"]
        self._used = self._images | self._previews | kind.others | {*self._texts, ".json", ".cls"}

    def samples(self, size: int) -> Iterator[tuple[Sample, int]]:
        """Samples in order; bad ones have a flaw."""
        keys: set[str] = set()
        for key, group in groupby(filter(self._is_used, members(self._file, size)), _key):
            parts = list(group)
            if all(map(self._is_about_many, parts)):
                for part in parts:
                    self.tally.add_file(part.name, "members")
                continue
            try:
                if key in keys:
                    raise PictureError("its key was used before: its members lie side by side")
                yield self._sample(key, parts)
            except PictureError as error:
                yield Sample(key, flaw=str(error), offset=parts[0].start), 0
            keys.add(key)

    def _is_used(self, member: Member) -> bool:
        """Test if a member belongs to a sample; count it if it does not."""
        suffix = _split(member.name)[1]
        if member.flaw or suffix in self._used:
            return bool(member.flaw) or not _is_hidden(member)
        last = f".{suffix.rpartition('.')[2]}" if suffix else ""
        kind = f"{last} members" if last else "members without a suffix"
        options = dict.fromkeys(CAPTION_SUFFIXES, "caption_suffixes")
        options |= dict.fromkeys(self._images | self._previews, "columns.image")
        if _is_hidden(member):
            return False
        if suffix == last or last not in options:
            self.tally.add_file(member.name, "members")
            return False
        role = CAPTION.option if last in CAPTION_SUFFIXES else ""
        remedy = "a key ends at the first dot of a name: rename them, or name what follows"
        remedy = f"{remedy} (--set data.{options[last]}=...)"
        self.tally.add(f"{kind} with further dots", member.name, role, remedy, is_each=True)
        return False

    def _is_about_many(self, member: Member) -> bool:
        """Test if a member is one such as `captions.json`, and no part of a sample."""
        return not member.flaw and is_about_many(member.name)

    def _sample(self, key: str, parts: Sequence[Member]) -> tuple[Sample, int]:
        """Sample from its members, and the size of its file. Raises PictureError."""
        kind = self._kind
        for part in parts:
            if part.flaw:
                raise PictureError(part.flaw)
        picture = _only(parts, self._images, kind.noun) or _only(parts, self._previews, kind.noun)
        if picture is None:
            raise PictureError(f"it has no {kind.formats} {kind.noun}")
        if not 0 < picture.size <= kind.max_bytes:
            raise PictureError(f"its {kind.noun} is {'too large' if picture.size else 'empty'}")
        data = self._small(parts, ".json")
        record = {} if data is None else json_object(data)
        words = self._records.read(record, _SIDES)
        files = (text for suffix in self._texts if (text := self._small(parts, suffix)) is not None)
        text = next(files, None)
        has_number = self._data.columns.label in (None, "cls")
        label = self._small(parts, ".cls") if has_number else None
        if label is not None and not label.strip().isdigit():
            raise PictureError("its .cls is no whole number")
        sides: list[Any] = [record.get(name) for name in _SIDES]
        known = all(isinstance(side, int) and 0 < side <= _MAX_ORIGINAL for side in sides)
        texts = words.captions if ".json" in suffixes_of(self._data) else ()
        texts = texts if text is None else captions_in(text, self._data)
        sample = Sample(
            key=key,
            captions=clean(texts) if texts or text is not None else (),
            label=words.label if label is None else int(label),
            original_side=min(sides) if known else None,
            offset=picture.start,
        )
        return sample, picture.size

    def _small(self, parts: Sequence[Member], suffix: str) -> bytes | None:
        member = _only(parts, frozenset({suffix}), suffix)
        most = MAX_BYTES.get(suffix, MAX_TEXT_BYTES)
        if member is not None and member.size > most:
            raise PictureError(f"{suffix} is longer than {most:,} bytes")
        return None if member is None else read_at(self._file, member.start, member.size)


def _only(parts: Sequence[Member], suffixes: frozenset[str], noun: str) -> Member | None:
    same = [part for part in parts if _split(part.name)[1] in suffixes]
    if len(same) > 1:
        raise PictureError(f"it has more than one {noun}: its key may be there twice")
    return same[0] if same else None


def _key(member: Member) -> str:
    """Key of a member's sample; a member that has lost its name is a sample of its own."""
    return _split(member.name)[0] or f"byte {member.start}"


def _split(name: str) -> tuple[str, str]:
    """Key and suffix: `a.b/c.seg.png` is `a.b/c` and `.seg.png`."""
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{suffix}".lower()


def _is_hidden(member: Member) -> bool:
    return member.name.rpartition("/")[2].startswith(".")
