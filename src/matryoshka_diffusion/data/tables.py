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
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from matryoshka_diffusion.data import decoded
from matryoshka_diffusion.data.bad import PictureError
from matryoshka_diffusion.data.decoded import Catalogue
from matryoshka_diffusion.data.folder import clean
from matryoshka_diffusion.data.remote import opened, state_of
from matryoshka_diffusion.data.shards import expand, short_names
from matryoshka_diffusion.data.source import HUGGING_FACE, Sample
from matryoshka_diffusion.files import UnreadableError, require

PICTURE = ("image", "picture", "photo", "img", "jpg", "jpeg", "png", "webp")
CAPTION = ("caption", "text")
LABEL = ("label", "cls")
DEFAULT_SPLIT = "train"

_GROUPS_KEPT = 2
_LARGE_GROUP = 200  # pictures, on average
_SMALL, _MAX_RATIO = 2**28, 32  # bytes that any file may unpack to, and how often its own size


class _Columns(NamedTuple):
    """Names of the columns that are read; None where the table has no such column."""

    picture: str
    caption: str | None
    label: str | None

    @property
    def words(self) -> list[str]:
        return [name for name in self[1:] if name is not None]


def _columns(names: Sequence[str], where: str) -> _Columns:
    """Columns of a table by their names. Raises ValueError without a column of images."""
    picture, caption, label = (
        next((name for name in wanted if name in names), None)
        for wanted in (PICTURE, CAPTION, LABEL)
    )
    if picture is None:
        raise ValueError(
            f"{where}: no column with pictures among {', '.join(names)}: "
            f"call it {' or '.join(PICTURE[:2])}"
        )
    return _Columns(picture, caption, label)


class _Row(NamedTuple):
    """A row without its image. A class is a number or a name."""

    captions: tuple[str, ...] = ()
    label: int | str | None = None
    flaw: str = ""


def _rows(table: Any, columns: _Columns) -> list[_Row]:
    """Rows of a pyarrow table; a value that makes no sense is a flaw of its row."""
    rows, nothing = [], [None] * table.num_rows
    cells = (nothing if name is None else table.column(name) for name in columns[1:])
    for pair in zip(*cells, strict=True):
        try:
            text, label = (None if cell is None else cell.as_py() for cell in pair)
            texts: list[Any] = text if isinstance(text, list) else [text]
            if text is not None and not all(isinstance(one, str) for one in texts):
                raise PictureError("its caption is no text")
            captions = () if text is None else clean(texts)
            label = int(label) if isinstance(label, int) else label  # yes and no are 1 and 0
            row = _Row(captions, label if isinstance(label, int | str) else None)
        except UnicodeDecodeError:
            row = _Row(flaw="its caption or class is not UTF-8")
        except PictureError as error:
            row = _Row(flaw=str(error))
        rows.append(row)
    return rows


def _catalogue(
    name: str,
    state: str,
    keys: Iterable[str],
    rows: Sequence[_Row],
    names: Sequence[str],
    load: Callable[[int], bytes | Path],
) -> Catalogue:
    """Catalogue of rows, with `names` of classes from the table or, sorted, from its words."""
    words = tuple(sorted({row.label for row in rows if isinstance(row.label, str)}))
    if words and any(isinstance(row.label, int) for row in rows):
        raise ValueError("classes are numbers in some of the rows and words in others")
    numbers: dict[Any, Any] = {word: number for number, word in enumerate(words)}
    samples = [
        Sample(key, row.captions, numbers.get(row.label, row.label), flaw=row.flaw)
        for key, row in zip(keys, rows, strict=True)
    ]
    return Catalogue(name, state, samples, load, words or tuple(names))


def _bytes(value: Any) -> bytes:
    """Encoded image in a cell: bytes, or a struct with `bytes` as `datasets` writes it."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise PictureError("there is no picture in its row")
    return data


# --- parquet ---------------------------------------------------------------------------------


def parquet(pattern: str) -> Catalogue:
    """Rows of all parquet files that `pattern` stands for (see `shards.expand`), in their order."""
    paths = expand(pattern, ".parquet")
    files = [_File(path) for path in paths]
    rows, keys, places = [], [], []
    for name, file in zip(short_names(paths), files, strict=True):
        rows += file.rows()
        keys += [f"{name}:{row}" for row in range(len(rows) - len(keys))]
        for group in range(file.metadata.num_row_groups):
            places += [(file, group, n) for n in range(file.metadata.row_group(group).num_rows)]
    lock = threading.Lock()
    kept = lru_cache(_GROUPS_KEPT)(lambda file, group: file.pictures(group))

    def load(n: int) -> bytes:
        file, group, row = places[n]
        with lock:  # or every thread would read the same group
            pictures = kept(file, group)
        if isinstance(pictures, PictureError):
            raise PictureError(*pictures.args)
        return _bytes(pictures[row].as_py())

    groups = sum(file.metadata.num_row_groups for file in files)
    if len(places) > max(decoded.CACHED_PICTURES, _LARGE_GROUP * groups):
        warnings.warn(
            f"parquet {pattern}: its row groups have {len(places) // groups:,} pictures, and a run "
            "reads a group for nearly every picture, since its order is random: write groups of a "
            "few dozen rows (row_group_size=64), or use shards",
            stacklevel=4,
        )
    state = "\n".join(f"{file.path} {file.state}" for file in files)
    return _catalogue(f"parquet {pattern}", state, keys, rows, files[0].class_names(), load)


class _File:
    """One parquet file: its footer is read once, its groups when they are wanted."""

    def __init__(self, path: str) -> None:
        self.path, self.state = path, state_of(path)
        self._size = int(self.state.split()[0])
        self.metadata: Any = None
        self._parquet = require("pyarrow.parquet", "parquet", "reading parquet files")
        self.metadata = self._whole(lambda file: file.metadata)
        self._schema = self.metadata.schema.to_arrow_schema()
        self._columns = _columns(self._schema.names, path)
        kind = str(self._schema.field(self._columns.picture).type)
        if "binary" not in kind:  # binary, large_binary, struct<bytes: binary, path: string>
            raise ValueError(f"{path}: column {self._columns.picture} holds {kind}, not bytes")

    def rows(self) -> list[_Row]:
        """Captions and classes."""
        words = self._columns.words
        if not words:
            return [_Row()] * self.metadata.num_rows
        groups = range(self.metadata.num_row_groups)
        return self._whole(lambda file: _rows(self._table(file, words, groups), self._columns))

    def pictures(self, group: int) -> Any:
        """Images of a row group, a pyarrow array; a PictureError if the group is damaged."""
        columns = [self._columns.picture]
        try:
            return self._read(lambda file: self._table(file, columns, [group]).column(0))
        except ValueError as error:
            reason = " ".join(str(error).split())
            return PictureError(f"row group {group} is damaged ({reason})")

    def _table(self, file: Any, columns: Sequence[str], groups: Sequence[int]) -> Any:
        """Columns of some row groups. Raises ValueError once they take more than the limit.

        A value that many rows repeat is stored once and is unpacked for each of them. No value is
        larger than all that is stored, so as many rows are unpacked at a time as that allows.
        """
        stored = 1
        for group in map(self.metadata.row_group, groups):
            for column in map(group.column, range(group.num_columns)):
                if column.path_in_schema.split(".")[0] in columns:
                    stored += column.total_uncompressed_size + 8 * column.num_values
        limit, size, batches = max(_SMALL, _MAX_RATIO * self._size), stored, []
        for batch in file.iter_batches(max(1, limit // (8 * stored)), groups, columns):
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

    def class_names(self) -> Sequence[str]:
        """Names of the classes, if `datasets` wrote the file and knew them."""
        try:
            about = json.loads((self._schema.metadata or {})[b"huggingface"])
            names = about["info"]["features"][self._columns.label]["names"]
        except (KeyError, TypeError, ValueError):
            return ()
        return [str(name) for name in names]


# --- Hugging Face ----------------------------------------------------------------------------


def hugging_face(address: str) -> Catalogue:
    """Data set `hf:NAME`, `hf:/saved/folder` or either with `@SPLIT` (default "train")."""
    name = address.removeprefix(HUGGING_FACE)
    datasets = require("datasets", "datasets", "reading Hugging Face data sets")
    table = _opened(datasets, name)
    columns = _columns(table.column_names, name)
    if isinstance(table.features[columns.picture], datasets.Image):  # our own decoder has bounds
        table = table.cast_column(columns.picture, datasets.Image(decode=False))
    rows = [_Row()] * table.num_rows
    if columns.words:
        rows = _rows(table.select_columns(columns.words).with_format("arrow")[:], columns)
    names = getattr(table.features.get(columns.label), "names", None) or ()
    keys = [f"{name}:{row}" for row in range(table.num_rows)]
    pictures = table.select_columns([columns.picture])

    def load(n: int) -> bytes | Path:
        value = pictures[n][columns.picture]
        if isinstance(value, dict) and value.get("bytes") is None and value.get("path"):
            if not (path := Path(value["path"])).exists():
                raise PictureError(f"its picture is a file that does not exist, {path}")
            return path
        return _bytes(value)

    return _catalogue(f"datasets {name}", str(table._fingerprint), keys, rows, names, load)


def _opened(datasets: Any, name: str) -> Any:
    place, split = split_of(name)
    split = split or DEFAULT_SPLIT
    if not os.path.isdir(place):
        return datasets.load_dataset(place, split=split)
    saved = datasets.load_from_disk(place)
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if split not in saved:
        raise ValueError(f"{name}: its splits are {', '.join(saved)}: add @ and one of them")
    return saved[split]


def split_of(name: str) -> tuple[str, str]:
    """Place and split of `PLACE@SPLIT`; the split is empty if none is named."""
    place, at, split = name.rpartition("@")
    return (name, "") if not at or "/" in split or os.path.isdir(name) else (place, split)
