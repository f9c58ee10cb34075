"""Tables with a column of encoded images: parquet files, and Hugging Face `datasets`.

Captions and classes are read at once. Images stay where they are: `datasets` maps its tables into
memory; a parquet file gives an image only with its whole row group. The last groups are kept, which
is cheap in the order of the files, but slow in random order unless the groups are small.
"""

from __future__ import annotations

import json
import os
import threading
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from matryoshka_diffusion.config import ConfigError, DataConfig
from matryoshka_diffusion.data import decoded
from matryoshka_diffusion.data.bad import PictureError
from matryoshka_diffusion.data.decoded import Catalogue
from matryoshka_diffusion.data.patterns import count_others, expand, of_split, short_names
from matryoshka_diffusion.data.remote import opened, state_of
from matryoshka_diffusion.data.source import HUGGING_FACE, Sample
from matryoshka_diffusion.data.spellings import (
    CAPTION,
    LABEL,
    PICTURE,
    LabelError,
    Tally,
    clean,
    find_columns,
    label_of,
    texts,
)
from matryoshka_diffusion.files import FOREIGN_ERRORS, UnreadableError, require

DEFAULT_SPLIT = "train"

_GROUPS_KEPT = 2
_LARGE_GROUP = 200  # pictures, on average
_SMALL, _MAX_RATIO = 2**28, 32  # bytes that any file may unpack to, and how often its own size
_SAVED = ("state.json", "dataset_dict.json")  # in a folder that `save_to_disk` wrote


class _Columns(NamedTuple):
    """Names of the columns that are read."""

    picture: str
    captions: tuple[str, ...]  # alternatives
    labels: tuple[str, ...]  # one or none

    @property
    def words(self) -> list[str]:
        """Columns of captions and classes."""
        return [*self.captions, *self.labels]


def _columns(types: Mapping[str, object], data: DataConfig, where: str, tally: Tally) -> _Columns:
    """Columns of a table by their names; the other ones are tallied with their types.

    Raises ConfigError without a column of images, or without one that `data.columns` names.
    """
    for option, name in data.columns.model_dump().items():
        if name and name not in types:
            raise ConfigError(
                f"data.columns.{option} is {name}, and {where} has {', '.join(types)}"
            )
    pictures = find_columns(PICTURE, types, data)
    if not pictures:
        raise ConfigError(
            f"{where}: no column with pictures among {', '.join(types)}: "
            f"call it {' or '.join(PICTURE.usual[:2])}, or --set data.columns.image=NAME"
        )
    columns = _Columns(
        pictures[0], find_columns(CAPTION, types, data), find_columns(LABEL, types, data)
    )
    used = {columns.picture, *columns.words}
    tally.names |= {name: str(kind) for name, kind in types.items() if name not in used}
    return columns


def _rows(table: Any, columns: _Columns, tally: Tally, file: str) -> list[Sample]:
    """Samples FILE:ROW in a pyarrow table; a caption that makes no sense is a flaw of its row.

    A column of classes that holds something else, or a column without a value, is tallied.
    """
    rows, count, other = [], len(columns.captions), None
    for row, cells in enumerate(zip(*map(table.column, columns.words), strict=True)):
        key, label = f"{file}:{row}", None
        try:
            values = [cell.as_py() for cell in cells]
            captions = [text for value in values[:count] for text in texts(value)]
            label = label_of(values[count]) if columns.labels else None
            rows.append(Sample(key, clean(captions) if captions else (), label))
        except UnicodeDecodeError:
            rows.append(Sample(key, flaw="its caption or class is not UTF-8"))
        except PictureError as error:
            rows.append(Sample(key, flaw=str(error)))
        except LabelError as error:
            other = str(error)
            rows.append(Sample(key, clean(captions) if captions else ()))
    if other is not None:
        (name,) = columns.labels
        remedy = "classes are whole numbers or words: --set data.columns.label=NAME reads others"
        example = f"{other} ({table.column(name).type})"
        tally.add(f"values of the column {name}", example, LABEL.option, remedy, count=len(rows))
        rows = [row._replace(label=None) for row in rows]
    for name in columns.words:
        if table.column(name).null_count == table.num_rows:
            role = CAPTION if name in columns.captions else LABEL
            tally.add(f"values of the column {name}", "null", role.option, count=len(rows))
    return rows


def _bytes(value: Any) -> bytes:
    """Encoded image in a cell: bytes, or a struct with `bytes` as `datasets` writes it."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise PictureError("there is no picture in its row")
    return data


# --- parquet ---------------------------------------------------------------------------------


def parquet(pattern: str, data: DataConfig) -> Catalogue:
    """Rows of the parquet files that `pattern` stands for (`patterns.expand`), in their order."""
    tally = Tally(form="table")
    paths = of_split(pattern, expand(pattern, ".parquet"), data)
    files = [_File(path, data, tally) for path in paths]
    samples = []
    for name, file in zip(short_names(paths), files, strict=True):
        samples += file.rows(name)
    groups = [(file, group) for file in files for group in range(file.metadata.num_row_groups)]
    starts = [0, *accumulate(file.metadata.row_group(group).num_rows for file, group in groups)]
    lock = threading.Lock()
    kept = lru_cache(_GROUPS_KEPT)(lambda file, group: file.pictures(group))

    def load(n: int) -> bytes:
        place = bisect_right(starts, n) - 1
        with lock:  # or every thread would read the same group
            pictures = kept(*groups[place])
        if isinstance(pictures, PictureError):
            raise PictureError(*pictures.args)
        return _bytes(pictures[n - starts[place]].as_py())

    if len(samples) > max(decoded.CACHED_PICTURES, _LARGE_GROUP * len(groups)):
        average = len(samples) // len(groups)
        warnings.warn(
            f"parquet {pattern}: its row groups have {average:,} pictures, and a run reads a group "
            "for nearly every picture, since its order is random: write groups of a few dozen rows "
            "(row_group_size=64), or use shards",
            stacklevel=4,
        )
    count_others(pattern, paths, tally)
    state = "\n".join(f"{file.path} {file.state} {file.columns.picture}" for file in files)
    names = files[0].class_names()
    return Catalogue(f"parquet {pattern}", state, samples, load, names, tally.unused())


class _File:
    """One parquet file: its footer is read once, its groups when they are wanted."""

    def __init__(self, path: str, data: DataConfig, tally: Tally) -> None:
        self.path, self.state = path, state_of(path)
        self._size = int(self.state.split()[0])
        self.metadata: Any = None
        self._parquet = require("pyarrow.parquet", "parquet", "reading parquet files")
        self.metadata = self._whole(lambda file: file.metadata)
        self._schema = self.metadata.schema.to_arrow_schema()
        types = {field.name: field.type for field in self._schema}
        self.columns, self._tally = _columns(types, data, path, tally), tally
        kind = str(types[self.columns.picture])
        # binary, large_binary, struct<bytes: binary, path: string>
        if "binary" not in kind or "list" in kind:
            raise ValueError(f"{path}: column {self.columns.picture} holds {kind}, not bytes")

    def rows(self, name: str) -> list[Sample]:
        """Samples NAME:ROW with captions and classes."""
        if not (words := self.columns.words):
            return [Sample(f"{name}:{row}") for row in range(self.metadata.num_rows)]
        groups = range(self.metadata.num_row_groups)
        return self._whole(
            lambda file: _rows(self._table(file, words, groups), self.columns, self._tally, name)
        )

    def pictures(self, group: int) -> Any:
        """Images of a row group, a pyarrow array; a PictureError if the group is damaged."""
        columns = [self.columns.picture]
        try:
            return self._read(lambda file: self._table(file, columns, [group]).column(0))
        except ValueError as error:
            reason = " ".join(str(error).split())
            return PictureError(f"row group {group} is damaged ({reason})")

    def _table(self, file: Any, columns: Sequence[str], groups: Sequence[int]) -> Any:
        """Columns of some row groups. Raises ValueError once they take more than the limit.

        A value that many rows repeat is stored once and is unpacked for each of them. No value is
        larger than the part of its column in a group, so as many rows are unpacked at a time as
        that allows.
        """
        stored, largest = 1, Counter[str]()
        for group in map(self.metadata.row_group, groups):
            for part in map(group.column, range(group.num_columns)):
                if (path := part.path_in_schema).split(".")[0] in columns:
                    size = part.total_uncompressed_size + 8 * part.num_values
                    stored, largest[path] = stored + size, max(largest[path], size)
        limit, size, batches = max(_SMALL, _MAX_RATIO * self._size), stored, []
        rows = max(1, limit // (8 * (1 + largest.total())))
        for batch in file.iter_batches(rows, groups, columns):
            size += batch.nbytes
            if size > limit:
                raise ValueError(f"{', '.join(columns)}: more than {limit:,} bytes when unpacked")
            batches.append(batch)
        table = require("pyarrow", "parquet", "reading parquet files").Table
        return table.from_batches(batches) if batches else file.read_row_groups([], columns)

    def _whole(self, read: Callable[[Any], Any]) -> Any:
        try:
            return self._read(read)
        except ValueError as error:
            raise ValueError(f"{self.path} is damaged: {error}") from error

    def _read(self, read: Callable[[Any], Any]) -> Any:
        """Result of `read`; damage is a ValueError, for which pyarrow has OSErrors, too."""
        with opened(self.path, self._size) as file:
            try:
                return read(self._parquet.ParquetFile(file, metadata=self.metadata))
            except Exception as error:
                if isinstance(error, OSError) and (
                    error.errno or isinstance(error, UnreadableError)
                ):
                    raise  # the disk or the connection, not the data
                raise ValueError(str(error) or type(error).__name__) from error

    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, if `datasets` wrote the file and knew them."""
        try:
            about = json.loads((self._schema.metadata or {})[b"huggingface"])
            names = about["info"]["features"][self.columns.labels[0]]["names"]
        except (LookupError, TypeError, ValueError, RecursionError):
            return ()
        return tuple(map(str, names))


# --- Hugging Face ----------------------------------------------------------------------------


def hugging_face(address: str, data: DataConfig) -> Catalogue:
    """Data set `hf:NAME`, `hf:/saved/folder` or either with `@SPLIT` (default "train")."""
    name, tally = address.removeprefix(HUGGING_FACE), Tally(form="table")
    datasets = require("datasets", "datasets", "reading Hugging Face data sets")
    table = _opened(datasets, name, data)
    types = {field.name: field.type for field in table.features.arrow_schema}
    columns = _columns(types, data, name, tally)
    if isinstance(table.features[columns.picture], datasets.Image):  # our own decoder has bounds
        table = table.cast_column(columns.picture, datasets.Image(decode=False))
    short = os.path.basename(name) if os.path.isabs(name) else name  # a folder may move
    if words := columns.words:
        arrow = table.select_columns(words).with_format("arrow")[:]
        samples = _rows(arrow, columns, tally, short)
    else:
        samples = [Sample(f"{short}:{row}") for row in range(table.num_rows)]
    names = [getattr(table.features[label], "names", None) or () for label in columns.labels]
    pictures = table.select_columns([columns.picture])

    def load(n: int) -> bytes | Path:
        value = pictures[n][columns.picture]
        if isinstance(value, dict) and value.get("bytes") is None and value.get("path"):
            if not (path := Path(value["path"])).exists():
                raise PictureError(f"its picture is a file that does not exist, {path}")
            return path
        return _bytes(value)

    state = f"{table._fingerprint} {columns.picture}"
    classes = tuple(name for some in names for name in some)
    return Catalogue(f"datasets {name}", state, samples, load, classes, tally.unused())


def _opened(datasets: Any, name: str, data: DataConfig) -> Any:
    place, split = split_of(name)
    if split and data.split not in (None, split):
        raise ConfigError(
            f"data.split is {data.split}, but --data names @{split}: omit one of them"
        )
    split = split or data.split
    is_saved = any((Path(place) / file).exists() for file in _SAVED)
    if not is_saved:  # on the hub, or a clone of what is there
        return datasets.load_dataset(place, split=split or DEFAULT_SPLIT)
    try:
        saved = datasets.load_from_disk(place)
    except FOREIGN_ERRORS as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{place} is damaged, or no data set that datasets saved ({reason})"
        ) from error
    if not isinstance(saved, datasets.DatasetDict):
        if split not in (None, there := saved.split and str(saved.split)):
            raise ConfigError(
                f"{place} holds one data set, {f'the split {there}' if there else 'of no split'}, "
                f"and not {split}: omit @{split} (or data.split)"
            )
        return saved
    if (split := split or DEFAULT_SPLIT) not in saved:
        raise ConfigError(f"{place} has the splits {', '.join(saved)}: add @ and one of them")
    return saved[split]


def split_of(name: str) -> tuple[str, str]:
    """Place and split of `PLACE@SPLIT`; the split is empty if none is named."""
    place, at, split = name.rpartition("@")
    return (name, "") if not at or "/" in split or os.path.isdir(name) else (place, split)
