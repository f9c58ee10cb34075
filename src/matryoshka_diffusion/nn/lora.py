"""LoRA: train a few parameters beside a network, whose own weights stay (arXiv 2106.09685).

The weight W of a linear map becomes W + (alpha / rank) B A. Only A (down to `rank`) and B (back up)
are trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matryoshka_diffusion.config import ConfigError, LoraConfig
from matryoshka_diffusion.nn.layers import Attention, zero
from matryoshka_diffusion.nn.nested import NestedUNet, level_of
from matryoshka_diffusion.nn.temporal import FrameAttention
from matryoshka_diffusion.rng import stream


@dataclass(frozen=True)
class LowRank:
    """The change of a layer's weight by an adapter: scale · up · down."""

    down: Float[Tensor, "rank inputs ..."]
    up: Float[Tensor, "outputs rank ..."]
    scale: float

    def added_to(self, weight: Float[Tensor, "outputs inputs ..."], share: float = 1.0) -> Tensor:
        """The weight of a single layer that computes what both do, with `share` of the change."""
        product = self.up.to(weight).flatten(1) @ self.down.to(weight).flatten(1)
        return weight + share * self.scale * product.view_as(weight)


class Adapted(nn.Module):
    """A linear layer or 1 x 1 convolution with a low-rank layer of the same kind beside it.

    `up` starts at zero, so the sum starts as the layer alone, bit for bit.
    """

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        outputs, inputs = base.weight.shape[:2]
        if isinstance(base, nn.Linear):
            self.down = nn.Linear(inputs, rank, bias=False)
            self.up = zero(nn.Linear(rank, outputs, bias=False))
        else:
            self.down = nn.Conv2d(inputs, rank, 1, bias=False)
            self.up = zero(nn.Conv2d(rank, outputs, 1, bias=False))

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return self.base(x) + self.scale * self.up(self.down(x))

    def merged_weight(self) -> Float[Tensor, "..."]:
        """The weight of a single layer that computes the sum."""
        down, up = (part.get_parameter("weight") for part in (self.down, self.up))
        return LowRank(down, up, self.scale).added_to(self.base.weight)


def attach(net: NestedUNet, lora: LoraConfig, seed: int = 0) -> NestedUNet:
    """Put low-rank layers beside the chosen layers of `net`, in place, and freeze all the rest.

    Their initial values depend only on `seed` and on the layer's name.

    Raises:
        ConfigError: the chosen levels have no such layer.
    """
    net.requires_grad_(False)
    chosen = list(_chosen(net, lora))
    if not chosen:
        raise ConfigError(
            f"train.lora: levels {list(lora.levels)} hold no attention to adapt; "
            "choose other levels, or train.lora.maps=all"
        )
    for name, owner, child in chosen:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(stream(seed, f"adapter {name}").integers(2**63)))
            scale = (lora.alpha or lora.rank) / lora.rank
            base = owner.get_submodule(child)
            assert isinstance(base, nn.Linear | nn.Conv2d)
            setattr(owner, child, Adapted(base, lora.rank, scale))
    return net


def merged_state(net: NestedUNet) -> dict[str, Tensor]:
    """The state of a plain network that computes the same as `net` with its low-rank layers."""
    state = net.state_dict()
    for name, module in net.named_modules():
        if isinstance(module, Adapted):
            state[f"{name}.base.weight"] = module.merged_weight().detach()
            del state[f"{name}.down.weight"], state[f"{name}.up.weight"]
    return {name.replace(".base.", "."): value for name, value in state.items()}


def _chosen(net: NestedUNet, lora: LoraConfig) -> Iterator[tuple[str, nn.Module, str]]:
    """The layers to adapt: the name, the module that has the layer, and its name in there."""
    levels = lora.levels or range(len(net.levels))
    kind = (Attention, FrameAttention) if lora.maps == "attention" else nn.Module
    for place, owner in net.named_modules():
        if place.startswith("levels.") and level_of(place) in levels and isinstance(owner, kind):
            for child, part in owner.named_children():
                # What multiplies the channels of each position by one matrix.
                if isinstance(part, nn.Linear) or getattr(part, "kernel_size", 0) == (1, 1):
                    yield f"{place}.{child}", owner, child
