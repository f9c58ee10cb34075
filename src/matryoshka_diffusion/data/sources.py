"""From a config to a source of pictures, and from what the user named to the kind of source."""

from __future__ import annotations

import os
import re
from pathlib import Path

from matryoshka_diffusion.config import (
    VIDEO_SOURCES,
    ConfigError,
    DataConfig,
    RunConfig,
    SourceName,
)
from matryoshka_diffusion.data.bad import NoneUsable
from matryoshka_diffusion.data.batch import Source
from matryoshka_diffusion.data.blobs import is_remote

HUGGING_FACE = "hf:"
PACKAGED: tuple[SourceName, ...] = ("openmoji", "fashion-mnist")
"""Sources that need no path."""
_SHARD = re.compile(r"\.(tar(\.\w+)?|tgz)$")  # compressed ones too, for shards.py to explain
_LARGE: tuple[SourceName, ...] = ("shards", "parquet")


def open_source(config: DataConfig, side: int, frames: int | None = None) -> Source:
    """The pictures that `config` names, at the finest level's `side`; of videos, clips of `frames`.

    Without `frames`, videos give the pictures that their clips begin with. Sources of pictures give
    pictures in either case.

    The first call for a set and side may take a while: it decodes or renders into the cache.

    Raises:
        ConfigError: no path where one is needed, or a side that the data does not have.
        ValueError, OSError: the data is missing or unusable; the message says what to do.
        MissingExtra: an optional package is not installed.
    """
    path = None if config.path is None else Path(config.path).expanduser()
    if config.source == "openmoji":
        from matryoshka_diffusion.data.openmoji import openmoji

        if path is not None:
            raise ConfigError("data.path: OpenMoji comes from its package, leave --data away")
        return openmoji(side)
    if config.source == "fashion-mnist":
        from matryoshka_diffusion.data.idx import fashion_mnist

        return fashion_mnist(side, path)
    if config.path is None or path is None:
        raise ConfigError(f"data.path is not set: {_what_to_bring(config.source)}")
    if config.source in VIDEO_SOURCES:
        return _open_videos(config, path, side, frames)
    if config.source == "folder":
        from matryoshka_diffusion.data.folder import picture_folder

        return picture_folder(path, side, config.max_bad_fraction, config.crop)
    return _open_large(config, absolute(config.path), side)


def _what_to_bring(source: SourceName) -> str:
    from matryoshka_diffusion.data.clips import VIDEOS
    from matryoshka_diffusion.data.fluent_emoji import PACKAGE
    from matryoshka_diffusion.data.folder import forms
    from matryoshka_diffusion.data.images import PICTURES

    if source == "fluent-emoji":
        return f"give the folder of the unpacked npm package {PACKAGE} with --data"
    if source == "clips":
        return f"give a folder with --data ({forms(VIDEOS)}), or tar shards"
    return f"give a folder with --data ({forms(PICTURES)}), or tar shards, parquet files or hf:NAME"


def _open_videos(config: DataConfig, path: Path, side: int, frames: int | None) -> Source:
    from matryoshka_diffusion.data.clip_sets import clips
    from matryoshka_diffusion.data.clips import clip_decoder
    from matryoshka_diffusion.data.fluent_emoji import fluent_emoji

    assert config.path is not None, "its path was asked for"
    decoder = clip_decoder(config, side, frames)
    if config.source == "fluent-emoji":
        return fluent_emoji(path, decoder, config.max_bad_fraction)
    try:
        return clips(absolute(config.path), decoder, config.max_bad_fraction)
    except NoneUsable as error:
        if frames is None:
            raise
        why = f"clips of {frames} frames, as the model's finest level has them, are made of videos"
        raise NoneUsable(f"{error}; {why}", error.bad) from error


def _open_large(config: DataConfig, path: str, side: int) -> Source:
    """Sets whose pictures lie inside larger files."""
    options = (side, config.max_bad_fraction, config.crop)
    if config.source == "shards":
        from matryoshka_diffusion.data.shards import shards

        return shards(path, *options)
    if config.source == "parquet":
        from matryoshka_diffusion.data.parquet import parquet

        return parquet(path, *options)
    from matryoshka_diffusion.data.hf import hugging_face

    return hugging_face(path.removeprefix(HUGGING_FACE), *options)


# --- what the user named ---------------------------------------------------------------------


def with_source(config: RunConfig) -> RunConfig:
    """A config for a folder whose path is something else becomes one for that."""
    clips = config.data_frames is not None
    return config.model_copy(update={"data": sourced(config.data, clips=clips)})


def sourced(data: DataConfig, *, clips: bool = False) -> DataConfig:
    """The same, of a config's part about data; a model of `clips` takes what may hold videos so."""
    if data.source != "folder" or data.path is None:
        return data
    kind = kind_of(data.path)
    found: SourceName = "clips" if clips and kind in ("folder", "shards") else kind
    return data.model_copy(update={"source": found})


def kind_of(path: str) -> SourceName:
    """What is at `path`: an `hf:` name, shards, parquet files, or a folder of pictures or videos.

    A folder that holds something else is one of that unless there are pictures, too; videos count
    before shards and parquet files.
    """
    from matryoshka_diffusion.data.clips import CONTAINERS
    from matryoshka_diffusion.data.folder import holds
    from matryoshka_diffusion.data.images import SUFFIXES

    if path.startswith(HUGGING_FACE):
        return "datasets"
    path = os.path.expanduser(path)
    if not os.path.isdir(path):
        return _kind_of_file(path)
    kinds = {_kind_of_file(name) for name in os.listdir(path)}
    large: SourceName | None = next((kind for kind in _LARGE if kind in kinds), None)
    found: SourceName | None = "clips" if holds(Path(path), CONTAINERS) else large
    return "folder" if found is None or holds(Path(path), SUFFIXES) else found


def _kind_of_file(name: str) -> SourceName:
    if name.endswith(".parquet"):
        return "parquet"
    return "shards" if _SHARD.search(name) else "folder"


def absolute(path: str) -> str:
    """The same data named from any folder; addresses and names on the hub stay as they are."""
    if is_remote(path):
        return path
    if not path.startswith(HUGGING_FACE):
        return str(Path(path).expanduser().resolve())
    from matryoshka_diffusion.data.hf import split_of

    place, split = split_of(path.removeprefix(HUGGING_FACE))
    folder = Path(place).expanduser()
    found = str(folder.resolve()) if folder.is_dir() else place
    return f"{HUGGING_FACE}{found}{'@' if split else ''}{split}"
