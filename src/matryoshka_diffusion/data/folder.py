"""Folders of images or videos that the user brings: with captions, with classes, or with neither.

- Captions: `metadata.jsonl` or `metadata.csv` in any folder, for the files below it (`file_name`,
  and `text` or `caption`), or `NAME.txt` beside `NAME.png` with one caption a line.
- Classes: `label` in these; or else the names of the sub-folders, where files may lie deeper.
- Neither: files that lie directly in the folder.

Other usual spellings (`spellings.py`) are understood, and what is not used is counted.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from unicodedata import normalize

import numpy as np
from jaxtyping import UInt8

from matryoshka_diffusion.config import ConfigError, DataConfig, UsageError
from matryoshka_diffusion.data.bad import BadFile, PictureError, some
from matryoshka_diffusion.data.decoded import Catalogue
from matryoshka_diffusion.data.image import PICTURES, SUFFIXES, Kind, read_picture
from matryoshka_diffusion.data.patterns import OF_THE_DISK
from matryoshka_diffusion.data.source import Sample
from matryoshka_diffusion.data.spellings import (
    FILE,
    LABEL,
    MAX_BYTES,
    MAX_TEXT_BYTES,
    METADATA,
    SPLITS,
    TEXT,
    Reader,
    Tally,
    Words,
    captions_in,
    clean,
    decoded,
    find_columns,
    json_object,
    lines,
    read_table,
    suffixes_of,
)
from matryoshka_diffusion.draw.grid import SHEETS
from matryoshka_diffusion.files import unreadable

_ACCEPTED = "a folder of pictures, tar shards (.tar), parquet files (.parquet) or hf:NAME"


def folder(path: Path, data: DataConfig, kind: Kind = PICTURES, noun: str = "folder") -> Catalogue:
    """Files of that kind under `path`, in the order of their paths."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: name {_ACCEPTED} (--data, data.path)")
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is a file of no known kind: name {_ACCEPTED}")
    tally = Tally()
    every, others, flaws = _find(path, kind, tally)
    prefix = _split_folder(path, every, data)
    names = [name for name in every if name.startswith(prefix)]
    flaws = {name: flaw for name, flaw in flaws.items() if name.startswith(prefix)}
    if not names:
        bad = some([BadFile(*item) for item in sorted(flaws.items())])
        raise ValueError(f"{path} holds no {kind.noun}{bad}: {forms(kind)}")
    others = [name for name in others if name.startswith(prefix) or "/" not in name]
    words = _read_words(path, every, names, others, data, flaws, tally)
    if words is None:
        if data.columns.label:
            raise ConfigError(
                f"data.columns.label is {data.columns.label}, and nothing in {path} has classes of "
                "that name: correct it, or omit it for the names of sub-folders"
            )
        parts = {name: name.removeprefix(prefix).split("/") for name in names}
        named = data.columns.label is None  # "": no classes
        words = {name: Words((), top[0]) for name, top in parts.items() if named and len(top) > 1}
        if words:
            stray = (name for name in names if name not in words)
            flaws |= dict.fromkeys(stray, "it is not in a class sub-folder")
    keys = sorted({*names, *flaws})  # among them lines of a metadata file
    samples = [Sample(key, *words.get(key, Words()), flaw=flaws.get(key, "")) for key in keys]
    name, unused = f"{noun} {path / prefix}", tally.unused("keys or columns")
    return Catalogue(name, state_of(path, names), samples, lambda n: path / keys[n], unused=unused)


def holds(path: Path, suffixes: frozenset[str]) -> bool:
    """Test if a file with one of these suffixes lies in the folder or deeper."""
    return any(_suffix(name) in suffixes for name, _ in _files_in(path))


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


def _find(path: Path, kind: Kind, tally: Tally) -> tuple[list[str], list[str], dict[str, str]]:
    """Sorted paths of such files inside the folder and of all others; the flaws of refused ones."""
    names, others, flaws = [], [], {}
    repeats: list[str] = []
    for name, entry in _files_in(path, repeats.append):
        suffix = _suffix(name)
        if suffix in kind.others:
            flaws[name] = f"{suffix} is not read: make it {kind.formats}"
        elif (entry.is_symlink() or suffix in kind.suffixes) and not os.path.isfile(entry):
            flaws[name] = "it is a broken link or no regular file"
        else:
            (names if suffix in kind.suffixes else others).append(name)
    for name in repeats:
        tally.add("links to folders that are read already", name)
    whole = {_stem(name) for name in names if _suffix(name) not in kind.previews}
    previews = {name for name in names if _suffix(name) in kind.previews and _stem(name) in whole}
    for name in sorted(previews):
        tally.add(f"animations beside a {kind.noun}", name)
    return sorted({*names} - previews), sorted(others), flaws


def _split_folder(path: Path, names: Sequence[str], data: DataConfig) -> str:
    """Folder of the split that is read, with a slash; empty if the folder has no splits."""
    tops = sorted({name.split("/")[0] if "/" in name else "" for name in names})
    splits = [top for top in tops if top.lower() in SPLITS]
    has_splits = len(splits) > 1 or (splits == tops and len(tops) == 1)
    if data.split == "all" or (data.split is None and not has_splits):
        return ""
    split = tops[0] if data.split is None and len(tops) == 1 else data.split
    if not split or split not in tops:
        raise ConfigError(
            f"data.split is {split or 'not set'}, and {path} has the folders "
            f"{', '.join(filter(None, tops)) or 'of no split'}: --set data.split=NAME reads one of "
            "them, as --data with its path does; data.split=all takes them for classes"
        )
    return f"{split}/"


def _files_in(
    path: Path, repeat: Callable[[str], object] = lambda name: None
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Files in the folder or deeper with their names, except hidden ones (such as `._*` of Macs).

    Links are followed, but no folder is read twice: `repeat` is called with the other ways to it.
    Raises UnreadableError for a folder that cannot be read.
    """
    folders, links, visited = [""], [], set()
    while folders or links:
        here = folders.pop() if folders else links.pop(0)
        try:
            status = os.stat(path / here)
            if (place := (status.st_dev, status.st_ino)) in visited:
                repeat(here)
                continue
            visited.add(place)
            entries = sorted(os.scandir(path / here), key=lambda entry: entry.name)
        except OSError as error:
            raise unreadable(path / here, error) from error
        for entry in entries:
            name = f"{here}/{entry.name}" if here else entry.name
            if entry.name.startswith(".") or entry.name in OF_THE_DISK:
                continue
            if os.path.isdir(entry) if entry.is_symlink() else entry.is_dir():
                (links if entry.is_symlink() else folders).append(name)
            else:
                yield name, entry


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


# --- captions and classes --------------------------------------------------------------------


def _read_words(
    path: Path,
    every: Sequence[str],
    names: Sequence[str],
    others: Sequence[str],
    data: DataConfig,
    flaws: dict[str, str],
    tally: Tally,
) -> dict[str, Words] | None:
    """Captions and classes of the files `names` among `every`; None if none are described.

    A metadata file wins over text files. Reasons why a file, or a line such as "metadata.csv:7",
    cannot be used are added to `flaws`; `others` without a use are counted in `tally`.
    """
    words: dict[str, Words] = {}
    reader, wanted, used = Reader(data, tally), {*names}, set()

    def add(name: str, file: str, read: Callable[[], Words]) -> None:
        try:
            new = read()
            if new == Words() and (data.captions == "none" or _suffix(file) == ".json"):
                return
            texts = clean(new.captions) if new.captions or new.label is None else ()
            old = words.get(name, Words())
            label = old.label if new.label is None else new.label
            words[name] = Words(old.captions + texts, label)
        except PictureError as error:
            flaws[name] = str(error)
        used.add(file)

    for file, line, row, target, flaw in _metadata(path, every, others, data):
        if target is None:
            has_name = find_columns(FILE, row, data)
            remedy = "" if has_name else f": name one of {', '.join(row)} with data.columns.image"
            flaws[f"{file}:{line}"] = flaw or f"it does not name a file of the folder{remedy}"
            used.add(file)
        elif target in wanted and flaw:
            flaws[target] = f"{file}:{line}: {flaw}"
            used.add(file)
        elif target in wanted:
            add(target, file, lambda row=row: reader.read(row, find_columns(FILE, row, data)))
    for name, file in _sidecars(names, others, data):
        if name not in words and name not in flaws:
            add(name, file, lambda file=file: _read_sidecar(path / file, reader))
    for file in others:
        if file not in used:
            tally.add_file(file)
    return words or None


def _metadata(
    path: Path, every: Sequence[str], others: Sequence[str], data: DataConfig
) -> Iterator[tuple[str, int, Mapping[str, Any], str | None, str]]:
    """Rows of all metadata files: file, line, row, the name that it describes, and its flaw."""
    files = {name: PurePosixPath(name).parent for name in others if _base(name) in METADATA}
    stems = Counter(map(_stem, every))
    known = {stem: name for name in every if stems[stem := _stem(name)] == 1}
    known |= {normalize("NFC", name): name for name in every} | {name: name for name in every}
    for file, parent in files.items():
        if several := [name for name in files if files[name] == parent and name != file]:
            raise ValueError(f"{path} has both {file} and {several[0]}: keep one of them")
        for line, row, flaw in _rows(path / file, data):
            columns = find_columns(FILE, row, data)
            text = row[columns[0]] if columns else None
            spellings = (text, text.replace("\\", "/")) if isinstance(text, str) else ()
            paths = [(parent / name).as_posix() for name in spellings]  # "./a.png" is a.png
            forms = (form for name in paths for form in (name, normalize("NFC", name)))
            target = next((known[form] for form in forms if form in known), None)
            yield file, line, row, target, flaw


def _base(name: str) -> str:
    return PurePosixPath(name).name.lower()


def _sidecars(
    names: Sequence[str], others: Sequence[str], data: DataConfig
) -> Iterator[tuple[str, str]]:
    """Files of `names` with the file of captions beside them: NAME.txt or NAME.png.txt."""
    suffixes = suffixes_of(data)
    beside: dict[str, str] = {}
    for file in others:
        for suffix in suffixes:
            if file.lower().endswith(suffix.lower()):
                stem = normalize("NFC", file[: -len(suffix)])
                beside.setdefault(f"{stem}{suffix}", file)
    for name in names:
        stems = [normalize("NFC", start) for start in (_stem(name), name)]
        keys = (f"{stem}{suffix}" for suffix in suffixes for stem in stems)
        if file := next((beside[key] for key in keys if key in beside), None):
            yield name, file


def _read_sidecar(path: Path, reader: Reader) -> Words:
    is_json = path.suffix.lower() == ".json"
    most = MAX_BYTES.get(path.suffix.lower(), MAX_TEXT_BYTES)
    try:
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise PictureError(f"{path.name} cannot be read ({error.strerror})") from error
    if is_json:  # most hold something else
        try:
            return reader.read(json_object(data))
        except PictureError:
            return Words()
    if len(data) > most:
        raise PictureError(f"{path.name} is longer than {most:,} bytes")
    return Words(captions_in(data, reader.data))


def _rows(path: Path, data: DataConfig) -> Iterator[tuple[int, Mapping[str, Any], str]]:
    """Line numbers, rows, and the flaws of lines that cannot be used."""
    content = path.read_bytes()
    if path.suffix.lower() == ".csv":
        names, rows = read_table(str(path), decoded(content))
        words = [*find_columns(TEXT, names, data), *find_columns(LABEL, names, data)]
        if not find_columns(FILE, names, data) or not (words or data.captions == "none"):
            raise ValueError(
                f"{path} needs the columns file_name and text (or caption, or label), and has "
                f"{', '.join(names)}: rename them, or set data.columns.image (of file names) and "
                "data.columns.caption"
            )
        yield from rows
        return
    for number, line in enumerate(lines(content), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            row = line
        if isinstance(row, Mapping):
            yield number, row, ""
        elif line.strip():
            yield number, {}, "it is no JSON object"


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
        raise FileNotFoundError(f"{path}: no picture here to enlarge ({PICTURES.formats})")
    images = []
    for file in files:
        try:
            # The crop "random" cuts nothing off.
            pixels, size = read_picture(file, side, "random", channels)
        except PictureError as error:
            raise UsageError(f"{file}: {error}") from error
        if size != (side, side):
            wanted = f"{side}x{side} pixels"
            raise UsageError(f"{file}: the upsampler takes pictures of exactly {wanted}")
        images.append(pixels)
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
