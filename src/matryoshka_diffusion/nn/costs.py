"""What a network costs, counted on tensors that have shapes and no numbers."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import ModelConfig
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.pyramid import Pyramid, resolutions_of

TEXT_TOKENS = 64
"""Tokens of text that costs are counted with."""


def count_parameters(module: nn.Module) -> int:
    """How many numbers the parameters of a module hold."""
    return sum(parameter.numel() for parameter in module.parameters())


def training_bytes(net: nn.Module, tracks: int = 0) -> int:
    """Bytes of a network in training, in float32, without what depends on the batch.

    A weight, and where it is learnt its gradient, two moments, the average and further `tracks`.
    """
    learnt = sum(p.numel() for p in net.parameters() if p.requires_grad)
    return 4 * count_parameters(net) + 4 * (4 + tracks) * learnt


def forward_flops(model: ModelConfig, levels: int, tokens: int = TEXT_TOKENS) -> int:
    """FLOPs (two for each multiply-add) of one forward pass of one picture, first `levels` only."""
    net, z, t, cond = _one_picture(model.first(levels), tokens)
    with FlopCounterMode(display=False) as counter:
        net(z, t, cond)
    return counter.get_total_flops()


def activation_bytes(model: ModelConfig, levels: int, recompute: Collection[int] = ()) -> int:
    """Bytes that one picture's forward pass keeps for its backward pass, in float32.

    In bf16 it is about half. Without what kernels use in between, and without the block that is
    being computed again where levels are recomputed.
    """
    net, z, t, cond = _one_picture(model.first(levels))
    net.recompute(recompute)
    return kept_bytes(net, lambda: net(z, t, cond))


def kept_bytes(net: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes that `forward` keeps for its backward pass besides the weights of `net`.

    Storages are counted, each once: two views of a tensor are one.
    """
    weights = {parameter.untyped_storage()._cdata for parameter in net.parameters()}
    kept: dict[int, Tensor] = {}  # the tensors too, so that no address is used twice

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in weights:
            kept[x.untyped_storage()._cdata] = x
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        outputs = forward()
        del outputs
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def _one_picture(
    model: ModelConfig, tokens: int = TEXT_TOKENS
) -> tuple[NestedUNet, Pyramid, Tensor, Conditioning]:
    with torch.device("meta"):
        net = NestedUNet(model)
        z = tuple(torch.empty(1, *each.shape(model.channels)) for each in resolutions_of(model))
        first = z[0] if model.coarse else None
        cond = Conditioning(
            labels=torch.zeros(1, dtype=torch.long) if model.classes else None,
            tokens=torch.empty(1, tokens, model.text.features) if model.text else None,
            micro={name: torch.ones(1) for name in model.micro_names},
            image=first,
            image_t=None if first is None else torch.ones(1),
        )
        return net, z, torch.ones(1), cond
