"""Equal compute: a budget in FLOPs, and how many images a stage gets for its share of it.

FLOPs are counted on shapes, so they do not depend on the machine. A training image costs three
forward passes: one forward, two for its gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from matryoshka_diffusion.config import CodecRunConfig, ModelConfig, StageConfig
from matryoshka_diffusion.nn.costs import forward_flops
from matryoshka_diffusion.runs.train_autoencoder import build

PASSES = 3
TOKENS = 8  # of text: the longest of a batch of 32 of OpenMoji's names has 8.3 on average

_counted: dict[tuple[str, int], int] = {}


def image_flops(model: ModelConfig, stage: StageConfig) -> float:
    """FLOPs of training on one image of a stage, on average over its mix of finest levels."""
    shares = stage.mix or (*[0.0] * (stage.levels - 1), 1.0)
    total = 0.0
    for levels, share in enumerate(shares, 1):
        key = (model.model_dump_json(), levels)
        if share and key not in _counted:
            _counted[key] = forward_flops(model, levels, TOKENS)
        total += share * _counted[key] if share else 0.0
    return PASSES * total


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
        batches = round(share * flops / image_flops(model, stage) / stage.batch_size)
        if batches:
            sized.append(stage.model_copy(update={"images": batches * stage.batch_size}))
    return tuple(sized)


def spent(model: ModelConfig, stages: Sequence[StageConfig], images_seen: int) -> float:
    """FLOPs of training up to `images_seen`."""
    total, before = 0.0, 0
    for stage in stages:
        total += min(max(images_seen - before, 0), stage.images) * image_flops(model, stage)
        before += stage.images
    return total


def images_at(model: ModelConfig, stages: Sequence[StageConfig], share: float) -> int:
    """The number of images at which a `share` of all the FLOPs has been spent."""
    left = share * spent(model, stages, sum(stage.images for stage in stages))
    images = 0
    for stage in stages:
        cost = image_flops(model, stage)
        here = min(stage.images, round(left / cost))
        images += here
        left -= here * cost
    return images
