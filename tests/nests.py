"""Small networks for tests, with inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import LevelConfig, ModelConfig, TextConfig
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.pyramid import Pyramid, shapes_of
from matryoshka_diffusion.runs.grow import next_frames, next_level

ROWS = 4
TEXT = TextConfig(features=12, width=16, layers=1, heads=2)
TIMES = torch.tensor([0.1, 0.4, 0.7, 1.0])


PICTURE = LevelConfig(
    side=8, widths=(32, 64), blocks=(1, 1), attention=(0, 1), middle=True, heads=4
)
MOVING = next_frames(PICTURE, 4)
CLIPS = (PICTURE, MOVING, next_level(MOVING, 16))
"""An image of 8 pixels, four frames of them, four frames of 16 pixels."""


def nest(
    depth: int = 3, *, core: dict[str, Any] | None = None, clips: bool = False, **shared: Any
) -> ModelConfig:
    """Levels of 8, 16, 32 pixels, or `CLIPS`. `core` changes the coarsest, `shared` the model."""
    if clips:
        return ModelConfig(levels=CLIPS[:depth], embedding=32, **shared)
    levels = [
        LevelConfig(side=8, widths=(32, 64), blocks=(1, 1), attention=(0, 1), middle=True),
        LevelConfig(
            side=16, widths=(32, 32), blocks=(1, 0), attention=(0, 0),
            shift_ratio=2.0, input_scaling="analytic",
        ),
        LevelConfig(
            side=32, widths=(32, 64), blocks=(1, 1), attention=(0, 0), patch=1,
            shift_ratio=4.0, input_scaling="std",
        ),
    ]  # fmt: skip
    levels[0] = levels[0].model_copy(update=core or {})
    return ModelConfig(levels=tuple(levels[:depth]), embedding=32, **shared)


def wake(net: NestedUNet, seed: int = 0) -> NestedUNet:
    """Give zero-initialised weights values: otherwise every prediction is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1, generator=generator)
    return net.eval()


def noisy(config: ModelConfig, rows: int = ROWS, seed: int = 0) -> Pyramid:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, *shape, generator=generator) for shape in shapes_of(config))


def words(rows: int = ROWS, tokens: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(rows, tokens, 12, generator=torch.Generator().manual_seed(seed))


def equal(one: Pyramid, other: Pyramid) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@torch.no_grad()
def run(
    net: NestedUNet,
    cond: Conditioning | None = None,
    *,
    z: Pyramid | None = None,
    t: Tensor = TIMES,
) -> Pyramid:
    """Predictions for noise, or for `z`, at `TIMES`."""
    z = noisy(net.config) if z is None else z
    return net(z, t[: len(z[0])], cond or Conditioning())


def inside(net: NestedUNet, depth: int) -> NestedUNet:
    """The first levels of a network as one of their own, with the same weights."""
    coarse = NestedUNet(net.config.first(depth)).eval()
    coarse.load_state_dict({key: net.state_dict()[key] for key in coarse.state_dict()})
    return coarse
