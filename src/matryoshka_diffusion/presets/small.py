"""Runs on real data that 2 CPU cores train in minutes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from matryoshka_diffusion.codecconfig import CodecRunConfig
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

DECAY = 0.3
"""Share of the last stage in which one rate for all levels decays.

As a share of all images it would be most of the last stage, and the finest level would hardly be
trained at the full rate: on Fashion-MNIST, in two stages of equal compute, the Fréchet distance was
401 with that and is 341 with this (docs/results.md).
"""


OWN_RATES = {"lr_per_level": True, "decay_share": 1.0}
"""The rate of each level falls over its own life (docs/training-settings.md)."""


def openmoji(name: str) -> RunConfig:
    """Text-to-image on 1,904 captioned OpenMoji images, levels {16, 32, 64}: the main run.

    It takes about 15 minutes on 2 CPU cores. The model learns its images by heart and recalls them
    by prompt; it does not generalise to unseen combinations.
    """
    small = {"patch": 2, "heads": 4, "shift_power": 2.0}
    outer = {"blocks": (0, 0), "attention": (0, 0), **small}
    trunk = {"widths": (96, 192), "blocks": (1, 1), "attention": (0, 1), **small}
    # The shift ratios are four times those of the sides: the caption decides which image is meant
    # under noise that hides the image, so that is where most of the training belongs.
    levels = (
        LevelConfig(side=16, shift_ratio=4.0, **trunk),
        LevelConfig(side=32, widths=(64, 32), shift_ratio=8.0, **outer),
        LevelConfig(side=64, widths=(32, 32), shift_ratio=16.0, **outer),
    )
    train = _training(
        StageConfig(levels=1, images=84_000, batch_size=64, lr=2e-3),
        StageConfig(levels=2, images=20_000, batch_size=48, lr=2e-3),
        StageConfig(levels=3, images=56_000, batch_size=48, lr=2e-3, mix=(0.4, 0.1, 0.5)),
    )
    return RunConfig(
        name=name,
        model=ModelConfig(levels=levels, embedding=512, text=TextConfig(features=384, width=256)),
        data=DataConfig(source="openmoji"),
        encoder=EncoderConfig(name="minilm"),
        train=train.model_copy(update=OWN_RATES),
        # At t = 1/25 half of the finest level is still noise, so steps even in log-SNR end closer
        # to the image than steps even in t. Guidance was measured to find no more images.
        sampling=SamplingConfig(grid="log-snr"),
    )


WAKE = (-3.0,)
"""Log-SNR from which the outer levels of `openmoji-256` take part, in training and in sampling."""


def openmoji_256(name: str) -> RunConfig:
    """Text-to-image on the same images at 256 pixels, levels {16, 64, 256} that wake late.

    Half of the images of the later stages stay at 16 pixels, where captions are learnt. It takes
    about an hour and a half on 2 CPU cores.
    """
    run = openmoji(name)
    small = {"heads": 4, "shift_power": 2.0}
    middle = {"widths": (64, 64, 96), "blocks": (0, 0, 0), "attention": (0, 0, 0), **small}
    outer = {"widths": (64, 64), "blocks": (0, 0), "attention": (0, 0), **small}
    levels = (
        run.model.levels[0].model_copy(update={"widths": (128, 192)}),
        # With twice these ratios, half as many images would wake the fine levels.
        LevelConfig(side=64, patch=2, shift_ratio=8.0, **middle),
        LevelConfig(side=256, patch=4, shift_ratio=32.0, **outer),
    )
    train = _training(
        StageConfig(levels=1, images=140_000, batch_size=64, lr=2e-3),
        StageConfig(levels=2, images=60_000, batch_size=64, lr=2e-3, mix=(0.5, 0.5)),
        StageConfig(levels=3, images=110_000, batch_size=64, lr=2e-3, mix=(0.5, 0.15, 0.35)),
    )
    train = train.model_copy(update={**OWN_RATES, "wake": WAKE, "preview_every_images": 20_000})
    update = {
        "model": run.model.model_copy(update={"levels": levels}),
        "train": train,
        "sampling": run.sampling.model_copy(update={"wake": WAKE}),
    }
    return run.model_copy(update=update)


def emoji_styles(name: str) -> RunConfig:
    """Text-to-image on emoji in three styles, 10 % of the pairs of emoji and style held out.

    Three times the images of `openmoji` have twice its training: half an hour to an hour on 2 CPU
    cores. `mdm eval --metrics unseen` measures whether it draws the pairs that it has not seen. The
    data is the unpacked npm package `@lobehub/fluent-emoji-3d`, beside OpenMoji and Debian's
    `fonts-noto-color-emoji`.
    """
    run = openmoji(name)
    longer = [stage.model_copy(update={"images": 2 * stage.images}) for stage in run.train.stages]
    # Beside each preview the loss of held-out images is computed.
    rare = run.train.model_copy(update={"preview_every_images": 40_000})
    data = DataConfig(source="emoji-styles", held_out=0.1)
    return run.model_copy(update={"data": data, "train": in_stages(rare, *longer)})


def fashion_mnist(name: str) -> RunConfig:
    """Class-conditional Fashion-MNIST, 60,000 grey images padded to 32 pixels, levels {16, 32}.

    It takes about 6 minutes on 2 CPU cores.
    """
    small = {"patch": 2, "heads": 4, "shift_power": 2.0}
    outer = {"blocks": (1, 0), "attention": (0, 0), "shift_ratio": 2.0, **small}
    levels = (
        LevelConfig(side=16, widths=(64, 128), blocks=(1, 1), attention=(0, 1), **small),
        LevelConfig(side=32, widths=(64, 64), **outer),
    )
    return RunConfig(
        name=name,
        model=ModelConfig(levels=levels, embedding=256, channels=1, classes=10),
        data=DataConfig(source="fashion-mnist"),
        train=_training(
            StageConfig(levels=1, images=90_000, batch_size=128, lr=1e-3),
            StageConfig(levels=2, images=60_000, batch_size=128, lr=1e-3),
        ),
        sampling=SamplingConfig(guidance=(2.0,)),
    )


def folder(name: str, like: Callable[[str], RunConfig]) -> RunConfig:
    """A folder of your own images: the nest and training of a run `like` this one.

    The command adds the class folders or captions that it finds there as conditions.
    """
    run = like(name)
    update = {
        "model": run.model.model_copy(update={"text": None}),
        "encoder": None,
        "data": DataConfig(source="folder", flip=True),
        "sampling": run.sampling.model_copy(update={"guidance": (1.0,)}),
    }
    return run.model_copy(update=update)


def emoji_still(name: str) -> RunConfig:
    """Text-to-image on the first frames of animated emoji, 32 pixels: the start of `emoji-video`.

    The data is the unpacked npm package `@lobehub/fluent-emoji-anim-1`.
    """
    shape = {"widths": (64, 128), "blocks": (1, 2), "attention": (0, 1), "heads": 4, "patch": 2}
    level = LevelConfig(side=32, shift_ratio=2.0, shift_power=2.0, **shape)
    text = TextConfig(features=384, width=256)
    return RunConfig(
        name=name,
        model=ModelConfig(levels=(level,), embedding=512, text=text),
        data=DataConfig(source="fluent-emoji", clip="start"),
        encoder=EncoderConfig(name="minilm"),
        train=_training(StageConfig(levels=1, images=40_000, batch_size=32, lr=1e-3)),
        sampling=SamplingConfig(grid="log-snr", guidance=(3.0,)),
    )


def emoji_video(name: str) -> RunConfig:
    """Text-to-video on animated emoji, levels {32, 16x32}, from a run of `emoji-still` (--init)."""
    still = emoji_still(name)
    clip = {
        "frames": 16,
        "widths": (32, 32, 64, 64, 64),  # most frames have the fewest channels
        "blocks": (1, 1, 1, 1, 0),
        "attention": (0,) * 5,
        "halve_frames": (True,) * 4,
        "frame_attention": (1, 1, 1, 1, 0),
        "heads": 1,
        "shift_ratio": 4.0,  # as in the paper: a quarter of the signal to noise
    }
    (level,) = still.model.levels
    levels = (level, level.model_copy(update=clip))
    stage = StageConfig(levels=2, images=20_000, batch_size=16, lr=2e-3, mix=(0.25, 0.75))
    train = {"init_levels": 1, "warmup_images": 1_600, "preview_every_images": 4_000}
    update = {
        "model": still.model.model_copy(update={"levels": levels}),
        "train": _training(stage).model_copy(update=train),
        # The image is guided and the clip follows it. With 3 for the clip, colours run over.
        "sampling": SamplingConfig(grid="log-snr", guidance=(3.0, 1.0)),
    }
    return still.model_copy(update=update)


SMALL: dict[str, Callable[[str], RunConfig]] = {
    "openmoji": openmoji,
    "openmoji-256": openmoji_256,
    "emoji-styles": emoji_styles,
    "fashion-mnist": fashion_mnist,
    "folder-64": partial(folder, like=openmoji),
    "folder-256-cpu": partial(folder, like=openmoji_256),
    "emoji-still": emoji_still,
    "emoji-video": emoji_video,
}


def _training(*stages: StageConfig) -> TrainConfig:
    """A short training: a high rate, quick averaging, a linear decay at the end."""
    quick = {"warmup_images": 6_400, "ema_decay": 0.998, "preview_every_images": 12_000}
    train = TrainConfig(stages=stages, decay_share=DECAY, whiten_captions=True, **quick)
    return in_stages(train, *stages)


def in_stages(train: TrainConfig, *stages: StageConfig) -> TrainConfig:
    """The training with other stages; one rate of all levels decays, if at all, in the last."""
    if train.lr_per_level:
        return train.model_copy(update={"stages": stages})
    share = stages[-1].images / sum(stage.images for stage in stages)
    decay = DECAY * share if train.decay_share else 0.0
    return train.model_copy(update={"stages": stages, "decay_share": round(decay, 4)})


CODECS: dict[str, CodecRunConfig] = {
    name: CodecRunConfig(name=name, data=data, side=side, images=images)
    for name, data, side, images in (
        ("codec", DataConfig(source="folder", flip=True), 64, 200_000),
        ("openmoji-codec", DataConfig(source="openmoji"), 64, 12_000),
        ("fashion-mnist-codec", DataConfig(source="fashion-mnist"), 32, 12_000),
    )
}
"""Trainings of autoencoders.

On one shared core OpenMoji's took 14 minutes and Fashion-MNIST's 7, to 26.1 and 24.8 dB on training
images (one run each).
"""
