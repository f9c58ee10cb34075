"""Adam and AdamW, with moments kept by parameter name so that they survive growing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from matryoshka_diffusion.config import TrainConfig
from matryoshka_diffusion.nn.nested import level_of
from matryoshka_diffusion.train.world import is_sharded, sharded_like

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def learnt_parameters(net: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training may change, by name: those that ask for a gradient."""
    return {name: value for name, value in net.named_parameters() if value.requires_grad}


def build_optimizer(net: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """A fused Adam or AdamW. Biases, gains and other vectors are not decayed."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[train.optimizer]
    learnt = learnt_parameters(net).values()
    matrices = [p for p in learnt if p.ndim > 1]
    vectors = [p for p in learnt if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": train.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return kind(groups, lr=0.0, betas=train.betas, eps=train.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def drop_gradients(net: nn.Module, levels: int) -> frozenset[str]:
    """Make a step pass by the first `levels` levels and what all levels share; their names.

    A gradient that is not there is all it takes: Adam moves neither such a parameter nor its
    moments nor decays it, and clipping measures only what will be applied. It is computed first
    and dropped after, so that every rank of a distributed run meets the same collectives in a
    frozen step as in any other, which switching `requires_grad` would change.
    """
    frozen = {name: p for name, p in net.named_parameters() if level_of(name) < levels}
    for parameter in frozen.values():
        parameter.grad = None
    return frozenset(frozen)


def moments(optimizer: torch.optim.Optimizer, net: nn.Module) -> dict[str, Tensor]:
    """The optimizer's memory as `<parameter>.<moment>`; a parameter never stepped has none."""
    return {
        f"{name}.{moment}": optimizer.state[parameter][moment]
        for name, parameter in net.named_parameters()
        if parameter in optimizer.state
        for moment in MOMENTS
    }


def load_moments(
    optimizer: torch.optim.Optimizer, net: nn.Module, memory: Mapping[str, Tensor]
) -> None:
    """Give parameters their memory by name; those without one (new levels) start afresh.

    Adam counts steps for each parameter, so the bias correction of new ones is right too.
    """
    for name, parameter in net.named_parameters():
        if f"{name}.step" in memory:
            optimizer.state[parameter] = {
                moment: _beside(parameter, memory[f"{name}.{moment}"]) for moment in MOMENTS
            }


def _beside(parameter: Tensor, moment: Tensor) -> Tensor:
    """A copy of a moment where its parameter is, laid out and sharded as that is.

    Fused kernels walk over both side by side. Step counts are numbers of their own.
    """
    if moment.ndim == 0:
        return moment.to(parameter.device, torch.float32, copy=True)
    target = torch.empty_like(parameter, dtype=torch.float32, requires_grad=False)
    if not is_sharded(moment):
        moment = sharded_like(moment.to(parameter.device), parameter)
    return target.copy_(moment)


def moment_shapes(net: nn.Module, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `memory` should look like for this network: tensors that have only a shape.

    Parameters of which `memory` knows nothing need not be in it.
    """
    known = {key.rpartition(".")[0] for key in memory}
    return {
        f"{name}.{moment}": torch.empty(() if moment == "step" else value.shape, device="meta")
        for name, value in net.named_parameters()
        if name in known
        for moment in MOMENTS
    }
