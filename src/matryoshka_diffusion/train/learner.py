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
from matryoshka_diffusion.nn.nested import NestedUNet, grow
from matryoshka_diffusion.pyramid import Pyramid
from matryoshka_diffusion.rng import stream
from matryoshka_diffusion.train.checkpoint import Snapshot, check_same
from matryoshka_diffusion.train.compiled import compile_network
from matryoshka_diffusion.train.curriculum import active_model
from matryoshka_diffusion.train.ema import Ema
from matryoshka_diffusion.train.feed import Inputs
from matryoshka_diffusion.train.layout import Layout, arranged, placed
from matryoshka_diffusion.train.optim import (
    build_optimizer,
    load_moments,
    moment_shapes,
    moments,
    set_learning_rate,
)
from matryoshka_diffusion.train.precision import LossScale, autocast

PATIENCE = 20
"""Steps in a row that may be skipped because they are not finite."""


class NotFinite(RuntimeError):
    """The loss or its gradient has been infinite or NaN for too long."""


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
    """What a step came to. `culprits` are the samples (number, key) that made it be skipped."""

    loss: float
    per_level: tuple[float, ...]
    grad_norm: float
    culprits: tuple[tuple[int, str], ...] = ()


class Learner:
    """The network, its average and the optimizer's memory: the part of a run that is saved.

    `config` is a resolved one (see `run_folder.open_run`).
    """

    def __init__(self, config: RunConfig, device: torch.device, images_seen: int = 0) -> None:
        self.config, self.device = config, device
        self.progress = Progress(images_seen, scale=LossScale.of(config.train.precision))
        model = active_model(config, images_seen)
        net = NestedUNet(model, seed=config.train.seed)
        self.net = placed(net, device, self.layout)
        self.ema = Ema(self.net, config.train.ema_decay)
        self._prepare()

    def _prepare(self) -> None:
        """Build what depends on which levels there are and holds no state yet."""
        self.process = Process.from_config(self.config.process, self.net.config)
        self.optimizer = build_optimizer(self.net, self.config.train)
        self.net.recompute(self.config.train.recompute)
        if self.config.train.compile:
            compile_network(self.net, self.device)

    @property
    def layout(self) -> Layout:
        """How features lie in memory, decided when the run's folder was opened."""
        assert self.config.train.layout != "auto"
        return self.config.train.layout

    def grow(self, levels: int) -> None:
        """Go on with the first `levels` levels; does nothing if they are there already.

        Weights, averages and moments of the existing levels are kept. The averages of the new
        ones start at their initial weights.
        """
        if levels == len(self.net.levels):
            return
        memory = moments(self.optimizer, self.net)
        model = self.config.model.first(levels)
        net = grow(self.net, model, seed=self.config.train.seed)
        self.net = placed(net, self.device, self.layout)
        self.ema.extend(self.net)
        self._prepare()
        load_moments(self.optimizer, self.net, memory)

    # --- one step --------------------------------------------------------------------------

    def learn(self, inputs: Inputs) -> Outcome:
        """Take one step, unless its loss or gradient is not finite.

        Raises:
            NotFinite: that was so `PATIENCE` times in a row.
        """
        step, progress = inputs.step, self.progress
        loss = self._gradient(inputs)
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.config.train.clip_norm)
        # One transfer, hence one wait for the device, a step.
        total, grad_norm, *per_level = torch.stack([loss.total, norm, *loss.per_level]).tolist()
        finite = math.isfinite(total) and math.isfinite(grad_norm)
        scale = progress.scale.after(finite)
        if finite:
            set_learning_rate(self.optimizer, step.lr)
            self.optimizer.step()
            self.ema.update(self.net, progress.steps)
            self.progress = Progress(step.end, progress.steps + 1, progress.skipped, scale=scale)
            return Outcome(total, tuple(per_level), grad_norm)
        in_a_row = progress.skipped_in_a_row + (not progress.scale.can_fall)
        skipped = progress.skipped + 1
        self.progress = Progress(step.end, progress.steps, skipped, in_a_row, scale)
        culprits = _culprits(inputs, loss.per_example)
        if in_a_row >= PATIENCE:
            raise NotFinite(
                f"{PATIENCE} steps in a row, up to {step.end:,} images, had an infinite or NaN "
                f"loss or gradient; the last was of {describe(culprits)}. Try a smaller "
                f"train.stages[{step.stage}].lr or train.precision=fp32, with another --out"
            )
        return Outcome(total, tuple(per_level), grad_norm, culprits)

    def _gradient(self, inputs: Inputs) -> Loss:
        """Leave the gradient of the step's loss in the parameters.

        The batch goes through in `accumulate` parts, each divided by the row counts of the
        whole, so that the parts add up to what the undivided batch gives.
        """
        step, train = inputs.step, self.config.train
        self.net.train()
        self.optimizer.zero_grad(set_to_none=True)
        scale = self.progress.scale.factor
        num_parts = min(train.accumulate, step.count)
        parts, per_example = [], torch.zeros_like(inputs.t)
        for offset in range(num_parts):
            micro = inputs.every(num_parts, offset)
            with _torch_seeded(self.device, train.seed, "network", step.first, offset):
                loss = matryoshka_loss(
                    self._network,
                    micro.x,
                    micro.cond,
                    micro.t,
                    micro.noise,
                    process=self.process,
                    counts=step.rows,
                )
            (scale * loss.total).backward()
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
            return self.net(arranged(z, self.layout), t, cond)

    # --- saving and restoring --------------------------------------------------------------

    def snapshot(self, seconds: float) -> Snapshot:
        """All of this as named tensors and plain values; `seconds` is the time spent so far."""
        config = self.config.model_dump(mode="json")
        return Snapshot(
            state={**asdict(self.progress), "seconds": seconds, "config": config},
            weights=self.net.state_dict(),
            ema=self.ema.weights,
            optimizer=moments(self.optimizer, self.net),
        )

    @classmethod
    def restore(
        cls, config: RunConfig, device: torch.device, snapshot: Snapshot, *, where: str
    ) -> Learner:
        """The learner that a snapshot was taken of; `where` names it in errors.

        Raises:
            CheckpointError: it does not fit the config. It is checked whole before any is used.
        """
        learner = cls(config, device, snapshot.state["images_seen"])
        net, memory = learner.net, snapshot.optimizer
        check_same(net.state_dict(), snapshot.weights, where=f"{where}: weights")
        check_same(dict(net.named_parameters()), snapshot.ema, where=f"{where}: ema")
        check_same(moment_shapes(net, memory), memory, where=f"{where}: optimizer")
        net.load_state_dict(snapshot.weights)
        learner.ema.load(snapshot.ema)
        load_moments(learner.optimizer, net, memory)
        learner.progress = learner.progress.restored(snapshot.state)
        return learner


def describe(culprits: Sequence[tuple[int, str]]) -> str:
    """The first few samples for people: numbers and names."""
    told = ", ".join(f"{number} ({key})" for number, key in culprits[:4])
    more = f" and {len(culprits) - 4} more" if len(culprits) > 4 else ""
    return f"samples {told}{more}"


def _culprits(inputs: Inputs, per_example: Float[Tensor, " b"]) -> tuple[tuple[int, str], ...]:
    """The samples whose own loss is not finite; all of them if only the gradient is not."""
    samples = tuple(zip(inputs.ids, inputs.keys, strict=True))
    bad = (~per_example.isfinite()).tolist()
    return tuple(itertools.compress(samples, bad)) if any(bad) else samples


@contextmanager
def _torch_seeded(device: torch.device, seed: int, purpose: str, *counters: int) -> Iterator[None]:
    """Torch's own generators seeded for the dropout of one micro-batch, and put back after."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(stream(seed, purpose, *counters).integers(2**63)))
        yield
