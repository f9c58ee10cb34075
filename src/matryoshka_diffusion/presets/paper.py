"""The paper's architectures (Appendix A) and trainings (Appendix B).

Where the paper is silent, a comment says whose choice a value is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from matryoshka_diffusion.config import (
    DataConfig,
    EncoderConfig,
    LevelConfig,
    ModelConfig,
    ProcessConfig,
    RunConfig,
    SamplingConfig,
    StageConfig,
    TextConfig,
    TrainConfig,
    WeightingConfig,
)
from matryoshka_diffusion.modelconfig import MicroConfig

# --- architectures (Appendix A) ----------------------------------------------------------------


def s64(*, text: bool) -> LevelConfig:
    """The base architecture, MDM-S64: most attention at 16 x 16.

    The released code has feed-forward layers after attention and the `scale` micro-condition. With
    them, text conditioning gives the 437 M parameters that the paper rounds to 450 M.
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
    return LevelConfig(
        side=side,
        widths=tuple(widths),
        blocks=(*[2] * (len(widths) - 1), 1),
        attention=(0,) * len(widths),
        micro=_scale(side) if text else (),
        shift_ratio=side / 64,
        shift_power=power,
    )


def _scale(side: int) -> tuple[MicroConfig, ...]:
    return (MicroConfig(name="scale", ceiling=float(side)),)


WIDTHS: dict[tuple[int, ...], tuple[tuple[int, ...], ...]] = {
    (64,): (),
    (64, 256): ((64, 128, 256),),
    (64, 128, 256): ((128, 256), (64, 128)),
    (64, 256, 1024): ((64, 128, 256), (32, 32, 64)),
    (64, 128, 256, 512, 1024): ((128, 256), (64, 128), (32, 64), (32, 32)),
}
"""Widths of the levels around S64 in each nest, by the sides of all its levels."""


def nest(*sides: int, text: bool) -> tuple[LevelConfig, ...]:
    """The levels of MDM-S64..., by their sides."""
    # The shift's power is the released models' (the paper leaves it open): 1 at 256, 2 at 1024.
    power = 2.0 if sides[-1] == 1024 else 1.0
    outers = zip(sides[1:], WIDTHS[sides], strict=True)
    return (s64(text=text), *(outer(*level, power=power, text=text) for level in outers))


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
    """MDM-S64T16S256: the same frames at 256 pixels, each an image of its own."""
    level = outer(256, (64, 128, 256), power=1.0)
    return level.model_copy(update={"frames": 16, "shift_ratio": 16.0})


# --- trainings (Appendix B) --------------------------------------------------------------------

TEXT_STAGES = ((2048, 500_000), (1024, 500_000), (768, 100_000))
"""(batch, steps) on CC12M at 64, 256 and 1024 pixels."""
CLASS_STAGES = ((512, 300_000), (256, 500_000), (192, 100_000))
"""(batch, steps) on ImageNet. The paper has no stage at 1024; ours has the length of CC12M's."""
VIDEO_STAGES = ((2048, 500_000), (512, 500_000), (128, 300_000))
"""(batch, steps) on WebVid-10M: images of 64 pixels, 16 frames of them, 16 frames of 256 pixels."""
V_PREDICTION = ProcessConfig(prediction="v", weighting=(WeightingConfig(name="v"),))


def _training(
    lengths: Sequence[tuple[int, int]], active: Sequence[int], *, condition_dropout: float
) -> TrainConfig:
    """The default training of Appendix B; `active` is the number of levels in each stage."""
    stages = tuple(
        # The paper mixes resolutions within a batch and does not say in what shares: half of the
        # rows at the finest level, and the rest spread evenly, is ours.
        StageConfig(
            levels=levels,
            images=steps * batch_size,
            batch_size=batch_size,
            lr=1e-4,
            mix=(*[0.5 / (levels - 1)] * (levels - 1), 0.5) if levels > 1 else (),
        )
        for levels, (batch_size, steps) in zip(active, lengths, strict=False)
    )
    batch_size = stages[0].batch_size
    return TrainConfig(
        stages=stages,
        optimizer="adam",  # with the default betas and eps
        warmup_images=30_000 * batch_size,
        clip_norm=2.0,
        ema_decay=0.9999,
        precision="bf16",
        condition_dropout=condition_dropout,
        log_every_images=100 * batch_size,
        preview_every_images=5_000 * batch_size,
        checkpoint_every_images=5_000 * batch_size,
    )


def _captioned(
    name: str, levels: tuple[LevelConfig, ...], train: TrainConfig, data: DataConfig
) -> RunConfig:
    """Captions as FLAN-T5-XL features with two self-attention layers on top of them."""
    text = TextConfig(features=2048, width=1024, layers=2)
    return RunConfig(
        name=name,
        model=ModelConfig(levels=levels, embedding=1024, text=text),
        process=V_PREDICTION,
        data=data,
        encoder=EncoderConfig(name="t5", path="google/flan-t5-xl", max_tokens=128),
        train=train,
        sampling=SamplingConfig(sampler="ddpm", steps=250, guidance=(7.0,), threshold=("dynamic",)),
    )


def cc12m(name: str, sides: tuple[int, ...], active: Sequence[int]) -> RunConfig:
    """CC12M. Dropping captions is ours: guidance needs it."""
    train = _training(TEXT_STAGES, active, condition_dropout=0.1)
    data = DataConfig(source="folder", held_out=0.001)
    return _captioned(name, nest(*sides, text=True), train, data)


def imagenet(name: str, sides: tuple[int, ...], active: Sequence[int]) -> RunConfig:
    """ImageNet: labels in the time embedding, no cross-attention, labels not dropped."""
    return RunConfig(
        name=name,
        model=ModelConfig(levels=nest(*sides, text=False), embedding=1024, classes=1000),
        process=V_PREDICTION,
        data=DataConfig(source="folder"),
        train=_training(CLASS_STAGES, active, condition_dropout=0.0),
        sampling=SamplingConfig(sampler="ddpm", steps=250, threshold=("dynamic",)),
    )


def webvid(name: str, levels: int) -> RunConfig:
    """WebVid-10M: every fourth frame, mirrored or not; of each video one clip (Appendix E).

    The clip starts at a random place that stays; the paper leaves this open. The stage on images
    decodes whole clips where finer levels need them: growing `webvid-64` is cheaper
    (docs/growing.md).
    """
    data = DataConfig(source="clips", flip=True, frame_stride=4, clip="fixed", held_out=0.001)
    train = _training(VIDEO_STAGES, range(1, levels + 1), condition_dropout=0.1)
    return _captioned(name, (s64(text=True), t16(), t16s256())[:levels], train, data)


def released(name: str, sides: tuple[int, ...]) -> RunConfig:
    """The networks of the paper's released checkpoints (no text layers, attention unmasked)."""
    run = cc12m(name, sides, range(1, len(sides) + 1))
    middle = "std" if len(sides) == 3 else "none"  # only the 1024 model divides, at its 256 level
    levels = tuple(
        level.model_copy(update={"input_scaling": scaling})
        for level, scaling in zip(run.model.levels, ("none", middle, "none"), strict=False)
    )
    text = TextConfig(features=2048, width=2048, masked=False, learned_null=False)
    update = {
        "model": ModelConfig(levels=levels, embedding=1024, schedule="squared-cosine", text=text),
        "process": ProcessConfig(prediction="v", weighting=(WeightingConfig(name="eps"),)),
        "sampling": run.sampling.model_copy(update={"threshold": ("clip",), "grid": "released"}),
        "data": run.data.model_copy(update={"pixels": "released"}),
    }
    return run.model_copy(update=update)


NESTS = {
    "64": ((64,), (1,)),
    "256": ((64, 256), (1, 2)),
    "256-nest3": ((64, 128, 256), (1, 3)),
    "1024": ((64, 256, 1024), (1, 2, 3)),
    "1024-nest5": ((64, 128, 256, 512, 1024), (1, 3, 5)),
}
"""Sides of the levels of each nest, and the levels that are active in its stages."""
VIDEOS = {"64": 1, "16x64": 2, "16x256": 3}
PAPER: dict[str, Callable[[str], RunConfig]] = {
    **{f"cc12m-{nest}": partial(cc12m, sides=s, active=n) for nest, (s, n) in NESTS.items()},
    **{f"webvid-{size}": partial(webvid, levels=levels) for size, levels in VIDEOS.items()},
    **{f"imagenet-{nest}": partial(imagenet, sides=s, active=n) for nest, (s, n) in NESTS.items()},
    **{
        f"released-{size}": partial(released, sides=NESTS[size][0])
        for size in ("64", "256", "1024")
    },
}
