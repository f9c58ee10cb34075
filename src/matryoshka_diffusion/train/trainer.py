"""Training: the loop that ties batches, losses and time together.

It knows no metrics, no sampling and no dataset by name; those come in as hooks and as a loader.
What it promises: the same command continues a stopped run bit for bit, and whatever happens
between two checkpoints (a signal, a full disk, a failing hook, kill -9) loses no checkpoint.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias, cast

import torch
from torch import Tensor

from matryoshka_diffusion.config import RunConfig
from matryoshka_diffusion.data.bad import Quarantine
from matryoshka_diffusion.data.loader import look_ahead
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.train import checkpoint
from matryoshka_diffusion.train.curriculum import Step, steps
from matryoshka_diffusion.train.dump import write_dump
from matryoshka_diffusion.train.ema_power import write_snapshot
from matryoshka_diffusion.train.feed import Batches, Encode, Feed, Inputs
from matryoshka_diffusion.train.learner import Learner, NotFinite, Outcome, describe
from matryoshka_diffusion.train.log import Display, Entry, Metrics, summary
from matryoshka_diffusion.train.memory import peak_memory_bytes
from matryoshka_diffusion.train.ranks import compare_ranks
from matryoshka_diffusion.train.run_folder import open_run
from matryoshka_diffusion.train.signals import Interrupts, Stopped
from matryoshka_diffusion.train.sinks import Log, OpenSink
from matryoshka_diffusion.train.world import World, gathered


@dataclass(frozen=True)
class View:
    """What a hook may look at.

    Attributes:
        config: the resolved config.
        folder: the run's folder, to put files into.
        images_seen: where the run is.
        averaged: makes a frozen copy in eval mode that holds the averaged weights.
    """

    config: RunConfig
    folder: Path
    images_seen: int
    averaged: Callable[[], NestedUNet]


Hook: TypeAlias = tuple[int, Callable[[View], object]]
"""Every so many images (0: never), and at the end of the run: what to call.

A dict that it returns becomes a line of metrics, the path of a picture goes to the sinks under the
name of its folder. A hook may draw from torch's global generator, since training does not. If it
raises, the run is saved first and then stops with that error; the same command goes on after the
hook's place. Hooks are called on rank 0; the other ranks wait.
"""


def train(
    config: RunConfig,
    loader: Batches,
    folder: Path,
    *,
    encode: Encode | None = None,
    base: Mapping[str, Tensor] | None = None,
    quarantine: Quarantine | None = None,
    hooks: Sequence[Hook] = (),
    sinks: Sequence[OpenSink] = (),
    device: torch.device | str = "cpu",
    world: World | None = None,
) -> Path:
    """Train in the run folder `folder`, or go on with the run that is there.

    Args:
        loader: where pictures come from; see `data.loader.Loader`.
        encode: captions to token features, for models with text.
        base: the weights of the model that adapters are put around (`train.lora`).
        quarantine: the source's list of bad samples, to be saved with the run and restored.
        sinks: where metrics and pictures go besides the run's folder.
        world: the ranks that train together, from `world.joined`; all of them call this.

    Returns:
        The folder with the finished weights (the averaged ones) and their config.

    Raises:
        ConfigError: `folder` holds another run, or something else.
        CheckpointError: the run's checkpoints cannot be used.
        Stopped: a rank got SIGINT, SIGTERM or SIGUSR1; the run is saved.
        RanksDiffer: the ranks were given different data or configs, or the same samples.
        NotFinite: the loss has not been finite for many steps.
        OSError: something could not be written.
    """
    device, world = torch.device(device), world or World()
    config = world.once(lambda: open_run(folder, config, device, world.size))
    run = Run(config, folder, device, world, base, quarantine or Quarantine(), sinks)
    feed = Feed(config, loader, encode, device, world)
    todo = steps(config.train, run.images_seen)
    # One thread makes the inputs of the next steps while the network works on this one.
    inputs = cast("Generator[Inputs]", look_ahead(_alone(feed), todo, workers=1, depth=2))
    with (
        closing(run.metrics),
        Interrupts() as interrupts,
        Display(config, run.images_seen, shown=world.leads) as display,
        closing(inputs),
        run.listing_bad(),
    ):
        for entry in run.learn(inputs):
            run.log(entry)
            display.show(entry)
            run.keep_averages(entry.step)
            run.call(hooks, entry.step)
            # Asked once, since it may change at any time, and of all ranks: they stop together.
            signal = world.highest(interrupts.received)
            saved = run.save() if signal or run.should_save(entry.step) else None
            if signal:
                raise Stopped(
                    f"stopped at {entry.step.end:,} of {config.train.images:,} images and saved "
                    f"{saved}; the same command continues from there",
                    signal,
                )
    weights = run.learner.averaged()
    world.once(lambda: checkpoint.export_weights(folder / "model", weights, config))
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
    """A learner and the folder that its progress is written to, by rank 0."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        device: torch.device,
        world: World,
        base: Mapping[str, Tensor] | None,
        quarantine: Quarantine,
        sinks: Sequence[OpenSink] = (),
    ) -> None:
        self.config, self.folder, self.world = config, folder, world
        self.quarantine = quarantine
        seconds, path = 0.0, world.once(lambda: checkpoint.newest(folder / "checkpoints"))
        if path is None:
            _refuse_lost_weights(config, folder)
            self.learner = Learner(config, device, base=base, world=world)
        else:
            snapshot = checkpoint.read(path)
            self.learner = Learner.restore(
                config, device, snapshot, where=str(path), base=base, world=world
            )
            seconds = snapshot.state["seconds"]
            quarantine.restore(snapshot.state.get("bad", ()))  # older checkpoints have none
        self._began = time.monotonic() - seconds
        self.metrics = Log()
        if world.leads:
            others = [open_sink(folder, config, self.images_seen) for open_sink in sinks]
            self.metrics = Log(Metrics(folder / "metrics.jsonl", self.images_seen), others)
        self._entries: list[Entry] = []

    @property
    def images_seen(self) -> int:
        return self.learner.progress.images_seen

    def learn(self, inputs: Iterable[Inputs]) -> Iterator[Entry]:
        """Take one step after the other, growing the network where its stage asks for it."""
        asked, compared = time.perf_counter(), False
        for given in inputs:
            begun = time.perf_counter()
            if not compared:
                compare_ranks(self.world, self.config, given)
                compared = True
            self.learner.grow(levels=len(given.step.rows))
            outcome = self._learn(given)
            done = time.perf_counter()
            yield Entry(given.step, outcome, begun - asked, done - begun)
            asked = time.perf_counter()

    def _learn(self, given: Inputs) -> Outcome:
        try:
            return self.learner.learn(given)
        except NotFinite as error:  # on all ranks
            path = self.folder / "not-finite.json"
            self.world.once(partial(write_dump, path, error, given.step))
            error.args = (f"{error}; {path} tells more",)
            raise

    def log(self, entry: Entry) -> None:
        """Take a step into the metrics, and warn of one that was skipped."""
        self._entries.append(entry)
        if entry.outcome.culprits and self.world.leads:
            warnings.warn(_why_skipped(entry), stacklevel=2)
        if entry.step.ends_stage or entry.step.passes(self.config.train.log_every_images):
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
            self.metrics.write(line)
            self._entries.clear()

    def keep_averages(self, step: Step) -> None:
        """Write a snapshot of the power-function averages, if there are any and it is time."""
        train = self.config.train
        if step.end == train.images or step.passes(train.ema_snapshot_interval):
            state = gathered(self.learner.tracks.state(), self.world)
            self.world.once(lambda: write_snapshot(self.folder / "ema", state, step.end))

    def call(self, hooks: Sequence[Hook], step: Step) -> None:
        """Call the hooks that are due, on rank 0; if one fails, save before its error goes on."""
        ends = step.end == self.config.train.images
        due = [hook for every, hook in hooks if every and (ends or step.passes(every))]
        if not due:
            return
        learner, error = self.learner, None
        weights = learner.averaged()
        view = View(self.config, self.folder, step.end, lambda: learner.network(weights))
        with self.world.first(f"hooks at {step.end}"):
            if self.world.leads:
                error = self._failure(due, view)
        if self.world.highest(int(error is not None)):
            self.save()
            raise error or RuntimeError("a hook failed on rank 0")

    def _failure(
        self, hooks: Sequence[Callable[[View], object]], view: View
    ) -> BaseException | None:
        """Call hooks, log what they find, and return the error that one of them raised."""
        try:
            for hook in hooks:
                found = hook(view)
                if isinstance(found, dict):
                    self.metrics.write({"images_seen": view.images_seen, **found})
                elif isinstance(found, Path):
                    self.metrics.picture(found.parent.name, found, view.images_seen)
        except BaseException as error:  # noqa: BLE001, raised again once all ranks have saved
            return error
        return None

    def should_save(self, step: Step) -> bool:
        """True at every interval and at the end of the run."""
        train = self.config.train
        return step.end == train.images or step.passes(train.checkpoint_every_images)

    def save(self) -> Path:
        """Write a checkpoint. A line of metrics ends with it, so resuming repeats the lines too."""
        self._close_line()
        snapshot = self.learner.snapshot(self.seconds)
        for found in self.world.gather(self.quarantine.state()):
            self.quarantine.restore(found)
        state = {**snapshot.state, "bad": self.quarantine.state()}
        self._list_bad()
        path = checkpoint.save(
            self.folder / "checkpoints",
            replace(snapshot, state=state),
            keep=self.config.train.keep_checkpoints,
            world=self.world,
        )
        self.quarantine.check()  # what all ranks have found together may be too much
        return path

    @contextmanager
    def listing_bad(self) -> Iterator[None]:
        """List the bad samples however the run ends, above all if there were too many."""
        try:
            yield
        finally:
            self._list_bad()

    def _list_bad(self) -> None:
        if self.world.leads:
            self.quarantine.write(self.folder / "bad.jsonl")

    @property
    def seconds(self) -> float:
        """Wall time of the run over all its starts."""
        return time.monotonic() - self._began


def _why_skipped(entry: Entry) -> str:
    at, outcome = f"step skipped at {entry.step.first:,} images", entry.outcome
    if outcome.scale is not None:
        return f"{at}: a gradient overflowed in fp16; the loss scale is now {outcome.scale:g}"
    return f"{at}: the loss or its gradient is not finite; {describe(outcome.culprits)}"


def _refuse_lost_weights(config: RunConfig, folder: Path) -> None:
    """Raise CheckpointError if a run without a checkpoint must have had one."""
    train, path = config.train, folder / "metrics.jsonl"
    if train.lora is None and (train.init or train.init_levels):
        raise checkpoint.CheckpointError(
            f"{folder} begins from trained weights, but its first checkpoint is missing: remove it "
            "and begin it again (mdm grow, or mdm train with --init)"
        )
    text = path.read_text("utf-8") if path.exists() else ""
    told = [int(number) for number in re.findall(r'"images_seen": (\d+)', text)]
    if max(told, default=0) >= 2 * train.checkpoint_every_images:  # one may have been in the making
        raise checkpoint.CheckpointError(
            f"{folder} has metrics of a run, but its checkpoints are gone: remove it to start over"
        )
