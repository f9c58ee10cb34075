"""The ranks that train together: who I am among them, and what we tell each other.

A process by itself is a world of one, in which everybody agrees at once. Every method with
"all ranks" in its description is a collective: each rank has to call it at the same place.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.train.pulse import DeadRank, Pulse, open_store
from matryoshka_diffusion.train.signals import unswayed

T = TypeVar("T")
Parallel = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class World:
    """A rank's view of its group.

    Attributes:
        rank: 0 .. size - 1; rank 0 writes what a run writes.
        size: how many ranks there are.
        parallel: `ddp`, every rank holds the whole network, or `fsdp`, each holds a share.
        machine: which machine the rank is on, and `local_rank` which it is there.
        pulse: who is still alive; a process alone needs none.
    """

    rank: int = 0
    size: int = 1
    parallel: Parallel = "ddp"
    machine: int = 0
    local_rank: int = 0
    pulse: Pulse | None = None

    @property
    def leads(self) -> bool:
        """True for rank 0, which speaks and writes for all."""
        return self.rank == 0

    @property
    def shards(self) -> bool:
        """Whether a rank holds only a share of every parameter."""
        return self.size > 1 and self.parallel == "fsdp"

    def mine(self, numbers: range) -> range:
        """This rank's share of consecutive samples: every `size`-th."""
        return numbers[self.rank :: self.size]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, the same on each."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def highest(self, number: int) -> int:
        """The highest of all ranks' numbers."""
        if self.size == 1:
            return number
        highest = torch.tensor(number)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return int(highest)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on each, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def each(self, make: Callable[[], T]) -> list[T]:
        """What every rank makes, on all ranks; if one fails, all of them fail with its error."""
        if self.size == 1:
            return [make()]
        try:
            result: Any = make()
        except Exception as error:  # noqa: BLE001, it is raised again, on all ranks
            result = _Failed(_portable(error))
        results = self.gather(result)
        for result in results:
            if isinstance(result, _Failed):
                raise result.error
        return results

    def once(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on all ranks; if it fails, all of them fail with its error."""
        return cast("T", self.each(make if self.leads else lambda: None)[0])

    @contextmanager
    def first(self, what: str) -> Iterator[None]:
        """Rank 0 goes through the block before the others, however long it takes.

        `what` is a name that is used once.
        """
        with self._after(leads=self.leads, what=what):
            yield

    @contextmanager
    def first_here(self, what: str) -> Iterator[None]:
        """On each machine one rank goes through the block before the others: caches are local.

        All ranks leave it together.
        """
        with self._after(leads=self.local_rank == 0, what=f"{what}/{self.machine}"):
            yield
        if self.pulse is not None:
            self.pulse.tell(f"{what} of rank {self.rank}")
            for rank in range(self.size):
                self.pulse.wait_for(f"{what} of rank {rank}")

    @contextmanager
    def _after(self, *, leads: bool, what: str) -> Iterator[None]:
        """Wait outside of collectives, whose time is limited, for the rank that leads."""
        if self.pulse is not None and not leads:
            self.pulse.wait_for(what)
        try:
            yield
        finally:
            if self.pulse is not None and leads:
                self.pulse.tell(what)


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same if it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001, whatever an error's own methods raise
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@dataclass(frozen=True)
class _Failed:
    error: Exception


def gathered(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """The tensors as rank 0 needs them to write or draw, the others get none; a collective.

    Sharded ones are put together one by one and kept in RAM: a GPU need not hold all of them.
    """
    if not world.shards:
        return dict(tensors) if world.leads else {}
    found = {}
    for name, value in tensors.items():
        full = whole(value)
        if world.leads:
            found[name] = full.cpu()
    return found


def is_sharded(value: Tensor) -> bool:
    """Whether ranks hold parts of it: a DTensor, whose module takes half a second to import."""
    return hasattr(value, "to_local")


def local(value: Tensor) -> Tensor:
    """The part of a tensor that this rank holds: all of it unless it is sharded."""
    return cast("Any", value).to_local() if is_sharded(value) else value


def fill(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy whole tensors, which every rank has, into tensors of the same names, sharded or not."""
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(sharded_like(values[name].to(target.device), target))


def whole(value: Tensor) -> Tensor:
    """The tensor put together from all ranks' parts; a collective if it is sharded."""
    return cast("Any", value).full_tensor() if is_sharded(value) else value


def sharded_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every rank holds, cut up as `like` is."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = cast("Any", like).device_mesh, cast("Any", like).placements
    # No rank sends anything: each cuts its part out of what it has.
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


# --- joining -----------------------------------------------------------------------------------

LIMIT = timedelta(minutes=30)
"""Of a collective, which may wait for as long as another rank draws previews or saves.

That a rank is dead is noticed by its pulse, long before.
"""


@contextmanager
def joined(device: torch.device, parallel: Parallel, seconds: int) -> Iterator[World]:
    """The world that this process was started in, by torchrun or a cluster's own launcher.

    Args:
        device: where this rank computes.
        seconds: after how long a silent rank counts as dead.

    Raises:
        DeadRank: another rank died; what it was takes the place of the collective's own error.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    rank = int(os.environ["RANK"])
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)  # collectives without a tensor use the current one
        backend = "cpu:gloo,cuda:nccl"
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    dist.init_process_group(
        backend, store=open_store(hosts=hosts), rank=rank, world_size=size, timeout=LIMIT
    )
    pulse = Pulse(open_store(), rank, size, seconds, hosts=hosts)
    machine = int(os.environ.get("GROUP_RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    try:
        yield World(rank, size, parallel, machine, local_rank, pulse)
        dist.barrier()
        pulse.rest()
        dist.barrier()  # nobody closes the store while another rank still asks it
        dist.destroy_process_group()
    except BaseException as error:
        missing = None
        if _may_be_a_peers(error):
            with unswayed():  # torchrun ends everybody as soon as one is gone
                missing = pulse.missing()
        pulse.leave(f"{type(error).__name__}: {error}")
        if missing:
            raise DeadRank(f"{missing}; the same command continues the run") from error
        raise


def _may_be_a_peers(error: BaseException) -> bool:
    """Whether the error may be what a collective says when another rank is gone."""
    return type(error) is RuntimeError or isinstance(error, dist.DistError)


def rank_device(name: str) -> str:
    """The device of this rank: `cuda` becomes the one that belongs to it on its machine.

    Raises:
        UsageError: one GPU was named for several ranks.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and name.startswith("cuda:"):
        raise UsageError(f"--device {name} is one GPU for {ranks} ranks: give --device cuda")
    if ranks == 1 or name != "cuda":
        return name
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    return f"cuda:{local_rank % torch.cuda.device_count()}"
