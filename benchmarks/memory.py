"""Activation memory of a training step, and its speed, with the outer levels recomputed or not.

    python -m benchmarks.memory --threads 2

Activations are what the forward pass keeps for the backward pass, each storage counted once. On a
GPU the peak of allocated memory over a whole step stands beside it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import parse, parser, report, speed, take_turns
from benchmarks.steps import Repeated, outer_levels, trainer

BASELINE = "fp32"


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark; returns the file of results."""
    options = parser(__doc__)
    options.add_argument("--model", nargs="+", default=["openmoji", "fashion-mnist"])
    options.add_argument("--batch", type=int, default=48)
    values = parse(options, arguments)
    device = torch.device(values.device)
    rows = []
    for name in values.model:
        outer = outer_levels(name)
        named: dict[str, dict[str, Any]] = {
            BASELINE: {},
            "fp32 outer levels recomputed": {"recompute": outer},
            "bf16": {"precision": "bf16"},
            "bf16 outer levels recomputed": {"precision": "bf16", "recompute": outer},
            "bf16 all levels recomputed": {"precision": "bf16", "recompute": (0, *outer)},
        }
        trainers = {key: trainer(name, values.batch, device, **each) for key, each in named.items()}
        seconds = take_turns(
            {key: each.step for key, each in trainers.items()}, values.repeats, device
        )
        kept = {key: each.activation_bytes() for key, each in trainers.items()}
        rows += [
            {
                "model": name,
                "variant": key,
                "batch": values.batch,
                "activation MB": kept[key] / 1e6,
                "less memory": kept[BASELINE] / kept[key],
                "seconds": statistics.median(seconds[key]),
                "speed": speed(seconds, key, BASELINE),
                **_peak(each, device),
            }
            for key, each in trainers.items()
        ]
    return report("memory", rows, values)


def _peak(each: Repeated, device: torch.device) -> dict[str, float]:
    """Peak memory of a step on a GPU, without the memory that is always in use."""
    if device.type != "cuda":
        return {}
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    each.step()
    return {"peak MB": (torch.cuda.max_memory_allocated(device) - before) / 1e6}


if __name__ == "__main__":
    main()
