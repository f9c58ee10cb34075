"""Every preset, shrunk: it trains, grows through all its stages, and samples what it learnt."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from matryoshka_diffusion.config import CodecConfig, RunConfig
from matryoshka_diffusion.data.loader import Batch
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.presets import preset
from matryoshka_diffusion.rng import normal, uniform
from matryoshka_diffusion.train.checkpoint import load_network
from matryoshka_diffusion.train.trainer import train
from test_presets import every_preset, revalidated, shrunk

ROWS = 4


def short(name: str) -> RunConfig:
    """The preset with its nest shrunk and two steps in each stage; shares and precision stay."""
    run = preset(name)
    stages = tuple(
        stage.model_copy(update={"images": 2 * ROWS, "batch_size": ROWS})
        for stage in run.train.stages
    )
    often = {"log_every_images": 1, "checkpoint_every_images": ROWS, "warmup_images": ROWS}
    learning = run.train.model_copy(update={"stages": stages, "init_levels": 0, **often})
    return revalidated(
        run.model_copy(update={"model": shrunk(run.model), "train": learning}),
    )


class Smooth:
    """Pictures of smooth colours, or such codes, with all that any preset is conditioned on."""

    def __init__(self, config: RunConfig) -> None:
        self.model = config.model

    def batch(self, ids: range) -> Batch:
        side, channels = self.model.levels[-1].side, self.model.channels
        coarse = [normal(0, "picture", n, shape=(channels, 2, 2)).clamp(-1, 1) for n in ids]
        picture = torch.nn.functional.interpolate(torch.stack(coarse), size=(side, side))
        frames = [picture.roll(n, dims=3) for n in range(self.model.levels[-1].frames or 0)]
        return Batch(
            picture=torch.stack(frames, dim=2) if frames else picture,
            captions=tuple(f"picture {n}" for n in ids),
            labels=torch.tensor([n % self.model.classes for n in ids])
            if self.model.classes
            else None,
            original_side=200 * uniform(0, "side", ids).float() + side,
            ids=torch.tensor(ids),
            keys=tuple(f"picture-{n}" for n in ids),
        )


class Words:
    """Features of the width that shrunk presets have: one fixed vector for each word."""

    key, width = "words", 24

    def __call__(self, captions: Sequence[str]) -> list[Tensor]:
        words = [(*caption.split(), "</s>") for caption in captions]
        return [torch.stack([normal(0, word, shape=(24,)) for word in some]) for some in words]


@every_preset
def test_a_shrunk_preset_trains_grows_and_samples(
    name: str, tmp_path: Path, tiny_codec: Callable[..., Path]
):
    config, words = short(name), Words()
    if config.codec is not None:
        factor, channels = config.codec.factor, config.model.channels
        codec = CodecConfig(path=str(tiny_codec(factor=factor, channels=channels)), factor=factor)
        config = config.model_copy(update={"codec": codec})
    encode = words if config.model.text is not None else None
    finished = train(config, Smooth(config), tmp_path / "run", encode=encode)

    lines = (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    levels = [len(json.loads(line)["loss_per_level"]) for line in lines]
    assert levels == [stage.levels for stage in config.train.stages for _ in range(2)]
    assert all(json.loads(line)["loss"] > 0 for line in lines)

    weights = load_file(finished / "model.safetensors")
    net = load_network(config.model, weights, where=name)
    model = Matryoshka(net, config, encoder=words if encode else None)
    prompts, classes = "picture 1" if encode else None, 0 if config.model.classes else None
    given, coarse = None, config.model.coarse
    if coarse is not None:
        given = np.zeros((1, coarse.side, coarse.side, config.model.channels), np.uint8)
    samples = model.sample(prompts, classes=classes, coarse=given, steps=1)
    sides = [level.side * config.pixels_per_side for level in config.model.levels]
    assert [tuple(level.shape[-3:-1]) for level in samples.levels] == [(s, s) for s in sides]
