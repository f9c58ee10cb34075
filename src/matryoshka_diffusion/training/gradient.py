"""Gradient of a step, whose rows go through in parts: in turns, or on all cores of a CPU."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Generic, Literal

import torch
from torch import nn

from matryoshka_diffusion.config import ModelConfig, TrainConfig
from matryoshka_diffusion.diffusion import Loss
from matryoshka_diffusion.training.distributed import World, micro_batch, shared
from matryoshka_diffusion.training.inputs import Inputs
from matryoshka_diffusion.training.step import Net, Recipe, torch_seeded

ROWS_OF_A_PART = 8
"""Fewer rows make a thread's convolutions too small to be fast."""


def resolve_threads(
    setting: int | Literal["auto"], train: TrainConfig, model: ModelConfig, device: torch.device
) -> int:
    """Replace `auto` by torch's number of threads on a CPU, else by 1.

    A part then has at least `ROWS_OF_A_PART` rows. A network with dropout draws from torch's one
    generator, and a compiled one is traced once, so these have one thread whatever is set.
    """
    if train.compile or any(level.dropout for level in model.levels):
        return 1
    if setting != "auto" or device.type != "cpu":
        return 1 if setting == "auto" else setting
    rows = min(stage.batch_size for stage in train.stages) // (train.accumulate * ROWS_OF_A_PART)
    return max(1, min(torch.get_num_threads(), rows))


class Gradient(Generic[Net]):
    """Leaves the gradient of a step's loss in the parameters of a network.

    A process alone on a CPU computes `train.threads` parts at a time. Each thread but the first
    has a copy of the network with the same weights and gradients of its own, which are added in a
    fixed order. So the number of threads decides the last digits, and nothing else of the machine
    does.
    """

    def __init__(self, recipe: Recipe[Net], net: Net, world: World, device: torch.device) -> None:
        self.recipe, self.net, self.world, self.device = recipe, net, world, device
        alone = world.size == 1 and device.type == "cpu"
        threads = recipe.train.threads if alone else 1
        assert threads != "auto", "the config of a run is resolved when its folder is opened"
        # A CPU's norms in C need float32 weights.
        half = (
            torch.bfloat16 if recipe.train.precision == "bf16" and device.type == "cuda" else None
        )
        whole = shared(net, world, device, half)
        self.networks = [whole, *(_twin(net) for _ in range(threads - 1))]
        self._pool = ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1))

    @property
    def threads(self) -> int:
        """Number of parts that are computed at a time."""
        return len(self.networks)

    def __call__(self, shapes: Sequence[Inputs], scale: float) -> Loss:
        """Compute the gradient of the loss; return this rank's share of the loss.

        The images of each of the `shapes` in the step go through in parts, all together in
        `accumulate` parts on each thread, or a few more. Each is divided by the counts of the whole
        batch, so that the parts of all ranks add up to it. `scale` multiplies the loss for the
        backward pass.
        """
        for network in self.networks:
            network.train()
            network.zero_grad(set_to_none=True)
        threads = self.threads
        rows = [one.rows(part) for one in shapes for part in self._parts(one)]
        parts: list[Loss] = [None] * len(rows)  # pyright: ignore[reportAssignmentType]

        def work(thread: int) -> None:
            offsets = range(thread, len(rows), threads)
            for offset in offsets:
                part, last = rows[offset], offset == offsets[-1]
                parts[offset] = self._part(self.networks[thread], part, offset, scale, last=last)

        if threads == 1:
            work(0)
        else:
            list(self._pool.map(work, range(threads)))
        self._add_up(scale)
        done, per_example = iter(parts), []
        for one in shapes:
            per_example.append(torch.zeros_like(one.t))
            for part in self._parts(one):
                per_example[-1][part] = next(done).per_example
        totals, per_level = (torch.stack([part[n] for part in parts]).sum(0) for n in (0, 1))
        return Loss(totals, per_level, torch.cat(per_example))

    def _parts(self, inputs: Inputs) -> list[slice]:
        """The rows of each part that images of one shape go through in, the same on all ranks."""
        whole = min(self.recipe.train.accumulate * self.threads, inputs.step.count)
        count = -(-whole * inputs.count // inputs.step.count)
        return [slice(offset, None, count) for offset in range(count)]

    def _part(
        self, network: nn.Module, part: Inputs, offset: int, scale: float, *, last: bool
    ) -> Loss:
        """Add the gradient of one part to those of the network; return its loss."""
        world, train = self.world, self.recipe.train
        place = world.rank + offset * world.size  # of its first row in the batch
        seeded = torch_seeded(self.device, train.seed, "network", part.step.first, place)
        with micro_batch(network, last=last):
            with seeded if self.threads == 1 else nullcontext():
                loss = self.recipe.loss(network, part)
            # DDP and FSDP average gradients; `world.size` makes it a sum.
            (scale * world.size * loss.total).backward()
        return Loss(*(value.detach() for value in loss))

    def _add_up(self, scale: float) -> None:
        """Add the gradients of all copies to those of the network, and undo `scale`."""
        twins = [[*twin.parameters()] for twin in self.networks[1:]]
        for parameter, *others in zip(self.net.parameters(), *twins, strict=True):
            gradients = [other.grad for other in others if other.grad is not None]
            for gradient in gradients:
                add = parameter.grad is not None
                parameter.grad = parameter.grad.add_(gradient) if add else gradient
        gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
        if scale != 1.0 and gradients:
            torch._foreach_div_(gradients, scale)  # pyright: ignore[reportPrivateImportUsage]


def _twin(net: Net) -> Net:
    """A copy of a network that shares its weights and has gradients of its own."""
    twin = copy.deepcopy(net)
    for own, weight in zip(twin.parameters(), net.parameters(), strict=True):
        own.data = weight.data
    return twin
