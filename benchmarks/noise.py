"""Numbers/s of noise against numpy's generator on one thread, for the samples of two models.

python -m benchmarks.noise --repeats 10
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import parse, parser, report, speed, take_turns
from matryoshka_diffusion.rng import normal, stream

SAMPLES = {"cc12m-64": 64, "cc12m-1024": 1024}
"""Models, and the side of their finest level."""


def by_numpy(rows: int, shape: tuple[int, ...]) -> Tensor:
    """Draw each row by rejection, as numpy does; a device gets a copy."""
    draws = [stream(0, "noise", n).standard_normal(shape, dtype=np.float32) for n in range(rows)]
    return torch.from_numpy(np.stack(draws))


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark; return the file of results."""
    options = parser(__doc__)
    options.add_argument("--samples", type=int, default=16, help="of a batch (default 16)")
    values = parse(options, arguments)
    device = torch.device(values.device)
    rows = []
    for name, side in SAMPLES.items():
        shape, places = (3, side, side), [(0, n) for n in range(values.samples)]
        variants = {
            "numpy, one thread": lambda shape=shape: by_numpy(values.samples, shape).to(device),
            "ours": partial(normal, "noise", places, shape, device),
        }
        seconds = take_turns(variants, values.repeats, device)
        count = 3 * side**2 * values.samples
        rows += [
            {
                "variant": variant,
                "model": name,
                "numbers": count,
                "millions/s": count / 1e6 / statistics.median(seconds[variant]),
                "speed": speed(seconds, variant, "numpy, one thread"),
            }
            for variant in variants
        ]
    return report("noise", rows, values)


if __name__ == "__main__":
    main()
