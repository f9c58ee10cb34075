"""What a run has learnt so far, and the step that changes it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import RunConfig
from matryoshka_diffusion.diffusion import Loss, Process, matryoshka_loss
from matryoshka_diffusion.nn.nested import NestedUNet, grow, in_walk_order, level_of
from matryoshka_diffusion.pyramid import Pyramid
from matryoshka_diffusion.rng import stream
from matryoshka_diffusion.train.adapters import build_network, plain_network
from matryoshka_diffusion.train.checkpoint import Snapshot, check_same
from matryoshka_diffusion.train.compiled import compile_network
from matryoshka_diffusion.train.curriculum import active_model, joined_after
from matryoshka_diffusion.train.ema import Ema
from matryoshka_diffusion.train.ema_power import PowerEma
from matryoshka_diffusion.train.engine import build_engine
from matryoshka_diffusion.train.feed import Inputs
from matryoshka_diffusion.train.layout import Layout, arranged, placed
from matryoshka_diffusion.train.optim import (
    build_optimizer,
    drop_gradients,
    learnt_parameters,
    load_moments,
    moment_shapes,
    moments,
    set_learning_rate,
)
from matryoshka_diffusion.train.precision import LossScale, autocast
from matryoshka_diffusion.train.world import World, fill, gathered, whole

PATIENCE = 20
"""Steps in a row that may be skipped because they are not finite."""


class NotFinite(RuntimeError):
    """The loss or its gradient has been infinite or NaN for too long.

    Attributes:
        outcome: what the last step came to.
        samples: all of its samples: number, key and the loss of each, in the order of numbers.
    """

    def __init__(
        self, message: str, outcome: Outcome, samples: Sequence[tuple[int, str, float]]
    ) -> None:
        super().__init__(message)
        self.outcome, self.samples = outcome, samples


@dataclass(frozen=True)
class Progress:
    """Where a run is. `steps` are those that changed the weights, `skipped` those that did not.

    A step that overflowed under a loss scale which can still fall is skipped, but not counted in
    `skipped_in_a_row`: the smaller scale is the remedy.
    """

    images_seen: int = 0
    steps: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    scale: LossScale = field(default_factory=LossScale)

    def restored(self, state: Mapping[str, Any]) -> Progress:
        """The progress that a checkpoint tells of; older ones have no scale, and keep this one."""
        counts = {f.name: state[f.name] for f in fields(self) if f.name != "scale"}
        scale = LossScale(**state["scale"]) if "scale" in state else self.scale
        return Progress(**counts, scale=scale)


class Outcome(NamedTuple):
    """What a step came to.

    `culprits` are the samples (number, key) that made it be skipped, all of them if only the
    gradient was not finite; `scale` is the smaller loss scale where that is the remedy.
    """

    loss: float
    per_level: tuple[float, ...]
    grad_norm: float
    culprits: tuple[tuple[int, str], ...] = ()
    scale: float | None = None


class Learner:
    """The network, its average and the optimizer's memory: the part of a run that is saved.

    `config` is a resolved one (see `run_folder.open_run`); `base` are the weights that adapters
    are put around, if it asks for them. Every rank of `world` has a learner; they take each step
    together and come to the same outcome.
    """

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        images_seen: int = 0,
        base: Mapping[str, Tensor] | None = None,
        world: World | None = None,
    ) -> None:
        self.config, self.device, self.world = config, device, world or World()
        self.base = base
        self.progress = Progress(images_seen, scale=LossScale.of(config.train.precision))
        self._prepare(build_network(active_model(config, images_seen), config.train, base))
        self.ema = Ema(self.net, config.train.ema_decay)
        self.tracks = PowerEma(self.net, config.train.ema_power)

    def _prepare(self, net: NestedUNet) -> None:
        """Take a network, and build what depends on which levels it has and holds no state yet."""
        train = self.config.train
        self.net = placed(net, self.device, self.layout)
        self.net.recompute(train.recompute)
        if train.compile:
            compile_network(self.net, self.device)
        self.engine = build_engine(self.net, self.world, self.device)
        self.process = Process.from_config(self.config.process, net.config)
        self.optimizer = build_optimizer(self.net, train)

    @property
    def layout(self) -> Layout:
        """How features lie in memory, decided when the run's folder was opened.

        FSDP2 takes contiguous weights only, and beside them kernels choose layouts as they please:
        where weights are sharded it is NCHW.
        """
        assert self.config.train.layout != "auto"
        return "nchw" if self.world.shards else self.config.train.layout

    def grow(self, levels: int) -> None:
        """Go on with the first `levels` levels; does nothing if they are there already.

        Weights, averages and moments of the existing levels are kept. The averages of the new
        ones start at their initial weights.
        """
        if levels == len(self.net.levels):
            return
        memory = moments(self.optimizer, self.net)
        small = self.network(dict(self.net.named_parameters()))
        larger = grow(small, self.config.model.first(levels), seed=self.config.train.seed)
        self._prepare(larger.train())
        self.ema.extend(self.net)
        self.tracks.extend(self.net)
        load_moments(self.optimizer, self.net, memory)

    def _joined(self, name: str) -> int:
        """After how many steps of the run a parameter came."""
        return joined_after(self.config.train)[level_of(name)]

    # --- one step --------------------------------------------------------------------------

    def learn(self, inputs: Inputs) -> Outcome:
        """Take one step, unless its loss or gradient is not finite.

        Raises:
            NotFinite: that was so `PATIENCE` times in a row.
        """
        step, progress = inputs.step, self.progress
        loss = self._gradient(inputs)
        frozen = drop_gradients(self.net, step.frozen)
        norm = nn.utils.clip_grad_norm_(in_walk_order(self.net), self.config.train.clip_norm)
        told = self.world.sum(torch.stack([whole(norm), loss.total, *loss.per_level]))
        # One transfer, hence one wait for the device, a step. All ranks get the same numbers, the
        # norm that each has of the gradient among them, so they decide alike whether to step.
        norms, total, *per_level = told.tolist()
        grad_norm = norms / self.world.size
        finite = math.isfinite(total) and math.isfinite(grad_norm)
        scale = progress.scale.after(finite)
        if finite:
            set_learning_rate(self.optimizer, step.lr)
            self.optimizer.step()
            self.ema.update(self.net, progress.steps, frozen, self._joined)
            self.tracks.update(self.net, step.count, frozen)
            self.progress = Progress(step.end, progress.steps + 1, progress.skipped, scale=scale)
            return Outcome(total, tuple(per_level), grad_norm)
        in_a_row = progress.skipped_in_a_row + (not progress.scale.can_fall)
        skipped = progress.skipped + 1
        self.progress = Progress(step.end, progress.steps, skipped, in_a_row, scale)
        samples = self._samples(inputs, loss.per_example)
        culprits = _culprits(samples)
        overflow = scale.factor if math.isfinite(total) and progress.scale.can_fall else None
        outcome = Outcome(total, tuple(per_level), grad_norm, culprits, overflow)
        if in_a_row >= PATIENCE:
            raise NotFinite(
                f"{PATIENCE} steps in a row, up to {step.end:,} images, had an infinite or NaN "
                f"loss or gradient; the last was of {describe(culprits)}. Try a smaller "
                f"train.stages[{step.stage}].lr or train.precision=fp32, with another --out",
                outcome,
                samples,
            )
        return outcome

    def _gradient(self, inputs: Inputs) -> Loss:
        """Leave the gradient of the step's loss in the parameters.

        A rank's share of the batch goes through in `accumulate` parts, each divided by the row
        counts of the whole batch, so that all parts of all ranks add up to what the undivided
        batch gives. The loss that is returned is this rank's part.
        """
        step, train = inputs.step, self.config.train
        self.net.train()
        self.optimizer.zero_grad(set_to_none=True)
        process = self.process.ramped(step.ramp)
        scale = self.progress.scale.factor
        num_parts = min(train.accumulate, step.count)
        parts, per_example = [], torch.zeros_like(inputs.t)
        for offset in range(num_parts):
            micro = inputs.every(num_parts, offset)
            place = self.world.rank + offset * self.world.size  # of its first row in the batch
            with self.engine.micro_batch(last=offset == num_parts - 1):
                with _torch_seeded(self.device, train.seed, "network", step.first, place):
                    loss = matryoshka_loss(
                        self._network,
                        micro.x,
                        micro.cond,
                        micro.t,
                        micro.noise,
                        process=process,
                        counts=step.rows,
                    )
                # The engine averages gradients over the ranks; they are to be summed.
                (scale * self.world.size * loss.total).backward()
            parts.append(Loss(*(part.detach() for part in loss)))
            per_example[offset::num_parts] = parts[-1].per_example
        if scale != 1.0:
            for parameter in self.net.parameters():
                if parameter.grad is not None:
                    parameter.grad /= scale
        return Loss(
            total=torch.stack([part.total for part in parts]).sum(),
            per_level=torch.stack([part.per_level for part in parts]).sum(0),
            per_example=per_example,
        )

    def _network(self, z: Pyramid, t: Float[Tensor, " b"], cond: Conditioning) -> Pyramid:
        """The network in the run's precision; the loss around it stays float32."""
        with autocast(self.config.train.precision, self.device):
            return self.engine(arranged(z, self.layout), t, cond)

    def _samples(
        self, inputs: Inputs, per_example: Float[Tensor, " b"]
    ) -> list[tuple[int, str, float]]:
        """All ranks' samples with the loss of each, on every rank."""
        mine = list(zip(inputs.ids, inputs.keys, per_example.tolist(), strict=True))
        return sorted(itertools.chain.from_iterable(self.world.gather(mine)))

    # --- saving and restoring --------------------------------------------------------------

    def snapshot(self, seconds: float) -> Snapshot:
        """All of this as named tensors and plain values; `seconds` is the time spent so far."""
        config = self.config.model_dump(mode="json")
        return Snapshot(
            state={**asdict(self.progress), "seconds": seconds, "config": config},
            weights=learnt_parameters(self.net),
            ema=self.ema.weights,
            optimizer=moments(self.optimizer, self.net),
            tracks=self.tracks.state(),
        )

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights, on rank 0, put together from all ranks; a collective."""
        return gathered(self.ema.weights, self.world)

    def network(self, weights: Mapping[str, Tensor]) -> NestedUNet:
        """A plain, frozen network in eval mode with copies of what is learnt: these weights.

        A collective if they are sharded.
        """
        copies = {name: whole(value).detach().clone() for name, value in weights.items()}
        net = plain_network(self.net.config, self.config.train, self.base, copies)
        return net.eval().requires_grad_(False)

    @classmethod
    def restore(
        cls,
        config: RunConfig,
        device: torch.device,
        snapshot: Snapshot,
        *,
        where: str,
        base: Mapping[str, Tensor] | None = None,
        world: World | None = None,
    ) -> Learner:
        """The learner that a snapshot was taken of; `where` names it in errors.

        Raises:
            CheckpointError: it does not fit the config. It is checked whole before any is used.
        """
        learner = cls(config, device, snapshot.state["images_seen"], base, world)
        net, memory = learner.net, snapshot.optimizer
        check_same(learnt_parameters(net), snapshot.weights, where=f"{where}: weights")
        check_same(learnt_parameters(net), snapshot.ema, where=f"{where}: ema")
        check_same(moment_shapes(net, memory), memory, where=f"{where}: optimizer")
        check_same(learner.tracks.state(), snapshot.tracks, where=f"{where}: tracks")
        fill(learnt_parameters(net), snapshot.weights)
        learner.ema.load(snapshot.ema)
        learner.tracks.load(snapshot.tracks)
        load_moments(learner.optimizer, net, memory)
        learner.progress = learner.progress.restored(snapshot.state)
        return learner


def _culprits(samples: Sequence[tuple[int, str, float]]) -> tuple[tuple[int, str], ...]:
    """The samples whose loss is not finite; every one if only the gradient is not."""
    bad = [(number, key) for number, key, loss in samples if not math.isfinite(loss)]
    return tuple(bad or [(number, key) for number, key, _ in samples])


def describe(culprits: Sequence[tuple[int, str]]) -> str:
    """The first few samples for people: numbers and names."""
    told = ", ".join(f"{number} ({key})" for number, key in culprits[:4])
    more = f" and {len(culprits) - 4} more" if len(culprits) > 4 else ""
    return f"samples {told}{more}"


@contextmanager
def _torch_seeded(device: torch.device, seed: int, purpose: str, *counters: int) -> Iterator[None]:
    """Torch's own generators seeded for the dropout of one micro-batch, and put back after."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(stream(seed, purpose, *counters).integers(2**63)))
        yield
