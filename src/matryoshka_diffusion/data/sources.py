"""From a config to a source of pictures, and from what the user named to the kind of source."""

from __future__ import annotations

import os
import re
from pathlib import Path

from matryoshka_diffusion.config import ConfigError, DataConfig, RunConfig, SourceName
from matryoshka_diffusion.data.batch import Source
from matryoshka_diffusion.data.blobs import is_remote

HUGGING_FACE = "hf:"
_SHARD = re.compile(r"\.(tar(\.\w+)?|tgz)$")  # compressed ones too, for shards.py to explain
_LARGE: tuple[SourceName, ...] = ("shards", "parquet")


def open_source(config: DataConfig, side: int) -> Source:
    """The pictures that `config` names, at the finest level's `side`.

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
    from matryoshka_diffusion.data.folder import FORMS, picture_folder

    if config.path is None or path is None:
        raise ConfigError(
            f"data.path is not set: give a folder with --data ({FORMS}), or tar shards, parquet "
            "files or hf:NAME"
        )
    if config.source == "folder":
        return picture_folder(path, side, config.max_bad_fraction, config.crop)
    return _open_large(config, absolute(config.path), side)


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
    return config.model_copy(update={"data": sourced(config.data)})


def sourced(data: DataConfig) -> DataConfig:
    """The same, of a config's part about data."""
    if data.source != "folder" or data.path is None:
        return data
    return data.model_copy(update={"source": kind_of(data.path)})


def kind_of(path: str) -> SourceName:
    """What is at `path`: an `hf:` name, shards, parquet files, or a folder of pictures.

    A folder that holds shards or parquet files is one of those unless there are pictures, too.
    """
    if path.startswith(HUGGING_FACE):
        return "datasets"
    path = os.path.expanduser(path)
    if not os.path.isdir(path):
        return _kind_of_file(path)
    kinds = {_kind_of_file(name) for name in os.listdir(path)}
    large: SourceName | None = next((kind for kind in _LARGE if kind in kinds), None)
    return "folder" if large is None or _holds_pictures(path) else large


def _kind_of_file(name: str) -> SourceName:
    if name.endswith(".parquet"):
        return "parquet"
    return "shards" if _SHARD.search(name) else "folder"


def _holds_pictures(folder: str) -> bool:
    from matryoshka_diffusion.data.images import SUFFIXES

    files = (name for _, _, names in os.walk(folder) for name in names)
    return any(os.path.splitext(name)[1].lower() in SUFFIXES for name in files)


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
