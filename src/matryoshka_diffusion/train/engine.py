"""How ranks work on one network: alone, each with a copy (DDP), or each with a share (FSDP2).

All three compute the same. Gradients are averaged over the ranks by torch, while the loss is a
sum of the ranks' parts (they divide by the counts of the whole batch): the learner multiplies it
by the number of ranks, which is exact for powers of two.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.nn.level import Block
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.pyramid import Pyramid
from matryoshka_diffusion.train.world import World


@runtime_checkable
class Engine(Protocol):
    """A network as the ranks see it."""

    def __call__(self, z: Pyramid, t: Float[Tensor, " b"], cond: Conditioning) -> Pyramid: ...

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        """Around forward and backward: the last of a step brings the ranks' gradients together."""
        ...


def build_engine(net: NestedUNet, world: World, device: torch.device) -> Engine:
    """The engine for `world`. Under FSDP2 the parameters of `net` become shards, in place."""
    if world.size == 1:
        return Alone(net)
    return {"ddp": Replicas, "fsdp": Shards}[world.parallel](net, device)


class Alone:
    """One rank has it all."""

    def __init__(self, net: NestedUNet) -> None:
        self._net = net

    def __call__(self, z: Pyramid, t: Float[Tensor, " b"], cond: Conditioning) -> Pyramid:
        return self._net(z, t, cond)

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        return nullcontext()


class Replicas:
    """DistributedDataParallel: every rank holds the network, gradients are averaged."""

    def __init__(self, net: NestedUNet, device: torch.device) -> None:
        # Every rank has built the same weights, so nothing needs to be sent at the start.
        self._net = DistributedDataParallel(net, init_sync=False)

    def __call__(self, z: Pyramid, t: Float[Tensor, " b"], cond: Conditioning) -> Pyramid:
        return self._net(z, t, cond)

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last else self._net.no_sync()


class Shards:
    """FSDP2: every rank holds a share of each parameter, gradient and moment.

    A block's parameters are put together when it is their turn; what is not in a block (stems,
    heads, adapters between levels, embeddings: a few per cent) for the whole of a forward pass.
    So no level's `encode` and `decode`, which are no forward methods, need to be known to FSDP.
    """

    def __init__(self, net: NestedUNet, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        for module in net.modules():
            if isinstance(module, Block):
                fully_shard(module, mesh=mesh)
        self._net = cast("FSDPModule", fully_shard(net, mesh=mesh))
        # It warns of views as outputs, for the sake of those who change them in place: we do not.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")

    def __call__(self, z: Pyramid, t: Float[Tensor, " b"], cond: Conditioning) -> Pyramid:
        return cast("NestedUNet", self._net)(z, t, cond)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        self._net.set_requires_gradient_sync(last)
        yield
