"""Training steps of every family on fake CUDA tensors, which have shapes, devices and no numbers.

    python tests/fake_gpu.py LIBRARY    # built from fake_gpu.cpp

prints, as JSON by family, the places at which the host would wait for a GPU. An
operation on tensors of several devices raises. It is a process of its own (`test_devices.py`),
because it changes torch.
"""

from __future__ import annotations

import ctypes
import json
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

library = ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)  # before torch looks for CUDA

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

library.install()

from benchmarks.families import FAMILIES  # noqa: E402
from benchmarks.steps import Noise, features  # noqa: E402

from matryoshka_diffusion.config import RunConfig  # noqa: E402
from matryoshka_diffusion.nn.lora import attach  # noqa: E402
from matryoshka_diffusion.nn.nested import NestedUNet  # noqa: E402
from matryoshka_diffusion.train import step as steps  # noqa: E402
from matryoshka_diffusion.train.inputs import Feed  # noqa: E402
from matryoshka_diffusion.train.stages import Step  # noqa: E402
from matryoshka_diffusion.train.trainer import Trainer  # noqa: E402

ROWS = (4, 3, 2)


class Waits(TorchDispatchMode):
    """The places in the package that copy between host and device."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        outputs = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, outputs)) if isinstance(x, Tensor)]
        copies = function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        if copies and len({x.device.type for x in tensors}) > 1:
            self.note()
        return outputs

    def note(self) -> None:
        frames = [f for f in traceback.extract_stack() if "matryoshka_diffusion" in f.filename]
        self.places.append(f"{Path(frames[-1].filename).name}: {frames[-1].line}")


def pretend(waits: Waits) -> None:
    """Stand in for what needs numbers or a real device."""

    def tolist(self: FakeTensor) -> Any:
        waits.note()
        return np.ones(self.shape).tolist()

    FakeTensor.tolist = tolist
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    torch.random.fork_rng = lambda *_, **__: nullcontext()
    steps.build_network = build
    nn.Module._apply = convert


def convert(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`Module.to`, with new parameters: fake tensors cannot change in place."""
    for part in self.modules():
        for name, weight in part.named_parameters(recurse=False):
            new = nn.Parameter(fn(weight.detach()), weight.requires_grad)
            setattr(part, name, new)
    return self


def build(model: Any, train: Any, base: Any) -> nn.Module:
    """A network as a run has it, around no particular base."""
    net = NestedUNet(model, seed=train.seed)
    return net if train.lora is None else attach(net, train.lora, train.seed)


def step(config: RunConfig, waits: Waits, train: Mapping[str, Any]) -> list[str]:
    """The waits of one training step."""
    config = config.model_copy(update={"train": config.train.model_copy(update=train)})
    levels = len(config.model.levels)
    one = Step(len(config.train.stages) - 1, 0, ROWS[:levels], 1e-4, False)
    inputs = Feed(config, Noise(config), features(config))(one)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:

        def moved(x: Tensor) -> Tensor:
            return fake.from_tensor(x).to("cuda")

        x, noise = (tuple(map(moved, part)) for part in (inputs.x, inputs.noise))
        inputs = replace(inputs, x=x, noise=noise, t=moved(inputs.t), cond=inputs.cond.map(moved))
        trainer = Trainer(steps.diffusion(config), "cuda", images_seen=config.train.images)
        waits.places.clear()
        with waits:
            trainer.step(inputs)
    return list(waits.places)


def main() -> None:
    waits = Waits()
    pretend(waits)
    change = {"precision": "bf16", "layout": "channels_last", "recompute": (0,)}
    found = {
        name: step(family.args[0], waits, change)  # pyright: ignore[reportFunctionMemberAccess]
        for name, family in FAMILIES.items()
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
