"""The perceptual loss: how far apart two images lie in the features of a frozen network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from matryoshka_diffusion.config import ConfigError, RunConfig
from matryoshka_diffusion.diffusion import Distance
from matryoshka_diffusion.metrics.networks import EffNetLite0

SMALLEST = 32
"""Pixels a side of the smallest image that the packaged network can look at."""
See: TypeAlias = Callable[[Tensor], Sequence[Tensor]]
"""Images (b, 3, h, w) in [0, 1] -> features (b, d, y, x) of one or several layers."""


def open_perceptual(
    config: RunConfig, device: torch.device | str = "cpu"
) -> tuple[RunConfig, Distance | None]:
    """The config of a run with the hash of the network of `train.perceptual`, and its distance.

    Raises:
        ConfigError: the network is not the one that the run began with.
        MissingExtra: a package of the network is not installed.
    """
    section = config.train.perceptual
    if section is None:
        return config, None
    network = EffNetLite0(device, purpose=f"train.perceptual.network={section.network}")
    if section.weights not in ("", network.weights):
        raise ConfigError(
            f"train.perceptual.network: the hash of {section.network} is {network.weights}, and "
            f"the run began with {section.weights}: install the package that it began with"
        )
    section = section.model_copy(update={"weights": network.weights})
    train = config.train.model_copy(update={"perceptual": section})
    see = _enlarging(network.maps)
    return config.model_copy(update={"train": train}), feature_distance(see)


def _enlarging(see: See) -> See:
    """The same features, of images that have at least `SMALLEST` pixels a side or are enlarged."""

    def features(x: Float[Tensor, "b c h w"]) -> Sequence[Tensor]:
        if (short := min(x.shape[-2:])) < SMALLEST:
            x = F.interpolate(x, scale_factor=SMALLEST / short, mode="bilinear")
        return see(x)

    return features


def feature_distance(see: See) -> Distance:
    """The squared distance between unit features at a position: mean over positions and layers.

    It is LPIPS (Zhang et al. 2018) with equal weights of all features, for images in [-1, 1].
    Gradients reach the estimates only.
    """

    def features(x: Float[Tensor, "b c h w"]) -> list[Tensor]:
        maps = see(((x + 1.0) / 2.0).expand(-1, 3, -1, -1))
        return [F.normalize(layer, dim=1, eps=1e-6) for layer in maps]

    def distance(
        estimates: Float[Tensor, "b c h w"], images: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, " b"]:
        with torch.no_grad():
            real = features(images)
        pairs = zip(features(estimates), real, strict=True)
        layers = [(a - b).square().sum(1).mean((1, 2)) for a, b in pairs]
        return torch.stack(layers).mean(0)

    return distance
