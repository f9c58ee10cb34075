"""A folder of pictures that the user brings: with captions, with classes, or with neither.

- Captions: `metadata.jsonl` or `metadata.csv` in the folder (`file_name`, and `text` or
  `caption`), or `NAME.txt` beside `NAME.png` with one caption a line. They win over sub-folders.
- Classes: the sorted names of the sub-folders; pictures may lie deeper inside them.
- Neither: pictures that lie directly in the folder.

Every file is decoded once, into a cached film. Files that cannot be used are listed with their
reasons, and too many of them are an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matryoshka_diffusion.config import Crop
from matryoshka_diffusion.data.bad import BadFile, refuse_too_many, some
from matryoshka_diffusion.data.batch import Pictures
from matryoshka_diffusion.data.captions import find_captions
from matryoshka_diffusion.data.decoded import Decoded, decode_once
from matryoshka_diffusion.data.images import PICTURES, Kind, read_picture
from matryoshka_diffusion.files import cache_folder, digest

READ = "a folder of pictures, tar shards (.tar), parquet files (.parquet) or hf:NAME"


def picture_folder(
    path: Path, side: int, max_bad_fraction: float, crop: Crop = "centre"
) -> Pictures:
    """The pictures under `path` as squares of `side` pixels, in the order of their paths.

    Raises:
        OSError: no such folder, or it is a file.
        ValueError: no picture in it, or more than `max_bad_fraction` of the files are bad.
    """
    names, bad, captions, classes = list_folder(path, PICTURES)
    decoded = _decode(path, names, side, crop)
    bad |= {names[row]: reason for row, reason in decoded.bad.items()}
    rows = [row for row, name in enumerate(names) if name not in bad]
    refuse_too_many(str(path), _files(bad), len(rows) + len(bad), max_bad_fraction)
    keys = [names[row] for row in rows]
    index = {name: number for number, name in enumerate(classes)}
    return Pictures(
        name=f"folder {path}",
        array=decoded.pictures,
        rows=rows,
        keys=keys,
        original_sides=[decoded.original_sides[row] for row in rows],
        captions=None if captions is None else [captions[key] for key in keys],
        labels=[index[class_of(key)] for key in keys] if classes else None,
        classes=classes,
        bad=_files(bad),
    )


class Listing(NamedTuple):
    """What a folder holds, before any file is opened.

    Attributes:
        names: of the files, sorted: their paths inside the folder, with forward slashes.
        bad: why one of them, or a line such as "metadata.csv:7", is of no use.
        captions: of each good file; None where the folder holds no words at all.
        classes: the names of the sub-folders; empty where there are captions, or no sub-folders.
    """

    names: list[str]
    bad: dict[str, str]
    captions: dict[str, tuple[str, ...]] | None
    classes: tuple[str, ...]


def list_folder(path: Path, kind: Kind) -> Listing:
    """The files of that kind under `path`. Raises OSError or ValueError where there are none."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: name {READ} (--data, data.path)")
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is a file of no known kind: what is read is {READ}")
    names, bad = _find(path, kind)
    if not names:
        raise ValueError(f"{path} holds no {kind.noun}{some(_files(bad))}: {forms(kind)}")
    captions = find_captions(path, names)
    if captions is not None:
        return Listing(names, bad | captions.bad, captions.of, ())
    classes = tuple(sorted({class_of(name) for name in names if "/" in name}))
    if classes:
        bad |= {name: "it is not in a class sub-folder" for name in names if "/" not in name}
    return Listing(names, bad, None, classes)


def holds(folder: Path, suffixes: frozenset[str]) -> bool:
    """Whether a file with one of these suffixes lies in the folder or deeper."""
    return any(_suffix(file.name) in suffixes for file in _files_in(folder))


def forms(kind: Kind) -> str:
    """What to do, for people who have not brought anything yet."""
    suffix = kind.formats.split(",")[0].lower()
    return (
        f"put {kind.formats} files there: in one sub-folder for each class, or with captions in "
        f"NAME.txt beside NAME.{suffix} or in a metadata.jsonl or metadata.csv (file_name, text), "
        "or neither"
    )


def class_of(name: str) -> str:
    """The sub-folder that a file lies in."""
    return name.split("/")[0]


def _files(bad: Mapping[str, str]) -> tuple[BadFile, ...]:
    return tuple(BadFile(*item) for item in sorted(bad.items()))


# --- finding and decoding --------------------------------------------------------------------


def _find(folder: Path, kind: Kind) -> tuple[list[str], dict[str, str]]:
    """The sorted paths of such files inside the folder, and those that cannot be tried."""
    names, bad = [], {}
    for file in _files_in(folder):
        name = file.relative_to(folder).as_posix()
        if file.suffix.lower() in kind.others:
            bad[name] = f"{file.suffix} is not read: make it {kind.formats}"
        elif file.suffix.lower() in kind.suffixes and not file.is_file():
            bad[name] = "it is a broken link or no regular file"
        elif file.suffix.lower() in kind.suffixes:
            names.append(name)
    return sorted(_without_previews(names, kind)), bad


def _files_in(folder: Path) -> Iterator[Path]:
    """All files in the folder or deeper.

    What is hidden is passed over (such as the `._*` files that archives from a Mac hold).
    """
    for here, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(here, name) for name in files if not name.startswith("."))


def _without_previews(names: Sequence[str], kind: Kind) -> list[str]:
    small = {name for name in names if _suffix(name) in kind.previews}
    whole = {_stem(name) for name in names if name not in small}
    return [name for name in names if name not in small or _stem(name) not in whole]


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _decode(folder: Path, names: Sequence[str], side: int, crop: Crop) -> Decoded:
    return decode_once(
        cache_folder("folder", digest(f"{folder.resolve()} at {side}, {crop}")),
        state_of(folder, names),
        len(names),
        lambda row: read_picture(folder / names[row], side, crop),
        side,
        f"decoding {folder.name} at {side} px",
    )


def state_of(folder: Path, names: Sequence[str]) -> str:
    """Changes with any file's name, size or time."""
    stats = ((name, (folder / name).stat()) for name in names)
    return "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)
