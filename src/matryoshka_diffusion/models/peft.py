"""Files of adapters in the form of the peft library: its settings and names, without the library.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. Our files also hold, as
metadata that peft ignores, the hash of the model that the adapters were trained around.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from matryoshka_diffusion.config import ConfigError, RunConfig, UsageError
from matryoshka_diffusion.files import BrokenFile, read_json, write_atomically
from matryoshka_diffusion.modelconfig import Count, Positive, Strict
from matryoshka_diffusion.nn.lora import LowRank
from matryoshka_diffusion.tensorfile import read_weights
from matryoshka_diffusion.training.checkpoint import CheckpointError, to_bytes
from matryoshka_diffusion.training.weights import lora_metadata

SETTINGS, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
"""Begin of every tensor's name in `WEIGHTS`."""
WITHOUT_EFFECT = {
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
    *("lora_dropout", "ensure_weight_tying", "velora_config", "eva_config", "peft_version"),
    *("megatron_core", "qalora_group_size"),
}
"""Settings that say how and where adapters were trained, but not what they compute."""

Number = TypeVar("Number", int, float)
# peft reads a regular expression here, which may take for ever.
Layer = Annotated[str, Field(pattern=r"^\^?[\w.]+$")]


class Settings(Strict):
    """The settings that decide what adapters compute, with peft's defaults.

    Any other setting that is switched on makes something else than LoRA of them, as most other
    initial values do: these also change the weights of the model.
    """

    peft_type: Literal["LORA"]
    r: Count = 8
    lora_alpha: Positive = 8.0
    use_rslora: bool = False
    bias: Literal["none"] = "none"
    init_lora_weights: bool | Literal["gaussian", "eva", "orthogonal", "mica"] = True
    rank_pattern: dict[Layer, Count] = Field(default_factory=dict)
    alpha_pattern: dict[Layer, Positive] = Field(default_factory=dict)

    def rank(self, layer: str) -> int:
        """The rank of a layer's adapter."""
        return next(_matching(self.rank_pattern, layer), self.r)

    def scale(self, layer: str) -> float:
        """The factor of a layer's two maps."""
        rank, alpha = self.rank(layer), next(_matching(self.alpha_pattern, layer), self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True)
class Adapters:
    """Changes of a model's layers by the layers' names."""

    changes: Mapping[str, LowRank]
    where: str  # for errors
    base: str  # hash of the model's weights; empty if nobody has noted it


def folder_of(path: Path) -> Path | None:
    """The folder of adapters in this form at a path, which may be one of its files."""
    folder = path.parent if path.name in (SETTINGS, WEIGHTS, PICKLE) else path
    there = any((folder / name).is_file() for name in (SETTINGS, WEIGHTS, PICKLE))
    return folder if there else None


def read(folder: Path) -> Adapters:
    """Read the adapters that peft, or `write`, wrote.

    Raises:
        UsageError: the weights are a pickle, or the adapters compute something else than LoRA.
        FileNotFoundError, ConfigError, ValueError: a file is missing or damaged.
    """
    file, pickle = folder / WEIGHTS, folder / PICKLE
    if pickle.is_file() and not file.is_file():
        raise UsageError(
            f"{pickle}: a pickle, which can run any code when it is opened: save the adapters as "
            f"{WEIGHTS}, as save_pretrained of peft does"
        )
    for path in (file, folder / SETTINGS):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; adapters are {SETTINGS} and {WEIGHTS}")
    settings = _read_settings(folder / SETTINGS)
    weights, about = read_weights(file)
    maps = pairs(weights, rf"{re.escape(PREFIX)}(?P<layer>.+)\.lora_(?P<part>[AB])\.weight", file)
    for layer, (down, _) in maps.items():
        if down.shape[0] != settings.rank(layer):
            raise CheckpointError(
                f"{file}: {layer} has rank {down.shape[0]}, but {SETTINGS} says "
                f"{settings.rank(layer)}: copy both files again"
            )
    # Adapters of `MDMPipeline.network` have the network's own name in theirs, as patterns do.
    changes = {
        layer.removeprefix("net."): LowRank(*both, settings.scale(layer))
        for layer, both in maps.items()
    }
    try:
        base = json.loads(about.get("lora", "{}"))["base"]
    except (ValueError, RecursionError, LookupError, TypeError):  # peft notes no hash
        base = ""
    return Adapters(changes, str(file), str(base))


def write(folder: Path, adapters: Adapters, config: RunConfig, dtype: torch.dtype) -> None:
    """Write the adapters of a run with the config `config` as peft does."""
    lora = config.train.lora
    assert lora is not None, "a run of adapters has their config"
    tensors = {}
    for layer, change in adapters.changes.items():
        tensors[f"{PREFIX}{layer}.lora_A.weight"] = change.down.to(dtype)
        tensors[f"{PREFIX}{layer}.lora_B.weight"] = change.up.to(dtype)
    alpha = float(lora.alpha or lora.rank)
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": config.train.init,
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,  # peft's type is int
        "target_modules": sorted(adapters.changes),
        "bias": "none",
        "inference_mode": True,
    }
    data, text = to_bytes(tensors, lora_metadata(config)), json.dumps(settings, indent=1).encode()
    write_atomically(folder / WEIGHTS, lambda file: file.write(data), needed=len(data))
    write_atomically(folder / SETTINGS, lambda file: file.write(text))


def pairs(
    weights: Mapping[str, Tensor], name: str, where: str | Path
) -> dict[str, tuple[Tensor, Tensor]]:
    """The two maps of every layer, that down to the rank first.

    `name` is a regular expression for names of tensors, with the groups `layer` and `part`.

    Raises CheckpointError if a tensor is no such map, or one of the two is missing.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in weights.items():
        match = re.fullmatch(name, key)
        if match is None or value.dim() < 2:
            raise CheckpointError(
                f"{where}: {key} is no map of an adapter, as LoRA has two a layer"
            )
        layers.setdefault(match["layer"], {})[match["part"]] = value
    for layer, parts in layers.items():
        if len(parts) == 1:
            raise CheckpointError(
                f"{where}: one of the two maps of {layer} is missing: copy it again"
            )
    # A and down come before B and up.
    return {layer: (parts[min(parts)], parts[max(parts)]) for layer, parts in layers.items()}


def _read_settings(path: Path) -> Settings:
    """Read what decides the computation. Raises `ConfigError` or `BrokenFile` with the path."""
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise BrokenFile(f"{path}: no settings of adapters: copy or download it again")
    used = {name: value for name, value in settings.items() if value and name not in WITHOUT_EFFECT}
    used |= {name: settings[name] for name in ("peft_type", "r", "lora_alpha") if name in settings}
    try:
        return Settings.model_validate(used)
    except ValidationError as error:
        keys = dict.fromkeys(str(problem["loc"][0]) for problem in error.errors())
        raise ConfigError(
            f"{path}: {', '.join(keys)} is no setting of plain LoRA around unchanged weights: only "
            "such adapters can be added; train them again, or convert them with peft"
        ) from None


def _matching(pattern: Mapping[str, Number], layer: str) -> Iterator[Number]:
    """Yield the numbers of all names that a layer's name is, or ends with."""
    for ending, value in pattern.items():
        own = ending.removeprefix("^")
        if layer == own or (own == ending and layer.endswith(f".{own}")):
            yield value
