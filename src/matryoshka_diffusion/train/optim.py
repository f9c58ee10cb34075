"""Adam and AdamW, with moments kept by parameter name so that they survive growing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from matryoshka_diffusion.config import TrainConfig

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def build_optimizer(net: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """A fused Adam or AdamW. Biases, gains and other vectors are not decayed."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[train.optimizer]
    matrices = [p for p in net.parameters() if p.ndim > 1]
    vectors = [p for p in net.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": train.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return kind(groups, lr=0.0, betas=train.betas, eps=train.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


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
                "step": memory[f"{name}.step"].to(parameter.device, torch.float32, copy=True)
            } | {
                # Laid out as the parameter is: fused kernels walk over both side by side.
                moment: torch.empty_like(parameter, dtype=torch.float32).copy_(
                    memory[f"{name}.{moment}"]
                )
                for moment in MOMENTS[1:]
            }


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
