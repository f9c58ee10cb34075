"""Weights on their way: into a network, and into the folder of a finished model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from matryoshka_diffusion.config import ModelConfig, RunConfig, TrainConfig
from matryoshka_diffusion.files import write_atomically
from matryoshka_diffusion.nn.layers import shapes_only
from matryoshka_diffusion.nn.lora import attach, merged_state
from matryoshka_diffusion.nn.nested import NestedUNet, learnt_parameters, old_name
from matryoshka_diffusion.tensorfile import FLOATS, not_floats
from matryoshka_diffusion.training.checkpoint import CheckpointError, Stored, to_bytes

MODEL, LORA = "model.safetensors", "lora.safetensors"
_FLOATS = {*FLOATS, *FLOATS.values()}

# --- into a network ------------------------------------------------------------------------------


def check_same(
    expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, where: str
) -> None:
    """Raise CheckpointError with the first differences unless names and shapes are equal.

    Where a float is expected, any type of float will do, and no integers.
    """

    def shape(name: str) -> torch.Size:
        return tensors.shape(name) if isinstance(tensors, Stored) else tensors[name].shape

    def dtype(name: str) -> object:
        return tensors.types[name] if isinstance(tensors, Stored) else tensors[name].dtype

    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is not in the network" for name in tensors if name not in expected]
    problems += [
        f"{name} is {tuple(shape(name))}, the network's {tuple(value.shape)}"
        for name, value in expected.items()
        if name in tensors and shape(name) != value.shape
    ]
    problems += [
        f"{name} is {not_floats(dtype(name))}"
        for name, value in expected.items()
        if name in tensors and value.is_floating_point() and dtype(name) not in _FLOATS
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{where} does not fit the network: {'; '.join(problems[:3])}{more}; "
            "it belongs to another config or version"
        )


def load_weights(net: nn.Module, weights: Mapping[str, Tensor], *, where: str) -> None:
    """Load all weights of a network. If they do not fit: CheckpointError, `net` unchanged."""
    check_same(net.state_dict(), weights, where=where)
    net.load_state_dict(weights)


def load_network(model: ModelConfig, weights: Mapping[str, Tensor], *, where: str) -> NestedUNet:
    """Make a network that holds `weights`, in float32 and without a second copy of them.

    Raises CheckpointError if they do not fit.
    """
    with shapes_only():
        net = NestedUNet(model)
    check_same(net.state_dict(), weights, where=where)
    net.load_state_dict({name: value.float() for name, value in weights.items()}, assign=True)
    return net


def build_network(
    model: ModelConfig, train: TrainConfig, base: Mapping[str, Tensor] | None
) -> NestedUNet:
    """Make the network at the start of a run: initial weights, or adapters around those of `base`.

    Raises CheckpointError if the run trains adapters and `base` is not the model that they are
    for: the config names it by a hash, since adapters mean nothing without it.
    """
    if train.lora is None:
        return NestedUNet(model, seed=train.seed)
    if base is None:
        raise CheckpointError("train.lora: the weights to put adapters around were not given")
    net = load_network(model, base, where=str(train.init))
    if train.lora.base != (own := fingerprint(base)):
        raise CheckpointError(
            f"{train.init} is not the model that the adapters are for: its weights have the hash "
            f"{own[:12]}..., theirs {train.lora.base[:12] or 'none'}..."
        )
    return attach(net, train.lora, train.seed)


def merge(
    model: ModelConfig,
    train: TrainConfig,
    base: Mapping[str, Tensor],
    adapters: Mapping[str, Tensor],
    *,
    where: str,
) -> dict[str, Tensor]:
    """Weights of one plain network that computes what `base` does with its adapters.

    Raises CheckpointError if they do not fit each other.
    """
    net = build_network(model, train, base)
    check_same(learnt_parameters(net), adapters, where=where)
    net.load_state_dict(adapters, strict=False)
    return merged_state(net)


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bits, in hexadecimal digits.

    Names are those of version 0.1.0, because configs hold the hashes that it computed.
    """
    digest = hashlib.sha256()
    for name, value in sorted((old_name(name), value) for name, value in weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- into a model folder -------------------------------------------------------------------------


def export_weights(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: RunConfig,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a model folder: the resolved `config.json` and the weights of the last stage's levels.

    They are the weights of adapters if the run trained adapters.
    """
    converted = {name: value.to(dtype) for name, value in weights.items()}
    data = to_bytes(converted, lora_metadata(config))
    path = folder / weights_file(config)
    write_atomically(path, lambda file: file.write(data), needed=len(data))
    text = json.dumps(config.model_dump(mode="json"), indent=1).encode()
    write_atomically(folder / "config.json", lambda file: file.write(text))


def weights_file(config: RunConfig) -> str:
    """Name of the weights' file in a model folder."""
    return MODEL if config.train.lora is None else LORA


def lora_metadata(config: RunConfig) -> dict[str, str] | None:
    """Metadata of a file of adapters: what they are, if the file is found alone.

    One entry, as JSON: several are written in no fixed order, and equal runs leave equal files.
    """
    lora = config.train.lora
    if lora is None:
        return None
    return {"lora": json.dumps({"base_model": config.train.init, **lora.model_dump(mode="json")})}
