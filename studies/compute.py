"""Equal compute: a budget in FLOPs, and how many images a stage gets for its share of it.

FLOPs are counted on shapes, so they do not depend on the machine or on what else it does. A
training image costs three forward passes (one forward, two for its gradients).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from matryoshka_diffusion.config import CodecRunConfig, ModelConfig, StageConfig
from matryoshka_diffusion.nn.costs import forward_flops
from matryoshka_diffusion.runs.train_autoencoder import build

PASSES = 3

TOKENS = 8
"""Of text: the longest of a batch of 32 of OpenMoji's names has 8.3 on average."""


def image_flops(model: ModelConfig, levels: int, mix: tuple[float, ...] = ()) -> float:
    """FLOPs of training on one image, on average over the `mix` of finest levels."""
    shares = mix or (*[0.0] * (levels - 1), 1.0)
    forward = [share * _forward(model, r) for r, share in enumerate(shares, 1) if share]
    return PASSES * sum(forward)


_counted: dict[tuple[str, int], int] = {}


def _forward(model: ModelConfig, levels: int) -> int:
    """FLOPs of a forward pass, counted once for each model."""
    key = (model.model_dump_json(), levels)
    if key not in _counted:
        _counted[key] = forward_flops(model, levels, TOKENS)
    return _counted[key]


def codec_flops(codec: CodecRunConfig) -> float:
    """FLOPs of training an autoencoder."""
    with torch.device("meta"):
        net = build(codec, colours=3)
        picture = torch.empty(1, 3, codec.side, codec.side)
    with FlopCounterMode(display=False) as counter:
        net(picture)
    return PASSES * codec.images * counter.get_total_flops()


def with_budget(
    model: ModelConfig, stages: Sequence[StageConfig], shares: Sequence[float], flops: float
) -> tuple[StageConfig, ...]:
    """The stages, each as long as its share of `flops` lasts, in whole batches; empty ones go."""
    sized = []
    for stage, share in zip(stages, shares, strict=True):
        cost = image_flops(model, stage.levels, stage.mix)
        batches = round(share * flops / cost / stage.batch_size)
        if batches:
            sized.append(stage.model_copy(update={"images": batches * stage.batch_size}))
    return tuple(sized)


def spent(model: ModelConfig, stages: Sequence[StageConfig], images_seen: int) -> float:
    """FLOPs of training up to `images_seen`."""
    total, before = 0.0, 0
    for stage in stages:
        here = min(max(images_seen - before, 0), stage.images)
        total += here * image_flops(model, stage.levels, stage.mix)
        before += stage.images
    return total


def images_at(model: ModelConfig, stages: Sequence[StageConfig], share: float) -> int:
    """The number of images at which a `share` of all the FLOPs has been spent."""
    left = share * spent(model, stages, sum(stage.images for stage in stages))
    images = 0
    for stage in stages:
        cost = image_flops(model, stage.levels, stage.mix)
        here = min(stage.images, round(left / cost))
        images += here
        left -= here * cost
    return images
