"""Commands that show: info, a nest as a table with its training, and plot, the curves of runs."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matryoshka_diffusion.cli.options import MODEL, add_command, add_shared
from matryoshka_diffusion.cli.terminal import show
from matryoshka_diffusion.models.names import is_hub_id

if TYPE_CHECKING:
    from matryoshka_diffusion.config import LevelConfig, RunConfig, SamplingConfig, StageConfig
    from matryoshka_diffusion.nn.nested import NestedUNet
else:
    LevelConfig = NestedUNet = RunConfig = SamplingConfig = StageConfig = Any

IMAGE_COLUMNS = ("level", "size", "widths", "blocks", "attention")
CLIP_COLUMNS = ("frames", "attention over them")
NUMBERS = ("parameters", "GFLOP", "log-SNR(0.5)")


CPU_RATE = 0.176e12
"""FLOP a second of `openmoji` in bf16 on 2 CPU cores, measured: 16 minutes for all of it."""
GPU_RATES = (30e12, 300e12)
"""FLOP a second of a GPU with 24 GB and of a large one, conventions: no GPU was measured.

The first is three quarters of what `folder-128` would reach on an RTX 3090 if every kernel kept the
share of its peak that benchmarks/trace.py assumes; the second is 30 to 40 % of an H100's peak.
"""
CPU_SECONDS, GPU_SECONDS = 48 * 3600, 10 * 86_400
"""Times from which a training is said to be for a GPU, and for a large one."""


def presets(options: argparse.Namespace) -> None:
    show(list_presets())


def info(options: argparse.Namespace) -> None:
    from matryoshka_diffusion.configfile import override
    from matryoshka_diffusion.models.find import read_config
    from matryoshka_diffusion.presets import preset

    path = Path(options.name)
    if options.as_ is not None or not (path.exists() or is_hub_id(options.name)):
        show(describe(override(preset(options.name, options.as_), options.set)))
    elif path.is_file():
        show(describe_released(path, options.set))
    else:
        show(describe(override(read_config(options.name), options.set)))


def plot(options: argparse.Namespace) -> None:
    from matryoshka_diffusion.draw import curves

    curves.plot(options.runs, options.out)
    show(f"{options.out}: the curves of {', '.join(run.name for run in options.runs)}")


def timelapse(options: argparse.Namespace) -> None:
    from matryoshka_diffusion.draw.timelapse import timelapse

    count = timelapse(options.run_folder, options.out, options.fps)
    show(f"{options.out}: {count} previews of {options.run_folder}")


def add_commands(commands: Any) -> None:
    """Add the commands of this module to the parser."""
    add_command(commands, "presets", presets, "list the trainings that have a name")
    command = add_command(commands, "info", info, "show a preset or a model, level by level")
    add = command.add_argument
    add("name", metavar="PRESET|RUN|FILE", help=f"preset, {MODEL}")
    add_shared(command, "--as", "--set")
    command = add_command(commands, "plot", plot, "draw the curves of runs")
    add = command.add_argument
    add("runs", metavar="RUN", nargs="+", type=Path, help="run folders")
    add("-o", "--out", type=Path, default=Path("plot.png"), metavar="FILE", help="(plot.png)")
    text = "join the previews of a run to a clip (.webp, .gif, .mp4)"
    command = add_command(commands, "timelapse", timelapse, text)
    add = command.add_argument
    add("run_folder", metavar="RUN", type=Path, help="run folder")
    out = Path("timelapse.webp")
    add("-o", "--out", type=Path, default=out, metavar="FILE", help=f"({out})")
    add("--fps", type=float, default=4.0, help="previews a second (4)")


# --- presets as a table ------------------------------------------------------------------------


def list_presets() -> str:
    """Format the presets as a table: levels, condition, data, images and time of the training."""
    from matryoshka_diffusion.presets import CODECS, PRESETS, preset

    rows = [("preset", "levels", "condition", "data", "images seen", "trains for about")]
    for name in PRESETS:
        config = preset(name)
        conditions = {"minilm": "text", "t5": "text (T5)", None: f"{config.model.classes} classes"}
        condition = conditions[config.encoder and config.encoder.name]
        own = config.data.source in ("folder", "clips")
        if own and not (config.model.text or config.model.classes):
            condition = "what is there"
        data = "yours" if own else config.data.source
        levels = " ".join(level.size for level in config.model.levels)
        images = f"{config.train.images:,}"
        rows.append((name, levels, condition, data, images, duration(name)))
    return "\n".join(
        [
            *_columns(rows, 4),
            f"autoencoders: {', '.join(CODECS)}",
            "mdm info NAME shows a preset, mdm train NAME --dry-run what it takes",
        ]
    )


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


# --- a nest as a table -------------------------------------------------------------------------


def describe(config: RunConfig, flops: Sequence[int] = ()) -> str:
    """Format the nest as a table, then its process and the stages of its training.

    `flops` are those of `_flops_of`, if they are known.
    """
    import torch

    from matryoshka_diffusion.nn.costs import count_parameters
    from matryoshka_diffusion.nn.layers import shapes_only
    from matryoshka_diffusion.nn.nested import NestedUNet, level_of
    from matryoshka_diffusion.schedule import build_schedules

    model = config.model
    with shapes_only():
        net = NestedUNet(model)
    shared = count_parameters(net.conditioner)
    parameters = Counter({0: -shared})
    for name, parameter in net.named_parameters():
        parameters[level_of(name)] += parameter.numel()
    words = IMAGE_COLUMNS + CLIP_COLUMNS * any(level.frames for level in model.levels)
    rows: list[Sequence[str]] = [words + NUMBERS]
    half, flops = torch.tensor([0.5], dtype=torch.float64), flops or _flops_of(config)
    for place, schedule in enumerate(build_schedules(model)):
        level = model.levels[place]
        cells = [str(place + 1), _size(level), _widths(level)]
        cells += [_list(level.blocks), _list(level.attention)]
        if level.frames:
            steps = range(len(level.widths))
            cells.append(_list([level.frames_at(step) for step in steps]))
            cells.append(_list(level.frame_attention or [0 for _ in steps]))
        numbers = (
            f"{parameters[place]:,}",
            f"{(flops[place + 1] - flops[place]) / 1e9:.2f}",
            f"{schedule.log_snr(half).item():+.2f}",
        )
        rows.append(_row(words, *cells, numbers=numbers))
    if shared:
        text = f"{model.classes} classes"
        if model.text:
            text = f"text {model.text.features}-d, {model.text.layers} layers of {model.text.width}"
        rows.append(_row(words, "shared", text, numbers=(f"{shared:,}", "", "")))
    total = count_parameters(net)
    rows.append(_row(words, "total", numbers=(f"{total:,}", f"{flops[-1] / 1e9:.2f}", "")))
    about = [*_about(config), _drawing(net, config, flops)]
    head = f"{config.name}: {total / 1e6:.1f} M parameters"
    return "\n".join([head, *_columns(rows, len(words)), *about])


def _columns(rows: Sequence[Sequence[str]], words: int) -> list[str]:
    """Lines of a table; the first `words` columns are text, the others numbers."""
    lengths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(length) if place < words else cell.rjust(length)
            for place, (cell, length) in enumerate(zip(row, lengths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _drawing(net: NestedUNet, config: RunConfig, flops: Sequence[int]) -> str:
    """A line about a sample's arithmetic; `flops` are those of the first 0, 1, ... levels."""
    from matryoshka_diffusion.pipeline import passes
    from matryoshka_diffusion.sampling import DiffusionModel

    def work(sampling: SamplingConfig) -> float:
        counts = passes(DiffusionModel(net, config.model, config), sampling)
        return sum(count * flops[levels] for levels, count in counts.items()) / 1e9

    sampling = config.sampling
    own, plain = work(sampling), work(sampling.model_copy(update={"wake": None}))
    sample = "a clip" if config.data_frames else "an image"
    line = f"draws {sample} in {sampling.steps} steps of {sampling.sampler}: {_rounded(own)} GFLOP"
    saved = f"; sampling.wake {_list(sampling.wake or ())} saves {1 - own / plain:.0%}"
    guided = sampling.guide is not None and "guide" not in sampling.idle
    guide = f"; {sampling.guide} is counted as if it were as large as this network"
    return line + saved * (sampling.wake is not None) + guide * guided


def _row(words: Sequence[str], *cells: str, numbers: Sequence[str]) -> list[str]:
    return [*cells, *[""] * (len(words) - len(cells)), *numbers]


def _size(level: LevelConfig) -> str:
    patch = f" /{level.patch}" if level.patch > 1 else ""
    frames = f"{level.frames}x" if level.frames else ""
    return f"{frames}{level.side}x{level.side}{patch}"


def _widths(level: LevelConfig) -> str:
    """The widths, with "=" before a width at the same side as the one before it."""
    first, *others = level.widths
    steps = (f"{'=' if level.stride(n) == 1 else ''}{wide}" for n, wide in enumerate(others))
    return " ".join([str(first), *steps])


def _list(values: Sequence[int | float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _about(config: RunConfig) -> list[str]:
    """Lines about codec, features, process, base, adapters and the stages of training."""
    process, train, lines = config.process, config.train, []
    if config.codec is not None:
        lines.append(
            f"levels are latents of images of {config.data_side} px, {config.codec.factor} times "
            f"smaller along each side, by {config.codec.path or 'a codec to be given (--codec)'}"
        )
    if config.features is not None:
        level = config.model.levels[0]
        lines.append(
            f"level 1 is {level.features} features of {config.features.network} in place of pixels"
        )
    weighting = ", ".join(weighting.name for weighting in process.weighting)
    lines.append(
        f"predicts {process.prediction}, loss weighted by {weighting}; "
        f"schedule {config.model.schedule}"
    )
    if any(weight != 1.0 for weight in process.level_weights):
        lines.append(f"weights of the levels' losses: {_list(process.level_weights)}")
    if (coarse := config.model.coarse) is not None:
        base = config.sampling.base
        lines.append(
            f"upsamples images of {coarse.side} pixels under noise of times up to "
            f"{coarse.max_noise:g}; draws with {config.sampling.coarse_noise:g}, "
            f"after {'a base to be given (--base)' if base is None else base.path}"
        )
    if train.lora is not None:
        levels = _list([place + 1 for place in train.lora.levels]) or "all"
        lines.append(
            f"trains adapters of rank {train.lora.rank} ({train.lora.maps} maps, levels {levels}) "
            f"around {train.init}"
        )
    whose, life = ("each level", "its life") if train.lr_per_level else ("all levels", "the run")
    lines.append(
        f"learning rate of {whose}: warm-up over {train.warmup_images:,} images, "
        f"decay over the last {100 * train.decay_share:.3g} % of {life}"
    )
    return [*lines, *(_stage(n, stage) for n, stage in enumerate(train.stages, start=1))]


def _stage(number: int, stage: StageConfig) -> str:
    parts = [
        f"stage {number}: {stage.levels} level{'s' * (stage.levels > 1)}",
        f"{stage.images:,} images",
        f"batch {stage.batch_size}",
        f"lr {stage.lr:g}",
    ]
    if stage.mix:
        parts.append(f"mix {'/'.join(f'{share:.3g}' for share in stage.mix)}")
    if stage.freeze_coarse_images:
        parts.append(f"coarse levels frozen for {stage.freeze_coarse_images:,}")
    if stage.ramp_images:
        parts.append(f"new ones ramped over {stage.ramp_images:,}")
    return ", ".join(parts)


def describe_released(path: Path, changes: Sequence[str] = ()) -> str:
    """Describe a released checkpoint: its nest, and the other settings in the file."""
    from matryoshka_diffusion.configfile import dump, override
    from matryoshka_diffusion.models.released import read_released

    released = read_released(path)
    others, about = released.weights.described(), describe(override(released.config, changes))
    if not others:
        return about
    text = dump(others, compact=True)
    return f"{about}\n\nwhat else is in {path.name}:\n{text}".rstrip()


# --- costs of training (mdm train --dry-run) -----------------------------------------------------


def describe_plan(
    config: RunConfig, images: int | None = None, *, gpus: int = 8, shards: bool = False
) -> str:
    """Describe the nest and the costs of each stage: steps, arithmetic, memory and data.

    Memory is estimated: weights, gradients, moments and averages exactly, activations as
    `costs.activation_bytes` counts them under `train.recompute`.

    Args:
        images: number of training images, if known.
        gpus: number of GPUs to state the memory for, besides one.
        shards: whether each GPU holds a share of the weights (FSDP2).
    """
    train, half, flops = config.train, config.train.precision != "fp32", _flops_of(config)
    lines = [describe(config, flops)]
    for place, stage in enumerate(train.stages, start=1):
        fixed, each = _memory(config, stage)
        sample = "a clip" if config.model.levels[stage.levels - 1].frames else "an image"
        work, awake = (
            f"{_rounded(3 * each_flops * stage.batch_size / 1e12)} TFLOP a step"
            for each_flops in (flops[stage.levels], _awake_flops(config, stage, flops))
        )
        mean = f", {awake} on average with train.wake" * (train.wake is not None)
        rows = -(-stage.batch_size // train.accumulate)
        share = fixed // (gpus if shards else 1) + -(-rows // gpus) * each
        lines += [
            f"stage {place}: {-(-stage.images // stage.batch_size):,} steps of "
            f"{stage.batch_size:,}, {work} at most{mean}",
            f"  memory in {'bf16' if half else 'fp32'}, about: "
            f"{gigabytes(fixed)} + {gigabytes(each)} {sample}; "
            f"{gigabytes(fixed + rows * each)} on one device, {gigabytes(share)} "
            f"on each of {gpus}{' with shards' if shards else ''}",
        ]
    frames, seen = config.data_frames, train.images
    condition = (
        "captions" if config.model.text else "classes" if config.model.classes else "nothing"
    )
    epochs = "" if images is None else f", {_rounded(seen / images)} times each of {images:,}"
    kind = "images" if frames is None else f"clips of {frames} frames"
    own = ", each in a shape of its own" * (config.data.shapes == "own")
    every = train.preview_every_images
    previews = f"; a preview every {every:,} images" * (every > 0)
    lines += [
        f"data: {kind} of {config.data_side} pixels or more{own}, with {condition} beside them; "
        f"{seen:,} are seen{epochs}",
        f"time: about {_time(work_of(config, flops))}, by arithmetic{previews}",
    ]
    return "\n".join(lines)


def work_of(config: RunConfig, flops: Sequence[int] = ()) -> float:
    """FLOPs of a whole training, three forward passes for each image."""
    flops, stages = flops or _flops_of(config), config.train.stages
    return sum(3 * _awake_flops(config, stage, flops) * stage.images for stage in stages)


def _flops_of(config: RunConfig) -> list[int]:
    """FLOPs of a forward pass of the first 0, 1, ... levels."""
    from matryoshka_diffusion.nn.costs import forward_flops

    return [0, *(forward_flops(config.model, n) for n in range(1, len(config.model.levels) + 1))]


def memory(config: RunConfig) -> int:
    """Bytes that the largest stage of a training takes on one device, about."""
    needs = []
    for stage in config.train.stages:
        fixed, each = _memory(config, stage)
        needs.append(fixed + -(-stage.batch_size // config.train.accumulate) * each)
    return max(needs)


def _memory(config: RunConfig, stage: StageConfig) -> tuple[int, int]:
    """Bytes that a stage takes for its network, and for each sample of a micro-batch."""
    from matryoshka_diffusion.nn.costs import activation_bytes, training_bytes
    from matryoshka_diffusion.nn.layers import shapes_only
    from matryoshka_diffusion.nn.lora import attach
    from matryoshka_diffusion.nn.nested import NestedUNet

    train, half = config.train, config.train.precision != "fp32"
    with shapes_only():
        net = NestedUNet(config.model.first(stage.levels))
        if train.lora is not None:
            attach(net, train.lora)
    fixed = training_bytes(net, len(train.ema_power), half=half)
    return fixed, activation_bytes(config.model, stage.levels, train.recompute, half=half)


def _awake_flops(config: RunConfig, stage: StageConfig, flops: Sequence[int]) -> float:
    """FLOPs of an image in a forward pass, on average over the stage's `mix` and `train.wake`."""
    from matryoshka_diffusion.schedule import build_schedules, wakes_at

    floors = config.model.floors(config.train.wake)
    mean = float(flops[1])
    for level, schedule in [*enumerate(build_schedules(config.model))][1 : stage.levels]:
        # Without a mix t is even in [0, 1]: the time of the floor is the share with the level.
        share = sum(stage.mix[level:]) if stage.mix else wakes_at(schedule, floors[level])
        mean += share * (flops[level + 1] - flops[level])
    return mean


def _rounded(number: float) -> str:
    return f"{number:,.0f}" if number > 100 else f"{number:.3g}"


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count < 1e11 else f"{count / 1e9:,.0f} GB"
