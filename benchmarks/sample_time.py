"""Time of sampling with the shipped model: one picture and a batch, fp32 and bf16.

    python -m benchmarks.sample_time --threads 2

On a GPU the rows also have the launch-bound share: how much of the time the GPU waits for the
program to tell it what to do next, which is nearly all that one small picture takes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import clock_of, parse, parser, report, speed, take_turns
from matryoshka_diffusion.pipeline import Matryoshka


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark; returns the file of results."""
    options = parser(__doc__)
    options.add_argument("--model", default="openmoji")
    options.add_argument("--steps", type=int, default=25)
    options.add_argument("--counts", type=int, nargs="+", default=[1, 16], help="pictures at once")
    values = parse(options, arguments)
    device = torch.device(values.device)
    models = {
        precision: Matryoshka.load(values.model, device=device, precision=precision)
        for precision in ("fp32", "bf16")
    }
    rows = []
    for count in values.counts:
        variants = {
            precision: partial(model.sample, ["red apple"], n=count, steps=values.steps)
            for precision, model in models.items()
        }
        seconds = take_turns(variants, values.repeats, device, clock_of(device))
        for precision, run in variants.items():
            median = statistics.median(seconds[precision])
            row = {
                "variant": precision,
                "pictures": count,
                "steps": values.steps,
                "seconds": median,
                "pictures/s": count / median,
                "speed": speed(seconds, precision, "fp32"),
            }
            if device.type == "cuda":
                row["launch-bound share"] = 1 - busy_seconds(run) / median
            rows.append(row)
    return report("sample_time", rows, values)


def busy_seconds(run: Callable[[], object]) -> float:
    """Seconds that a GPU's kernels take, without the gaps between them."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
    return sum(event.self_device_time_total for event in profiled.key_averages()) / 1e6


if __name__ == "__main__":
    main()
