"""Folders of images or videos that the user brings: with captions, with classes, or with neither.

- Captions: `metadata.jsonl` or `metadata.csv` in the folder (`file_name`, and `text` or
  `caption`), or `NAME.txt` beside `NAME.png` with one caption a line. They win over sub-folders.
- Classes: the sorted names of the sub-folders; files may lie deeper inside them.
- Neither: files that lie directly in the folder.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.data.bad import BadFile, PictureError, some
from matryoshka_diffusion.data.decoded import Catalogue
from matryoshka_diffusion.data.image import PICTURES, SUFFIXES, Kind, read_picture
from matryoshka_diffusion.data.source import Sample
from matryoshka_diffusion.draw.grid import SHEETS

METADATA = ("metadata.jsonl", "metadata.csv")
MAX_SIDECAR_BYTES = 65_536

_ACCEPTED = "a folder of pictures, tar shards (.tar), parquet files (.parquet) or hf:NAME"


def folder(path: Path, kind: Kind = PICTURES, noun: str = "folder") -> Catalogue:
    """Files of that kind under `path`, in the order of their paths."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: name {_ACCEPTED} (--data, data.path)")
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is a file of no known kind: name {_ACCEPTED}")
    names, flaws = _find(path, kind)
    if not names:
        bad = some([BadFile(*item) for item in sorted(flaws.items())])
        raise ValueError(f"{path} holds no {kind.noun}{bad}: {forms(kind)}")
    captions = _find_captions(path, names, flaws)
    tops = {name: name.split("/")[0] for name in names if "/" in name and captions is None}
    classes = tuple(sorted(set(tops.values())))
    if classes:
        flaws |= {name: "it is not in a class sub-folder" for name in names if name not in tops}
    numbers = {top: number for number, top in enumerate(classes)}
    keys = sorted({*names, *flaws})  # among them lines of a metadata file
    samples = [
        Sample(n, (captions or {}).get(n, ()), numbers.get(tops.get(n, "")), flaw=flaws.get(n, ""))
        for n in keys
    ]
    state = state_of(path, names)
    return Catalogue(f"{noun} {path}", state, samples, lambda n: path / keys[n], classes)


def holds(path: Path, suffixes: frozenset[str]) -> bool:
    """Test if a file with one of these suffixes lies in the folder or deeper."""
    return any(file.suffix.lower() in suffixes for file in _files_in(path))


def forms(kind: Kind) -> str:
    """Advice on what to put into a folder, for errors."""
    suffix = kind.formats.split(",")[0].lower()
    return (
        f"put {kind.formats} files there: in one sub-folder for each class, or with captions in "
        f"NAME.txt beside NAME.{suffix} or in a metadata.jsonl or metadata.csv (file_name, text), "
        "or neither"
    )


def state_of(path: Path, names: Sequence[str]) -> str:
    """Text that changes with any file's name, size or time."""
    stats = ((name, (path / name).stat()) for name in names)
    return "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)


def _find(path: Path, kind: Kind) -> tuple[list[str], dict[str, str]]:
    """Sorted paths of such files inside the folder, and the flaws of those that are refused."""
    names, flaws = [], {}
    for file in _files_in(path):
        name, suffix = file.relative_to(path).as_posix(), file.suffix.lower()
        if suffix in kind.others:
            flaws[name] = f"{file.suffix} is not read: make it {kind.formats}"
        elif suffix in kind.suffixes and not file.is_file():
            flaws[name] = "it is a broken link or no regular file"
        elif suffix in kind.suffixes:
            names.append(PurePosixPath(name))
    previews = {name for name in names if name.suffix.lower() in kind.previews}
    whole = {name.with_suffix("") for name in names if name not in previews}
    kept = (name for name in names if name not in previews or name.with_suffix("") not in whole)
    return sorted(map(str, kept)), flaws


def _files_in(path: Path) -> Iterator[Path]:
    """All files in the folder or deeper, except hidden ones (such as `._*` from a Mac)."""
    for here, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(here, name) for name in files if not name.startswith("."))


# --- captions --------------------------------------------------------------------------------


def clean(texts: Sequence[str]) -> tuple[str, ...]:
    """Captions in `texts` with single blanks between words. Raises PictureError without any."""
    captions = tuple(" ".join(text.split()) for text in texts if text.strip())
    if not captions:
        raise PictureError("its caption is empty")
    if any("\ud800" <= character <= "\udfff" for text in captions for character in text):
        raise PictureError("its caption is not UTF-8")
    return captions


def lines(data: bytes) -> list[str]:
    """Lines of a text file; bytes that are not UTF-8 become surrogates, for `clean` to refuse."""
    return data.decode("utf-8-sig", "surrogateescape").splitlines()


def texts_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Texts of a JSON object or a table row under `text` or `caption`: one or several."""
    texts = row.get("text", row.get("caption"))
    texts = texts if isinstance(texts, list) else [texts]
    return tuple(text for text in texts if isinstance(text, str))


def _find_captions(
    path: Path, names: Sequence[str], flaws: dict[str, str]
) -> dict[str, tuple[str, ...]] | None:
    """Captions of the files `names`; None if the folder holds no captions at all.

    The metadata file wins over text files. Reasons why a file, or a line such as
    "metadata.csv:7", cannot be used are added to `flaws`.
    """
    metadata = [path / name for name in METADATA if (path / name).is_file()]
    if len(metadata) > 1:
        raise ValueError(f"{path} has both {' and '.join(METADATA)}: keep one of them")
    captions: dict[str, tuple[str, ...]] = {}

    def add(name: str, row: Mapping[str, Any] | None) -> None:
        try:
            texts = _sidecar((path / name).with_suffix(".txt")) if row is None else texts_of(row)
            captions[name] = captions.get(name, ()) + clean(texts)
        except PictureError as error:
            flaws[name] = str(error)

    known = frozenset(names)
    for line, row in _rows(metadata[0]) if metadata else ():
        file = row.get("file_name") if isinstance(row, Mapping) else None
        name = PurePosixPath(file).as_posix() if isinstance(file, str) else ""  # of "./a.png" too
        if name in known:
            add(name, row)
        else:
            flaws[f"{metadata[0].name}:{line}"] = "it does not name a file of the folder"
    sidecars = [n for n in names if (path / n).with_suffix(".txt").is_file()]
    for name in sidecars:
        if name not in captions and name not in flaws:
            add(name, None)
    return captions if metadata or sidecars else None


def _sidecar(path: Path) -> list[str]:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_SIDECAR_BYTES + 1)
    except OSError as error:
        raise PictureError(f"{path.name} cannot be read ({error.strerror})") from error
    if len(data) > MAX_SIDECAR_BYTES:
        raise PictureError(f"{path.name} is longer than {MAX_SIDECAR_BYTES:,} bytes")
    return lines(data)


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers and rows; bytes that are not UTF-8 become surrogates, for `clean` to refuse."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        for number, line in enumerate(file if path.suffix == ".jsonl" else (), 1):
            try:
                row = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):
                row = None
            if line.strip():
                yield number, row
        if path.suffix == ".jsonl":
            return
        table = csv.DictReader(file)
        try:
            columns = set(table.fieldnames or ())
            if "file_name" not in columns or not columns & {"text", "caption"}:
                raise ValueError(f"{path} needs the columns file_name and text (or caption)")
            yield from ((table.line_num, row) for row in table)
        except csv.Error as error:
            raise ValueError(f"{path}, line {table.line_num}: {error}") from error


# --- small images for an upsampler -----------------------------------------------------------


def read_coarse(path: Path, side: int, channels: int) -> UInt8[np.ndarray, "n side side channels"]:
    """Read the image at `path`, or all of a folder by name, each exactly `side` x `side`.

    They are not resized: an upsampler depends on how an image was made small. The sheets
    (`grid.png`, ...) in a folder of samples are ignored. Raises FileNotFoundError or UsageError.
    """
    files = [path]
    if path.is_dir():
        pictures = (file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        files = sorted(file for file in pictures if file.name not in SHEETS)
    if not files or not path.exists():
        raise FileNotFoundError(f"{path}: no picture here to enlarge (PNG, JPEG or WEBP)")
    images = []
    for file in files:
        try:
            pixels, original_side = read_picture(file, side, "random")  # which cuts nothing off
        except PictureError as error:
            raise UsageError(f"{file}: {error}") from error
        if pixels.shape[:2] != (side, side) or original_side != side:
            wanted = f"{side}x{side} pixels"
            raise UsageError(f"{file}: the upsampler takes pictures of exactly {wanted}")
        grey = np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
        images.append(pixels if channels == 3 else grey)
    return np.stack(images)


def for_each(
    pictures: UInt8[np.ndarray, "p side side channels"], conditions: int, n: int
) -> tuple[UInt8[np.ndarray, "samples side side channels"], int]:
    """Coarse image for each sample, and the number of samples of each prompt or class.

    One image goes with every prompt, and one prompt with every image; several of both are pairs.
    Each is enlarged `n` times, with consecutive seeds. `conditions` is the number of prompts or
    classes, 1 without any. Several of both in different numbers are a UsageError.
    """
    if len(pictures) != conditions and 1 not in (len(pictures), conditions):
        raise UsageError(
            f"--coarse: {len(pictures)} pictures for {conditions} prompts or classes; give one "
            "picture, or one prompt or class, or as many of either"
        )
    each = pictures if len(pictures) > 1 else pictures.repeat(conditions, axis=0)
    return each.repeat(n, axis=0), n * len(each) // conditions
