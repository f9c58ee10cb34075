"""Costs of a network in FLOPs and bytes, counted on tensors that have shapes and no numbers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import ModelConfig
from matryoshka_diffusion.nn.layers import shapes_only
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.pyramid import Pyramid, Resolution, shapes_of

ATTENTION = "scaled_dot_product_attention"
IN_HALF = ("conv2d", "linear", ATTENTION)
"""Names of functions that CUDA's autocast computes in half precision."""
TEXT_TOKENS = 64
"""Text tokens for which costs are counted."""


def count_parameters(module: nn.Module) -> int:
    """The number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def training_bytes(net: nn.Module, tracks: int = 0, *, half: bool = False) -> int:
    """Bytes of a network in training, without those that depend on the batch.

    They are the float32 weights, with `half` also autocast's copies of them, and, for trained
    weights, gradient, two moments, EMA and further `tracks`.
    """
    learnt = sum(p.numel() for p in net.parameters() if p.requires_grad)
    return (6 if half else 4) * count_parameters(net) + 4 * (4 + tracks) * learnt


def forward_flops(model: ModelConfig, levels: int, tokens: int = TEXT_TOKENS) -> int:
    """FLOPs (two for each multiply-add) of the first `levels` levels, for one image."""
    net, z, t, cond = _one_image(model.first(levels), tokens)
    with FlopCounterMode(display=False) as counter:
        net(z, t, cond)
    return counter.get_total_flops()


def activation_bytes(
    model: ModelConfig,
    levels: int,
    recompute: Collection[int] = (),
    *,
    half: bool = False,
    sizes: Sequence[Resolution] | None = None,
) -> int:
    """Bytes that the forward pass of an image keeps for the backward pass.

    It is a square, or its levels have these `sizes`. The bytes are those of float32 everywhere, or
    with `half` those under a GPU's autocast. Temporary memory of kernels is not counted, nor are
    half-precision copies of weights, nor is the block that a recomputed level computes again.
    """
    net, z, t, cond = _one_image(model.first(levels), sizes=sizes)
    net.recompute(recompute)
    if not half:
        return kept_bytes(net, lambda: net(z, t, cond))
    with _GpuAutocast(net) as autocast:
        kept = kept_tensors(net, lambda: net(z, t, cond))
    copies = {copy.untyped_storage()._cdata for copy in autocast.copies.values()}
    storages = (x.untyped_storage() for x in kept)
    return sum(storage.nbytes() for storage in storages if storage._cdata not in copies)


class _GpuAutocast(TorchFunctionMode):
    """CUDA's autocast and fused attention, for tensors that have shapes and no numbers.

    Attributes:
        copies: half-precision copies of weights, each made once.
    """

    def __init__(self, net: NestedUNet) -> None:
        super().__init__()
        self.copies: dict[Tensor, Tensor] = {}
        self._floats = [level.head.weight for level in net.levels]  # without autocast

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in IN_HALF and not any(args[1] is weight for weight in self._floats):
            args = [self._half(x) if isinstance(x, Tensor) else x for x in args]
        if name != ATTENTION:
            return func(*args, **kwargs)
        if (mask := kwargs["attn_mask"]) is None:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
        bias = torch.zeros_like(mask, dtype=torch.bfloat16)
        return torch.ops.aten._scaled_dot_product_efficient_attention(*args, bias, True)[0]

    def _half(self, x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter):
            return x.bfloat16() if x.is_floating_point() else x
        if x not in self.copies:
            self.copies[x] = x.bfloat16()
        return self.copies[x]


def kept_bytes(net: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes that `forward` keeps for its backward pass besides the weights of `net`."""
    return sum(x.untyped_storage().nbytes() for x in kept_tensors(net, forward))


def kept_tensors(
    net: nn.Module, forward: Callable[[], object], note: Callable[[Tensor], None] = lambda x: None
) -> list[Tensor]:
    """Tensors that `forward` keeps for its backward pass besides the weights of `net`.

    Each storage counts once, so two views of a tensor count once. `note` is called with each
    tensor where it is kept.
    """
    weights = {parameter.untyped_storage()._cdata for parameter in net.parameters()}
    kept: dict[int, Tensor] = {}  # holds the tensors, so that no address is used twice

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in weights:
            kept[x.untyped_storage()._cdata] = x
            note(x)
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        outputs = forward()
        del outputs
    return list(kept.values())


def _one_image(
    model: ModelConfig,
    tokens: int = TEXT_TOKENS,
    sizes: Sequence[Resolution] | None = None,
) -> tuple[NestedUNet, Pyramid, Tensor, Conditioning]:
    with shapes_only():
        net = NestedUNet(model)
        z = tuple(torch.empty(1, *shape) for shape in shapes_of(model, sizes))
        first = z[0] if model.coarse else None
        cond = Conditioning(
            labels=torch.zeros(1, dtype=torch.long) if model.classes else None,
            tokens=torch.empty(1, tokens, model.text.features) if model.text else None,
            micro={name: torch.ones(1) for name in model.micro_names},
            image=first,
            image_t=None if first is None else torch.ones(1),
        )
        return net, z, torch.ones(1), cond
