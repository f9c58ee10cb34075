"""Sets of videos that the user brings: a folder of them, or tar shards."""

from __future__ import annotations

from pathlib import Path

from matryoshka_diffusion.data.batch import Source
from matryoshka_diffusion.data.blobs import is_remote
from matryoshka_diffusion.data.clips import CONTAINERS, VIDEOS, ClipDecoder
from matryoshka_diffusion.data.containers import pyav
from matryoshka_diffusion.data.encoded import open_catalogue
from matryoshka_diffusion.data.folder import class_of, holds, list_folder, state_of
from matryoshka_diffusion.data.samples import Catalogue, Sample
from matryoshka_diffusion.data.shards import sharded


def clips(path: str, decoder: ClipDecoder, max_bad_fraction: float) -> Source:
    """Clips of the videos in a folder, as `folder` reads pictures, or in shards, as `shards` does.

    Raises:
        OSError: nothing is there, or it cannot be read.
        ValueError: no videos, or too many of them are bad.
        MissingExtra: PyAV is not installed, or fsspec for shards that lie elsewhere.
    """
    pyav()  # now and not after hours, when the first video is decoded
    catalogue = _folder(Path(path)) if _is_folder(path) else sharded(path, VIDEOS)
    return open_catalogue(catalogue, decoder, max_bad_fraction)


def _is_folder(path: str) -> bool:
    """Whether it is a folder of videos: one of shards may have animations beside them."""
    if is_remote(path) or not Path(path).is_dir():
        return False
    return not any(Path(path).glob("*.tar")) or holds(Path(path), CONTAINERS)


def _folder(path: Path) -> Catalogue:
    names, bad, captions, classes = list_folder(path, VIDEOS)
    numbers = {name: number for number, name in enumerate(classes)}
    keys = sorted({*names, *bad})  # lines of a metadata file may be bad, too
    samples = [
        Sample(
            key,
            captions=() if captions is None else captions.get(key, ()),
            label=numbers.get(class_of(key)),
            flaw=bad.get(key, ""),
        )
        for key in keys
    ]
    return Catalogue(
        name=f"clips {path}",
        state=state_of(path, names),
        samples=samples,
        load=lambda n: path / keys[n],
        classes=classes,
    )
