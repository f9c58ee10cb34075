"""Runs on your own images that one GPU of 24 GB trains in about a day.

No GPU has measured these values. The networks have the paper's proportions, and what the paper
leaves open is a convention (docs/defaults.md).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from matryoshka_diffusion.config import (
    DataConfig,
    LevelConfig,
    ModelConfig,
    RunConfig,
    SamplingConfig,
    StageConfig,
    TrainConfig,
)
from matryoshka_diffusion.presets.paper import outer, s64

WIDTHS = {64: (64, 128), 128: (32, 64), 256: (32, 32)}
"""Widths of the levels around the base: those of MDM-S64S128S256S512S1024, halved."""
SEEN = 16_000_000
"""Images of the first two stages, each. A preview is drawn every 100,000."""


def folder(name: str, sides: tuple[int, ...]) -> RunConfig:
    """A folder of your own images on MDM-S64S128..., with half of its sides and widths.

    A quarter of the weights and an eighth of the memory for each image make batches of 256 possible
    on one GPU. The command adds the class folders or captions that it finds as conditions.
    """
    halved = {"side": 32, "widths": (128, 256, 384)}
    base = s64(text=False).model_copy(update=halved)
    return RunConfig(
        name=name,
        model=ModelConfig(levels=(base, *map(_outer, sides)), embedding=512),
        data=DataConfig(source="folder", flip=True),
        train=_training(len(sides)),
        sampling=SamplingConfig(grid="log-snr"),
    )


def _outer(side: int) -> LevelConfig:
    """A level around the base: convolutions only, and a schedule shifted by its side over 32."""
    level = outer(side, WIDTHS[side], power=2.0, text=False)
    return level.model_copy(update={"shift_ratio": side / 32})


def _training(added: int) -> TrainConfig:
    """The base alone, then the levels of 64 and 128 pixels together, then each finer one.

    Half of the rows of a stage have its finest level, and the rest is spread evenly.
    """
    stages = [StageConfig(levels=1, images=SEEN, batch_size=256, lr=2e-4)]
    for levels in range(3, added + 2):
        images, batch = (SEEN, 128) if levels == 3 else (SEEN // 4, 64)
        mix = (*[0.5 / (levels - 1)] * (levels - 1), 0.5)
        stage = StageConfig(levels=levels, images=images, batch_size=batch, lr=2e-4, mix=mix)
        stages.append(stage)
    return TrainConfig(
        stages=tuple(stages),
        warmup_images=256_000,
        lr_per_level=True,
        decay_share=1.0,
        whiten_captions=True,
        log_every_images=10_000,
        preview_every_images=100_000,
        checkpoint_every_images=200_000,
    )


ONE_GPU: dict[str, Callable[[str], RunConfig]] = {
    "folder-128": partial(folder, sides=(64, 128)),
    "folder-256": partial(folder, sides=(64, 128, 256)),
}
