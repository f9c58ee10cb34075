"""A set of pictures decoded once, into an array on disk with notes beside it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from matryoshka_diffusion.data.images import Picture, PictureError
from matryoshka_diffusion.data.store import look_ahead, stored_pictures
from matryoshka_diffusion.files import digest, write_atomically

DECODER = 1
"""To be raised when the same file would decode to other bytes than before."""


class Decoded(NamedTuple):
    """Aligned with what was read: a bad file has a black picture and a reason."""

    pictures: UInt8[np.ndarray, "n side side 3"]
    original_sides: list[int]
    bad: dict[int, str]


def workers() -> int:
    """How many threads decode at a time."""
    return min(os.cpu_count() or 1, 8)


def decode_once(
    cache: Path, state: str, count: int, read: Callable[[int], Picture], side: int, title: str
) -> Decoded:
    """All of `count` pictures, from the folder `cache`, filled first unless it fits `state`.

    The notes (sides and reasons) are written before the array, so where the array is, they are.
    Arrays of other states are removed.

    Args:
        state: changes with whatever the pictures depend on besides the decoder.
        read: picture n; raises PictureError, and is called from several threads.
        side: of the pictures, in pixels.

    Raises:
        OSError: the cache cannot be written.
    """
    name = digest("\n".join([str(DECODER), state]))
    array = cache / f"{name}.npy"
    notes = array.with_suffix(".json")
    if array.exists() and _read_notes(notes, count) is None:
        warnings.warn(f"{notes} is corrupt: the pictures are decoded again", stacklevel=3)
        array.unlink()

    def make() -> Iterator[np.ndarray]:
        found = []
        for picture, original_side, reason in look_ahead(
            lambda n: _try(read, n, side), range(count), workers=workers(), depth=4 * workers()
        ):
            found.append((original_side, reason))
            yield picture
        text = json.dumps(found)
        write_atomically(notes, lambda file: file.write(text.encode()))

    pictures = stored_pictures(array, (count, side, side, 3), make, title)
    for old in (*cache.glob("*.npy"), *cache.glob("*.json")):
        if old.stem != array.stem:
            old.unlink(missing_ok=True)
    found = _read_notes(notes, count)
    assert found is not None, "the notes were checked or written above"
    bad = {n: reason for n, (_, reason) in enumerate(found) if reason}
    return Decoded(pictures, [original_side for original_side, _ in found], bad)


def _try(read: Callable[[int], Picture], n: int, side: int) -> tuple[np.ndarray, int, str]:
    try:
        pixels, original_side = read(n)
        return pixels, original_side, ""
    except PictureError as error:
        return np.zeros((side, side, 3), np.uint8), 0, str(error)


def _read_notes(path: Path, count: int) -> list[tuple[int, str]] | None:
    try:
        notes = json.loads(path.read_bytes())
        return [(int(side), str(reason)) for side, reason in notes] if len(notes) == count else None
    except (OSError, ValueError, TypeError):
        return None
