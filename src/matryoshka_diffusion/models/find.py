"""Loading of every model: a run, a model folder, a released checkpoint, shipped, or on the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from matryoshka_diffusion.codec import OWN, Frozen, refuse_codec, with_path
from matryoshka_diffusion.config import ConfigError, RunConfig, UsageError
from matryoshka_diffusion.configfile import from_dict, load_config
from matryoshka_diffusion.features import FILE
from matryoshka_diffusion.files import BrokenFile, read_json
from matryoshka_diffusion.models.names import is_hub_id, refuse_unknown, shipped_models
from matryoshka_diffusion.models.peft import folder_of
from matryoshka_diffusion.nn.nested import present_name
from matryoshka_diffusion.progress import Progress
from matryoshka_diffusion.tensorfile import open_tensors, read_weights
from matryoshka_diffusion.training import checkpoint
from matryoshka_diffusion.training.stages import active_model
from matryoshka_diffusion.training.weights import LORA, MODEL, lora_metadata, merge, weights_file

WEIGHTS = (MODEL, LORA)
"""Names of the weights file of a model folder: a whole model, or adapters."""
CAPTIONS = "captions.safetensors"
"""Features of captions beside the weights of a shipped model: 8 bits a number, a scale a token."""


class Found(NamedTuple):
    """Weights as they are stored, of a whole model or of adapters, with the config of their run."""

    weights: Mapping[str, Tensor]
    config: RunConfig
    where: str  # the file or folder, for errors


def find_model(
    run: str | Path, *, progress: Progress | None = None
) -> tuple[dict[str, Tensor], RunConfig]:
    """Weights and config of a run, a model folder, a released checkpoint or a shipped model.

    `owner/name` is a model on the hub, which is downloaded once, unless there is such a folder.
    Adapters are merged into the model that they belong to, and the config then names no adapters.
    `progress` is called while a released checkpoint is converted into the cache, once.

    Raises:
        FileNotFoundError: there is no such model; lists the places that were searched.
        OSError: the hub does not have the model, or cannot be reached.
        ConfigError, ValueError: the weights do not fit the config.
    """
    weights, config, where = find_unmerged(run, progress=progress)
    return merge_adapters(weights, config, where=where)


def find_unmerged(run: str | Path, *, progress: Progress | None = None) -> Found:
    """Weights and config of what `find_model` finds, before adapters are merged.

    Raises FileNotFoundError, ConfigError or ValueError as `find_model` does.
    """
    path = place_of(run)
    if path.is_file():
        from matryoshka_diffusion.models.released import convert_once

        return _read_folder(convert_once(path, progress=progress))
    for folder in (path / "model", path):
        if any((folder / name).is_file() for name in WEIGHTS):
            found = _read_folder(folder)
            config = with_own_frozen(moved_frozen(found.config, path), folder)
            return found._replace(config=config)
    if path.is_dir():
        refuse_codec(path)
        if folder_of(path) is not None:
            raise UsageError(
                f"{path} holds adapters in peft's form, no model: mdm sample MODEL --lora {path} "
                "adds them to the model that they are for"
            )
        newest = checkpoint.newest(path / "checkpoints")
        if newest is None:
            raise FileNotFoundError(
                f"{path}: neither a model nor a checkpoint here; mdm train PRESET --out {path} "
                "makes one"
            )
        snapshot = checkpoint.read(newest)
        config = from_dict(snapshot.state["config"], where=str(newest))
        return Found(snapshot.ema, moved_frozen(config, path), str(newest))
    refuse_unknown(run)
    return _read_folder(shipped_models()[str(run)])


def read_config(run: str | Path) -> RunConfig:
    """The config of what `find_model` finds, also of a run that has no checkpoint yet."""
    path = place_of(run)
    if path.is_file():
        from matryoshka_diffusion.models.released import read_released

        return read_released(path).config
    written = path / "config.yaml"
    return load_config(written) if written.is_file() else find_model(path)[1]


def caption_features(run: str | Path) -> dict[str, Tensor]:
    """Stored features of captions of what `find_model` finds. Only shipped models have them."""
    shipped = shipped_models().get(str(run))
    if shipped is None or Path(run).exists() or not (shipped / CAPTIONS).is_file():
        return {}
    with open_tensors(shipped / CAPTIONS) as file:
        features = file.get_tensor("features") * file.get_tensor("scales")[:, None]
        counts: dict[str, int] = json.loads(file.metadata()["captions"])
    return dict(zip(counts, features.split([*counts.values()]), strict=True))


def with_encoder(config: RunConfig, path: str) -> RunConfig:
    """The config with another text encoder, from a folder or a hub id.

    Raises:
        UsageError: the model has no text.
    """
    if config.encoder is None:
        raise UsageError(f"{config.name} has no text encoder: omit --text-encoder")
    encoder = config.encoder.model_copy(update={"path": absolute_if_here(path)})
    return config.model_copy(update={"encoder": encoder})


def absolute_if_here(model: str) -> str:
    """The absolute path of a model that is here; other names stay, such as a shipped model's."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else model


FROZEN: dict[Frozen, str] = {"codec": OWN, "features": FILE}
"""Names of the codec and of the projection of features that lie beside a model's weights."""


def with_own_frozen(config: RunConfig, folder: Path) -> RunConfig:
    """The config of the model in `folder`, with what of `FROZEN` lies beside its weights."""
    for part, name in FROZEN.items():
        if (own := folder / name).exists():
            config = with_path(config, part, str(own.resolve()))
    return config


def moved_frozen(config: RunConfig, run: Path) -> RunConfig:
    """The config of a checkpoint, with `FROZEN` of its run, or at the places that the run names."""
    if (config.codec or config.features) and (run / "config.yaml").is_file():
        present = load_config(run / "config.yaml")
        for part in FROZEN:
            config = with_path(config, part, getattr(getattr(present, part), "path", None))
    return with_own_frozen(config, run)


def count_levels(weights: Mapping[str, Tensor]) -> int:
    """The number of levels in weights; a run that still grows has not reached all.

    Raises:
        ValueError: the weights hold no level.
    """
    places = [key.split(".")[1] for key in weights if key.startswith("levels.")]
    levels = max((1 + int(place) for place in places if place.isdigit()), default=0)
    if not levels:
        raise ValueError("these weights hold no level of a nest")
    return levels


def merge_adapters(
    weights: Mapping[str, Tensor], config: RunConfig, *, where: str
) -> tuple[dict[str, Tensor], RunConfig]:
    """Weights and config of a whole model: adapters are merged, whole weights stay as they are.

    Raises:
        FileNotFoundError, CheckpointError: the model of the adapters is missing, or another one.
    """
    if config.train.lora is None or config.train.init is None:
        return dict(weights), config
    try:
        base, _ = find_model(config.train.init)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{where} holds adapters for a model that is not there: {error}; if it has moved, "
            "correct train.init in the config beside the adapters"
        ) from error
    model = active_model(config, config.train.images)
    whole = merge(model, config.train, base, weights, where=where)
    train = config.train.model_copy(update={"lora": None})
    return whole, config.model_copy(update={"train": train})


def place_of(run: str | Path) -> Path:
    """The path of a model: the folder of a weights file, or of a download from the hub.

    Raises:
        OSError: the hub does not have the model, or cannot be reached.
    """
    if is_hub_id(run):
        from matryoshka_diffusion.models.hub import download

        return download(str(run))
    path = Path(run)
    has_config = path.name in WEIGHTS and path.with_name("config.json").is_file()
    return path.parent if has_config else path


def _read_folder(folder: Path) -> Found:
    path = folder / "config.json"
    try:
        config = from_dict(read_json(path), where=str(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing beside the weights") from None
    except BrokenFile as error:
        raise ConfigError(str(error)) from error
    file = folder / weights_file(config)
    stored, about = read_weights(file)
    weights = {present_name(name): value for name, value in stored.items()}
    try:
        metadata = json.loads(about.get("lora", "{}"))
    except (ValueError, RecursionError) as error:
        raise BrokenFile(f"{file}: its metadata lora is no valid JSON ({error})") from error
    expected = json.loads((lora_metadata(config) or {}).get("lora", "{}"))
    for name, value in expected.items():
        other = metadata.get(name) if isinstance(metadata, dict) else None
        if other != value and name != "base_model":  # which may have moved
            raise ConfigError(f"{file}: {name} is {other} in it, {value} in config.json")
    return Found(weights, with_own_frozen(config, folder), str(file))
