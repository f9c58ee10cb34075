"""The whole chain learns: eight pictures are learnt by heart and drawn again by their class."""

from __future__ import annotations

import numpy as np
import torch

from matryoshka_diffusion.config import (
    DataConfig,
    LevelConfig,
    ModelConfig,
    RunConfig,
    SamplingConfig,
    StageConfig,
    TrainConfig,
)
from matryoshka_diffusion.data.loader import Loader
from matryoshka_diffusion.data.source import array_source
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.rng import stream
from matryoshka_diffusion.training.trainer import train


def eight_pictures():
    """Smooth colourful pictures of 8 pixels, each its own class."""
    coarse = torch.from_numpy(stream(0, "eight pictures").random((8, 3, 4, 4)))
    fine = torch.nn.functional.interpolate(coarse, size=(8, 8), mode="bilinear")
    pixels = (fine * 255).byte().permute(0, 2, 3, 1).numpy()
    names = tuple("abcdefgh")
    return array_source("eight", pixels, names, labels=range(8), classes=names)


def config(source):
    outer = LevelConfig(side=8, widths=(32, 32), blocks=(1, 0), attention=(0, 0), shift_ratio=2.0)
    stages = (
        StageConfig(levels=1, images=1_280, batch_size=32, lr=1e-2),
        StageConfig(levels=2, images=2_240, batch_size=32, lr=1e-2, mix=(0.25, 0.75)),
    )
    return RunConfig(
        name="eight",
        model=ModelConfig(
            levels=(LevelConfig(side=4, widths=(32,), blocks=(1,), attention=(0,)), outer),
            embedding=64,
            classes=8,
        ),
        data=DataConfig(source="folder", path=".", classes=source.classes),
        train=TrainConfig(
            stages=stages,
            precision="fp32",
            warmup_images=640,
            decay_share=0.5,
            ema_decay=0.9,
            checkpoint_every_images=10_000,
        ),
        sampling=SamplingConfig(steps=10, guidance=(1.5,)),
    )


def test_eight_pictures_are_learnt_by_heart(tmp_path):
    source = eight_pictures()
    finished = train(config(source), Loader(source, seed=0), tmp_path / "run")
    samples = Matryoshka.load(finished).sample(seed=1)
    assert samples.captions == source.classes
    real = np.stack([source[i].picture for i in range(8)]).astype(float)
    drawn = samples.pictures.astype(float)
    squared = np.square(drawn[:, None] - real[None]).mean(axis=(2, 3, 4))
    assert (squared.argmin(axis=1) == np.arange(8)).all(), "every class draws its own picture"
    psnr = 10 * np.log10(255**2 / squared.diagonal())
    assert psnr.min() > 20, psnr
    averaged = drawn.reshape(8, 4, 2, 4, 2, 3).mean(axis=(2, 4))
    agreement = np.abs(averaged - samples.levels[0]).mean()
    assert agreement < 8, "the levels show the same picture"
