"""One optimizer step: the loss that it lowers, how weights move, and how it may end."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matryoshka_diffusion.codecconfig import CodecRunConfig
from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import ConfigError, RunConfig, TrainConfig
from matryoshka_diffusion.diffusion import (
    Distance,
    FinestLoss,
    Loss,
    Network,
    Process,
    matryoshka_loss,
)
from matryoshka_diffusion.files import write_atomically
from matryoshka_diffusion.nn.nested import NestedUNet, in_walk_order, learnt_parameters, level_of
from matryoshka_diffusion.pyramid import Pyramid
from matryoshka_diffusion.rng import stream
from matryoshka_diffusion.training.distributed import is_sharded, sharded_like
from matryoshka_diffusion.training.inputs import Inputs
from matryoshka_diffusion.training.precision import LossScale, autocast
from matryoshka_diffusion.training.stages import Step
from matryoshka_diffusion.training.weights import build_network, load_network, merge

Net = TypeVar("Net", bound=nn.Module)


@dataclass(frozen=True)
class Recipe(Generic[Net]):
    """The network and the loss of one training; `Trainer` does the rest.

    To train something else than a nest, make a recipe of these functions, and then

        trainer = Trainer.resume(recipe, folder, device)  # or begin, without a checkpoint
        trainer.fit(inputs, folder)  # raises `Stopped` after a signal
        trainer.net  # has learnt; export it as you like

    `inputs` maps a `Step` to its `Inputs`, one for each shape of images, as `Feed` does. Draw
    everything random by the numbers of the samples, `range(step.first, step.end)`, so that a
    resumed run has the same bits.

    Attributes:
        config: content of checkpoints and logs, compared between ranks.
        train: stages, optimizer, averages, intervals; `layout` and `precision` are not `auto`.
        build: number of levels -> the network with initial weights.
        loss: (network, `Inputs` of a part of a step) -> its loss, divided by the counts of the
            whole step (`inputs.step.rows`), so that the losses of all parts add up.
        level_names: names of the losses in `Loss.per_level`, for the progress bar.
        finished: (number of levels, learnt weights) -> a plain network, for hooks.
        level_of: name of a parameter -> the level that it came with.
        in_order: network -> its parameters in the order in which gradients are summed to a norm.
    """

    config: RunConfig | CodecRunConfig
    train: TrainConfig
    build: Callable[[int], Net]
    loss: Callable[[Any, Inputs], Loss]
    level_names: Sequence[object] = ("loss",)
    finished: Callable[[int, Mapping[str, Tensor]], Net] | None = None
    level_of: Callable[[str], int] = lambda name: 0
    in_order: Callable[[Any], Sequence[nn.Parameter]] = lambda net: [*net.parameters()]


def diffusion(
    config: RunConfig,
    base: Mapping[str, Tensor] | None = None,
    distance: Distance | None = None,
    captions: Float[Tensor, "n d"] | None = None,
) -> Recipe[NestedUNet]:
    """Recipe of the paper: a nest of UNets and the joint loss (Eq. 3).

    `config` is resolved (`run_folder.open_run`). `base` are the weights under trained adapters,
    `distance` is what a frozen network sees between images, for `train.perceptual`. `captions` are
    mean features of captions, which the initial weights whiten.
    """
    model, train, finest = config.model, config.train, None
    if (section := train.perceptual) is not None:
        if distance is None:
            raise ConfigError("train.perceptual: open_perceptual gives its distance; pass it on")
        finest = FinestLoss(distance, section.weight, section.log_snr_above, config.model.hidden)

    def build(levels: int) -> NestedUNet:
        net = build_network(model.first(levels), train, base)
        if captions is not None and net.conditioner.text is not None:
            net.conditioner.text.whiten(captions)
        net.recompute(train.recompute)
        return net

    def loss(net: Network, inputs: Inputs) -> Loss:
        step, x, cond, t, noise = inputs.step, inputs.x, inputs.cond, inputs.t, inputs.noise
        process = Process.from_config(config.process, model.first(len(step.rows)))

        def network(z: Pyramid, t: Float[Tensor, " b"], cond: Conditioning) -> Pyramid:
            with autocast(train.precision, t.device):  # the loss around it stays float32
                return net(z, t, cond)

        process = process.ramped(step.ramp)
        return matryoshka_loss(
            network, x, cond, t, noise, process=process, counts=step.rows, finest=finest
        )

    def finished(levels: int, weights: Mapping[str, Tensor]) -> NestedUNet:
        if train.lora is not None and base is not None:
            weights = merge(model.first(levels), train, base, weights, where="the run's adapters")
        return load_network(model.first(levels), weights, where="the run's weights")

    names = [level.size for level in model.levels]
    return Recipe(config, train, build, loss, names, finished, level_of, in_walk_order)


# --- how a step ends ---------------------------------------------------------------------------


class SampleLoss(NamedTuple):
    """Global number of a sample, the source's name for it, and its loss in a step."""

    number: int
    key: str
    loss: float


class Stepped(NamedTuple):
    """A step that changed the weights. `grad_norm` is the norm before clipping."""

    loss: float
    per_level: tuple[float, ...]
    grad_norm: float


class Skipped(NamedTuple):
    """A step that changed nothing, because its loss or its gradient is not finite.

    `samples` are those of all ranks; `scale` is the next loss scale after an overflow in fp16.
    """

    loss: float
    per_level: tuple[float, ...]
    grad_norm: float
    samples: tuple[SampleLoss, ...]
    scale: float | None = None

    @property
    def culprits(self) -> tuple[SampleLoss, ...]:
        """Samples whose loss is not finite; every sample if only the gradient is not."""
        bad = tuple(sample for sample in self.samples if not math.isfinite(sample.loss))
        return bad or self.samples

    def __str__(self) -> str:
        if self.scale is not None:
            return f"a gradient overflowed in fp16; the loss scale is now {self.scale:g}"
        first = ", ".join(f"{number} ({key})" for number, key, _ in self.culprits[:4])
        more = f" and {len(self.culprits) - 4} more" if len(self.culprits) > 4 else ""
        return f"the loss or its gradient is not finite; samples {first}{more}"


Outcome: TypeAlias = Stepped | Skipped

PATIENCE = 20
"""Steps in a row that may be skipped because they are not finite."""


class NotFinite(RuntimeError):
    """`PATIENCE` steps in a row were not finite; `skipped` is the last of them."""

    def __init__(self, step: Step, skipped: Skipped) -> None:
        super().__init__(
            f"{PATIENCE} steps in a row, up to {step.end:,} images, were skipped: {skipped}. Try a "
            f"smaller train.stages[{step.stage}].lr or train.precision=fp32, with another --out"
        )
        self.step, self.skipped = step, skipped

    def dump(self, path: Path) -> None:
        """Write the last step as JSON, with `nan`, `inf` and `-inf` as text."""
        content = {
            "error": str(self),
            "images_seen": self.step.end,
            "stage": self.step.stage,
            "lr_per_level": self.step.lr,
            "loss": self.skipped.loss,
            "loss_per_level": self.skipped.per_level,
            "grad_norm": self.skipped.grad_norm,
            "samples": [sample._asdict() for sample in self.skipped.samples],
        }
        plain = json.loads(json.dumps(content), parse_constant=lambda name: str(float(name)))
        write_atomically(path, lambda file: file.write(json.dumps(plain, indent=1).encode()))


@dataclass(frozen=True)
class Progress:
    """Place in a run. `steps` changed the weights, `skipped` did not.

    `skipped_in_a_row` leaves out the steps whose remedy is a smaller loss scale.
    """

    images_seen: int = 0
    steps: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    scale: LossScale = field(default_factory=LossScale)

    def after(self, step: Step, finite: bool) -> Progress:
        """Place after a step."""
        in_a_row = 0 if finite else self.skipped_in_a_row + (not self.scale.can_fall)
        steps, skipped = self.steps + finite, self.skipped + (not finite)
        return Progress(step.end, steps, skipped, in_a_row, self.scale.after(finite))

    def restored(self, state: Mapping[str, Any]) -> Progress:
        """Place of a checkpoint. Values that an older checkpoint does not hold stay as here."""
        known = {key: state[key] for key in asdict(self) if key in state}
        if "scale" in known:
            known["scale"] = LossScale(**known["scale"])
        return replace(self, **known)


# --- the optimizer -----------------------------------------------------------------------------

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@contextmanager
def torch_seeded(device: torch.device, seed: int, purpose: str, *counters: int) -> Iterator[None]:
    """Seed torch's own generators for the dropout of one micro-batch, and put them back after."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(stream(seed, purpose, *counters).integers(2**63)))
        yield


def build_optimizer(
    net: nn.Module, train: TrainConfig, level_of: Callable[[str], int]
) -> torch.optim.Optimizer:
    """Make a fused Adam or AdamW. Biases, gains and other vectors are not decayed."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[train.optimizer]
    parameters: dict[tuple[int, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in learnt_parameters(net).items():
        level = level_of(name) if train.lr_per_level else 0  # a GPU has two kernels a group
        parameters[level, parameter.ndim > 1].append(parameter)
    groups = [
        {"params": some, "level": level, "weight_decay": train.weight_decay if decays else 0.0}
        for (level, decays), some in parameters.items()
    ]
    return kind(groups, lr=0.0, betas=train.betas, eps=train.eps, fused=True)


def set_learning_rates(optimizer: torch.optim.Optimizer, lr: Sequence[float]) -> None:
    """Set the rate of each level for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr[group["level"]]


def drop_gradients(net: nn.Module, frozen: Callable[[str], bool]) -> frozenset[str]:
    """Drop the gradients of the parameters that `frozen` names; return their names.

    Adam then leaves them, their moments included, and clipping measures only what will be applied.
    The gradient is computed first, so that every rank meets the same collectives in every step.
    """
    chosen = {name: p for name, p in net.named_parameters() if frozen(name)}
    for parameter in chosen.values():
        parameter.grad = None
    return frozenset(chosen)


def moments(optimizer: torch.optim.Optimizer, net: nn.Module) -> dict[str, Tensor]:
    """Optimizer's memory as `<parameter>.<moment>`; a parameter never stepped has none."""
    return {
        f"{name}.{moment}": optimizer.state[parameter][moment]
        for name, parameter in net.named_parameters()
        if parameter in optimizer.state
        for moment in MOMENTS
    }


@torch.no_grad()
def load_moments(
    optimizer: torch.optim.Optimizer, net: nn.Module, memory: Mapping[str, Tensor]
) -> None:
    """Give parameters copies of their memory; those without one (new levels) start afresh."""
    for name, parameter in net.named_parameters():
        if f"{name}.step" not in memory:
            continue
        count, *averages = (memory[f"{name}.{moment}"] for moment in MOMENTS)
        state = {"step": count.to(parameter.device, torch.float32, copy=True)}
        for moment, value in zip(MOMENTS[1:], averages, strict=True):
            # In the parameter's layout: fused kernels walk over both side by side.
            state[moment] = torch.empty_like(parameter, dtype=torch.float32, requires_grad=False)
            if not is_sharded(value):
                value = sharded_like(value.to(parameter.device), parameter)
            state[moment].copy_(value)
        optimizer.state[parameter] = state


def moment_shapes(net: nn.Module, memory: Mapping[str, Tensor], steps: int) -> dict[str, Tensor]:
    """Names and shapes of the moments of `net`, for the parameters that `memory` knows at all.

    They are those of all parameters if it knows none after some steps: it was emptied.
    """
    known = {key.rpartition(".")[0] for key in memory}
    return {
        f"{name}.{moment}": torch.empty(() if moment == "step" else value.shape, device="meta")
        for name, value in net.named_parameters()
        if name in known or (steps and not known)
        for moment in MOMENTS
    }
