"""Which network a run trains, and what holds adapters and the model around them together.

Adapters mean nothing without the weights that they were trained around, so their config and their
file name these weights by a hash, and other weights are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from matryoshka_diffusion.config import ModelConfig, TrainConfig
from matryoshka_diffusion.nn.lora import attach, merged_state
from matryoshka_diffusion.nn.nested import NestedUNet, first_name
from matryoshka_diffusion.train.checkpoint import CheckpointError, check_same, load_network
from matryoshka_diffusion.train.optim import learnt_parameters


def build_network(
    model: ModelConfig, train: TrainConfig, base: Mapping[str, Tensor] | None
) -> NestedUNet:
    """The network at the start of a run: initial weights, or adapters around those of `base`.

    Raises:
        CheckpointError: the run trains adapters, and `base` is not the model that they are for.
    """
    if train.lora is None:
        return NestedUNet(model, seed=train.seed)
    if base is None:
        raise CheckpointError("train.lora: the weights to put adapters around were not given")
    net = load_network(model, base, where=str(train.init))
    if train.lora.base != (found := fingerprint(base)):
        raise CheckpointError(
            f"{train.init} is not the model that the adapters are for: its weights have the hash "
            f"{found[:12]}..., theirs {train.lora.base[:12] or 'none'}..."
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

    Raises:
        CheckpointError: they do not fit each other; lists the first differences.
    """
    net = build_network(model, train, base)
    check_same(learnt_parameters(net), adapters, where=where)
    net.load_state_dict(adapters, strict=False)
    return merged_state(net)


def plain_network(
    model: ModelConfig,
    train: TrainConfig,
    base: Mapping[str, Tensor] | None,
    learnt: Mapping[str, Tensor],
) -> NestedUNet:
    """One plain network that computes what the run has learnt: all of it, or merged adapters."""
    if train.lora is not None and base is not None:
        learnt = merge(model, train, base, learnt, where="the run's adapters")
    return load_network(model, learnt, where="the run's weights")


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """A SHA-256 of names, types, shapes and bits, in hexadecimal digits.

    Names are those of version 0.1.0, because configs hold the hashes that it computed.
    """
    digest = hashlib.sha256()
    for name, value in sorted((first_name(name), value) for name, value in weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
