"""Training: the loop that ties batches, losses and time together.

It knows no metrics, no sampling and no dataset by name; those come in as hooks and as a loader.
What it promises: the same command continues a stopped run bit for bit, and whatever happens
between two checkpoints (a signal, a full disk, a failing hook, kill -9) loses no checkpoint.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

import torch

from matryoshka_diffusion.config import RunConfig
from matryoshka_diffusion.data.store import look_ahead
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.train import checkpoint
from matryoshka_diffusion.train.curriculum import Step, steps
from matryoshka_diffusion.train.feed import Batches, Encode, Feed, Inputs
from matryoshka_diffusion.train.learner import Learner, describe
from matryoshka_diffusion.train.log import Display, Entry, Metrics, summary
from matryoshka_diffusion.train.memory import peak_memory_bytes
from matryoshka_diffusion.train.run_folder import open_run
from matryoshka_diffusion.train.signals import Interrupts, Stopped


@dataclass(frozen=True)
class View:
    """What a hook may look at.

    Attributes:
        config: the resolved config.
        folder: the run's folder, to put files into.
        images_seen: where the run is.
        net: the network in training; use it without changing it.
        averaged: makes a frozen copy in eval mode that holds the averaged weights.
    """

    config: RunConfig
    folder: Path
    images_seen: int
    net: NestedUNet
    averaged: Callable[[], NestedUNet]


Hook: TypeAlias = tuple[int, Callable[[View], object]]
"""Every so many images (0: never), and at the end of the run: what to call.

A dict that it returns becomes a line of metrics. A hook may draw from torch's global generator,
since training does not. If it raises, the run is
saved first and then stops with that error; the same command goes on after the hook's place.
"""


def train(
    config: RunConfig,
    loader: Batches,
    folder: Path,
    *,
    encode: Encode | None = None,
    hooks: Sequence[Hook] = (),
    device: torch.device | str = "cpu",
) -> Path:
    """Train in the run folder `folder`, or go on with the run that is there.

    Args:
        loader: where pictures come from; see `data.loader.Loader`.
        encode: captions to token features, for models with text.

    Returns:
        The folder with the finished weights (the averaged ones) and their config.

    Raises:
        ConfigError: `folder` holds another run, or something else.
        CheckpointError: the run's checkpoints cannot be used.
        Stopped: after SIGINT or SIGTERM; the run is saved.
        NotFinite: the loss has not been finite for many steps.
        OSError: something could not be written.
    """
    device = torch.device(device)
    config = open_run(folder, config, device)
    run = Run(config, folder, device)
    feed = Feed(config, loader, encode, device)
    todo = steps(config.train, run.images_seen)
    # One thread makes the inputs of the next steps while the network works on this one.
    inputs = cast("Generator[Inputs]", look_ahead(_alone(feed), todo, workers=1, depth=2))
    with Interrupts() as interrupts, Display(config, run.images_seen) as display, closing(inputs):
        for entry in run.learn(inputs):
            run.log(entry)
            display.show(entry)
            run.call(hooks, entry.step)
            stopping = interrupts.received is not None  # asked once: it may change at any time
            saved = run.save() if stopping or run.should_save(entry.step) else None
            if stopping:
                raise Stopped(
                    f"stopped at {entry.step.end:,} of {config.train.images:,} images and saved "
                    f"{saved}; the same command continues from there",
                    interrupts.exit_code,
                )
    learner = run.learner
    weights = learner.ema.network(learner.net).state_dict()
    checkpoint.export_weights(folder / "model", weights, config)
    return folder / "model"


def _alone(feed: Feed) -> Callable[[Step], Inputs]:
    """The feed without helper threads of its own, which would compete for the network's cores.

    Torch counts threads for each thread that calls it, so the network keeps its own.
    """

    def inputs(step: Step) -> Inputs:
        torch.set_num_threads(1)
        return feed(step)

    return inputs


class Run:
    """A learner and the folder that its progress is written to."""

    def __init__(self, config: RunConfig, folder: Path, device: torch.device) -> None:
        self.config, self.folder = config, folder
        seconds, path = 0.0, checkpoint.newest(folder / "checkpoints")
        if path is None:
            self.learner = Learner(config, device)
        else:
            snapshot = checkpoint.read(path)
            self.learner = Learner.restore(config, device, snapshot, where=str(path))
            seconds = snapshot.state["seconds"]
        self._began = time.monotonic() - seconds
        self._metrics = Metrics(folder / "metrics.jsonl", self.images_seen)
        self._entries: list[Entry] = []

    @property
    def images_seen(self) -> int:
        return self.learner.progress.images_seen

    def learn(self, inputs: Iterable[Inputs]) -> Iterator[Entry]:
        """Take one step after the other, growing the network where its stage asks for it."""
        asked = time.perf_counter()
        for given in inputs:
            begun = time.perf_counter()
            self.learner.grow(levels=len(given.step.rows))
            outcome = self.learner.learn(given)
            done = time.perf_counter()
            yield Entry(given.step, outcome, begun - asked, done - begun)
            asked = time.perf_counter()

    def log(self, entry: Entry) -> None:
        """Take a step into the metrics, and warn of one that was skipped."""
        self._entries.append(entry)
        if entry.outcome.culprits:
            warnings.warn(
                f"step skipped at {entry.step.first:,} images: the loss or its gradient is not "
                f"finite; {describe(entry.outcome.culprits)}",
                stacklevel=2,
            )
        if entry.step.ends_stage or _passes(entry.step, self.config.train.log_every_images):
            self._close_line()

    def _close_line(self) -> None:
        """Write a line about the steps since the last one."""
        if self._entries:
            line = {
                "step": self.learner.progress.steps,
                **summary(self._entries),
                "skipped": self.learner.progress.skipped,
                "peak_memory_bytes": peak_memory_bytes(self.learner.device),
                "seconds": self.seconds,
            }
            self._metrics.write(line)
            self._entries.clear()

    def call(self, hooks: Sequence[Hook], step: Step) -> None:
        """Call the hooks that are due; if one fails, save before its error goes on."""
        learner = self.learner
        view = View(
            config=self.config,
            folder=self.folder,
            images_seen=step.end,
            net=learner.net,
            averaged=lambda: learner.ema.network(learner.net),
        )
        for every, hook in hooks:
            if every and (_passes(step, every) or step.end == self.config.train.images):
                try:
                    found = hook(view)
                except BaseException:
                    self.save()
                    raise
                if isinstance(found, dict):
                    self._metrics.write({"images_seen": step.end, **found})

    def should_save(self, step: Step) -> bool:
        """True at every interval and at the end of the run."""
        train = self.config.train
        return step.end == train.images or _passes(step, train.checkpoint_every_images)

    def save(self) -> Path:
        """Write a checkpoint. A line of metrics ends with it, so resuming repeats the lines too."""
        self._close_line()
        return checkpoint.save(
            self.folder / "checkpoints",
            self.learner.snapshot(self.seconds),
            keep=self.config.train.keep_checkpoints,
        )

    @property
    def seconds(self) -> float:
        """Wall time of the run over all its starts."""
        return time.monotonic() - self._began


def _passes(step: Step, every: int) -> bool:
    """Whether the step reaches or passes a multiple of `every` images."""
    return step.end // every > step.first // every
