"""A folder of pictures that the user brings: with captions, with classes, or with neither.

- Captions: `metadata.jsonl` or `metadata.csv` in the folder (`file_name`, and `text` or
  `caption`), or `NAME.txt` beside `NAME.png` with one caption a line. They win over sub-folders.
- Classes: the sorted names of the sub-folders; pictures may lie deeper inside them.
- Neither: pictures that lie directly in the folder.

Every file is decoded once, into a cached array. Files that cannot be used are listed with their
reasons, and too many of them are an error.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from matryoshka_diffusion.data.batch import BadFile, Pictures
from matryoshka_diffusion.data.captions import find_captions
from matryoshka_diffusion.data.images import SUFFIXES, PictureError, read_picture
from matryoshka_diffusion.data.store import look_ahead, stored_pictures
from matryoshka_diffusion.files import cache_folder, digest, write_atomically

FORMS = (
    "put PNG, JPEG or WEBP files there: in one sub-folder for each class, or with captions in "
    "NAME.txt beside NAME.png or in a metadata.jsonl or metadata.csv (file_name, text), or neither"
)
_OTHER_FORMATS = frozenset({".avif", ".bmp", ".gif", ".heic", ".heif", ".tif", ".tiff"})
_DECODER = 1  # to be raised when the same file would decode to other bytes than before


class _Decoded(NamedTuple):
    """Aligned with the names: a bad file has a black picture and a reason."""

    pictures: UInt8[np.ndarray, "n side side 3"]
    original_sides: list[int]
    bad: dict[str, str]


def picture_folder(path: Path, side: int, max_bad_fraction: float) -> Pictures:
    """The pictures under `path`, cut square and resized to `side`, in the order of their paths.

    Raises:
        OSError: no such folder.
        ValueError: no picture in it, or more than `max_bad_fraction` of the files are bad.
    """
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is not a folder: name one with --data (data.path)")
    names, bad = _find(path)
    if not names:
        raise ValueError(f"{path} holds no picture{_some(bad)}: {FORMS}")
    captions = find_captions(path, names)
    classes = _classes(names) if captions is None else ()
    if captions is not None:
        bad |= captions.bad
    if classes:
        bad |= {name: "it is not in a class sub-folder" for name in names if "/" not in name}
    decoded = _decode(path, names, side)
    bad |= decoded.bad
    rows = [row for row, name in enumerate(names) if name not in bad]
    total = len(rows) + len(bad)
    if not rows or len(bad) > max_bad_fraction * total:
        raise ValueError(
            f"{path}: {len(bad)} of {total} files cannot be used{_some(bad)}: repair or remove "
            f"them, or raise data.max_bad_fraction (now {max_bad_fraction:g})"
        )
    keys = [names[row] for row in rows]
    index = {name: number for number, name in enumerate(classes)}
    return Pictures(
        name=f"folder {path}",
        array=decoded.pictures,
        rows=rows,
        keys=keys,
        original_sides=[decoded.original_sides[row] for row in rows],
        captions=None if captions is None else [captions.of[key] for key in keys],
        labels=[index[_class(key)] for key in keys] if classes else None,
        classes=classes,
        bad=tuple(BadFile(*item) for item in sorted(bad.items())),
    )


def _some(bad: Mapping[str, str], count: int = 5) -> str:
    """' (a.png: reason; ...)' of the first bad files, for errors."""
    shown = [f"{name}: {reason}" for name, reason in sorted(bad.items())[:count]]
    more = [f"and {len(bad) - count} more"] if len(bad) > count else []
    return f" ({'; '.join([*shown, *more])})" if bad else ""


def _class(name: str) -> str:
    return name.split("/")[0]


def _classes(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted({_class(name) for name in names if "/" in name}))


# --- finding and decoding --------------------------------------------------------------------


def _find(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The sorted paths of the pictures inside the folder, and those that cannot be tried.

    What is hidden is passed over (such as the `._*` files that archives from a Mac hold).
    """
    names, bad = [], {}
    for here, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in (Path(here, name) for name in files if not name.startswith(".")):
            name = file.relative_to(folder).as_posix()
            if file.suffix.lower() in _OTHER_FORMATS:
                bad[name] = f"{file.suffix} is not read: make it PNG, JPEG or WEBP"
            elif file.suffix.lower() in SUFFIXES and not file.is_file():
                bad[name] = "it is a broken link or no regular file"
            elif file.suffix.lower() in SUFFIXES:
                names.append(name)
    return sorted(names), bad


def _decode(folder: Path, names: Sequence[str], side: int) -> _Decoded:
    """All pictures from the cache, which is filled first unless it fits the folder's state.

    The notes (sides and reasons) are written before the array, so where the array is, they are.
    """
    cache = cache_folder("folder", digest(f"{folder.resolve()} at {side}"))
    state = cache / f"{_fingerprint(folder, names)}.npy"
    notes = state.with_suffix(".json")
    if state.exists() and _read_notes(notes, len(names)) is None:
        warnings.warn(f"{notes} is corrupt: the pictures are decoded again", stacklevel=2)
        state.unlink()

    def make() -> Iterator[np.ndarray]:
        workers = min(os.cpu_count() or 1, 8)
        read = []
        for picture, original_side, reason in look_ahead(
            lambda name: _try(folder / name, side), names, workers=workers, depth=4 * workers
        ):
            read.append((original_side, reason))
            yield picture
        text = json.dumps(read)
        write_atomically(notes, lambda file: file.write(text.encode()))

    pictures = stored_pictures(
        state, (len(names), side, side, 3), make, f"decoding {folder.name} at {side} px"
    )
    for old in (*cache.glob("*.npy"), *cache.glob("*.json")):
        if old.stem != state.stem:  # the folder as it was before
            old.unlink(missing_ok=True)
    read = _read_notes(notes, len(names))
    assert read is not None, "the notes were checked or written above"
    bad = {name: reason for name, (_, reason) in zip(names, read, strict=True) if reason}
    return _Decoded(pictures, [original_side for original_side, _ in read], bad)


def _fingerprint(folder: Path, names: Sequence[str]) -> str:
    """Changes with any picture's name, size or time, and with the decoder."""
    stats = ((name, (folder / name).stat()) for name in names)
    lines = (f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)
    return digest("\n".join([str(_DECODER), *lines]))


def _try(path: Path, side: int) -> tuple[np.ndarray, int, str]:
    try:
        pixels, original_side = read_picture(path, side)
        return pixels, original_side, ""
    except PictureError as error:
        return np.zeros((side, side, 3), np.uint8), 0, str(error)


def _read_notes(path: Path, count: int) -> list[tuple[int, str]] | None:
    try:
        notes = json.loads(path.read_bytes())
        return [(int(side), str(reason)) for side, reason in notes] if len(notes) == count else None
    except (OSError, ValueError, TypeError):
        return None
