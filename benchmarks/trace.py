"""Trace a training step as a GPU would compute it, without a GPU.

    python -m benchmarks.trace cc12m-256 --batch 32
    python -m benchmarks.trace openmoji --batch 48 --set train.recompute=[1]

runs a step of the last stage, in the preset's precision, on tensors that have CUDA's devices, types
and strides but no numbers. It prints kernels, bytes, FLOPs and the time that they would take on one
H200, where each kernel takes the longer of its arithmetic (75 % of 790 TFLOP/s) and its memory
traffic (85 % of 4.3 TB/s); then the memory that an image with all levels keeps for the backward
pass, copies between host and device, waits of the host by line, and attention kernels. It needs
Linux and a C++ compiler.
"""

from __future__ import annotations

import benchmarks.fake_gpu  # isort: skip  # noqa: F401  (its library loads before torch)

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.harness import ROOT, parse, report
from benchmarks.steps import Noise, features
from benchmarks.tracer import HALF, Tracer, place
from matryoshka_diffusion.config import RunConfig
from matryoshka_diffusion.configfile import override
from matryoshka_diffusion.nn.costs import TEXT_TOKENS, kept_tensors
from matryoshka_diffusion.presets import preset
from matryoshka_diffusion.pyramid import rows_of_mix
from matryoshka_diffusion.training import step as steps
from matryoshka_diffusion.training.inputs import Feed, Inputs
from matryoshka_diffusion.training.precision import PrecisionSetting, autocast
from matryoshka_diffusion.training.stages import Step
from matryoshka_diffusion.training.trainer import Trainer

GPU = torch.device("cuda")
WHOLE = 2
"""Images with all levels, whose memory is counted."""


class Kept(NamedTuple):
    """Bytes that the forward pass keeps for the backward pass.

    Attributes:
        weights: copies of weights, which do not depend on the batch.
        rows: all others.
        floats: places of float32 tensors larger than a batch of images, with their bytes.
    """

    weights: int
    rows: int
    floats: Counter[str]


def inputs(config: RunConfig, rows: Sequence[int], tokens: int = TEXT_TOKENS) -> Inputs:
    """Inputs of a step of the last stage on the fake GPU."""
    step = Step(len(config.train.stages) - 1, 0, tuple(rows), (1e-4,) * len(rows), False)
    return Feed(config, Noise(config), features(config, tokens), GPU)(step)[0]


def trainer(config: RunConfig, *, grow: bool = False) -> Trainer[Any]:
    """A trainer with all levels and their moments on the fake GPU; `grow` it to them at the end."""
    images = 0 if grow else config.train.images
    made = Trainer(steps.diffusion(config), GPU, images_seen=images)
    for parameter in made.net.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    made.optimizer.step()
    made.grow(len(config.model.levels))
    return made


def kept(net: nn.Module, precision: PrecisionSetting, inputs: Inputs) -> Kept:
    """Tensors that a forward pass keeps for the backward pass."""
    image = max(x.numel() for x in inputs.x)
    places: dict[int, str] = {}

    def forward() -> object:
        with autocast(precision, GPU):
            return net(inputs.x, inputs.t, inputs.cond)

    def note(x: Tensor) -> None:
        places[x.untyped_storage()._cdata] = place()

    tensors = kept_tensors(net, forward, note)
    shapes = {p.shape for p in net.parameters()}
    shapes |= {torch.Size(reversed(shape)) for shape in shapes if len(shape) == 2}
    weights = rows = 0
    floats: Counter[str] = Counter()
    for x in tensors:
        size = x.untyped_storage().nbytes()
        if x.shape in shapes:
            weights += size
            continue
        rows += size
        if x.dtype not in HALF and x.numel() > image:
            floats[f"{places[x.untyped_storage()._cdata]} {tuple(x.shape)}"] += size
    return Kept(weights, rows, floats)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Trace a step; returns the file of results."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("preset")
    add("--batch", type=int, default=64)
    add("--set", dest="settings", nargs="+", default=[], metavar="KEY=VALUE", help="of the config")
    add("--top", type=int, default=0, metavar="N", help="list the N places that move most bytes")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON")
    options.set_defaults(device="cpu", threads=None)  # of what runs the trace
    values = parse(options, arguments)
    config = override(preset(values.preset), values.settings)
    train = config.train
    if train.layout == "auto":
        train = train.model_copy(update={"layout": "channels_last"})
    if train.precision == "auto":
        train = train.model_copy(update={"precision": "bf16"})
    config = config.model_copy(update={"train": train})
    return trace(config, values)


def trace(config: RunConfig, values: argparse.Namespace) -> Path:
    """Trace a step of a resolved run; print and write what it does."""
    batch, levels = values.batch, len(config.model.levels)
    mix = config.train.stages[-1].mix
    rows = rows_of_mix(mix, 0, batch) if mix else (batch,) * levels
    learner, made = trainer(config), inputs(config, rows)
    whole = inputs(config, (WHOLE,) * levels)
    memory = kept(learner.net, config.train.precision, whole)
    with Tracer() as tracer:
        learner.step([made])
    kernels = tracer.kernels
    seconds = sum(kernel.seconds for kernel in kernels)
    table = []
    for kind in sorted({kernel.kind for kernel in kernels}):
        some = [kernel for kernel in kernels if kernel.kind == kind]
        table.append(_sums(kind, some))
    table.append(_sums("all", kernels))
    about = {
        "preset": values.preset,
        "rows of each level": rows,
        "images/s": batch / seconds,
        "share of 790 TFLOP/s": sum(kernel.flops for kernel in kernels) / seconds / 790e12,
        "GB kept an image": memory.rows / WHOLE / 1e9,
        "GB kept in any batch": memory.weights / 1e9,
        "GB kept in float32": {place: size / 1e9 for place, size in memory.floats.items()},
        "copies in bytes": dict(tracer.copies),
        "waits": dict(Counter(tracer.waits)),
        "float64 on the device": dict(tracer.doubles),
        "attention": dict(tracer.attention),
    }
    path = report("trace", table, values, **about)
    for name, value in about.items():
        lines = value.items() if isinstance(value, dict) else ((value, ""),)
        print(f"\n{name}:", *(f"{a} {b}" for a, b in lines), sep="\n  " if len(lines) > 1 else " ")
    moved = Counter[str]()
    for kernel in kernels:
        moved[f"{kernel.place} {kernel.operator}"] += kernel.bytes
    for place_, size in moved.most_common(values.top):
        print(f"{size / 1e9:8.2f} GB  {place_}")
    return path


def _sums(kind: str, kernels: Sequence[Any]) -> dict[str, Any]:
    return {
        "kind": kind,
        "kernels": len(kernels),
        "GB": sum(kernel.bytes for kernel in kernels) / 1e9,
        "TFLOP": sum(kernel.flops for kernel in kernels) / 1e12,
        "ms": 1e3 * sum(kernel.seconds for kernel in kernels),
    }


if __name__ == "__main__":
    main()
