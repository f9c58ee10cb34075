"""Training: one class that owns what is learnt, and the loop that ties batches and time together.

It knows no metrics, no sampling and no data set by name. They come in as hooks and as a loader,
the network and its loss as a `Recipe`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matryoshka_diffusion.config import RunConfig
from matryoshka_diffusion.data.bad import Quarantine
from matryoshka_diffusion.data.loader import look_ahead
from matryoshka_diffusion.diffusion import Distance
from matryoshka_diffusion.files import UnreadableError
from matryoshka_diffusion.nn.nested import learnt_parameters
from matryoshka_diffusion.training import checkpoint
from matryoshka_diffusion.training.averages import Ema, PowerEma, write_snapshot
from matryoshka_diffusion.training.checkpoint import Snapshot
from matryoshka_diffusion.training.distributed import (
    ALONE,
    World,
    fill,
    gathered,
    whole,
)
from matryoshka_diffusion.training.gradient import Gradient
from matryoshka_diffusion.training.inputs import (
    Batches,
    Beside,
    Encode,
    Feed,
    Inputs,
    MakeInputs,
    compare_ranks,
    fetched,
)
from matryoshka_diffusion.training.log import Entry, Log, OpenSink, ShownProgress, peak_memory_bytes
from matryoshka_diffusion.training.memory import keep_freed_memory
from matryoshka_diffusion.training.precision import (
    LossScale,
    algorithms,
    compile_network,
    one_core,
    placed,
)
from matryoshka_diffusion.training.run_folder import open_run, owned, refuse_lost_weights
from matryoshka_diffusion.training.signals import Interrupts, Stopped, handled
from matryoshka_diffusion.training.stages import Step, active_levels, joined_after, steps
from matryoshka_diffusion.training.step import (
    PATIENCE,
    Net,
    NotFinite,
    Outcome,
    Progress,
    Recipe,
    SampleLoss,
    Skipped,
    Stepped,
    build_optimizer,
    diffusion,
    drop_gradients,
    load_moments,
    moment_shapes,
    moments,
    set_learning_rates,
)
from matryoshka_diffusion.training.weights import check_same, export_weights


@dataclass(frozen=True)
class View:
    """A run as hooks see it. `averaged` makes a plain network with the averaged weights."""

    config: Any
    folder: Path
    images_seen: int
    averaged: Callable[[], Any]


Hook: TypeAlias = tuple[int, Callable[[View], object]]
"""Interval in images (0: never), and a function that rank 0 calls then and at the end of the run.

A dict that it returns becomes a line of metrics; the path of a picture goes to the sinks. If it
raises, the run is saved first.
"""


def train(
    config: RunConfig,
    loader: Batches,
    folder: Path,
    *,
    encode: Encode | None = None,
    captions: Float[Tensor, "n d"] | None = None,
    base: Mapping[str, Tensor] | None = None,
    distance: Distance | None = None,
    quarantine: Quarantine | None = None,
    hooks: Sequence[Hook] = (),
    sinks: Sequence[OpenSink] = (),
    device: torch.device | str = "cpu",
    world: World = ALONE,
    data_changed: bool = False,
    progress: ShownProgress = True,
) -> Path:
    """Train in a run folder, or continue the run there; return the folder of the finished model.

    All ranks of `world` call it. `encode` is for models with text, `captions` for
    `train.whiten_captions`, `base` for adapters (`train.lora`), `distance` for `train.perceptual`;
    `quarantine` lists the source's bad samples and is saved with the run. With `data_changed` the
    run goes on although its data is another one now. `True` as `progress` shows a bar.

    Raises RunInUse if another process trains there, ConfigError if `folder` holds something else,
    and the errors of `Trainer.resume` and `fit`.
    """
    device = torch.device(device)
    with ExitStack() as ownership:
        world.once(lambda: ownership.enter_context(owned(folder)))
        begin = partial(open_run, folder, config, device, world.size, data_changed=data_changed)
        config = world.once(begin)
        recipe = diffusion(config, base, distance, captions)
        trainer = Trainer.resume(recipe, folder, device, world, quarantine)
        feed = Feed(config, loader, encode, device, world)
        trainer.fit(feed, folder, hooks=hooks, sinks=sinks, progress=progress)
        weights = trainer.averaged()
        world.once(lambda: export_weights(folder / "model", weights, config))
    return folder / "model"


_NO_INPUTS = 1_000  # in the place of a signal's number, above all of them


class Trainer(Generic[Net]):
    """The network `net`, its averages `ema` and `tracks`, the optimizer, and the place in the run.

    Every rank of `world` has one; they take each step together and come to the same outcome.
    """

    def __init__(
        self,
        recipe: Recipe[Net],
        device: torch.device | str = "cpu",
        images_seen: int = 0,
        world: World = ALONE,
    ) -> None:
        keep_freed_memory()
        self.recipe, self.train = recipe, recipe.train
        self.device, self.world = torch.device(device), world
        self.quarantine = Quarantine()
        self.progress = Progress(images_seen, scale=LossScale.initial(self.train.precision))
        self._began = time.monotonic()
        self._build(active_levels(self.train, images_seen))
        self.ema = Ema(self.net, self.train.ema_decay)
        self.tracks = PowerEma(self.net, self.train.ema_power)

    @classmethod
    def resume(
        cls,
        recipe: Recipe[Net],
        folder: Path,
        device: torch.device | str = "cpu",
        world: World = ALONE,
        quarantine: Quarantine | None = None,
    ) -> Trainer[Net]:
        """Continue from the newest checkpoint in a run folder, or begin if there never was one.

        Raises CheckpointError if the checkpoints cannot be used or are missing.
        """
        path = world.once(lambda: checkpoint.newest(folder / "checkpoints"))
        snapshot = None if path is None else checkpoint.read(path, type(recipe.config))
        if snapshot is None:
            refuse_lost_weights(recipe.train, folder)
        trainer = cls(recipe, device, snapshot.state["images_seen"] if snapshot else 0, world)
        trainer.quarantine = quarantine or trainer.quarantine
        if snapshot is not None:
            trainer.restore(snapshot, where=str(path))
        return trainer

    def fit(
        self,
        inputs_of: MakeInputs,
        folder: Path,
        *,
        hooks: Sequence[Hook] = (),
        sinks: Sequence[OpenSink] = (),
        progress: ShownProgress = True,
    ) -> None:
        """Take all steps that are left, and save, log and call hooks on the way.

        Raises:
            Stopped: a rank got SIGINT, SIGTERM or SIGUSR1; the run is saved.
            RanksDiffer: the ranks have different data or configs, or the same samples.
            NotFinite: the loss has not been finite for many steps.
            UnreadableError: the data cannot be read; what was learnt is saved.
        """
        train, interrupts = self.train, Interrupts()
        todo = steps(train, self.progress.images_seen)
        # One thread makes the inputs of the next steps while the network works on this one.
        make, stop = Beside(inputs_of, self.device), lambda: interrupts.received
        ahead = look_ahead(make, todo, workers=1, depth=2, stop=stop)
        with (
            self._reporting(folder, sinks, progress) as log,
            handled(interrupts.note),
            closing(ahead),
            one_core(self.gradient.threads > 1),
            algorithms(train),
        ):
            inputs, wait, error = fetched(ahead)
            if signal := self.world.highest(0 if inputs or error else interrupts.received):
                raise Stopped("stopped before the first step; the same command starts it", signal)
            if inputs:
                compare_ranks(self.world, self.recipe.config, inputs)
            while inputs:
                step, began = inputs[0].step, time.perf_counter()
                self.grow(len(step.rows))
                outcome = self.step(inputs)
                log.add(Entry(step, outcome, wait, time.perf_counter() - began))
                self._report(step, folder, hooks, log)
                inputs, wait, error = fetched(ahead)
                # A signal may come at any time: read it once for all ranks, so they stop together.
                signal = self.world.highest(_NO_INPUTS if error else interrupts.received)
                ends = step.end == train.images
                if signal or ends or step.passes(train.checkpoint_every_images):
                    path = self.save(folder, log)
                if signal:
                    stop = f"stopped at {step.end:,} of {train.images:,} images and saved {path}"
                    stop = f"{stop}; the same command continues from there"
                    if signal != _NO_INPUTS:
                        raise Stopped(stop, signal)
                    reason = error or "the data of another rank cannot be read"
                    raise UnreadableError(f"{reason}; {stop}")
            if error is not None:
                raise error

    # --- one step --------------------------------------------------------------------------

    def step(self, inputs: Sequence[Inputs]) -> Outcome:
        """Take one step, or skip it on all ranks if its loss or gradient is not finite.

        Raises NotFinite after `PATIENCE` skipped steps in a row.
        """
        step, progress = inputs[0].step, self.progress
        loss = self.gradient(inputs, progress.scale.factor)
        frozen = drop_gradients(self.net, lambda name: self.recipe.level_of(name) < step.frozen)
        norm = nn.utils.clip_grad_norm_(self._parameters, self.train.clip_norm)
        sums = self.world.sum(torch.stack([whole(norm), loss.total, *loss.per_level]))
        # One transfer a step means one wait for the device. All ranks get the same sums, including
        # the sum of their gradient norms, so all ranks decide alike whether to step.
        norms, total, *per_level = sums.tolist()
        grad_norm = norms / self.world.size
        finite = math.isfinite(total) and math.isfinite(grad_norm)
        self.progress = progress.after(step, finite)
        if finite:
            set_learning_rates(self.optimizer, step.lr)
            self.optimizer.step()
            joined, level_of = joined_after(self.train), self.recipe.level_of
            self.ema.update(self.net, progress.steps, frozen, lambda name: joined[level_of(name)])
            self.tracks.update(self.net, step.count, frozen)
            return Stepped(total, tuple(per_level), grad_norm)
        overflow = progress.scale.can_fall and math.isfinite(total)
        scale = self.progress.scale.factor if overflow else None
        named = [one for part in inputs for one in zip(part.ids, part.keys, strict=True)]
        losses = zip(named, loss.per_example.tolist(), strict=True)
        mine = [SampleLoss(*name, value) for name, value in losses]
        samples = sorted(sample for rank in self.world.gather(mine) for sample in rank)
        skipped = Skipped(total, tuple(per_level), grad_norm, tuple(samples), scale)
        if self.progress.skipped_in_a_row >= PATIENCE:
            raise NotFinite(step, skipped)
        return skipped

    # --- the network -----------------------------------------------------------------------

    def _build(self, levels: int, kept: Mapping[str, Tensor] | None = None) -> None:
        """Make the network and what depends on its levels; copy `kept` weights into it."""
        net = self.recipe.build(levels)
        parameters = learnt_parameters(net)
        fill({name: parameters[name] for name in kept or ()}, kept or {})
        # FSDP2 takes contiguous weights only.
        layout = "nchw" if self.world.shards else self.train.layout
        self.net, self.levels = placed(net, self.device, layout), levels
        if self.train.compile:
            compile_network(self.net, self.device)
        self.gradient = Gradient(self.recipe, self.net, self.world, self.device)
        self.optimizer = build_optimizer(self.net, self.train, self.recipe.level_of)
        self._parameters = self.recipe.in_order(self.net)

    def grow(self, levels: int) -> None:
        """Continue with the first `levels` levels; old ones keep weights, averages and moments."""
        if levels == self.levels:
            return
        memory = moments(self.optimizer, self.net)
        live = learnt_parameters(self.net)
        self._build(levels, {name: whole(value).detach() for name, value in live.items()})
        self.ema.extend(self.net)
        self.tracks.extend(self.net)
        load_moments(self.optimizer, self.net, memory)

    def averaged(self) -> dict[str, Tensor]:
        """Averaged weights on rank 0, put together from all ranks, which all call it."""
        return gathered(self.ema.weights, self.world)

    def network(self, weights: Mapping[str, Tensor]) -> Net:
        """Make a plain network in eval mode with copies of these weights.

        The copies require gradients: autocast keeps what it casts of such weights only.
        """
        copies = {name: whole(value).detach().clone() for name, value in weights.items()}
        assert self.recipe.finished is not None, "hooks need a recipe that makes finished networks"
        return self.recipe.finished(self.levels, copies).eval()

    # --- saving and restoring --------------------------------------------------------------

    def counts(self) -> dict[str, Any]:
        """Numbers of the run so far, for a line of metrics. `seconds` are those of all starts."""
        return {
            "step": self.progress.steps,
            "skipped": self.progress.skipped,
            "peak_memory_bytes": peak_memory_bytes(self.device),
            "seconds": time.monotonic() - self._began,
        }

    def snapshot(self) -> Snapshot:
        """Return the state of the run as named tensors and plain values."""
        config, bad = self.recipe.config.model_dump(mode="json"), self.quarantine.state()
        seconds = time.monotonic() - self._began
        state = {**asdict(self.progress), "seconds": seconds, "config": config, "bad": bad}
        weights, memory = learnt_parameters(self.net), moments(self.optimizer, self.net)
        return Snapshot(state, weights, self.ema.weights, memory, self.tracks.state())

    def restore(self, snapshot: Snapshot, *, where: str) -> None:
        """Go on from a snapshot. Raises CheckpointError, naming `where`, before any change."""
        if not snapshot.ema:  # codecs had no average in earlier versions
            snapshot = replace(snapshot, ema=snapshot.weights)
        live, memory = learnt_parameters(self.net), snapshot.optimizer
        for part, expected in {
            "weights": live,
            "ema": live,
            "optimizer": moment_shapes(self.net, memory, snapshot.state["steps"]),
            "tracks": self.tracks.state(),
        }.items():
            check_same(expected, getattr(snapshot, part), where=f"{where}: {part}")
        fill(live, snapshot.weights)
        self.ema.load(snapshot.ema)
        self.tracks.load(snapshot.tracks)
        load_moments(self.optimizer, self.net, memory)
        self.progress = self.progress.restored(snapshot.state)
        self.quarantine.restore(snapshot.state.get("bad", ()))  # older checkpoints have none
        self._began = time.monotonic() - snapshot.state["seconds"]

    def save(self, folder: Path, log: Log) -> Path:
        """Write a checkpoint and the list of bad samples."""
        log.close_line(**self.counts())  # so that a resumed run writes the same lines
        for state in self.world.gather(self.quarantine.state()):
            self.quarantine.restore(state)
        if self.world.leads:
            self.quarantine.write(folder / "bad.jsonl")
        keep = self.train.keep_checkpoints
        path = checkpoint.save(folder / "checkpoints", self.snapshot(), keep=keep, world=self.world)
        self.quarantine.check()  # the bad samples of all ranks together may be too many
        return path

    def _report(self, step: Step, folder: Path, hooks: Sequence[Hook], log: Log) -> None:
        """Write the line of metrics, the averages and what hooks make, where they are due."""
        train, ends = self.train, step.end == self.train.images
        if step.ends_stage or step.passes(train.log_every_images):
            log.close_line(**self.counts())
        if ends or step.passes(train.ema_snapshot_interval):
            tracks = gathered(self.tracks.state(), self.world)
            self.world.once(partial(write_snapshot, folder / "ema", tracks, step.end))
        due = [hook for every, hook in hooks if every and (ends or step.passes(every))]
        if due:
            self._call(due, folder, log)

    def _call(self, hooks: Sequence[Callable[[View], object]], folder: Path, log: Log) -> None:
        """Call hooks on rank 0; if one fails, save before its error goes on."""
        images_seen, weights, error = self.progress.images_seen, self.averaged(), None
        view = View(self.recipe.config, folder, images_seen, lambda: self.network(weights))
        with self.world.first(f"hooks at {images_seen}"):
            try:
                for hook in hooks if self.world.leads else ():
                    result = hook(view)
                    if isinstance(result, dict):
                        log.write({"images_seen": images_seen, **result})
                    elif isinstance(result, Path):
                        log.picture(result, images_seen)
            except BaseException as raised:  # noqa: BLE001, raised again once all ranks have saved
                error = raised
        if self.world.highest(int(error is not None)):
            self.save(folder, log)
            raise error or RuntimeError("a hook failed on rank 0")

    @contextmanager
    def _reporting(
        self, folder: Path, sinks: Sequence[OpenSink], progress: ShownProgress
    ) -> Iterator[Log]:
        """Open the log of a run on rank 0; at the end write bad samples, and the failed step."""
        images_seen, leads = self.progress.images_seen, self.world.leads
        log = Log(folder, self.recipe, images_seen, sinks, leads, progress)
        try:
            yield log
        except NotFinite as error:  # on all ranks
            path = folder / "not-finite.json"
            self.world.once(partial(error.dump, path))
            error.args = (f"{error}; {path} tells more",)
            raise
        finally:
            if leads:
                self.quarantine.write(folder / "bad.jsonl")
            log.close()
