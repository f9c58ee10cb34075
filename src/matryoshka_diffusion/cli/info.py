"""Commands that show: info, a nest as a table with its training, and plot, the curves of runs."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matryoshka_diffusion.cli.options import MODEL, add_command, add_shared
from matryoshka_diffusion.cli.plan import duration, flops_of, rounded
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


# --- a nest as a table -------------------------------------------------------------------------


def describe(config: RunConfig) -> str:
    """Format the nest as a table, then its process and the stages of its training."""
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
    half, flops = torch.tensor([0.5], dtype=torch.float64), flops_of(config)
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
    line = f"draws {sample} in {sampling.steps} steps of {sampling.sampler}: {rounded(own)} GFLOP"
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
