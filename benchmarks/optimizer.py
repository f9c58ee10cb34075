"""Adam and the average of the weights: fused, as training runs them, against a loop over tensors.

    python -m benchmarks.optimizer --threads 2      # S64 at full size: about 9 GB of memory

Both work on the same weights, gradients, moments and averages, one after the other.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness import parse, parser, report, speed, take_turns
from matryoshka_diffusion.nn.costs import count_parameters, training_bytes
from matryoshka_diffusion.nn.nested import NestedUNet, level_of
from matryoshka_diffusion.presets import preset
from matryoshka_diffusion.training.averages import Ema
from matryoshka_diffusion.training.step import build_optimizer

DECAY = 0.999


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark; returns the file of results."""
    options = parser(__doc__)
    options.add_argument("--model", default="cc12m-64")
    values = parse(options, arguments)
    device = torch.device(values.device)
    config = preset(values.model)
    net = NestedUNet(config.model).to(device)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    ema = Ema(net, DECAY)
    fused = build_optimizer(net, config.train, level_of)
    loop = torch.optim.Adam(
        net.parameters(), betas=config.train.betas, eps=config.train.eps, foreach=False, fused=False
    )
    fused.step()
    loop.state = fused.state  # the same moments: memory for one set of them
    for group in (*fused.param_groups, *loop.param_groups):
        group["lr"] = 1e-4

    def fused_step() -> None:
        fused.step()
        ema.update(net, 10**6)

    @torch.no_grad()
    def loop_step() -> None:
        loop.step()
        for name, parameter in net.named_parameters():
            ema.weights[name].mul_(DECAY).add_(parameter, alpha=1 - DECAY)

    variants = {"loop over tensors": loop_step, "fused": fused_step}
    seconds = take_turns(variants, values.repeats, device)
    rows = [
        {
            "model": values.model,
            "variant": name,
            "seconds": statistics.median(seconds[name]),
            "speed": speed(seconds, name, "loop over tensors"),
        }
        for name in variants
    ]
    return report(
        "optimizer", rows, values, parameters=count_parameters(net), bytes=training_bytes(net)
    )


if __name__ == "__main__":
    main()
