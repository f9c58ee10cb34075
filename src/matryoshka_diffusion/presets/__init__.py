"""Named runs: complete configs. `mdm info NAME` prints one as a table. No import of torch."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from matryoshka_diffusion.config import ConfigError, RunConfig
from matryoshka_diffusion.presets.baselines import BASELINES, baseline
from matryoshka_diffusion.presets.paper import PAPER
from matryoshka_diffusion.presets.small import CODECS as CODECS
from matryoshka_diffusion.presets.small import SMALL

PRESETS: dict[str, Callable[[str], RunConfig]] = {**SMALL, **PAPER}
"""Functions from a preset's name to its config."""


def preset(name: str, as_: str | None = None) -> RunConfig:
    """The run of this name, or what the paper compares it with.

    Args:
        as_: a baseline in place of the nest, one of `BASELINES`.

    Raises:
        ConfigError: there is no such preset (the message has the nearest name), or the baseline is
            not for this one.
    """
    if name in CODECS:
        raise ConfigError(f"{name} is an autoencoder; only mdm train {name} takes it")
    if name not in PRESETS:
        plain, _, last = name.rpartition("-")
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        near = f"{plain} --as {last}" if plain in PRESETS and last in BASELINES else near
        known = ", ".join([*PRESETS, *CODECS])
        raise ConfigError(f"unknown preset {name!r} (did you mean {near}?); there are: {known}")
    run = PRESETS[name](name)
    return run if as_ is None else baseline(run, as_)
