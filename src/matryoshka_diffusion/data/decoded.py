"""A set of pictures or clips decoded once, into a film on disk with notes beside it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from matryoshka_diffusion.data.film import Film, Shape, open_film, write_film
from matryoshka_diffusion.data.images import Picture, PictureError
from matryoshka_diffusion.data.store import look_ahead
from matryoshka_diffusion.files import digest, remove_stale, write_atomically

DECODER = 2
"""To be raised when the same file would decode to other bytes, or be kept in another way."""

_CHANNELS = 3


class Decoded(NamedTuple):
    """Aligned with what was read: a bad file has a reason and no picture."""

    pictures: Film
    original_sides: list[int]
    bad: dict[int, str]


def workers() -> int:
    """How many threads decode at a time."""
    return min(os.cpu_count() or 1, 8)


def decode_once(
    cache: Path,
    state: str,
    count: int,
    read: Callable[[int], Picture],
    side: int,
    title: str,
    frames: int | None = None,
) -> Decoded:
    """All of `count` pictures or clips, from the folder `cache`, filled first unless it fits.

    The notes (shapes, sides and reasons) are written before the film, so where the film is, they
    are. Films of other states are removed once nobody has written them for an hour: until then
    they may be those of another process that is about to open them.

    Args:
        state: changes with whatever the pictures depend on besides the decoder.
        read: picture n; raises PictureError, and is called from several threads.
        side: the shorter one of every picture, in pixels.
        frames: of every clip; None for pictures.

    Raises:
        OSError: the cache cannot be written.
    """
    name = digest("\n".join([str(DECODER), state]))
    path, notes = cache / f"{name}.npy", cache / f"{name}.json"
    film, found = _kept(path, notes, count, side, frames)
    if film is None:
        _write(path, notes, count, read, side, title, frames)
        film, found = _kept(path, notes, count, side, frames)
    if film is None:
        raise OSError(f"{path} vanished or changed as soon as it was written: try again")
    for old in (*cache.glob("*.npy"), *cache.glob("*.json")):
        if old.stem != name:
            remove_stale(old)
    bad = {n: note.reason for n, note in enumerate(found) if note.reason}
    return Decoded(film, [note.original_side for note in found], bad)


class _Note(NamedTuple):
    """What is known of a picture besides its pixels."""

    shape: Shape
    original_side: int
    reason: str


def _kept(
    path: Path, notes: Path, count: int, side: int, frames: int | None
) -> tuple[Film | None, list[_Note]]:
    """What the cache holds; no film, with a warning where that is a surprise, if it holds none."""
    if not path.exists():
        return None, []
    found = _read_notes(notes, count)
    if found is None:
        warnings.warn(f"{notes} is corrupt: the pictures are decoded again", stacklevel=4)
        return None, []
    return open_film(path, side, _CHANNELS, [note.shape for note in found], frames), found


def _write(
    path: Path,
    notes: Path,
    count: int,
    read: Callable[[int], Picture],
    side: int,
    title: str,
    frames: int | None,
) -> None:
    """Decode everything into the film at `path`, and write the notes before it is complete."""
    from tqdm import tqdm

    unit = " pictures" if frames is None else " clips"

    def pictures() -> Iterator[UInt8[np.ndarray, "*frames h w 3"]]:
        found = []
        decoded = look_ahead(
            lambda n: _try(read, n), range(count), workers=workers(), depth=4 * workers()
        )
        for picture, note in tqdm(decoded, desc=title, total=count, unit=unit, disable=None):
            found.append(note)
            yield picture
        text = json.dumps(found)
        write_atomically(notes, lambda file: file.write(text.encode()))

    needed = count * (frames or 1) * side**2 * _CHANNELS
    write_film(path, pictures(), side, _CHANNELS, needed=needed)


def _try(
    read: Callable[[int], Picture], n: int
) -> tuple[UInt8[np.ndarray, "*frames h w 3"], _Note]:
    try:
        pixels, original_side = read(n)
        height, width = pixels.shape[-3:-1]
        return pixels, _Note((height, width), original_side, "")
    except PictureError as error:
        return np.zeros((0, 0, _CHANNELS), np.uint8), _Note((0, 0), 0, str(error))


def _read_notes(path: Path, count: int) -> list[_Note] | None:
    try:
        notes = json.loads(path.read_bytes())
        found = [
            _Note((int(height), int(width)), int(side), str(reason))
            for (height, width), side, reason in notes
        ]
        return found if len(found) == count else None
    except (OSError, ValueError, TypeError):
        return None
