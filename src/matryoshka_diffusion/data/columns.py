"""Samples from tables: which columns are meant, and what their values say.

Tables are pyarrow's; they come from parquet files and from Hugging Face `datasets`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from matryoshka_diffusion.data.captions import CaptionError, clean
from matryoshka_diffusion.data.samples import Sample

PICTURE = ("image", "picture", "photo", "img", "jpg", "jpeg", "png", "webp")
CAPTION = ("caption", "text")
LABEL = ("label", "cls")


class Columns(NamedTuple):
    """The names of the columns that are read; None where the table has no such column."""

    picture: str
    caption: str | None
    label: str | None


class Row(NamedTuple):
    """A row without its picture. A class is a number or a name."""

    captions: tuple[str, ...]
    label: int | str | None
    flaw: str = ""


def find_columns(names: Sequence[str], where: str) -> Columns:
    """The columns of a table by their names.

    Raises:
        ValueError: no column is called as one with pictures would be.
    """
    picture = _first(names, PICTURE)
    if picture is None:
        raise ValueError(
            f"{where}: no column with pictures among {', '.join(names)}: "
            f"call it {' or '.join(PICTURE[:2])}"
        )
    return Columns(picture, _first(names, CAPTION), _first(names, LABEL))


def _first(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    return next((name for name in wanted if name in names), None)


def rows(table: Any, columns: Columns) -> Iterator[Row]:
    """What the rows of a pyarrow table say; a value that makes no sense is a flaw of its row."""
    nothing = [None] * table.num_rows
    captions = nothing if columns.caption is None else table.column(columns.caption)
    labels = nothing if columns.label is None else table.column(columns.label)
    return (_row(*cells) for cells in zip(captions, labels, strict=True))


def _row(caption: Any, label: Any) -> Row:
    try:
        return Row(_captions(caption), _label(label))
    except CaptionError as error:
        return Row((), None, str(error))
    except UnicodeDecodeError:
        return Row((), None, "its caption or class is not UTF-8")


def _captions(scalar: Any) -> tuple[str, ...]:
    value = None if scalar is None else scalar.as_py()
    if value is None:
        return ()
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise CaptionError("its caption is no text")
    return clean(texts)


def _label(scalar: Any) -> int | str | None:
    value = None if scalar is None else scalar.as_py()
    if isinstance(value, int):
        return int(value)  # yes and no are 1 and 0
    return value if isinstance(value, str) else None


def to_samples(
    keys: Iterable[str], rows: Iterable[Row], names: Sequence[str]
) -> tuple[list[Sample], tuple[str, ...]]:
    """Samples whose classes are numbers, and the classes' names.

    `names` are those that the table itself states. Classes that are words are sorted.

    Raises:
        ValueError: some rows have words and others numbers.
    """
    listed = list(rows)
    words = tuple(sorted({row.label for row in listed if isinstance(row.label, str)}))
    numbers = {word: number for number, word in enumerate(words)}
    if words and any(isinstance(row.label, int) for row in listed):
        raise ValueError("classes are numbers in some of the rows and words in others")

    def label(row: Row) -> int | None:
        return numbers[row.label] if isinstance(row.label, str) else row.label

    pairs = zip(keys, listed, strict=True)
    samples = [Sample(key, row.captions, label(row), flaw=row.flaw) for key, row in pairs]
    return samples, words or tuple(names)
