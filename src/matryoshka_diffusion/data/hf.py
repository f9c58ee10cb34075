"""Hugging Face `datasets`: saved in a folder, or by their name on the hub.

Their tables are memory-mapped, so any picture can be read at any time.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from matryoshka_diffusion.config import Crop
from matryoshka_diffusion.data.batch import Source
from matryoshka_diffusion.data.columns import Row, find_columns, rows, to_samples
from matryoshka_diffusion.data.encoded import PictureDecoder, open_catalogue
from matryoshka_diffusion.data.images import PictureError
from matryoshka_diffusion.data.parquet import picture_bytes
from matryoshka_diffusion.data.samples import Catalogue
from matryoshka_diffusion.files import require

DEFAULT_SPLIT = "train"


def hugging_face(name: str, side: int, max_bad_fraction: float, crop: Crop = "centre") -> Source:
    """The data set `NAME`, `/saved/folder` or either with `@SPLIT`, which is "train" if unsaid.

    Raises:
        OSError: there is no such data set.
        ValueError: no such split or no column of pictures, or too many rows are bad.
        MissingExtra: `datasets` is not installed.
    """
    datasets = require("datasets", "datasets", "reading Hugging Face data sets")
    table = _opened(datasets, name)
    columns = find_columns(table.column_names, name)
    feature = table.features[columns.picture]
    if isinstance(feature, datasets.Image):  # the bytes as they are: decoding is ours, with bounds
        table = table.cast_column(columns.picture, datasets.Image(decode=False))
    words = [column for column in columns[1:] if column is not None]
    about = table.select_columns(words).with_format("arrow")[:] if words else None
    names = getattr(table.features.get(columns.label), "names", None) or ()
    keys = [f"{name}:{row}" for row in range(table.num_rows)]
    found = rows(about, columns) if about is not None else [Row((), None)] * table.num_rows
    samples, classes = to_samples(keys, found, names)
    pictures = table.select_columns([columns.picture])

    def load(n: int) -> bytes | Path:
        value = pictures[n][columns.picture]
        if isinstance(value, dict) and value.get("bytes") is None and value.get("path"):
            if not (path := Path(value["path"])).exists():
                raise PictureError(f"its picture is a file that does not exist, {path}")
            return path
        return picture_bytes(value)

    catalogue = Catalogue(f"datasets {name}", str(table._fingerprint), samples, load, classes)
    return open_catalogue(catalogue, PictureDecoder(side, crop), max_bad_fraction)


def _opened(datasets: Any, name: str) -> Any:
    place, split = split_of(name)
    if not os.path.isdir(place):
        return datasets.load_dataset(place, split=split or DEFAULT_SPLIT)
    found = datasets.load_from_disk(place)
    if not isinstance(found, datasets.DatasetDict):
        return found
    if (split or DEFAULT_SPLIT) not in found:
        raise ValueError(f"{name}: its splits are {', '.join(found)}: add @ and one of them")
    return found[split or DEFAULT_SPLIT]


def split_of(name: str) -> tuple[str, str]:
    """Place and split of `PLACE@SPLIT`; the split is empty if none is named."""
    place, at, split = name.rpartition("@")
    return (name, "") if not at or "/" in split or os.path.isdir(name) else (place, split)
