"""The folder of a codec: found, described, named by a hash, and carried along with a model.

It is what diffusers' `save_pretrained` writes for an `AutoencoderKL`. Nothing here needs diffusers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from matryoshka_diffusion.config import CodecConfig, ConfigError, RunConfig
from matryoshka_diffusion.configfile import load_config
from matryoshka_diffusion.files import write_atomically

CLASS = "AutoencoderKL"
SETTINGS, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
FILES = (SETTINGS, WEIGHTS)
OWN = "codec"
"""The folder of a model's own codec, beside the weights; so a trained codec's in its run."""
TRAINING = "codec.yaml"
"""The config of a codec's training, in its folder."""
PARTS = ("", OWN, "vae")
"""Where a codec may lie in a folder that is given: there, in a run or model, in a pipeline."""


class Card(NamedTuple):
    """What a codec's settings say: pixels along each side of a code, and channels of codes."""

    factor: int
    channels: int


def codec_folder(path: str) -> Path:
    """The folder of the `AutoencoderKL` at `path`, absolute.

    Raises:
        ConfigError: there is none, or its weights are no safetensors.
    """
    there = Path(path).expanduser().resolve()
    if not there.is_dir():
        raise ConfigError(
            f"codec.path: there is no folder {there}; if the codec has moved, correct codec.path "
            f"in the config, or put a copy into a folder {OWN} in the run's or model's folder"
        )
    folder = next((there / part for part in PARTS if _is_codec(there / part)), None)
    if folder is None:
        raise ConfigError(
            f"codec.path: {there} holds no {CLASS} of diffusers (a {SETTINGS} with the _class_name "
            f"{CLASS}, beside {WEIGHTS})"
        )
    if not (folder / WEIGHTS).is_file():
        raise ConfigError(
            f"codec.path: {folder} has no {WEIGHTS}; other forms of weights can run code when they "
            "are read, so save it as safetensors with diffusers first"
        )
    return folder


def read_card(folder: Path) -> Card:
    """What the settings of a codec say. Raises `ConfigError` if they do not say it."""
    settings = _settings(folder)
    try:
        return Card(2 ** (len(settings["block_out_channels"]) - 1), settings["latent_channels"])
    except (KeyError, TypeError) as error:
        raise ConfigError(f"codec.path: {folder / SETTINGS} lacks {error}") from error


def fingerprint(folder: Path) -> str:
    """A SHA-256 of what codes depend on, in hexadecimal digits: settings and weights."""
    settings = {name: value for name, value in _settings(folder).items() if name[:1] != "_"}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    with open(folder / WEIGHTS, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def check_weights(folder: Path, loading: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if weights are missing or of no use: diffusers would only warn.

    `loading` is the `output_loading_info` of `from_pretrained`.
    """
    problems = {kind: sorted(map(str, found)) for kind, found in loading.items() if found}
    if problems:
        raise ConfigError(f"codec.path: the weights in {folder} do not fit its config: {problems}")


def with_own_codec(config: RunConfig, folder: Path) -> RunConfig:
    """The config of the model in `folder`, whose codec is the one beside the weights, if any."""
    own = folder / OWN
    if config.codec is None or not own.is_dir():
        return config
    codec = config.codec.model_copy(update={"path": str(own.resolve())})
    return config.model_copy(update={"codec": codec})


def moved_codec(config: RunConfig, run: Path) -> RunConfig:
    """The config of what was trained in a run, whose codec may have been moved since.

    It is the run's own, or where the run's config says now.
    """
    if config.codec is not None and (run / "config.yaml").is_file():
        now = load_config(run / "config.yaml").codec
        codec = config.codec.model_copy(update={"path": now and now.path})
        config = config.model_copy(update={"codec": codec})
    return with_own_codec(config, run)


def refuse_codec(path: Path) -> None:
    """Raise `ConfigError` if what is asked to be a model is an autoencoder, or its training."""
    if (path / TRAINING).is_file():
        raise ConfigError(
            f"{path} is the training of an autoencoder, which draws nothing by itself: mdm train "
            f"PRESET --codec {path} trains a model on its codes, mdm train {path} goes on with it"
        )
    if _is_codec(path):
        raise ConfigError(
            f"{path} is an autoencoder, which draws nothing by itself: mdm train PRESET --codec "
            f"{path} trains a model on its codes"
        )


def check_codec(config: CodecConfig, folder: Path, name: str) -> str:
    """The hash of the codec in `folder`. Raises `ConfigError` if that of model `name` is another.

    A config that has no hash yet agrees with every codec.
    """
    key = fingerprint(folder)
    if config.weights not in ("", key):
        raise ConfigError(
            f"codec.path: {folder} is not the codec that {name} was trained with: its hash is "
            f"{key[:12]}..., that one's {config.weights[:12]}...; give the folder of that"
        )
    return key


def carry_codec(config: RunConfig, folder: Path) -> RunConfig:
    """Copy the codec of a run into the model folder `folder`; returns the config that says so.

    Raises:
        ConfigError: there is no codec at `codec.path`, or it is not the one of the run.
        OSError: it cannot be written.
    """
    if config.codec is None or config.codec.path is None:
        return config
    there = codec_folder(config.codec.path)
    check_codec(config.codec, there, config.name)
    for name in FILES:
        with open(there / name, "rb") as source:

            def copy(file: BinaryIO, source: BinaryIO = source) -> None:
                shutil.copyfileobj(source, file)

            write_atomically(folder / OWN / name, copy, needed=(there / name).stat().st_size)
    codec = config.codec.model_copy(update={"path": None})
    return config.model_copy(update={"codec": codec})


def _is_codec(folder: Path) -> bool:
    return _settings(folder).get("_class_name") == CLASS


def _settings(folder: Path) -> dict[str, Any]:
    """The settings in a folder; nothing if there are none to be read."""
    try:
        settings = json.loads((folder / SETTINGS).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}
