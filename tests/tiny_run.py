"""A run so small that training tests take seconds."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from matryoshka_diffusion.config import (
    DataConfig,
    EncoderConfig,
    LevelConfig,
    ModelConfig,
    RunConfig,
    SamplingConfig,
    StageConfig,
    TextConfig,
    TrainConfig,
)
from matryoshka_diffusion.data.loader import Batch
from matryoshka_diffusion.files import UnreadableError
from matryoshka_diffusion.modelconfig import MicroConfig
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.rng import stream
from matryoshka_diffusion.runs.grow import next_frames
from matryoshka_diffusion.training.checkpoint import newest
from matryoshka_diffusion.training.inputs import Batches, Feed
from matryoshka_diffusion.training.stages import steps
from matryoshka_diffusion.training.step import diffusion
from matryoshka_diffusion.training.trainer import Hook, Trainer, View, train

T = TypeVar("T")
FRAMES = 4
CAPTIONS = ("red", "a green square", "blue thing", "")


def tiny_config(*, dropout: float = 0.1, **train: Any) -> RunConfig:
    """Levels of 8 and 16 pixels with text; 6 steps of the first level, then 6 of both."""
    settings: dict[str, Any] = {
        "stages": (
            StageConfig(levels=1, images=24, batch_size=4, lr=1e-2),
            StageConfig(levels=2, images=24, batch_size=4, lr=1e-2, mix=(0.5, 0.5)),
        ),
        "precision": "fp32",
        "layout": "nchw",
        "threads": 1,
        "warmup_images": 8,
        "decay_share": 0.25,
        "weight_decay": 0.01,
        "ema_decay": 0.9,
        "condition_dropout": 0.3,
        "log_every_images": 1,
        "checkpoint_every_images": 8,
    }
    inner = LevelConfig(
        side=8,
        widths=(32,),
        blocks=(1,),
        attention=(1,),
        heads=2,
        dropout=dropout,
        micro=(MicroConfig(name="scale", ceiling=64.0),),
    )
    outer = LevelConfig(side=16, widths=(32, 32), blocks=(1, 1), attention=(0, 0), dropout=dropout)
    return RunConfig(
        name="tiny",
        model=ModelConfig(
            levels=(inner, outer),
            embedding=32,
            text=TextConfig(features=8, width=32, heads=2),
        ),
        data=DataConfig(source="folder", path="."),
        encoder=EncoderConfig(name="minilm"),
        train=TrainConfig(**(settings | train)),
        sampling=SamplingConfig(wake=train.get("wake")),
    )


def with_frames(config: RunConfig, frames: int | None = 4) -> RunConfig:
    """The run with so many frames in its finest level."""
    finest = config.model.levels[-1].model_copy(update={"frames": frames})
    model = config.model.model_copy(update={"levels": (*config.model.levels[:-1], finest)})
    return config.model_copy(update={"model": model})


class TinyPictures(Batches):
    """A loader of smooth random pictures, a pure function of the sample number.

    The system cannot read the sample `unreadable_at`.
    """

    unreadable_at: int | None = None

    def batch(self, ids: Sequence[int]) -> Batch:
        if self.unreadable_at in ids:
            raise UnreadableError("cannot read https://host/0.tar: HTTP 503")
        coarse = torch.stack(
            [torch.from_numpy(stream(0, "picture", n % 16).random((3, 4, 4))).float() for n in ids]
        )
        return Batch(
            picture=torch.nn.functional.interpolate(coarse, size=(16, 16)) * 2 - 1,
            captions=tuple(CAPTIONS[n % len(CAPTIONS)] for n in ids),
            labels=None,
            original_side=torch.tensor([16.0 + n % 16 for n in ids]),
            ids=torch.tensor(ids),
            keys=tuple(f"picture-{n % 16}" for n in ids),
        )


def tiny_video(*, dropout: float = 0.1, **train: Any) -> RunConfig:
    """Its first level, and four frames of it around that: one stage of both levels."""
    stage = StageConfig(levels=2, images=24, batch_size=4, lr=1e-2, mix=(0.5, 0.5))
    config = tiny_config(dropout=dropout, **{"stages": (stage,), **train})
    picture = config.model.levels[0]
    clip = next_frames(picture, FRAMES).model_copy(update={"dropout": dropout})
    return config.model_copy(
        update={"model": config.model.model_copy(update={"levels": (picture, clip)})}
    )


class TinyClips(TinyPictures):
    """Pictures of `TinyPictures` that move to the right, a pixel a frame."""

    def batch(self, ids: Sequence[int]) -> Batch:
        batch = super().batch(ids)
        frames = [batch.picture.roll(n, dims=3) for n in range(FRAMES)]
        return replace(batch, picture=torch.stack(frames, dim=2))


class TinyShapes(TinyPictures):
    """Pictures of `TinyPictures` of three shapes: squares, wide ones and tall ones."""

    def shape_of(self, n: int) -> int:
        return n % 3

    def batch(self, ids: Sequence[int]) -> Batch:
        batch = super().batch(ids)
        size = ((16, 16), (12, 20), (20, 12))[self.shape_of(ids[0])]
        return replace(batch, picture=torch.nn.functional.interpolate(batch.picture, size=size))


def encode(captions: Sequence[str]) -> list[Tensor]:
    """Features of a caption: a fixed random vector for each word, and one for its end."""
    return [
        torch.stack(
            [
                torch.from_numpy(stream(0, f"word {word}").random(8)).float()
                for word in (*caption.split(), "</s>")
            ]
        )
        for caption in captions
    ]


# --- runs and what they leave ------------------------------------------------------------------

OF_THE_MACHINE = {"images_per_second", "data_wait", "seconds", "peak_memory_bytes"}


def there(value: T | None) -> T:
    """A value that a test knows to be there."""
    assert value is not None
    return value


def run(folder: Path, config: RunConfig | None = None, **options: Any) -> Path:
    """Train the tiny run in a folder, or continue it."""
    options = {"loader": TinyPictures(), "encode": encode} | options
    return train(config or tiny_config(), folder=folder, **options)


def stop_at(images_seen: int, number: int = signal.SIGTERM) -> Hook:
    """A hook that sends this process a signal, as a cluster would."""

    def hook(view: View) -> None:
        if view.images_seen == images_seen:
            os.kill(os.getpid(), number)

    return (1, hook)


def digests(folder: Path) -> dict[str, str]:
    """What a run has learnt: hashes of weights, average and optimizer, and of what is exported."""
    last = there(newest(folder / "checkpoints"))
    paths = [*last.glob("*.safetensors"), *folder.glob("model/*"), *folder.glob("ema/*")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics, without what depends on the machine."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    return [{key: line[key] for key in line.keys() - OF_THE_MACHINE} for line in lines]


def trainer_after(images_seen: int, config: RunConfig | None = None) -> Trainer[NestedUNet]:
    """A trainer that has taken the first steps of a run."""
    config = config or tiny_config()
    trainer, feed = Trainer(diffusion(config)), Feed(config, TinyPictures(), encode)
    for step in steps(config.train):
        if step.first >= images_seen:
            break
        trainer.grow(len(step.rows))
        trainer.step(feed(step))
    return trainer


def state(trainer: Trainer[NestedUNet]) -> dict[str, Tensor]:
    """Copies of everything that a step may change."""
    snapshot = trainer.snapshot()
    return {
        f"{part}.{name}": value.clone()
        for part in ("weights", "ema", "optimizer", "tracks")
        for name, value in getattr(snapshot, part).items()
    }


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Fail unless two states are equal, bit for bit."""
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
