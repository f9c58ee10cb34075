"""What a nest looks like, level by level, as a table for people."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import LevelConfig, ModelConfig, RunConfig
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.released import read_released
from matryoshka_diffusion.schedule import build_schedules

HEADER = ("level", "size", "widths", "blocks", "attention", "parameters", "GFLOP", "log-SNR(0.5)")

TEXT_TOKENS = 64
"""Tokens of text that FLOPs are counted with."""


def describe(config: RunConfig) -> str:
    """The nest as a table, then its process and its stages of training."""
    model = config.model
    with torch.device("meta"):
        net = NestedUNet(model)
    flops = [forward_flops(model, count) for count in range(1, len(model.levels) + 1)]
    rows: list[tuple[str, ...]] = [HEADER]
    half = torch.tensor([0.5], dtype=torch.float64)
    for place, (level, schedule) in enumerate(
        zip(model.levels, build_schedules(model), strict=True)
    ):
        own_flops = flops[place] - (flops[place - 1] if place else 0)
        rows.append(
            (
                str(place + 1),
                _size(level),
                *(_list(values) for values in (level.widths, level.blocks, level.attention)),
                f"{count_parameters(net.levels[place]):,}",
                f"{own_flops / 1e9:.2f}",
                f"{schedule.log_snr(half).item():+.2f}",
            )
        )
    shared = count_parameters(net.conditioner)
    if shared:
        rows.append(("shared", _condition(model), "", "", "", f"{shared:,}", "", ""))
    total = count_parameters(net)
    rows.append(("total", "", "", "", "", f"{total:,}", f"{flops[-1] / 1e9:.2f}", ""))
    return "\n".join(
        [f"{config.name}: {total / 1e6:.1f} M parameters", *_align(rows), *_about(config)]
    )


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


def forward_flops(model: ModelConfig, levels: int) -> int:
    """FLOPs (two for each multiply-add) of one forward pass of one picture, first `levels` only."""
    part = model.first(levels)
    with torch.device("meta"):
        net = NestedUNet(part)
        z = tuple(torch.empty(1, model.channels, level.side, level.side) for level in part.levels)
        cond = Conditioning(
            labels=torch.zeros(1, dtype=torch.long) if model.classes else None,
            tokens=torch.empty(1, TEXT_TOKENS, model.text.features) if model.text else None,
            micro={name: torch.ones(1) for name in part.micro_names},
        )
        with FlopCounterMode(display=False) as counter:
            net(z, torch.ones(1), cond)
    return counter.get_total_flops()


def count_parameters(module: nn.Module) -> int:
    """How many numbers a module learns."""
    return sum(parameter.numel() for parameter in module.parameters())


def _size(level: LevelConfig) -> str:
    patch = f" /{level.patch}" if level.patch > 1 else ""
    return f"{level.side}x{level.side}{patch}"


def _list(values: tuple[int, ...]) -> str:
    return " ".join(str(value) for value in values)


def _condition(model: ModelConfig) -> str:
    if model.text:
        return f"text {model.text.features}-d, {model.text.layers} layers of {model.text.width}"
    return f"{model.classes} classes"


def _about(config: RunConfig) -> list[str]:
    process, train = config.process, config.train
    weighting = ", ".join(weighting.name for weighting in process.weighting)
    lines = [
        f"predicts {process.prediction}, loss weighted by {weighting}; "
        f"schedule {config.model.schedule}"
    ]
    for place, stage in enumerate(train.stages, start=1):
        mix = f", mix {_list_shares(stage.mix)}" if stage.mix else ""
        lines.append(
            f"stage {place}: {stage.levels} level{'s' * (stage.levels > 1)}, "
            f"{stage.images:,} images, batch {stage.batch_size}, lr {stage.lr:g}{mix}"
        )
    return lines


def _list_shares(mix: tuple[float, ...]) -> str:
    return "/".join(f"{share:.3g}" for share in mix)


def _align(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns of equal width; words to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < 5 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
