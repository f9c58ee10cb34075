"""Time of a training step in each precision, layout and with recomputation, against plain fp32.

    python -m benchmarks.step_time --threads 2
    python -m benchmarks.step_time --model cc12m-64 --batch 0      # on a GPU; 0: what fits

On a GPU the rows also have the share of the bf16 matrix product's own speed that the step reaches,
counting three times the FLOPs of the forward pass.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import parse, parser, report, speed, synchronize, take_turns
from benchmarks.steps import Repeated, outer_levels, trainer
from matryoshka_diffusion.nn.costs import forward_flops
from matryoshka_diffusion.presets import preset

BASELINE = "fp32"


def variants(name: str, *, fp16: bool, compiled: bool) -> dict[str, dict[str, Any]]:
    """Variants to compare, as changes of `train`."""
    found: dict[str, dict[str, Any]] = {
        BASELINE: {},
        "fp32 channels last": {"layout": "channels_last"},
        "bf16": {"precision": "bf16"},
        "bf16 channels last": {"precision": "bf16", "layout": "channels_last"},
    }
    if outer := outer_levels(name):
        found["bf16 outer levels recomputed"] = {"precision": "bf16", "recompute": outer}
    if fp16:
        found["fp16"] = {"precision": "fp16"}
    if compiled:
        found["bf16 compiled"] = {"precision": "bf16", "compile": True}
    return found


def largest_batch(fits: Callable[[int], bool], start: int = 1) -> int:
    """The largest power of two times `start` for which `fits` is true; 0 if not even that."""
    batch = 0
    while fits(max(start, 2 * batch)):
        batch = max(start, 2 * batch)
    return batch


def step_fits(name: str, device: torch.device, batch: int) -> bool:
    """Try a step of that batch in fp32, the largest variant, in a GPU's memory."""
    try:
        trainer(name, batch, device).step()
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return True


def product_flops(device: torch.device, dtype: torch.dtype, side: int = 8192) -> float:
    """FLOPs a second of one large square matrix product: what the hardware gives at best."""
    a = torch.randn(side, side, device=device, dtype=dtype)
    seconds = take_turns({"product": lambda: [a @ a for _ in range(10)]}, 5, device)["product"]
    return 10 * 2 * side**3 / statistics.median(seconds)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark; returns the file of results."""
    options = parser(__doc__)
    options.add_argument("--model", nargs="+", default=["openmoji", "fashion-mnist"])
    options.add_argument("--batch", type=int, default=48, help="0: the largest that a GPU holds")
    options.add_argument("--fp16", action="store_true", help="fp16 too, which CPUs emulate slowly")
    options.add_argument("--compile", action="store_true", help="compiled too: minutes more")
    values = parse(options, arguments)
    device = torch.device(values.device)
    peak = product_flops(device, torch.bfloat16) if device.type == "cuda" else None
    rows = []
    for name in values.model:
        batch = values.batch or largest_batch(partial(step_fits, name, device))
        named = variants(name, fp16=values.fp16, compiled=values.compile)
        trainers = {key: trainer(name, batch, device, **train) for key, train in named.items()}
        rows += _rows(name, trainers, values.repeats, device, peak)
    return report("step_time", rows, values, product_flops=peak)


def _rows(
    name: str,
    trainers: dict[str, Repeated],
    repeats: int,
    device: torch.device,
    peak: float | None,
) -> list[dict[str, Any]]:
    seconds = take_turns({key: each.step for key, each in trainers.items()}, repeats, device)
    synchronize(device)
    model = preset(name).model
    image_flops, rows = 3 * forward_flops(model, len(model.levels)), []
    for key, each in trainers.items():
        median, batch = statistics.median(seconds[key]), len(each.inputs.ids)
        flops = image_flops * batch / median
        row = {
            "model": name,
            "variant": key,
            "batch": batch,
            "seconds": median,
            "images/s": batch / median,
            "speed": speed(seconds, key, BASELINE),
        }
        rows.append(row if peak is None else row | {"of the product's peak": flops / peak})
    return rows


if __name__ == "__main__":
    main()
