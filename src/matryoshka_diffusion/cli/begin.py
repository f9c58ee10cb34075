"""How `mdm train` begins: a preset proposed for images, or a finished run made longer."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from pathlib import Path
from typing import Any

from matryoshka_diffusion.cli.terminal import show

SMALLEST, LOOKED_AT = "folder-64", 64
"""Preset for images of any size, and images to look at before one is proposed."""
MOST_TIMES = 3_000
"""Times that a proposed preset sees each image at most; EDM saw those of FFHQ 2,900 times."""


def proposed(options: argparse.Namespace) -> str | None:
    """The preset for the images of `--data`, or the run in `--out` that goes on.

    Prints what was chosen, and why; without `--out` the command that begins it, and returns None.
    """
    from statistics import median

    from matryoshka_diffusion.cli.plan import duration, gigabytes, memory
    from matryoshka_diffusion.config import UsageError
    from matryoshka_diffusion.data.check import summary
    from matryoshka_diffusion.data.shapes import MOST_LOST
    from matryoshka_diffusion.data.source import kind_of
    from matryoshka_diffusion.presets import PRESETS, preset
    from matryoshka_diffusion.runs import prepare

    if options.out is not None and (options.out / "config.yaml").is_file():
        return str(options.out)
    if options.data is None:
        raise UsageError(
            "mdm train: name a preset (mdm presets lists them), a run to go on with, or a folder "
            "of your images with --data"
        )
    if kind_of(options.data) == "clips":
        raise UsageError(f"--data {options.data}: it has videos: name a preset, as webvid-16x64")
    source = prepare.open_data(prepare.find_config(SMALLEST, options.data))
    some = range(0, len(source), -(-len(source) // LOOKED_AT))
    side = median(example.original_side for example in source.many(some))
    show(summary(source))
    if (lost := max(1.0 - sample.kept for sample in source.samples)) > MOST_LOST:
        show(f"squares cut off up to {lost:.0%} of an image: --set data.shapes=own keeps its shape")
    presets = [name for name in PRESETS if name.startswith("folder-")]
    takes: dict[str, tuple[int, int]] = {}  # bytes, and times that an image is seen
    for name in presets:
        if preset(name).data_side > max(side, 64):
            continue
        config = prepare.complete(prepare.find_config(name, options.data), source)
        needed, times = takes[name] = memory(config), config.train.images // len(source)
        every = config.train.preview_every_images
        show(
            f"{name}: {config.data_side} pixels, about {duration(name)}, {gigabytes(needed)} of "
            f"memory; sees each image {times:,} times, a preview every {every:,} images"
        )
    chosen = _chosen(takes)
    if options.out is None and not options.dry_run:
        name = Path(options.data.rpartition(":")[2]).stem
        place = name if re.fullmatch(r"[\w.-]+", name) else "mine"
        show(f"to begin: mdm train {chosen} --data {shlex.quote(options.data)} --out runs/{place}")
        return None
    show(f"takes {chosen}; name another preset for another side")
    return chosen


def _chosen(takes: dict[str, tuple[int, int]]) -> str:
    """The first preset on a CPU; on a GPU the last one that its memory and the images suffice for.

    Args:
        takes: bytes that a training takes, and how often it sees each image, by preset.
    """
    from matryoshka_diffusion.training.precision import best_device, device_memory

    first, device = next(iter(takes)), best_device()
    if device == "cpu":
        return first
    room = device_memory(device)
    fitting = [name for name, (n, times) in takes.items() if n <= room and times <= MOST_TIMES]
    return fitting[-1] if fitting else first


def lengthened(config: Any, options: argparse.Namespace) -> Any:
    """The config of a finished run with a longer last stage, which is written to the run's folder.

    A run that has not finished goes on as it is, so the same line again adds nothing.
    """
    run = Path(options.preset)
    from matryoshka_diffusion.config import UsageError
    from matryoshka_diffusion.configfile import changed, load_config, to_yaml
    from matryoshka_diffusion.files import write_atomically
    from matryoshka_diffusion.training import checkpoint
    from matryoshka_diffusion.training.run_folder import owned

    if not (run / "config.yaml").is_file() or options.out not in (None, run):
        raise UsageError(f"--more: {run} is no run; name the folder of one, and omit --out")
    newest, images = checkpoint.newest(run / "checkpoints"), config.train.images
    if newest is None or int(newest.name) < images:
        if "RANK" not in os.environ:
            show(f"{run} has not seen its {images:,} images: it goes on, and --more adds nothing")
        return config
    if "RANK" in os.environ:
        raise UsageError("--more: with torchrun, set train.stages in the run's config.yaml instead")
    last = config.train.stages[-1].images + options.more
    more = [(f"train.stages.{len(config.train.stages) - 1}.images", last)]
    longer = changed(config, more, where="--more")
    show(f"{run}: {longer.train.images:,} images in all; learning rates follow this length")
    if not options.dry_run:
        with owned(run):
            text = to_yaml(changed(load_config(run / "config.yaml"), more)).encode()
            write_atomically(run / "config.yaml", lambda file: file.write(text))
    return longer
