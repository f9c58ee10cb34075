"""Adapters (LoRA) that are added to a loaded model, each with a weight of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.hints import did_you_mean
from matryoshka_diffusion.models import peft
from matryoshka_diffusion.models.find import Found, find_unmerged, place_of
from matryoshka_diffusion.models.peft import Adapters
from matryoshka_diffusion.nn.lora import LowRank
from matryoshka_diffusion.training.checkpoint import CheckpointError
from matryoshka_diffusion.training.weights import fingerprint


def add_adapters(
    weights: Mapping[str, Tensor], shares: Mapping[str, float], *, where: str
) -> dict[str, Tensor]:
    """Weights of a model with adapters merged into them, each multiplied by its share.

    Args:
        shares: by the run, folder or file of the adapters.
        where: the model, for errors.

    Raises:
        UsageError: a share is no finite number, or a path holds no adapters.
        CheckpointError: adapters are for other weights, other layers or other shapes.
        FileNotFoundError, ConfigError, ValueError: adapters are missing or damaged.
    """
    merged, own = {name: value.float() for name, value in weights.items()}, ""
    for path, share in shares.items():
        if not math.isfinite(share):
            raise UsageError(f"{path}: the weight of adapters is {share}: give a finite number")
        adapters = read_adapters(path)
        own = own or (adapters.base and fingerprint(weights))
        if adapters.base not in ("", own):
            raise CheckpointError(
                f"{adapters.where} is for another model than {where}: its weights have the hash "
                f"{own[:12]}..., not {adapters.base[:12]}...; name the model that the adapters "
                "were trained around"
            )
        for name, change in adapters.changes.items():
            weight = merged.get(f"{name}.weight")
            if weight is None:
                layers = [known.removesuffix(".weight") for known in merged]
                name = name[:200]  # comparing a very long one with all layers would take for ever
                raise CheckpointError(
                    f"{adapters.where}: {where} has no layer {name}{did_you_mean(name, layers)}; "
                    "the adapters belong to another model"
                )
            _check_shapes(name, change, weight, adapters.where)
            merged[f"{name}.weight"] = change.added_to(weight, share)
    return merged


def _check_shapes(name: str, change: LowRank, weight: Tensor, where: str) -> None:
    """Raise CheckpointError unless a change is one of this weight."""
    down, up = tuple(change.down.shape), tuple(change.up.shape)
    outputs, *inputs = weight.shape
    point = (1,) * (weight.dim() - 2)  # the second map of a convolution sees single positions
    if weight.dim() < 2 or down[1:] != (*inputs,) or up != (outputs, down[0], *point):
        raise CheckpointError(
            f"{where}: the maps of {name} are {down} and {up}, but its weight is "
            f"{tuple(weight.shape)}; the adapters belong to another model"
        )


def read_adapters(source: str | Path) -> Adapters:
    """Read the adapters of a run, of a folder with `lora.safetensors`, or of a folder by peft.

    The source may be a folder on the hub, as for `find_model`.

    Raises:
        UsageError: the source is a whole model or a pickle, or does not compute what LoRA does.
        OSError: the hub does not have it, or cannot be reached.
        FileNotFoundError, ConfigError, ValueError: there is no such source, or it is damaged.
    """
    path = place_of(source)
    folder = peft.folder_of(path)
    return adapters_of(find_unmerged(path)) if folder is None else peft.read(folder)


def adapters_of(found: Found) -> Adapters:
    """The adapters of a run of this project. Raises `UsageError` for whole weights."""
    weights, config, where = found
    if config.train.lora is None:
        raise UsageError(f"{where}: the weights of a whole model, no adapters (mdm train --lora)")
    scale = (config.train.lora.alpha or config.train.lora.rank) / config.train.lora.rank
    pairs = peft.pairs(weights, r"(?P<layer>.+)\.(?P<part>down|up)\.weight", where)
    changes = {name: LowRank(*pair, scale) for name, pair in pairs.items()}
    return Adapters(changes, where, config.train.lora.base)
