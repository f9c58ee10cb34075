"""Parquet files with a column of encoded pictures.

Captions and classes are read at once; pictures stay in the files. A picture can only be read with
its whole row group, so the last groups are kept: cheap in the order of the files, as when a set is
decoded once, but slow in random order unless the groups are small.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

from matryoshka_diffusion.config import Crop
from matryoshka_diffusion.data.batch import Source
from matryoshka_diffusion.data.blobs import expand, is_remote, opened, short_names, stat
from matryoshka_diffusion.data.columns import Columns, Row, find_columns, rows, to_samples
from matryoshka_diffusion.data.encoded import PictureDecoder, open_catalogue
from matryoshka_diffusion.data.images import PictureError
from matryoshka_diffusion.data.samples import Catalogue
from matryoshka_diffusion.files import require

_GROUPS_KEPT = 2


def parquet(pattern: str, side: int, max_bad_fraction: float, crop: Crop = "centre") -> Source:
    """The rows of all parquet files that `pattern` stands for (see `blobs.expand`), in their order.

    Raises:
        OSError: a file is not there.
        ValueError: a file is damaged or has no column of pictures, or too many rows are bad.
        MissingExtra: pyarrow is not installed.
    """
    paths = expand(pattern, ".parquet")
    files = [_File(path) for path in paths]
    found: list[Row] = []
    keys: list[str] = []
    places: list[_Place] = []
    for name, file in zip(short_names(paths), files, strict=True):
        found += file.rows()
        places += file.places()
        keys += [f"{name}:{row}" for row in range(len(found) - len(keys))]
    samples, classes = to_samples(keys, found, files[0].class_names())
    groups = _Groups()

    def load(n: int) -> bytes:
        return picture_bytes(groups.value(places[n]))

    catalogue = Catalogue(
        name=f"parquet {pattern}",
        state="\n".join(" ".join(map(str, stat(path))) for path in paths),
        samples=samples,
        load=load,
        classes=classes,
    )
    return open_catalogue(catalogue, PictureDecoder(side, crop), max_bad_fraction)


def picture_bytes(value: Any) -> bytes:
    """The encoded picture in a cell: bytes, or a struct with `bytes` as `datasets` writes it.

    Raises:
        PictureError: there is none.
    """
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise PictureError("there is no picture in its row")
    return data


class _Place(NamedTuple):
    """Where a picture is: its file, row group, and row in the group."""

    file: _File
    group: int
    row: int


class _File:
    """One parquet file: its footer is read once, its groups when they are wanted."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._parquet = require("pyarrow.parquet", "parquet", "reading parquet files")
        try:
            with opened(path) as file:
                self._metadata = self._parquet.read_metadata(file)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        self._schema = self._metadata.schema.to_arrow_schema()
        self.columns: Columns = find_columns(self._schema.names, path)
        self._refuse_other_types()

    def _refuse_other_types(self) -> None:
        kind = str(self._schema.field(self.columns.picture).type)
        if "binary" not in kind:  # binary, large_binary, struct<bytes: binary, path: string>
            raise ValueError(f"{self.path}: column {self.columns.picture} holds {kind}, not bytes")

    def rows(self) -> list[Row]:
        """Captions and classes."""
        wanted = [name for name in self.columns[1:] if name is not None]
        if not wanted:
            return [Row((), None)] * self._metadata.num_rows
        try:
            with opened(self.path) as file:
                table = self._parquet.ParquetFile(file, metadata=self._metadata).read(wanted)
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.path} is damaged: {error}") from error
        return list(rows(table, self.columns))

    def places(self) -> list[_Place]:
        """Of all pictures in order."""
        groups = range(self._metadata.num_row_groups)
        sizes = [self._metadata.row_group(group).num_rows for group in groups]
        return [_Place(self, group, row) for group in groups for row in range(sizes[group])]

    def pictures(self, group: int) -> Any:
        """The pictures of a row group, a pyarrow array.

        Raises:
            PictureError: the group is damaged.
            OSError: a file elsewhere cannot be reached.
        """
        try:
            with opened(self.path) as file:
                whole = self._parquet.ParquetFile(file, metadata=self._metadata)
                return whole.read_row_group(group, columns=[self.columns.picture]).column(0)
        except (ValueError, OSError) as error:
            if is_remote(self.path) and isinstance(error, OSError):
                raise  # the connection, not the data
            reason = " ".join(str(error).split())
            raise PictureError(f"row group {group} is damaged ({reason})") from error

    def class_names(self) -> Sequence[str]:
        """The names of the classes, if `datasets` wrote the file and knew them."""
        try:
            about = json.loads((self._schema.metadata or {})[b"huggingface"])
            names = about["info"]["features"][self.columns.label]["names"]
        except (KeyError, TypeError, ValueError):
            return ()
        return [str(name) for name in names]


class _Groups:
    """The row groups that were read last. Any thread may ask."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._lock = threading.Lock()

    def value(self, place: _Place) -> Any:
        """What is in the cell. Raises as `_File.pictures`."""
        key = (place.file.path, place.group)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = place.file.pictures(place.group)
            self._kept.move_to_end(key)
            while len(self._kept) > _GROUPS_KEPT:
                self._kept.popitem(last=False)
            return self._kept[key][place.row].as_py()
