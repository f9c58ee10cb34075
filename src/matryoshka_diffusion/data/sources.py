"""From a config to a source of pictures."""

from __future__ import annotations

from pathlib import Path

from matryoshka_diffusion.config import ConfigError, DataConfig
from matryoshka_diffusion.data.batch import Source


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

    if path is None:
        raise ConfigError(f"data.path is not set: give a folder with --data; {FORMS}")
    return picture_folder(path, side, config.max_bad_fraction)
