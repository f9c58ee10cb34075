"""The captions of a folder of pictures: in a metadata file, or in text files beside them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

METADATA = ("metadata.jsonl", "metadata.csv")
MAX_SIDECAR_BYTES = 65_536


class CaptionError(ValueError):
    """A caption that cannot be used; the message is the reason."""


class Captions(NamedTuple):
    """What was found. Pictures are named by their path inside the folder, with forward slashes.

    Attributes:
        of: the captions of a picture, at least one.
        bad: why a picture, or a line such as "metadata.csv:7", is of no use.
    """

    of: dict[str, tuple[str, ...]]
    bad: dict[str, str]


def find_captions(folder: Path, names: Sequence[str]) -> Captions | None:
    """The captions of the pictures `names`, or None if the folder holds no words at all.

    The metadata file wins over text files. Once one picture has a caption, all need one.

    Raises:
        ValueError: two metadata files, or one that is no table of `file_name` and `text`.
        OSError: the metadata file cannot be read.
    """
    metadata = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(metadata) > 1:
        raise ValueError(f"{folder} has both {' and '.join(METADATA)}: keep one of them")
    found = Captions({}, {})
    if metadata:
        _add_metadata(found, metadata[0], frozenset(names))
    sidecars = {name: path for name in names if (path := _sidecar(folder / name)).is_file()}
    for name, path in sidecars.items():
        if name not in found.of and name not in found.bad:
            _add_sidecar(found, name, path)
    if not metadata and not sidecars:
        return None
    for name in names:
        if name not in found.of:
            found.bad.setdefault(name, "it has no caption, although others have one")
    return found


def _add(found: Captions, name: str, texts: Sequence[str]) -> None:
    try:
        found.of[name] = found.of.get(name, ()) + clean(texts)
    except CaptionError as error:
        found.bad[name] = str(error)


# --- one caption -----------------------------------------------------------------------------


def clean(texts: Sequence[str]) -> tuple[str, ...]:
    """The captions in `texts` with single blanks between their words.

    Raises:
        CaptionError: there are none, or they were no UTF-8 and hold surrogates.
    """
    captions = tuple(" ".join(text.split()) for text in texts if text.strip())
    if not captions:
        raise CaptionError("its caption is empty")
    if any("\ud800" <= character <= "\udfff" for text in captions for character in text):
        raise CaptionError("its caption is not UTF-8")
    return captions


def lines(data: bytes) -> list[str]:
    """The lines of a text file; bytes that are not UTF-8 become surrogates, for `clean` to find."""
    return data.decode("utf-8-sig", "surrogateescape").splitlines()


def texts_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What a row of JSON or of a table holds as `text` or `caption`: one text or several."""
    texts = row.get("text", row.get("caption"))
    texts = texts if isinstance(texts, list) else [texts]
    return tuple(text for text in texts if isinstance(text, str))


# --- text files beside the pictures ----------------------------------------------------------


def _sidecar(picture: Path) -> Path:
    return picture.with_suffix(".txt")


def _add_sidecar(found: Captions, name: str, path: Path) -> None:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_SIDECAR_BYTES + 1)
    except OSError as error:
        found.bad[name] = f"{path.name} cannot be read ({error.strerror})"
        return
    if len(data) > MAX_SIDECAR_BYTES:
        found.bad[name] = f"{path.name} is longer than {MAX_SIDECAR_BYTES:,} bytes"
        return
    _add(found, name, lines(data))


# --- metadata files --------------------------------------------------------------------------


def _add_metadata(found: Captions, path: Path, names: frozenset[str]) -> None:
    for line, row in _rows(path):
        name, texts = _entry(row)
        if name in names:
            _add(found, name, texts)
        else:
            found.bad[f"{path.name}:{line}"] = "it does not name a picture of the folder"


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers and rows; bytes that are not UTF-8 become surrogates, for `_add` to find."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if path.suffix == ".jsonl":
            yield from ((n, _parse(line)) for n, line in enumerate(file, 1) if line.strip())
            return
        table = csv.DictReader(file)
        try:
            columns = set(table.fieldnames or ())
            if "file_name" not in columns or not columns & {"text", "caption"}:
                raise ValueError(f"{path} needs the columns file_name and text (or caption)")
            yield from ((table.line_num, row) for row in table)
        except csv.Error as error:
            raise ValueError(f"{path}, line {table.line_num}: {error}") from error


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _entry(row: Any) -> tuple[str, tuple[str, ...]]:
    """The picture a row names and its captions; empty where the row lacks them."""
    if not isinstance(row, Mapping) or not isinstance(row.get("file_name"), str):
        return "", ()
    return PurePosixPath(row["file_name"]).as_posix(), texts_of(row)  # "./a.png" is "a.png"
