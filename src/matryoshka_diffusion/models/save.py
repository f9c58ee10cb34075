"""Write a trained model as a folder for sampling and sharing."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from matryoshka_diffusion.codec import carry_codec
from matryoshka_diffusion.config import UNIFORM, RunConfig, UsageError
from matryoshka_diffusion.configfile import load_config
from matryoshka_diffusion.features import carry_features
from matryoshka_diffusion.files import refuse_full
from matryoshka_diffusion.models import peft
from matryoshka_diffusion.models.adapters import adapters_of, add_adapters
from matryoshka_diffusion.models.card import model_card, read_figures, write_card
from matryoshka_diffusion.models.find import (
    Progress,
    find_model,
    find_unmerged,
    place_of,
    with_encoder,
    with_own_frozen,
)
from matryoshka_diffusion.models.released import convert, read_released
from matryoshka_diffusion.training.averages import average_of, synthesise
from matryoshka_diffusion.training.weights import export_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export_model(
    run: str,
    out: Path,
    dtype: str = "fp32",
    text_encoder: str | None = None,
    adapters: Mapping[str, float] | None = None,
    license: str | None = None,
) -> RunConfig:
    """Write the weights of a model with its config, codec and projection of features into `out`.

    `adapters` are merged into the weights, as `Matryoshka.load` does. A card for the hub has the
    `license` and the figures that were measured in the run.

    Nothing else of its run goes there. A text encoder in a folder of this computer is named only
    if it is given here.

    Returns:
        The config in `out`, otherwise without paths of this computer.

    Raises:
        ConfigError: `out` is not empty.
        FileNotFoundError, ValueError: `run` is no trained model.
    """
    refuse_full(out)
    weights, config = find_model(run)
    if adapters:
        weights = add_adapters(weights, adapters, where=run)
    if text_encoder is not None:
        config = with_encoder(config, text_encoder)
    shared = shared_config(config) if text_encoder is None else without_paths(config)
    shared = shared if text_encoder is None else with_encoder(shared, text_encoder)
    carry_frozen(config, out)
    export_weights(out, weights, shared, dtype=DTYPES[dtype])
    figures = read_figures(place_of(run), weights)
    write_card(out, model_card(shared, license=license, figures=figures))
    return shared


def export_adapters(
    run: str, out: Path, dtype: str = "fp32", *, license: str | None = None
) -> None:
    """Write the adapters of a run into a folder that peft loads, without paths of this computer.

    Raises:
        ConfigError: `out` is not empty.
        UsageError: `run` is a whole model, or adapters in this form already.
        FileNotFoundError, ValueError: `run` is no trained model.
    """
    refuse_full(out)
    found = find_unmerged(run)
    shared = without_paths(found.config)
    peft.write(out, adapters_of(found), shared, DTYPES[dtype])
    write_card(out, model_card(shared, form="peft", license=license))


def convert_released(
    file: Path, out: Path, *, text_encoder: str | None = None, progress: Progress | None = None
) -> RunConfig:
    """Turn a checkpoint of the paper's release into a model folder.

    Raises:
        ConfigError: `out` is not empty.
        FileNotFoundError, ValueError: `file` is no such checkpoint.
    """
    refuse_full(out)
    released = read_released(file)
    if text_encoder is not None:
        released = replace(released, config=with_encoder(released.config, text_encoder))
    convert(released, out, progress=progress)
    return released.config


def average_model(run: Path, length: float, out: Path, until: int | None = None) -> float:
    """Write the model whose weights are the average of `length` over the training of `run`.

    With `until` it is an early average: that of the training until so many images were seen.

    Returns:
        The error of the average's profile, as `training.averages.Fit.error`.

    Raises:
        UsageError: `out` is not empty, `run` is no run, there is no average of this length, or the
            run's codec is missing or another one.
        FileNotFoundError, ValueError: the run has no snapshots, or one is damaged.
    """
    refuse_full(out)
    if not 0.0 < length < UNIFORM:
        raise UsageError(f"--length {length:g}: give a number above 0 and below {UNIFORM:.4f}")
    if not (run / "config.yaml").is_file():
        raise UsageError(f"{run}: no run folder with a config.yaml in it")
    average = synthesise(run / "ema", length, until)
    config = with_own_frozen(load_config(run / "config.yaml"), run)
    config = average_of(carry_frozen(config, out), length)
    export_weights(out, average.weights, config)
    return average.error


def carry_frozen(config: RunConfig, folder: Path) -> RunConfig:
    """Copy codec and projection into the model folder `folder`; return the config without paths.

    Raises ConfigError or OSError as `carry_codec` and `carry_features` do.
    """
    return carry_features(carry_codec(config, folder), folder)


def shared_config(config: RunConfig) -> RunConfig:
    """The config without folders of this computer; warns if its text encoder is one of them."""
    shared = without_paths(config)
    if shared.encoder != config.encoder and config.encoder is not None:
        warnings.warn(
            f"the text encoder {config.encoder.path} is a local folder and does not go with the "
            "model: whoever loads it must name one (--text-encoder, text_encoder=)",
            stacklevel=4,
        )
    return shared


def without_paths(config: RunConfig) -> RunConfig:
    """The config without folders of this computer, which nobody else has or should see."""
    train, encoder, features = config.train, config.encoder, config.features
    if features is not None:
        nameless = {"path": None, "network": Path(features.network).name}
        features = features.model_copy(update=nameless)
    if train.init is not None and _is_here(train.init):
        train = train.model_copy(update={"init": None})
    if encoder is not None and encoder.path is not None and _is_here(encoder.path):
        encoder = encoder.model_copy(update={"path": None})
    update: dict[str, Any] = {
        "data": config.data.model_copy(update={"path": None, "mix": ()}),
        "codec": config.codec and config.codec.model_copy(update={"path": None}),
        "features": features,
        "encoder": encoder,
        "train": train,
    }
    base, guide = config.sampling.base, config.sampling.guide
    paths = {"base": base and base.path, "guide": guide}
    here = {name: None for name, path in paths.items() if path is not None and _is_here(path)}
    update["sampling"] = config.sampling.model_copy(update=here)
    return config.model_copy(update=update)


def _is_here(path: str) -> bool:
    return path.startswith(("/", "~", ".")) or Path(path).exists()
