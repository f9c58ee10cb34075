"""Training steps and sampling beside networks of other libraries, at equal FLOPs.

    pip install -c constraints.txt -e '.[bench]'
    pip install -c constraints.txt --no-deps denoising-diffusion-pytorch imagen-pytorch
    python -m benchmarks.peers --threads 1 --clock cpu       # on a busy machine
    python -m benchmarks.peers --threads 2                   # on a quiet one
    python -m benchmarks.peers --threads 2 --batch 32 --repeats 3      # shorter

Without the two libraries, which ask for torchvision and do not need it here, the others are
measured. The baseline is `openmoji` with three times its widths, because others are seldom as
narrow as that preset. A training step is forward, backward, clipping, AdamW and an average of the
weights, each as the library's own trainer does it. Noise is drawn in the step; images are ready.
Samples take equally many network evaluations. `per FLOP` is how many times faster the nest computes
a FLOP.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.families import Words
from benchmarks.harness import CLOCKS, add_clock, parse, parser, report, speed, take_turns
from benchmarks.peer_networks import KINDS, TEXT_FEATURES, Peer, Task, forward_flops
from benchmarks.steps import WORDS, Noise, Repeated, features, resolved, trainer
from matryoshka_diffusion.config import RunConfig
from matryoshka_diffusion.data.loader import Batch
from matryoshka_diffusion.nn import costs
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.presets import preset
from matryoshka_diffusion.training.inputs import Batches, Feed
from matryoshka_diffusion.training.precision import Precision, autocast

OURS = "nest"


class Work(NamedTuple):
    """Timed calls of a network."""

    training: Callable[[], object]
    sampling: Callable[[], object]


def wider(factor: int) -> RunConfig:
    """The run of `openmoji` with AdamW and `factor` times its channels."""
    run = preset("openmoji")
    levels = tuple(
        level.model_copy(update={"widths": tuple(factor * width for width in level.widths)})
        for level in run.model.levels
    )
    train = run.train.model_copy(update={"optimizer": "adamw"})
    model = run.model.model_copy(update={"levels": levels})
    return run.model_copy(update={"model": model, "train": train})


def nest_flops(config: RunConfig) -> int:
    """FLOPs of the nest for one image, counted as those of the peers are."""
    return costs.forward_flops(config.model, len(config.model.levels), WORDS)


class Images(NamedTuple):
    """Images of a training step, and images that are sampled at once."""

    training: int
    sampling: int


class Ready(Batches):
    """A loader whose images are there already."""

    def __init__(self, config: RunConfig, batch: int) -> None:
        self._batch = Noise(config).batch(range(batch))

    def batch(self, ids: Sequence[int]) -> Batch:
        return self._batch


def nest(config: RunConfig, task: Task, images: Images, precision: Precision) -> Work:
    """The nest with its own trainer and sampler."""
    batch, count = images
    repeated = trainer(
        config, batch, task.device, **resolved(config, batch, task.device, precision)
    )
    feed = Feed(config, Ready(config, batch), features(config), task.device)
    model = Matryoshka(
        NestedUNet(config.model),
        config,
        encoder=Words(TEXT_FEATURES),
        device=task.device,
        precision=precision,
    )

    def step() -> None:
        Repeated(repeated.trainer, feed(repeated.inputs.step)[0]).step()

    def sample() -> None:
        steps = task.evaluations
        model.sample("", n=count, steps=steps, sampler="ddim", guidance=1.0, batch_size=count)

    return Work(step, sample)


def peer_work(peer: Peer, task: Task, images: Images, precision: Precision) -> Work:
    """The network of another library in a step like its trainer's, and with its sampler."""
    pictures = torch.rand(images.training, task.channels, task.side, task.side, device=task.device)
    optimizer = torch.optim.AdamW(peer.net.parameters(), lr=1e-4)
    average = peer.average(peer.net)

    def step() -> None:
        with autocast(precision, task.device):
            loss = peer.loss(pictures)
        loss.backward()
        if peer.clip is not None:
            nn.utils.clip_grad_norm_(peer.net.parameters(), peer.clip)
        optimizer.step()
        optimizer.zero_grad()
        average()

    def sample() -> None:
        with autocast(precision, task.device):
            peer.sample(images.sampling)

    return Work(step, sample)


def measure(
    config: RunConfig, task: Task, images: Images, values: Namespace
) -> list[dict[str, Any]]:
    """Rows of one batch size: the nest and the peers that are installed, in turns."""
    kinds = {name: kind for name, kind in KINDS.items() if not kind.missing()}
    flops = {OURS: nest_flops(config)}
    for name, kind in kinds.items():
        flops[name] = forward_flops(kind, task, kind.widths[values.wider])
    rows = []
    for precision in values.precisions:
        works = {OURS: nest(config, task, images, precision)}
        for name, kind in kinds.items():
            peer = kind.build(task, kind.widths[values.wider])
            works[name] = peer_work(peer, task, images, precision)
        for field in values.work:
            variants = {name: getattr(work, field) for name, work in works.items()}
            seconds = take_turns(variants, values.repeats, task.device, CLOCKS[values.clock])
            for name in works:
                factor = speed(seconds, OURS, name)
                row = {
                    "network": name,
                    "GFLOP": flops[name] / 1e9,
                    "work": field,
                    "precision": precision,
                    "batch": getattr(images, field),
                    "seconds": statistics.median(seconds[name]),
                    "nest is faster": factor,
                    "per FLOP": factor * flops[OURS] / flops[name],
                }
                rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark; returns the file of results."""
    options = parser(__doc__)
    add = options.add_argument
    add("--wider", type=int, default=3, choices=(1, 3), help="factor of openmoji's widths")
    add("--batch", type=int, nargs="+", default=[8, 32], help="images of a training step")
    add("--samples", type=int, default=8, help="images sampled at once (default 8)")
    add("--precisions", nargs="+", default=["bf16", "fp32"], choices=("bf16", "fp32"))
    add("--work", nargs="+", default=Work._fields, choices=Work._fields)
    add("--steps", type=int, default=5, help="network evaluations of a sample (default 5)")
    add_clock(options)
    values = parse(options, arguments)
    missing = {name: kind.missing() for name, kind in KINDS.items() if kind.missing()}
    for name, packages in missing.items():
        print(f"{name} is left out: {', '.join(packages)} not installed (see --help)")
    config = wider(values.wider)
    finest, channels = config.model.levels[-1], config.model.channels
    task = Task(finest.side, channels, values.steps, torch.device(values.device))
    rows = []
    for batch in values.batch:
        rows += measure(config, task, Images(batch, values.samples), values)
    names = {KINDS[name].distribution for name in KINDS.keys() - missing.keys()}
    versions = {name: version(name) for name in sorted(names)}
    return report("peers", rows, values, versions=versions, missing=missing)


if __name__ == "__main__":
    main()
