"""Time and memory of a training step and of samples, against the paper's released arithmetic.

    python -m benchmarks.against_release                                 # on a quiet machine
    python -m benchmarks.against_release --threads 1 --clock cpu         # on a busy one

Both sides have the same network with the same weights. Their predictions are compared before
anything is timed. `nest` is what `mdm train` and `Matryoshka.sample` do on this CPU: layout and
threads by `auto`, fused AdamW and average. `release` is `benchmarks/release.py`: NCHW, plain
operations, loops over weights. In sampling it calls the network twice a step, each time in an
autocast of its own. `release, joined` calls it once with both halves of guidance, in one autocast
for all steps. Noise is drawn in the step; images and text features are ready. Each side is a
process of its own, and the sides take turns. `faster` is a median over rounds. `MB` is a process'
peak above its memory after the imports; it needs Linux.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks import release
from benchmarks.families import Words
from benchmarks.harness import CLOCKS, add_clock, parse, parser, report, speed
from benchmarks.peers import Ready
from benchmarks.resume import resident
from benchmarks.steps import WORDS, Noise, Repeated, features, resolved, trainer
from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import RunConfig
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.presets import preset
from matryoshka_diffusion.pyramid import Pyramid, resolutions_of, to_uint8
from matryoshka_diffusion.training.inputs import Feed
from matryoshka_diffusion.training.precision import Precision

CPU = torch.device("cpu")
OURS, RELEASE, JOINED = "nest", "release", "release, joined"
SIDES = {"training": (OURS, RELEASE), "sampling": (OURS, RELEASE, JOINED)}
PROCESSES: Any = multiprocessing.get_context("spawn")
WIDTHS = {
    "1.9M": ((32, 32, 32), (32, 32, 32), 128),
    "25M": ((64, 128, 192), (32, 32, 64), 256),
}
"""Widths of the coarse level, of the fine level and of embeddings, by number of parameters."""
FEATURES, GUIDANCE = 384, 7.0
TOLERANCE = 1e-5


def run_of(network: str) -> RunConfig:
    """The run of `released-256` with a quarter of its sides, fewer channels, and AdamW."""
    run = preset("released-256")
    *widths, embedding = WIDTHS[network]
    levels = tuple(
        level.model_copy(update={"side": level.side // 4, "widths": own, "heads": 4})
        for level, own in zip(run.model.levels, widths, strict=True)
    )
    assert run.model.text is not None
    text = run.model.text.model_copy(update={"features": FEATURES, "width": 128})
    update = {"levels": levels, "embedding": embedding, "text": text}
    train = run.train.model_copy(update={"optimizer": "adamw", "weight_decay": 0.01})
    return run.model_copy(update={"model": run.model.model_copy(update=update), "train": train})


def enliven(net: nn.Module) -> None:
    """Draw the weights that begin at zero, so that every layer counts in a comparison."""
    draw = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02, generator=draw)


def lively(config: RunConfig) -> NestedUNet:
    """The network of a run, without weights that are zero."""
    net = NestedUNet(config.model)
    enliven(net)
    return net


def conditions(config: RunConfig, caption: str, rows: int) -> Conditioning:
    """A caption's features and the size of the finest images, in as many rows."""
    (tokens,) = Words(FEATURES)([caption])
    mask, side = torch.ones(rows, WORDS, dtype=torch.bool), float(config.model.levels[-1].side)
    micro = {"scale": torch.full((rows,), side)}
    return Conditioning(tokens=tokens.expand(rows, -1, -1), mask=mask, micro=micro)


def pure_noise(config: RunConfig, rows: int) -> Pyramid:
    """Normal numbers on every level."""
    sizes = resolutions_of(config.model)
    return tuple(torch.randn(rows, *size.shape(config.model.channels)) for size in sizes)


@torch.no_grad()
def difference(config: RunConfig, rows: int = 2) -> float:
    """Largest relative error (L2) of a level's prediction between both sides, in float32."""
    net = lively(config)
    z, t, cond = pure_noise(config, rows), torch.rand(rows), conditions(config, "one", rows)
    pairs = zip(net(z, t, cond), release.PlainNest(net)(z, t, cond), strict=True)
    return max(float((plain - own).norm() / own.norm()) for own, plain in pairs)


# --- what is timed -------------------------------------------------------------------------------


class Task(NamedTuple):
    """Computations of a process in its turns."""

    network: str
    precision: Precision
    images: int
    """Rows of a training step, or images sampled at once."""
    steps: int
    """Steps of a sample."""


def training(task: Task, side: str) -> Callable[[], object]:
    """A training step of one side."""
    config, rows, precision = run_of(task.network), task.images, task.precision
    if side == OURS:
        repeated = trainer(config, rows, CPU, **resolved(config, rows, CPU, precision))
        enliven(repeated.trainer.net)
        feed = Feed(config, Ready(config, rows), features(config), CPU)
        return lambda: Repeated(repeated.trainer, feed(repeated.inputs.step)[0]).step()
    net = lively(config)
    pictures, cond = Noise(config).batch(range(rows)).numbers(), conditions(config, "one", rows)
    return release.training(net, pictures, cond, config.train, precision)


def sampling(task: Task, side: str) -> Callable[[], object]:
    """Guided DDIM samples of one side, as bytes."""
    config, rows, precision = run_of(task.network), task.images, task.precision
    net = lively(config).eval()
    if side == OURS:
        model = Matryoshka(net, config, encoder=Words(FEATURES), precision=precision)
        settings: dict[str, Any] = {"sampler": "ddim", "steps": task.steps, "guidance": GUIDANCE}
        return partial(model.sample, "one", n=rows, batch_size=rows, **settings)
    given, without = (conditions(config, caption, rows) for caption in ("one", ""))

    def sample() -> list[torch.Tensor]:
        joined, z = side == JOINED, pure_noise(config, rows)
        settings: dict[str, Any] = {"guidance": GUIDANCE, "precision": precision, "joined": joined}
        images = release.sample(net, z, given, without, steps=task.steps, **settings)
        return [to_uint8(level, config.data.pixels) for level in images]

    return sample


WORK = {"training": training, "sampling": sampling}


# --- processes that take turns -------------------------------------------------------------------

_turn: Callable[[], object]
_imported: int


def prepare(task: Task, work: str, side: str, threads: int) -> None:
    """Build what this process computes in its turns."""
    global _turn, _imported
    torch.set_num_threads(threads)
    _imported = resident("VmRSS")
    _turn = WORK[work](task, side)


def seconds_of_turn(clock: str) -> float:
    """Seconds of one turn in this process."""
    began = CLOCKS[clock]()
    _turn()
    return CLOCKS[clock]() - began


def risen() -> int:
    """Bytes by which this process' peak is above its memory after the imports."""
    return resident("VmHWM") - _imported


def compare(task: Task, work: str, repeats: int, clock: str) -> list[dict[str, Any]]:
    """Rows of one kind of work: the nest against each form of the release."""
    sides, threads = SIDES[work], torch.get_num_threads()
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    with ExitStack() as stack:
        processes: dict[str, ProcessPoolExecutor] = {}
        for side in sides:
            process = ProcessPoolExecutor(1, PROCESSES, prepare, (task, work, side, threads))
            processes[side] = stack.enter_context(process)
        for turn in range(repeats + 1):  # the first round does not count
            for side, process in processes.items():
                spent = process.submit(seconds_of_turn, clock).result()
                seconds[side] += [spent] * (turn > 0)
        peaks = {side: process.submit(risen).result() for side, process in processes.items()}
    rows = []
    for side in sides[1:]:
        ratios = [slow / fast for slow, fast in zip(seconds[side], seconds[OURS], strict=True)]
        row = {"network": task.network, "work": work, "precision": task.precision, "against": side}
        row |= {"its seconds": statistics.median(seconds[side])}
        row |= {"seconds": statistics.median(seconds[OURS]), "faster": speed(seconds, OURS, side)}
        row |= {"least": min(ratios), "most": max(ratios), "its MB": peaks[side] / 1e6}
        row |= {"MB": peaks[OURS] / 1e6, "memory": peaks[OURS] / peaks[side]}
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark; returns the file of results."""
    options = parser(__doc__)
    options.set_defaults(device="cpu")
    options.add_argument("--networks", nargs="+", default=[*WIDTHS], choices=WIDTHS)
    options.add_argument("--precisions", nargs="+", default=["bf16", "fp32"])
    options.add_argument("--work", nargs="+", default=[*SIDES], choices=SIDES)
    options.add_argument("--batch", type=int, default=16, help="images of a training step")
    options.add_argument("--samples", type=int, default=4, help="images sampled at once")
    options.add_argument("--steps", type=int, default=5, help="of a sample (default 5)")
    add_clock(options)
    values = parse(options, arguments)
    images = {"training": values.batch, "sampling": values.samples}
    rows, differences = [], {}
    for network in values.networks:
        differences[network] = difference(run_of(network))
        assert differences[network] < TOLERANCE, "both sides are the same network"
        for precision, work in product(values.precisions, values.work):
            task = Task(network, precision, images[work], values.steps)
            rows += compare(task, work, values.repeats, values.clock)
    return report("against_release", rows, values, differences=differences)


if __name__ == "__main__":
    main()
