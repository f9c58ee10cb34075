"""Named runs. Each is a function that returns a complete `RunConfig`; none does anything else.

The paper's architectures are Appendix A, their training Appendix B. Where the paper is silent the
comment beside the value says whose choice it is. `mdm info NAME` prints any of them as a table.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

from matryoshka_diffusion.config import (
    CoarseConfig,
    CodecConfig,
    CodecRunConfig,
    ConfigError,
    DataConfig,
    EncoderConfig,
    LevelConfig,
    MicroConfig,
    ModelConfig,
    ProcessConfig,
    RunConfig,
    SamplingConfig,
    StageConfig,
    TextConfig,
    TrainConfig,
    WeightingConfig,
)

# --- small runs: real data, a 2-core CPU -------------------------------------------------------


def openmoji() -> RunConfig:
    """Text-to-image on 1,904 captioned OpenMoji pictures, levels {16, 32, 64}: the main job.

    Command: `mdm train openmoji --out runs/openmoji`. About 12 minutes on 2 CPU cores with bf16;
    prompt retrieval then was 0.805 nearest and 0.930 among five (one run, seed 0).
    It learns its pictures by heart and recalls them by prompt; it does not generalise to unseen
    combinations.
    """
    small = {"patch": 2, "heads": 4, "shift_power": 2.0}
    outer = {"attention": (0, 0), **small}
    # The ratios are twice the sides': which picture a caption means is learnt under noise that
    # hides the picture. A reasoned choice; its effect was not measured on its own.
    model = ModelConfig(
        levels=(
            LevelConfig(
                side=16,
                widths=(96, 192),
                blocks=(1, 1),
                attention=(0, 1),
                shift_ratio=2.0,
                **small,
            ),
            LevelConfig(side=32, widths=(64, 32), blocks=(0, 0), shift_ratio=4.0, **outer),
            LevelConfig(side=64, widths=(32, 32), blocks=(0, 0), shift_ratio=8.0, **outer),
        ),
        embedding=512,
        text=TextConfig(features=384, width=256),
    )
    return RunConfig(
        name="openmoji",
        model=model,
        data=DataConfig(source="openmoji"),
        encoder=EncoderConfig(name="minilm"),
        train=_small_training(
            StageConfig(levels=1, images=84_000, batch_size=64, lr=2e-3),
            StageConfig(levels=2, images=20_000, batch_size=48, lr=2e-3),
            StageConfig(levels=3, images=56_000, batch_size=48, lr=2e-3, mix=(0.4, 0.1, 0.5)),
        ),
        # At t = 1/25 a fifth of the finest level (shifted by 64) is still noise: steps even in
        # log-SNR end closer to the picture than steps even in t (README, Results).
        sampling=SamplingConfig(grid="log-snr", guidance=(3.0,)),
    )


def fashion_mnist() -> RunConfig:
    """Class-conditional Fashion-MNIST, 60,000 grey pictures padded to 32 pixels, levels {16, 32}.

    Command: `mdm train fashion-mnist --out runs/fashion`. About 6 minutes on 2 CPU cores.
    """
    small = {"patch": 2, "heads": 4, "shift_power": 2.0}
    model = ModelConfig(
        levels=(
            LevelConfig(side=16, widths=(64, 128), blocks=(1, 1), attention=(0, 1), **small),
            LevelConfig(
                side=32, widths=(64, 64), blocks=(1, 0), attention=(0, 0), shift_ratio=2.0, **small
            ),
        ),
        embedding=256,
        channels=1,
        classes=10,
    )
    return RunConfig(
        name="fashion-mnist",
        model=model,
        data=DataConfig(source="fashion-mnist", flip=False),
        train=_small_training(
            StageConfig(levels=1, images=90_000, batch_size=128, lr=1e-3),
            StageConfig(levels=2, images=60_000, batch_size=128, lr=1e-3),
        ),
        sampling=SamplingConfig(guidance=(2.0,)),
    )


def folder_64() -> RunConfig:
    """A folder of your own pictures at 64 pixels, levels {16, 32, 64}, without conditions.

    Command: `mdm train folder-64 --data DIR --out runs/mine`. Class sub-folders or captions that
    the folder holds are found by the command, which completes this preset with them.
    """
    base = openmoji()
    return base.model_copy(
        update={
            "name": "folder-64",
            "model": base.model.model_copy(update={"text": None}),
            "encoder": None,
            "data": DataConfig(source="folder", flip=True),
            "sampling": SamplingConfig(grid="log-snr"),
        }
    )


# --- small runs: clips -------------------------------------------------------------------------


def emoji_still() -> RunConfig:
    """Text-to-image on the first frames of animated emoji, 32 pixels: where `emoji-video` begins.

    Command: `mdm train emoji-still --data DIR --out runs/still`, where DIR is the unpacked npm
    package `@lobehub/fluent-emoji-anim-1`.
    """
    level = LevelConfig(
        side=32,
        widths=(64, 128),
        blocks=(1, 2),
        attention=(0, 1),
        heads=4,
        patch=2,
        shift_ratio=2.0,
        shift_power=2.0,
    )
    model = ModelConfig(levels=(level,), embedding=512, text=TextConfig(features=384, width=256))
    return RunConfig(
        name="emoji-still",
        model=model,
        data=DataConfig(source="fluent-emoji", clip="start"),
        encoder=EncoderConfig(name="minilm"),
        train=_small_training(StageConfig(levels=1, images=40_000, batch_size=32, lr=1e-3)),
        sampling=SamplingConfig(grid="log-snr", guidance=(3.0,)),
    )


def emoji_video() -> RunConfig:
    """Text-to-video on animated emoji, levels {32, 16x32}: how the stills of `emoji-still` move.

    Command: `mdm train emoji-video --data DIR --init runs/still --out runs/moving`, after a run of
    `emoji-still` in runs/still.
    """
    still = emoji_still()
    (picture,) = still.model.levels
    clip = picture.model_copy(
        update={
            "frames": 16,
            "widths": (32, 32, 64, 64, 64),  # most frames have the fewest channels
            "blocks": (1, 1, 1, 1, 0),
            "attention": (0,) * 5,
            "halve_frames": (True,) * 4,
            "frame_attention": (1, 1, 1, 1, 0),
            "heads": 1,
            "shift_ratio": 4.0,  # as the paper: a quarter of the signal to noise
        }
    )
    stage = StageConfig(levels=2, images=20_000, batch_size=16, lr=2e-3, mix=(0.25, 0.75))
    then = {"init_levels": 1, "warmup_images": 1_600, "preview_every_images": 4_000}
    return still.model_copy(
        update={
            "name": "emoji-video",
            "model": still.model.model_copy(update={"levels": (picture, clip)}),
            "train": _small_training(stage).model_copy(update=then),
            # The picture is guided and the clip follows it; guided by 3 too, its colours run over.
            "sampling": SamplingConfig(grid="log-snr", guidance=(3.0, 1.0)),
        }
    )


# --- small runs: the paper's baselines (Section 4.1) -------------------------------------------
# Each is as long as its forward passes take the arithmetic of all stages of the run that it is
# compared with, to 1 %; base and upsampler share it. Costs are of one picture's forward pass.


def openmoji_simple() -> RunConfig:
    """Simple DM: `openmoji` as one UNet at 64 pixels, 6.2 M parameters and 0.56 GFLOP.

    Command: `mdm train openmoji-simple --out runs/simple`. The nest has 7.2 M and 0.52. Widths,
    blocks and attention at each side are the nest's, and so are the finest level's schedule, the
    optimiser and the sampling; there are no levels, hence one stage.
    """
    return _one_stage(openmoji(), "openmoji-simple", (_openmoji_unet(),), images=100_000)


def openmoji_finest() -> RunConfig:
    """The nest of `openmoji` without the low-resolution losses, all levels from the start.

    Command: `mdm train openmoji-finest --out runs/finest`. The same 7.2 M and 0.52 GFLOP.
    """
    run = openmoji()
    finest = _one_stage(run, "openmoji-finest", run.model.levels, images=108_000)
    return _finest_loss(finest)


def openmoji_base() -> RunConfig:
    """The base of a cascade: the coarsest level of `openmoji` (16 pixels) and its first stage.

    Command: `mdm train openmoji-base --out runs/base`. 5.9 M parameters and 0.30 GFLOP. Its
    pictures are D^r of those of 64 pixels, as the nest's and those that the upsampler learns from.
    """
    run = openmoji()
    base = _one_stage(run, "openmoji-base", run.model.levels[:1], images=84_000, batch_size=64)
    return _on_pictures_of(64, base)


def openmoji_upsampler() -> RunConfig:
    """The upsampler of a cascade, 16 to 64 pixels: the UNet of `openmoji-simple`.

    Command: `mdm train openmoji-upsampler --base runs/base --out runs/upsampler`, and
    `mdm sample runs/upsampler` then draws with both. 6.5 M parameters and 0.57 GFLOP.
    """
    run = _one_stage(openmoji(), "openmoji-upsampler", (_openmoji_unet(),), images=55_000)
    return _upsampling(run, side=16, noise=0.3)


def fashion_mnist_simple() -> RunConfig:
    """Simple DM: `fashion-mnist` as one UNet at 32 pixels, 2.7 M parameters and 0.29 GFLOP.

    Command: `mdm train fashion-mnist-simple --out runs/simple`. The nest has 3.0 M and 0.32 GFLOP.
    """
    levels = (_fashion_unet(),)
    return _one_stage(fashion_mnist(), "fashion-mnist-simple", levels, images=98_000)


def fashion_mnist_finest() -> RunConfig:
    """The nest of `fashion-mnist` without the low-resolution loss, both levels from the start.

    Command: `mdm train fashion-mnist-finest --out runs/finest`. The same 3.0 M and 0.32 GFLOP.
    """
    run = fashion_mnist()
    return _finest_loss(_one_stage(run, "fashion-mnist-finest", run.model.levels, images=90_000))


def fashion_mnist_base() -> RunConfig:
    """The base of a cascade: the coarse level of `fashion-mnist` (16 pixels) and its first stage.

    Command: `mdm train fashion-mnist-base --out runs/base`. 2.2 M parameters and 0.11 GFLOP.
    """
    run = fashion_mnist()
    base = _one_stage(run, "fashion-mnist-base", run.model.levels[:1], images=90_000)
    return _on_pictures_of(32, base)


def fashion_mnist_upsampler() -> RunConfig:
    """The upsampler of a cascade, 16 to 32 pixels: the UNet of `fashion-mnist-simple`.

    Command: `mdm train fashion-mnist-upsampler --base runs/base --out runs/upsampler`. 2.8 M
    parameters and 0.29 GFLOP.
    """
    levels = (_fashion_unet(),)
    run = _one_stage(fashion_mnist(), "fashion-mnist-upsampler", levels, images=65_000)
    return _upsampling(run, side=16, noise=0.3)


def _openmoji_unet() -> LevelConfig:
    return LevelConfig(
        side=64,
        widths=(32, 64, 96, 192),
        blocks=(0, 0, 1, 1),
        attention=(0, 0, 0, 1),
        patch=2,
        heads=4,
        shift_ratio=8.0,
        shift_power=2.0,
    )


def _fashion_unet() -> LevelConfig:
    return LevelConfig(
        side=32,
        widths=(64, 64, 128),
        blocks=(1, 1, 1),
        attention=(0, 0, 1),
        patch=2,
        heads=4,
        shift_ratio=2.0,
        shift_power=2.0,
    )


def _one_stage(
    run: RunConfig,
    name: str,
    levels: tuple[LevelConfig, ...],
    *,
    images: int,
    batch_size: int | None = None,
) -> RunConfig:
    """The run with other levels and one stage like its last: every row has all levels."""
    stage = run.train.stages[-1].model_copy(
        update={
            "levels": len(levels),
            "images": images,
            "batch_size": batch_size or run.train.stages[-1].batch_size,
            "mix": (),
        }
    )
    model = run.model.model_copy(update={"levels": levels})
    train = _staged(run.train, (stage,))
    return run.model_copy(update={"name": name, "model": model, "train": train})


def _finest_loss(run: RunConfig) -> RunConfig:
    """The run in which only the finest level's error counts."""
    weights = (*[0.0] * (len(run.model.levels) - 1), 1.0)
    process = run.process.model_copy(update={"level_weights": weights})
    return run.model_copy(update={"process": process})


def _on_pictures_of(side: int, run: RunConfig) -> RunConfig:
    return run.model_copy(update={"data": run.data.model_copy(update={"side": side})})


def _upsampling(run: RunConfig, *, side: int, noise: float) -> RunConfig:
    """The run as an upsampler of pictures of `side`, which samples with noise of that time."""
    model = run.model.model_copy(update={"coarse": CoarseConfig(side=side)})
    sampling = run.sampling.model_copy(update={"coarse_noise": noise})
    return run.model_copy(update={"model": model, "sampling": sampling})


# --- small runs on codes of an autoencoder (docs/baselines.md) ----------------------------------


def openmoji_latent() -> RunConfig:
    """OpenMoji at 64 pixels as codes of 16 x 16: latent diffusion, one level.

    Commands: `mdm train openmoji-codec --out runs/codec`, then
    `mdm train openmoji-latent --codec runs/codec --out runs/latent`.
    """
    # openmoji's own level of this side and as many images as it sees, for about as much arithmetic.
    # The shift is that level's, too; it was not tuned for codes.
    base = openmoji()
    stage = StageConfig(levels=1, images=160_000, batch_size=64, lr=2e-3)
    return _on_codes(base, "openmoji-latent", base.model.levels[:1], (stage,))


def openmoji_codes() -> RunConfig:
    """OpenMoji at 64 pixels as codes of 16 x 16 with a coarser level of 8 x 8: MDM on codes.

    Commands: `mdm train openmoji-codec --out runs/codec`, then
    `mdm train openmoji-codes --codec runs/codec --out runs/codes`.
    """
    small = {"heads": 4, "shift_power": 2.0}
    levels = (
        LevelConfig(
            side=8, widths=(96, 192), blocks=(1, 1), attention=(0, 1), shift_ratio=2.0, **small
        ),
        LevelConfig(
            side=16, widths=(64, 64), blocks=(1, 0), attention=(0, 0), shift_ratio=4.0, **small
        ),
    )
    stages = (
        StageConfig(levels=1, images=84_000, batch_size=64, lr=2e-3),
        StageConfig(levels=2, images=76_000, batch_size=48, lr=2e-3, mix=(0.4, 0.6)),
    )
    return _on_codes(openmoji(), "openmoji-codes", levels, stages)


def fashion_mnist_latent() -> RunConfig:
    """Fashion-MNIST at 32 pixels as codes of 8 x 8: latent diffusion, one level.

    Commands: `mdm train fashion-mnist-codec --out runs/codec`, then
    `mdm train fashion-mnist-latent --codec runs/codec --out runs/latent`.
    """
    base = fashion_mnist()
    level = base.model.levels[0].model_copy(update={"side": 8, "patch": 1})  # the same trunk
    stage = StageConfig(levels=1, images=150_000, batch_size=128, lr=1e-3)
    return _on_codes(base, "fashion-mnist-latent", (level,), (stage,))


def folder_64_latent() -> RunConfig:
    """A folder of your own pictures at 64 pixels as codes of 16 x 16: latent diffusion.

    Commands: `mdm train codec --data DIR --out runs/codec`, then
    `mdm train folder-64-latent --data DIR --codec runs/codec --out runs/latent`.
    """
    base, small = folder_64(), openmoji_latent()
    return _on_codes(base, "folder-64-latent", small.model.levels, small.train.stages)


def _on_codes(
    base: RunConfig,
    name: str,
    levels: tuple[LevelConfig, ...],
    stages: tuple[StageConfig, ...],
    *,
    factor: int = 4,
    channels: int = 4,
) -> RunConfig:
    """`base` with levels of codes, of unit variance and without bounds to keep estimates in."""
    nest = {"levels": levels, "channels": channels, "data_std": 1.0}
    return base.model_copy(
        update={
            "name": name,
            "model": base.model.model_copy(update=nest),
            "codec": CodecConfig(factor=factor),
            "train": _staged(base.train, stages),
            "sampling": base.sampling.model_copy(update={"threshold": ("none",)}),
        }
    )


DECAY = 0.3
"""The share of a run's last stage in which the rate decays, where it does.

Of all images it would be most of a last stage, and the finest level would hardly be trained at the
full rate: on Fashion-MNIST, in two stages of equal compute, the Fréchet distance was 401 with that
and is 341 with this (docs/results.md).
"""


def _small_training(*stages: StageConfig) -> TrainConfig:
    """Short runs: a high rate, quick averaging, a linear decay at the end."""
    train = TrainConfig(
        stages=stages,
        warmup_images=6_400,
        decay_share=DECAY,
        clip_norm=1.0,
        ema_decay=0.998,
        preview_every_images=12_000,
    )
    return _staged(train, stages)


def _staged(train: TrainConfig, stages: tuple[StageConfig, ...]) -> TrainConfig:
    """The training in these stages; a rate that decays does so in the last of them."""
    share = stages[-1].images / sum(stage.images for stage in stages)
    decay = DECAY * share if train.decay_share else 0.0
    return train.model_copy(update={"stages": stages, "decay_share": round(decay, 4)})


# --- the paper's architectures (Appendix A) ----------------------------------------------------


def s64(*, text: bool) -> LevelConfig:
    """The base architecture, MDM-S64: most attention at 16 x 16.

    Feed-forward layers after attention and the `scale` micro-condition are the released code's;
    with them text conditioning gives the 437 M parameters that the paper rounds to 450 M.
    """
    return LevelConfig(
        side=64,
        widths=(256, 512, 768),
        blocks=(2, 2, 2),
        attention=(0, 1, 5),
        attention_mlp=True,
        middle=True,
        micro=_scale(64) if text else (),
    )


def outer(side: int, widths: Sequence[int], *, power: float, text: bool = True) -> LevelConfig:
    """A level around S64: convolutions only, and a schedule shifted by its side over 64."""
    blocks = (2,) * (len(widths) - 1) + (1,)
    return LevelConfig(
        side=side,
        widths=tuple(widths),
        blocks=blocks,
        attention=(0,) * len(widths),
        micro=_scale(side) if text else (),
        shift_ratio=side / 64,
        shift_power=power,
    )


def _scale(side: int) -> tuple[MicroConfig, ...]:
    return (MicroConfig(name="scale", ceiling=float(side)),)


def nest(*sides: int, text: bool) -> tuple[LevelConfig, ...]:
    """The levels of MDM-S64..., by their sides."""
    # The shift's power is the released models' (the paper leaves it open): 1 at 256, 2 at 1024.
    power = 2.0 if sides[-1] == 1024 else 1.0
    widths = {
        (64,): {},
        (64, 256): {256: (64, 128, 256)},
        (64, 128, 256): {128: (128, 256), 256: (64, 128)},
        (64, 256, 1024): {256: (64, 128, 256), 1024: (32, 32, 64)},
        (64, 128, 256, 512, 1024): {
            128: (128, 256),
            256: (64, 128),
            512: (32, 64),
            1024: (32, 32),
        },
    }[sides]
    outers = (outer(side, wide, power=power, text=text) for side, wide in widths.items())
    return (s64(text=text), *outers)


def t16() -> LevelConfig:
    """MDM-S64T16: 16 frames around S64, halved until one is left, at 64 x 64 all along."""
    return LevelConfig(
        side=64,
        frames=16,
        widths=(256,) * 5,
        blocks=(2, 2, 2, 2, 1),
        attention=(0,) * 5,
        halve_frames=(True,) * 4,
        frame_attention=(1, 1, 1, 1, 0),
        micro=_scale(64),
        shift_ratio=4.0,
    )


def t16s256() -> LevelConfig:
    """MDM-S64T16S256: around these frames the same at 256 pixels, each a picture of its own."""
    level = outer(256, (64, 128, 256), power=1.0)
    return level.model_copy(update={"frames": 16, "shift_ratio": 16.0})


# --- the paper's runs (Appendix B) -------------------------------------------------------------


def _text_run(name: str, sides: tuple[int, ...], stages: tuple[StageConfig, ...]) -> RunConfig:
    """CC12M."""
    data = DataConfig(source="folder", held_out=0.001)
    return _captioned(name, nest(*sides, text=True), stages, data)


def _captioned(
    name: str, levels: tuple[LevelConfig, ...], stages: tuple[StageConfig, ...], data: DataConfig
) -> RunConfig:
    """Captions as FLAN-T5-XL features with two self-attention layers on top of them."""
    model = ModelConfig(
        levels=levels,
        embedding=1024,
        text=TextConfig(features=2048, width=1024, layers=2),
    )
    return RunConfig(
        name=name,
        model=model,
        process=_V_PREDICTION,
        data=data,
        encoder=EncoderConfig(name="t5", path="google/flan-t5-xl", max_tokens=128),
        train=_paper_training(stages, condition_dropout=0.1),  # ours: guidance needs it
        sampling=SamplingConfig(sampler="ddpm", steps=250, guidance=(7.0,), threshold=("dynamic",)),
    )


def _class_run(name: str, sides: tuple[int, ...], stages: tuple[StageConfig, ...]) -> RunConfig:
    """ImageNet: labels in the time embedding, no cross-attention, labels not dropped."""
    model = ModelConfig(levels=nest(*sides, text=False), embedding=1024, classes=1000)
    return RunConfig(
        name=name,
        model=model,
        process=_V_PREDICTION,
        data=DataConfig(source="folder"),
        train=_paper_training(stages, condition_dropout=0.0),
        sampling=SamplingConfig(sampler="ddpm", steps=250, threshold=("dynamic",)),
    )


_V_PREDICTION = ProcessConfig(prediction="v", weighting=(WeightingConfig(name="v"),))


def _paper_training(stages: tuple[StageConfig, ...], *, condition_dropout: float) -> TrainConfig:
    """The default training config of Appendix B."""
    return TrainConfig(
        stages=stages,
        optimizer="adam",
        betas=(0.9, 0.99),
        eps=1e-8,
        warmup_images=30_000 * stages[0].batch_size,
        clip_norm=2.0,
        ema_decay=0.9999,
        precision="bf16",
        condition_dropout=condition_dropout,
        log_every_images=100 * stages[0].batch_size,
        preview_every_images=5_000 * stages[0].batch_size,
        checkpoint_every_images=5_000 * stages[0].batch_size,
    )


def _stage(levels: int, batch_size: int, steps: int) -> StageConfig:
    """A stage of the paper: learning rate 1e-4, length in steps.

    The paper trains mixed resolutions within a batch and does not say in what shares; half of the
    rows at the finest level and the rest spread evenly is ours.
    """
    coarse = tuple(0.5 / (levels - 1) for _ in range(levels - 1))
    return StageConfig(
        levels=levels,
        images=steps * batch_size,
        batch_size=batch_size,
        lr=1e-4,
        mix=(*coarse, 0.5) if coarse else (),
    )


def _text_stages(*levels: int) -> tuple[StageConfig, ...]:
    """CC12M: 64, then 256, then 1024 pixels; `levels` are how many are active in each."""
    lengths = ((2048, 500_000), (1024, 500_000), (768, 100_000))
    return tuple(_stage(n, *length) for n, length in zip(levels, lengths, strict=False))


def _class_stages(*levels: int) -> tuple[StageConfig, ...]:
    """ImageNet: 64, then 256 pixels; the paper has no stage at 1024, this one is CC12M's."""
    lengths = ((512, 300_000), (256, 500_000), (192, 100_000))
    return tuple(_stage(n, *length) for n, length in zip(levels, lengths, strict=False))


def _video_run(name: str, levels: int) -> RunConfig:
    """WebVid-10M: 64 pixels, then 16 frames of them, then 16 frames of 256 pixels.

    Every fourth frame, mirrored or not; of each video one clip (Appendix E), which we take from a
    random place that stays. The stage on pictures, too, decodes whole clips where finer levels need
    them: growing `webvid-64` is cheaper (docs/growing.md).
    """
    data = DataConfig(source="clips", flip=True, frame_stride=4, clip="fixed", held_out=0.001)
    lengths = ((2048, 500_000), (512, 500_000), (128, 300_000))
    stages = tuple(_stage(n, *length) for n, length in enumerate(lengths[:levels], start=1))
    return _captioned(name, (s64(text=True), t16(), t16s256())[:levels], stages, data)


def _imagenet_latent() -> RunConfig:
    """S64 on codes of 64 x 64 (Appendix D.2: of the autoencoder KL-F4, which have 3 channels)."""
    base = _class_run("imagenet-256-latent", (64,), _class_stages(1))
    return _on_codes(base, base.name, base.model.levels, base.train.stages, channels=3)


def _cc12m_latent() -> RunConfig:
    """The changed S64 on codes of 32 x 32 (Appendix D.2: of KL-F8, which have 4 channels).

    It does not halve after its first width, so attention is at 16 x 16 as in S64, with S64's
    weights. The micro-condition tells of pictures, which have 256 pixels.
    """
    base = _text_run("cc12m-256-latent", (64,), _text_stages(1))
    level = s64(text=True).model_copy(
        update={"side": 32, "halve": (False, True), "micro": _scale(256)}
    )
    return _on_codes(base, base.name, (level,), base.train.stages, factor=8)


def _released(name: str, sides: tuple[int, ...]) -> RunConfig:
    """The networks of the paper's released checkpoints (no text layers, attention unmasked)."""
    middle = "std" if len(sides) == 3 else "none"  # only the 1024 model divides, at its 256 level
    levels = tuple(
        level.model_copy(update={"input_scaling": scaling})
        for level, scaling in zip(nest(*sides, text=True), ("none", middle, "none"), strict=False)
    )
    model = ModelConfig(
        levels=levels,
        embedding=1024,
        schedule="squared-cosine",
        text=TextConfig(features=2048, width=2048, masked=False, learned_null=False),
    )
    base = _text_run(name, sides, _text_stages(*range(1, len(sides) + 1)))
    process = ProcessConfig(prediction="v", weighting=(WeightingConfig(name="eps"),))
    sampling = base.sampling.model_copy(update={"threshold": ("clip",), "grid": "released"})
    data = base.data.model_copy(update={"pixels": "released"})
    return base.model_copy(
        update={"model": model, "process": process, "sampling": sampling, "data": data}
    )


# --- the paper's baselines at 256 pixels (Section 4.1, Appendix D.1) ---------------------------


def _simple_256(run: RunConfig, name: str) -> RunConfig:
    """Simple DM: the widths of S64S256 as one UNet, with its 256 level's schedule.

    371 M parameters and 557 GFLOP with classes (the nest: 376 M, 582); 446 M and 568 with text
    (452 M, 593). One stage of the last one's batches, as many images as all stages of the nest.
    """
    return _one_stage(run, name, (_unet_256(run.model.levels),), images=run.train.images)


def _finest_256(run: RunConfig, name: str) -> RunConfig:
    """S64S256 without the loss at 64 pixels: what the paper calls simple DM on CC12M."""
    return _finest_loss(_one_stage(run, name, run.model.levels, images=run.train.images))


def _upsampler_256(run: RunConfig, name: str) -> RunConfig:
    """The upsampler from 64 to 256 pixels, trained as long as the nest's stage with that level.

    373 M parameters and 557 GFLOP with classes, 448 M and 568 with text, beside those of the base
    (imagenet-64, cc12m-64). The paper found times of 0.5 or 0.7 to be needed for the noise.
    """
    levels, images = (_unet_256(run.model.levels),), run.train.stages[-1].images
    return _upsampling(_one_stage(run, name, levels, images=images), side=64, noise=0.5)


def _unet_256(levels: tuple[LevelConfig, ...]) -> LevelConfig:
    """The two levels of S64S256 as one: where they meet, at 64 x 64, their blocks add up."""
    inner, outer = levels
    return inner.model_copy(
        update={
            "side": outer.side,
            "widths": (*outer.widths[:-1], *inner.widths),
            "blocks": (*outer.blocks[:-1], outer.blocks[-1] + inner.blocks[0], *inner.blocks[1:]),
            "attention": (*outer.attention[:-1], *inner.attention),
            "micro": outer.micro,
            "shift_ratio": outer.shift_ratio,
            "shift_power": outer.shift_power,
        }
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "openmoji": openmoji,
    "fashion-mnist": fashion_mnist,
    "folder-64": folder_64,
    "emoji-still": emoji_still,
    "emoji-video": emoji_video,
    "openmoji-simple": openmoji_simple,
    "openmoji-finest": openmoji_finest,
    "openmoji-base": openmoji_base,
    "openmoji-upsampler": openmoji_upsampler,
    "fashion-mnist-simple": fashion_mnist_simple,
    "fashion-mnist-finest": fashion_mnist_finest,
    "fashion-mnist-base": fashion_mnist_base,
    "fashion-mnist-upsampler": fashion_mnist_upsampler,
    "openmoji-latent": openmoji_latent,
    "openmoji-codes": openmoji_codes,
    "fashion-mnist-latent": fashion_mnist_latent,
    "folder-64-latent": folder_64_latent,
    "cc12m-64": lambda: _text_run("cc12m-64", (64,), _text_stages(1)),
    "cc12m-256": lambda: _text_run("cc12m-256", (64, 256), _text_stages(1, 2)),
    "cc12m-256-nest3": lambda: _text_run("cc12m-256-nest3", (64, 128, 256), _text_stages(1, 3)),
    "cc12m-1024": lambda: _text_run("cc12m-1024", (64, 256, 1024), _text_stages(1, 2, 3)),
    "cc12m-1024-nest5": lambda: _text_run(
        "cc12m-1024-nest5", (64, 128, 256, 512, 1024), _text_stages(1, 3, 5)
    ),
    "webvid-64": lambda: _video_run("webvid-64", 1),
    "webvid-16x64": lambda: _video_run("webvid-16x64", 2),
    "webvid-16x256": lambda: _video_run("webvid-16x256", 3),
    "imagenet-64": lambda: _class_run("imagenet-64", (64,), _class_stages(1)),
    "imagenet-256": lambda: _class_run("imagenet-256", (64, 256), _class_stages(1, 2)),
    "imagenet-256-nest3": lambda: _class_run(
        "imagenet-256-nest3", (64, 128, 256), _class_stages(1, 3)
    ),
    "imagenet-1024": lambda: _class_run("imagenet-1024", (64, 256, 1024), _class_stages(1, 2, 3)),
    "imagenet-1024-nest5": lambda: _class_run(
        "imagenet-1024-nest5", (64, 128, 256, 512, 1024), _class_stages(1, 3, 5)
    ),
    "cc12m-256-simple": lambda: _simple_256(PRESETS["cc12m-256"](), "cc12m-256-simple"),
    "cc12m-256-finest": lambda: _finest_256(PRESETS["cc12m-256"](), "cc12m-256-finest"),
    "cc12m-256-upsampler": lambda: _upsampler_256(PRESETS["cc12m-256"](), "cc12m-256-upsampler"),
    "imagenet-256-simple": lambda: _simple_256(PRESETS["imagenet-256"](), "imagenet-256-simple"),
    "imagenet-256-upsampler": lambda: _upsampler_256(
        PRESETS["imagenet-256"](), "imagenet-256-upsampler"
    ),
    "imagenet-256-latent": _imagenet_latent,
    "cc12m-256-latent": _cc12m_latent,
    "released-64": lambda: _released("released-64", (64,)),
    "released-256": lambda: _released("released-256", (64, 256)),
    "released-1024": lambda: _released("released-1024", (64, 256, 1024)),
}


CODECS: dict[str, CodecRunConfig] = {
    "codec": CodecRunConfig(
        name="codec", data=DataConfig(source="folder", flip=True), side=64, images=200_000
    ),
    "openmoji-codec": CodecRunConfig(
        name="openmoji-codec", data=DataConfig(source="openmoji"), side=64, images=12_000
    ),
    "fashion-mnist-codec": CodecRunConfig(
        name="fashion-mnist-codec", data=DataConfig(source="fashion-mnist"), side=32, images=12_000
    ),
}
"""Autoencoders to be trained, by name.

On one core that others shared, OpenMoji's took 14 minutes and Fashion-MNIST's 7, to 26.1 and
24.8 dB on training pictures (one run each).
"""


def preset(name: str) -> RunConfig:
    """The run of that name.

    Raises:
        ConfigError: there is none; the message names the nearest and lists all.
    """
    if name in CODECS:
        raise ConfigError(f"{name} is an autoencoder: mdm train {name} trains it, and nothing else")
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        known = ", ".join([*PRESETS, *CODECS])
        raise ConfigError(f"unknown preset {name!r} (did you mean {close}?); there are: {known}")
    return PRESETS[name]()
