"""Training steps on a fake GPU (`benchmarks/fake_gpu.py`), in a process of its own.

    python tests/device_contracts.py FOLDER

prints, as JSON, what `test_devices.py` compares.
"""

from __future__ import annotations

import benchmarks.fake_gpu  # isort: skip  # noqa: F401  (its library loads before torch)

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks import trace
from benchmarks.families import CONFIGS
from benchmarks.tracer import Tracer
from torch import nn
from torch.nn import functional as F

from matryoshka_diffusion.config import RunConfig
from matryoshka_diffusion.nn.lora import attach
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.train import step as steps

ROWS = (4, 3, 2)


def build(model: Any, train: Any, base: Any) -> nn.Module:
    """A network as a run has it, around no particular base."""
    net = NestedUNet(model, seed=train.seed)
    return net if train.lora is None else attach(net, train.lora, train.seed)


def step(config: RunConfig, **train: Any) -> dict[str, Any]:
    """What one training step does."""
    config = config.model_copy(update={"train": config.train.model_copy(update=train)})
    trainer = trace.trainer(config)
    inputs = trace.inputs(config, ROWS[: trainer.levels])
    with Tracer() as tracer:
        trainer.step(inputs)
    return {"waits": tracer.waits, "kernels": len(tracer.kernels)}


def training() -> dict[str, Any]:
    """A step of every family."""
    steps.build_network = build
    change = {"precision": "bf16", "layout": "channels_last", "recompute": (0,)}
    return {name: step(config, **change) for name, config in CONFIGS.items()}


# --- what the tracer counts of operators that can be counted by hand ----------------------------


def count(run: Callable[[], object]) -> dict[str, Any]:
    with Tracer() as tracer:
        run()
    return {
        "kernels": [(kernel.operator, kernel.bytes, kernel.flops) for kernel in tracer.kernels],
        "places": [kernel.place for kernel in tracer.kernels],
        "waits": len(tracer.waits),
        "copies": dict(tracer.copies),
        "attention": [name.split()[0] for name in tracer.attention],
        "doubles": sum(tracer.doubles.values()),
    }


def mixed() -> str:
    try:
        torch.add(torch.zeros(2, device="cuda"), torch.zeros(2))
    except RuntimeError as error:
        return str(error)
    return "no error"


def tracing() -> dict[str, Any]:
    x = torch.zeros(2, 8, 4, 4, device="cuda")
    half = x.bfloat16()
    last = half.contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(8, 8, 3, 3, device="cuda", dtype=torch.bfloat16)
    weight_last = weight.contiguous(memory_format=torch.channels_last)
    bias = torch.zeros(8, device="cuda", dtype=torch.bfloat16)
    q = torch.zeros(1, 2, 4, 8, device="cuda", dtype=torch.bfloat16)
    crossed = q.transpose(2, 3).contiguous().transpose(2, 3)
    mask = torch.ones(1, 1, 1, 4, dtype=torch.bool, device="cuda")
    leaf = torch.zeros(4, device="cuda", requires_grad=True)
    norm = nn.GroupNorm(2, 8).to("cuda")
    cases: dict[str, Callable[[], object]] = {
        "add": lambda: x + x[:1],
        "broadcast": lambda: x[0, 0, 0] + torch.empty((), device="cuda").expand(4),
        "in place": lambda: x.add_(1),
        "views": lambda: x.view(2, -1)[0].expand(3, -1),
        "nothing": lambda: x[:0] + 1,
        "convolution": lambda: F.conv2d(last, weight_last, bias, padding=1),
        "mixed layouts": lambda: F.conv2d(half, weight_last, padding=1),
        "product": lambda: half[0, 0] @ half[0, 1],
        "backward": lambda: F.silu(leaf).sum().backward(),
        "norm": lambda: norm(x),
        "item": lambda: x.sum().item(),
        "list": lambda: x.tolist(),
        "to the GPU": lambda: torch.zeros(4).to("cuda", non_blocking=True),
        "pinned to the GPU": lambda: torch.zeros(4).pin_memory().to("cuda", non_blocking=True),
        "from the GPU": lambda: x.to("cpu", non_blocking=True),
        "double": lambda: x.double(),
        "attention": lambda: F.scaled_dot_product_attention(q, q, q, mask),
        "attention across": lambda: F.scaled_dot_product_attention(crossed, q, q),
    }
    return {name: count(run) for name, run in cases.items()} | {"mixed": mixed()}


def script(folder: Path) -> dict[str, Any]:
    """What the script writes."""
    words = ["fashion-mnist", "--batch", "4", "--top", "1", "--out", str(folder)]
    return json.loads(trace.main(words).read_text("utf-8"))


if __name__ == "__main__":
    results = {"training": training(), "tracing": tracing(), "script": script(Path(sys.argv[1]))}
    print(json.dumps(results))
