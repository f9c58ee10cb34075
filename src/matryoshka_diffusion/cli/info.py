"""What a nest looks like, level by level, as a table for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from matryoshka_diffusion.config import LevelConfig, ModelConfig, RunConfig, StageConfig
from matryoshka_diffusion.models.released import read_released
from matryoshka_diffusion.nn.costs import (
    activation_bytes,
    count_parameters,
    forward_flops,
    training_bytes,
)
from matryoshka_diffusion.nn.lora import attach
from matryoshka_diffusion.nn.nested import NestedUNet, level_of
from matryoshka_diffusion.schedule import build_schedules

WORDS = ("level", "size", "widths", "blocks", "attention")
OF_CLIPS = ("frames", "attention over them")
NUMBERS = ("parameters", "GFLOP", "log-SNR(0.5)")


def describe(config: RunConfig) -> str:
    """The nest as a table, then its process and its stages of training."""
    model = config.model
    with torch.device("meta"):
        net = NestedUNet(model)
    shared = count_parameters(net.conditioner)
    parameters = Counter({0: -shared})
    for name, parameter in net.named_parameters():
        parameters[level_of(name)] += parameter.numel()
    flops = [forward_flops(model, count) for count in range(1, len(model.levels) + 1)]
    moves = any(level.frames for level in model.levels)
    words = WORDS + OF_CLIPS * moves
    rows: list[tuple[str, ...]] = [words + NUMBERS]
    half = torch.tensor([0.5], dtype=torch.float64)
    for place, (level, schedule) in enumerate(
        zip(model.levels, build_schedules(model), strict=True)
    ):
        own_flops = flops[place] - (flops[place - 1] if place else 0)
        rows.append(
            (
                str(place + 1),
                _size(level),
                _widths(level),
                *(_list(values) for values in (level.blocks, level.attention)),
                *(_list(values) for values in _over_time(level) if moves),
                f"{parameters[place]:,}",
                f"{own_flops / 1e9:.2f}",
                f"{schedule.log_snr(half).item():+.2f}",
            )
        )
    if shared:
        rows.append(_padded(("shared", _condition(model)), words, f"{shared:,}", "", ""))
    total = count_parameters(net)
    rows.append(_padded(("total",), words, f"{total:,}", f"{flops[-1] / 1e9:.2f}", ""))
    table = _align(rows, words=len(words))
    return "\n".join([f"{config.name}: {total / 1e6:.1f} M parameters", *table, *_about(config)])


def _padded(cells: tuple[str, ...], words: tuple[str, ...], *numbers: str) -> tuple[str, ...]:
    """A row with little to say in words."""
    return (*cells, *[""] * (len(words) - len(cells)), *numbers)


def describe_released(path: Path) -> str:
    """A released checkpoint's nest, and the run configuration that lies in the file."""
    released = read_released(path)
    others = released.weights.described()
    if not others:
        return describe(released.config)
    text = yaml.dump(others, Dumper=_Plain, sort_keys=False, default_flow_style=None, width=100)
    return f"{describe(released.config)}\n\nwhat else is in {path.name}:\n{text}".rstrip()


class _Plain(yaml.SafeDumper):
    """Values that occur twice are written twice."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def describe_plan(
    config: RunConfig, pictures: int | None = None, *, gpus: int = 8, shards: bool = False
) -> str:
    """The nest, and what each stage of its training takes: steps, arithmetic, memory and data.

    Memory is estimated: weights, gradients, moments and averages exactly, activations as
    `costs.activation_bytes` counts them under `train.recompute`, halved unless in fp32.

    Args:
        pictures: how many there are to train on, if that is known.
        gpus: to say the memory of, besides one.
        shards: whether each of them holds a share of the weights (FSDP2).
    """
    precision = "fp32" if config.train.precision == "fp32" else "bf16"
    lines = [describe(config)]
    for place, stage in enumerate(config.train.stages, start=1):
        with torch.device("meta"):
            net = NestedUNet(config.model.first(stage.levels))
            if config.train.lora is not None:
                attach(net, config.train.lora)
        fixed = training_bytes(net, len(config.train.ema_power))
        each = activation_bytes(config.model, stage.levels, config.train.recompute)
        each = each if precision == "fp32" else each // 2
        shown = "a clip" if config.model.levels[stage.levels - 1].frames else "a picture"
        work = 3 * forward_flops(config.model, stage.levels) * stage.batch_size
        rows = -(-stage.batch_size // config.train.accumulate)
        steps = -(-stage.images // stage.batch_size)
        lines += [
            f"stage {place}: {steps:,} steps of {stage.batch_size:,}, "
            f"{_teraflops(work)} a step at most",
            f"  memory in {precision}, about: {_gigabytes(fixed)} + {_gigabytes(each)} {shown}; "
            f"{_gigabytes(fixed + rows * each)} on one device, "
            f"{_gigabytes(fixed // (gpus if shards else 1) + -(-rows // gpus) * each)} "
            f"on each of {gpus}{' with shards' if shards else ''}",
        ]
    return "\n".join([*lines, _data_needed(config, pictures)])


def _data_needed(config: RunConfig, pictures: int | None) -> str:
    model, images = config.model, config.train.images
    beside = "captions" if model.text else "classes" if model.classes else "nothing"
    epochs = "" if pictures is None else f", {images / pictures:.3g} times each of {pictures:,}"
    frames = config.data_frames
    shown = "pictures" if frames is None else f"clips of {frames} frames"
    return (
        f"data: {shown} of {config.data_side} pixels or more, with {beside} beside them; "
        f"{images:,} are seen{epochs}"
    )


def _teraflops(count: int) -> str:
    return f"{count / 1e12:,.0f} TFLOP" if count > 1e14 else f"{count / 1e12:.3g} TFLOP"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count < 1e11 else f"{count / 1e9:,.0f} GB"


def _size(level: LevelConfig) -> str:
    patch = f" /{level.patch}" if level.patch > 1 else ""
    frames = f"{level.frames}x" if level.frames else ""
    return f"{frames}{level.side}x{level.side}{patch}"


def _widths(level: LevelConfig) -> str:
    """The widths, with "=" before one whose side is that of the width before."""
    first, *others = level.widths
    steps = (f"{'=' if level.stride(n) == 1 else ''}{wide}" for n, wide in enumerate(others))
    return " ".join([str(first), *steps])


def _over_time(level: LevelConfig) -> tuple[Sequence[int], Sequence[int]]:
    """Of each width, its frames and its layers of attention over them; nothing of pictures."""
    if level.frames is None:
        return (), ()
    steps = range(len(level.widths))
    return [level.frames_at(step) for step in steps], level.frame_attention or (0,) * len(steps)


def _list(values: Sequence[int | float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _condition(model: ModelConfig) -> str:
    if model.text:
        return f"text {model.text.features}-d, {model.text.layers} layers of {model.text.width}"
    return f"{model.classes} classes"


def _about(config: RunConfig) -> list[str]:
    process, train = config.process, config.train
    weighting = ", ".join(weighting.name for weighting in process.weighting)
    lines = [*_codec(config)]
    lines += [
        f"predicts {process.prediction}, loss weighted by {weighting}; "
        f"schedule {config.model.schedule}"
    ]
    if any(weight != 1.0 for weight in process.level_weights):
        lines.append(f"weights of the levels' losses: {_list(process.level_weights)}")
    if config.model.coarse is not None:
        base = config.sampling.base
        lines.append(
            f"upsamples pictures of {config.model.coarse.side} pixels under noise of times up to "
            f"{config.model.coarse.max_noise:g}; draws with {config.sampling.coarse_noise:g}, "
            f"after {'a base yet to be named (--base)' if base is None else base.path}"
        )
    if train.lora is not None:
        levels = _list([place + 1 for place in train.lora.levels]) or "all"
        lines.append(
            f"trains adapters of rank {train.lora.rank} ({train.lora.maps} maps, levels {levels}) "
            f"around {train.init}"
        )
    for place, stage in enumerate(train.stages, start=1):
        mix = f", mix {_list_shares(stage.mix)}" if stage.mix else ""
        lines.append(
            f"stage {place}: {stage.levels} level{'s' * (stage.levels > 1)}, "
            f"{stage.images:,} images, batch {stage.batch_size}, lr {stage.lr:g}{mix}"
            f"{_gentle(stage)}"
        )
    return lines


def _codec(config: RunConfig) -> list[str]:
    """What the levels are codes of, if they are."""
    if config.codec is None:
        return []
    where = config.codec.path or "a codec yet to be given (--codec)"
    return [
        f"levels are codes of pictures of {config.data_side} px, {config.codec.factor} times "
        f"smaller along each side, by {where}"
    ]


def _gentle(stage: StageConfig) -> str:
    """How a stage with new levels begins, if it does so in a special way."""
    frozen = f", coarse levels frozen for {stage.freeze_coarse_images:,}"
    ramp = f", new ones ramped over {stage.ramp_images:,}"
    return frozen * (stage.freeze_coarse_images > 0) + ramp * (stage.ramp_images > 0)


def _list_shares(mix: tuple[float, ...]) -> str:
    return "/".join(f"{share:.3g}" for share in mix)


def _align(rows: list[tuple[str, ...]], *, words: int) -> list[str]:
    """Columns of equal width; words, which are the first columns, to the left, numbers right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
