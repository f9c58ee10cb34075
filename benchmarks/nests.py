"""Time of a training step as a nest grows from one level to five, against its FLOPs.

    python -m benchmarks.nests --threads 1 --clock cpu       # on a busy machine
    python -m benchmarks.nests --threads 2                   # on a quiet one

The first three levels are those of `openmoji` (16, 32 and 64 pixels); two more, like its finest,
lead to 256. FLOPs and seconds are relative to one level, and `time / FLOPs` says which of them
grows faster: below 1, a level costs less time than its arithmetic would suggest.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness import CLOCKS, add_clock, parse, parser, report, speed, take_turns
from benchmarks.steps import WORDS, trainer
from matryoshka_diffusion.config import RunConfig
from matryoshka_diffusion.nn.costs import forward_flops
from matryoshka_diffusion.presets import preset

LEVELS = (1, 2, 3, 4, 5)


def nest(levels: int) -> RunConfig:
    """A run of `openmoji` with this many levels, each twice as large as the one before."""
    run = preset("openmoji")
    chain = list(run.model.levels)
    while len(chain) < levels:
        finest = chain[-1]
        grown = {"side": 2 * finest.side, "shift_ratio": 2 * finest.shift_ratio}
        chain.append(finest.model_copy(update=grown))
    stage = run.train.stages[-1].model_copy(update={"levels": levels, "mix": ()})
    model = run.model.model_copy(update={"levels": tuple(chain[:levels])})
    train = run.train.model_copy(update={"stages": (stage,)})
    return run.model_copy(update={"model": model, "train": train})


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark; returns the file of results."""
    options = parser(__doc__)
    options.add_argument("--levels", type=int, nargs="+", default=LEVELS, choices=LEVELS)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--precisions", nargs="+", default=["bf16", "fp32"])
    add_clock(options)
    values = parse(options, arguments)
    device, least = torch.device(values.device), min(values.levels)
    configs = {levels: nest(levels) for levels in values.levels}
    flops = {n: forward_flops(config.model, n, WORDS) for n, config in configs.items()}
    variants = {
        f"{n} {precision}": trainer(config, values.batch, device, precision=precision).step
        for n, config in configs.items()
        for precision in values.precisions
    }
    seconds = take_turns(variants, values.repeats, device, CLOCKS[values.clock])
    rows = []
    for n, config in configs.items():
        row = {
            "levels": n,
            "side": config.model.levels[-1].side,
            "GFLOP": flops[n] / 1e9,
            "FLOPs": flops[n] / flops[least],
        }
        for precision in values.precisions:
            name = f"{n} {precision}"
            time = speed(seconds, f"{least} {precision}", name)
            row[f"{precision} seconds"] = statistics.median(seconds[name])
            row[f"{precision} time"] = time
            row[f"{precision} time / FLOPs"] = time / row["FLOPs"]
        rows.append(row)
    return report("nests", rows, values)


if __name__ == "__main__":
    main()
