"""The plan of a training, for `mdm train --dry-run`: its arithmetic, memory and time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matryoshka_diffusion.config import ModelConfig, RunConfig, StageConfig
    from matryoshka_diffusion.data.source import Source
    from matryoshka_diffusion.pyramid import Resolution
else:
    ModelConfig = Resolution = RunConfig = Source = StageConfig = Any

CPU_RATE = 0.176e12
"""FLOP a second of `openmoji` in bf16 on 2 CPU cores, measured: 16 minutes for all of it."""
GPU_RATES = (30e12, 300e12)
"""FLOP a second of a GPU with 24 GB and of a large one, conventions: no GPU was measured.

The first is three quarters of what `folder-128` would reach on an RTX 3090 if every kernel kept the
share of its peak that benchmarks/trace.py assumes; the second is 30 to 40 % of an H100's peak.
"""
CPU_SECONDS, GPU_SECONDS = 48 * 3600, 10 * 86_400
"""Times from which a training is said to be for a GPU, and for a large one."""


# --- numbers as text -----------------------------------------------------------------------------


def duration(name: str) -> str:
    """About how long the training of a preset takes."""
    from matryoshka_diffusion.presets import WORK

    return _time(WORK[name] * 1e15)


def _time(flops: float) -> str:
    """About how long so much arithmetic takes, and on what."""
    minutes = flops / CPU_RATE / 60
    if minutes < 100:
        return f"{minutes:.0f} minutes on 2 CPU cores"
    if 60 * minutes < CPU_SECONDS:
        return f"{minutes / 60:.1f} hours on 2 CPU cores"
    rate = next((rate for rate in GPU_RATES if flops / rate < GPU_SECONDS), GPU_RATES[-1])
    hours = flops / rate / 3600
    length = f"{hours:.0f} hours" if hours < 100 else f"{hours / 24:,.0f} days"
    return f"{length} on a GPU at {rate / 1e12:.0f} TFLOP/s"


def rounded(number: float) -> str:
    return f"{number:,.0f}" if number > 100 else f"{number:.3g}"


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count < 1e11 else f"{count / 1e9:,.0f} GB"


# --- shapes, arithmetic and memory ---------------------------------------------------------------


def _shapes(config: RunConfig, source: Source | None) -> list[Resolution]:
    """The shape of every image; without a source, each shape that an image may have."""
    from matryoshka_diffusion.data.shapes import shapes_of_data

    if source is None:
        return [*shapes_of_data(config)]
    return [source.shapes[sample.shape] for sample in source.samples]


def _area(config: RunConfig, shape: Resolution) -> float:
    """The area of a shape as a multiple of the square's; FLOPs go with it."""
    return shape.height * shape.width / config.data_side**2


def flops_of(config: RunConfig) -> list[int]:
    """FLOPs of a forward pass of the first 0, 1, ... levels for a square image."""
    model: Any = config.model  # frozen, hence hashable
    return [0, *(_forward(model, n) for n in range(1, len(model.levels) + 1))]


@cache
def _forward(model: ModelConfig, levels: int) -> int:
    from matryoshka_diffusion.nn.costs import forward_flops

    return forward_flops(model, levels)


def _awake_flops(config: RunConfig, stage: StageConfig) -> float:
    """FLOPs of a square in a forward pass, on average over the stage's `mix` and `train.wake`."""
    from matryoshka_diffusion.schedule import build_schedules, wakes_at

    floors, flops = config.model.floors(config.train.wake), flops_of(config)
    mean = float(flops[1])
    for level, schedule in [*enumerate(build_schedules(config.model))][1 : stage.levels]:
        # Without a mix t is even in [0, 1]: the time of the floor is the share with the level.
        share = sum(stage.mix[level:]) if stage.mix else wakes_at(schedule, floors[level])
        mean += share * (flops[level + 1] - flops[level])
    return mean


def work_of(config: RunConfig) -> float:
    """FLOPs of a whole training on squares, three forward passes for each image."""
    return sum(3 * _awake_flops(config, stage) * stage.images for stage in config.train.stages)


def memory(config: RunConfig, source: Source | None = None) -> int:
    """Bytes that the largest stage of a training takes on one device, about."""
    needs, shapes = [], _shapes(config, source)
    for stage in config.train.stages:
        fixed, each = _memory(config, stage, shapes)
        needs.append(fixed + -(-stage.batch_size // config.train.accumulate) * each)
    return max(needs)


def _memory(config: RunConfig, stage: StageConfig, shapes: Sequence[Resolution]) -> tuple[int, int]:
    """Bytes that a stage takes for its network, and for a sample of the largest of the shapes."""
    from matryoshka_diffusion.nn.costs import activation_bytes, training_bytes
    from matryoshka_diffusion.nn.layers import shapes_only
    from matryoshka_diffusion.nn.lora import attach
    from matryoshka_diffusion.nn.nested import NestedUNet
    from matryoshka_diffusion.pyramid import resolutions_of

    train, half = config.train, config.train.precision != "fp32"
    model = config.model.first(stage.levels)
    with shapes_only():
        net = NestedUNet(model)
        if train.lora is not None:
            attach(net, train.lora)
    sizes = None
    if config.data.shapes == "own":
        largest = max(shapes, key=lambda shape: _area(config, shape))
        sizes = resolutions_of(model, largest, config.data_side)
    fixed, levels = training_bytes(net, len(train.ema_power), half=half), stage.levels
    return fixed, activation_bytes(model, levels, train.recompute, half=half, sizes=sizes)


def describe_plan(
    config: RunConfig, source: Source | None = None, *, gpus: int = 8, shards: bool = False
) -> str:
    """Describe the costs of each stage: steps, arithmetic, memory and data.

    Memory is estimated: weights, gradients, moments and averages exactly, activations as
    `costs.activation_bytes` counts them under `train.recompute`, for images of the largest shape.

    Args:
        source: the training images, if they are known.
        gpus: number of GPUs to state the memory for, besides one.
        shards: whether each GPU holds a share of the weights (FSDP2).
    """
    train, half, shapes = config.train, config.train.precision != "fp32", _shapes(config, source)
    areas, flops, lines = [_area(config, shape) for shape in shapes], flops_of(config), []
    largest, mean = max(areas), sum(areas) / len(areas)
    for place, stage in enumerate(train.stages, start=1):
        fixed, each = _memory(config, stage, shapes)
        sample = "a clip" if config.model.levels[stage.levels - 1].frames else "an image"
        most, usual = (
            f"{rounded(3 * each_flops * stage.batch_size / 1e12)} TFLOP a step"
            for each_flops in (
                largest * flops[stage.levels],
                mean * _awake_flops(config, stage),
            )
        )
        reason = " with train.wake" * (train.wake is not None)
        average = f", {usual} on average{reason}" if reason or len({*areas}) > 1 else ""
        rows = -(-stage.batch_size // train.accumulate)
        share = fixed // (gpus if shards else 1) + -(-rows // gpus) * each
        lines += [
            f"stage {place}: {-(-stage.images // stage.batch_size):,} steps of "
            f"{stage.batch_size:,}, {most} at most{average}",
            f"  memory in {'bf16' if half else 'fp32'}, about: "
            f"{gigabytes(fixed)} + {gigabytes(each)} {sample}; "
            f"{gigabytes(fixed + rows * each)} on one device, {gigabytes(share)} "
            f"on each of {gpus}{' with shards' if shards else ''}",
        ]
    images = None if source is None else len(source)
    return "\n".join([*lines, *_data_and_time(config, mean * work_of(config), images)])


def _data_and_time(config: RunConfig, work: float, images: int | None) -> list[str]:
    """Lines about the images that a training sees, and about its time for so many FLOPs."""
    train, model, frames = config.train, config.model, config.data_frames
    condition = "captions" if model.text else "classes" if model.classes else "nothing"
    epochs = f", {rounded(train.images / images)} times each of {images:,}" if images else ""
    kind = "images" if frames is None else f"clips of {frames} frames"
    own = ", each in a shape of its own" * (config.data.shapes == "own")
    every = train.preview_every_images
    previews = f"; a preview every {every:,} images" * (every > 0)
    return [
        f"data: {kind} of {config.data_side} pixels or more{own}, with {condition} beside them; "
        f"{train.images:,} are seen{epochs}",
        f"time: about {_time(work)}, by arithmetic{previews}",
    ]
