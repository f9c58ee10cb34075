"""Trained models of any family, opened alike: a nest, or the two networks of a cascade."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from matryoshka_diffusion.cascade import Cascade, check_pair
from matryoshka_diffusion.config import (
    BaseConfig,
    ConfigError,
    RunConfig,
    SamplingConfig,
    load_config,
)
from matryoshka_diffusion.pipeline import (
    Matryoshka,
    Progress,
    Samples,
    count_levels,
    find_model,
    read_config,
    with_encoder,
)
from matryoshka_diffusion.pyramid import Resolution
from matryoshka_diffusion.train.adapters import fingerprint
from matryoshka_diffusion.train.precision import Precision


@runtime_checkable
class Model(Protocol):
    """What can be sampled from and measured, whatever networks it is made of."""

    @property
    def config(self) -> RunConfig: ...
    @property
    def resolutions(self) -> tuple[Resolution, ...]: ...
    @property
    def picture_side(self) -> int: ...
    def describe(self, settings: dict[str, Any]) -> dict[str, Any]: ...
    def evaluations(self, settings: dict[str, Any]) -> int: ...
    def idle(self, settings: dict[str, Any]) -> set[str]: ...
    def sampling(self, settings: dict[str, Any]) -> SamplingConfig: ...
    def sample(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        classes: str | int | Sequence[str | int] | None = None,
        negative: str | None = None,
        n: int = 1,
        seed: int = 0,
        batch_size: int | None = None,
        progress: Progress | None = None,
        **settings: Any,
    ) -> Samples: ...


def open_model(
    run: str | Path,
    *,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    text_encoder: str | None = None,
    progress: Progress | None = None,
    base: str | Path | None = None,
) -> Matryoshka | Cascade:
    """Load what `Matryoshka.load` loads and, if that is an upsampler, the base it goes with.

    `base` takes the place of the one that the upsampler's config names.

    Raises:
        ConfigError: the base is missing, is another one than in training, or does not fit; or
            `run` is no upsampler, and a base was given.
        FileNotFoundError, ValueError: as `Matryoshka.load`.
    """
    options: dict[str, Any] = {
        "device": device,
        "precision": precision,
        "text_encoder": text_encoder,
        "progress": progress,
    }
    model = Matryoshka.load(run, **options)
    if model.config.model.coarse is None and base is None:
        return model
    where, config = find_base(model.config, base)
    check_pair(config if text_encoder is None else with_encoder(config, text_encoder), model.config)
    encoder = None if model.config.encoder is None else model.text_encoder()
    return Cascade(Matryoshka.load(where, encoder=encoder, **options), model)


def find_base(config: RunConfig, other: str | Path | None = None) -> tuple[str | Path, RunConfig]:
    """Where the base of an upsampler of this config is, and the base's own config.

    Raises:
        ConfigError: there is none, or not the one that the config names.
    """
    if other is not None:
        return other, read_config(other)
    named = config.sampling.base
    if named is None:
        raise ConfigError(
            f"{config.name} enlarges pictures that another model draws, and its config names none "
            "(sampling.base): give that model (--base RUN), or pictures of your own (--coarse)"
        )
    weights, theirs = _read(config, named)
    if fingerprint(weights) != named.hash:
        raise ConfigError(
            f"sampling.base.path: {named.path} has other weights than when the training of "
            f"{config.name} began; if that is meant, name it again (--base {named.path})"
        )
    return named.path, theirs


def keep_base(config: RunConfig, run: Path) -> RunConfig:
    """The config with the base as the run in the folder `run` has noted it, if it names that one.

    Training does not use the base, so a run goes on whatever has become of it.
    """
    named, written = config.sampling.base, run / "config.yaml"
    if named is None or not written.is_file():
        return config
    noted = load_config(written).sampling.base
    # A path that leads nowhere any more is still as it was typed, not absolute.
    same = (named.path, str(Path(named.path).expanduser().resolve()))
    if noted is None or noted.path not in same:
        return config
    return _with_base(config, noted)


def note_base(config: RunConfig) -> RunConfig:
    """The config of an upsampler that is about to be trained, with the hash of its base's weights.

    Raises:
        ConfigError: the base is missing or does not fit.
    """
    named = config.sampling.base
    if named is None or named.hash:
        return config
    weights, theirs = _read(config, named)
    check_pair(theirs, config, levels=count_levels(weights))
    return _with_base(config, named.model_copy(update={"hash": fingerprint(weights)}))


def _with_base(config: RunConfig, base: BaseConfig) -> RunConfig:
    sampling = config.sampling.model_copy(update={"base": base})
    return config.model_copy(update={"sampling": sampling})


def _read(config: RunConfig, named: BaseConfig) -> tuple[dict[str, Tensor], RunConfig]:
    try:
        return find_model(named.path)
    except FileNotFoundError as error:
        raise ConfigError(
            f"sampling.base.path: the model that {config.name} goes with is not there ({error}); "
            "name it (--base RUN)"
        ) from error
