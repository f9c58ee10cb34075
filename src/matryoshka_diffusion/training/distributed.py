"""Ranks that train together: how they start, agree, and share a network.

Each rank has to call a method that says "all ranks" at the same place.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.nn.level import Block
from matryoshka_diffusion.training.signals import DeadRank, Pulse, handled, open_store

T = TypeVar("T")
Parallel = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class World:
    """A rank's view of its group of `size` ranks; rank 0 writes what a run writes.

    With `parallel` `ddp` every rank holds the whole network, with `fsdp` a share. `machine` and
    `local_rank` are the indices of the rank's machine and of the rank on it. `pulse` notices dead
    ranks; a process alone has none.
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
        """True if a rank holds only a share of every parameter."""
        return self.size > 1 and self.parallel == "fsdp"

    def mine(self, numbers: range) -> range:
        """Return this rank's share of consecutive samples: every `size`-th."""
        return numbers[self.rank :: self.size]

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, the same on each."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def highest(self, number: int) -> int:
        """Maximum of all ranks' numbers."""
        if self.size == 1:
            return number
        highest = torch.tensor(number)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return int(highest)

    def gather(self, value: T) -> list[T]:
        """Collect the values of all ranks, on each, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def each(self, make: Callable[[], T]) -> list[T]:
        """Call `make` on all ranks and collect the results; an error on one is raised on all."""
        if self.size == 1:
            return [make()]
        value = error = None
        try:
            value = make()
        except Exception as raised:  # noqa: BLE001, it is raised again, on all ranks
            error = _portable(raised)
        results = self.gather((value, error))
        for _, error in results:
            if error is not None:
                raise error
        return [cast("T", value) for value, _ in results]

    def once(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0; all ranks get its result, or raise its error."""
        return cast("T", self.each(make if self.leads else lambda: None)[0])

    @contextmanager
    def first(self, event: str, *, each_machine: bool = False) -> Iterator[None]:
        """Let rank 0 go through the block before the others; all ranks leave together.

        With `each_machine` one rank of each goes first, since caches are local. `event` is a name
        that is used once.
        """
        if self.pulse is None:
            yield
            return
        leads = self.local_rank == 0 if each_machine else self.leads
        begun = f"{event} on {self.machine}" if each_machine else event
        if not leads:  # outside of collectives, whose time is limited
            self.pulse.wait_for(begun)
        try:
            yield
        finally:
            if leads:
                self.pulse.tell(begun)
        self.pulse.tell(f"{event} of rank {self.rank}")
        for rank in range(self.size):
            self.pulse.wait_for(f"{event} of rank {rank}")


ALONE = World()
"""World of a process that trains alone."""


def _portable(error: Exception) -> Exception:
    """Return the error, or one with the same text if it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001, whatever an error's own methods raise
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


# --- sharing a network -------------------------------------------------------------------------


def shared(
    net: nn.Module, world: World, device: torch.device, dtype: torch.dtype | None = None
) -> nn.Module:
    """Wrap a network, the same on all ranks, so that its gradient is averaged over them.

    Under FSDP2 its parameters become shards, in place, put together block by block, in `dtype` if
    it is given; gradients are averaged in float32. Parameters outside of blocks (a few per cent)
    are together for the whole of a forward pass, so that FSDP need not know the methods of a
    level, and in float32, in which output layers compute.
    """
    if world.size == 1:
        return net
    if world.parallel == "ddp":
        # The weights are the same already. Gradients that are parts of the buckets in which they
        # travel need no second copy. Every parameter is used in every step, also by no rows.
        return DistributedDataParallel(net, init_sync=False, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (world.size,))
    policy = MixedPrecisionPolicy(dtype, dtype and torch.float32)
    for module in net.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    # The warning is for those who change outputs in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    return cast("nn.Module", fully_shard(net, mesh=mesh))


@contextmanager
def micro_batch(net: nn.Module, *, last: bool) -> Iterator[None]:
    """Enclose forward and backward; the last part of a step averages the ranks' gradients."""
    if isinstance(net, DistributedDataParallel) and not last:
        with net.no_sync():
            yield
        return
    if hasattr(net, "set_requires_gradient_sync"):  # FSDP2
        cast("Any", net).set_requires_gradient_sync(last)
    yield


def gathered(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Put sharded tensors together on rank 0, one by one in RAM; all ranks call it."""
    if not world.shards:
        return dict(tensors) if world.leads else {}
    copies = ((name, whole(value).cpu()) for name, value in tensors.items())
    return {name: copy for name, copy in copies if world.leads}


def is_sharded(value: Tensor) -> bool:
    """True if ranks hold parts of it: a DTensor, whose module takes half a second to import."""
    return hasattr(value, "to_local")


def local(value: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds: all of it unless it is sharded."""
    return cast("Any", value).to_local() if is_sharded(value) else value


def whole(value: Tensor) -> Tensor:
    """Put a tensor together from the parts of all ranks."""
    return cast("Any", value).full_tensor() if is_sharded(value) else value


@torch.no_grad()
def fill(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy whole tensors, which every rank has, into tensors of the same names, sharded or not."""
    for name, target in targets.items():
        target.copy_(sharded_like(values[name].to(target.device), target))


def sharded_like(value: Tensor, like: Tensor) -> Tensor:
    """Cut up a whole tensor, which every rank holds, as `like` is."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = cast("Any", like).device_mesh, cast("Any", like).placements
    # No rank sends anything: each cuts its part out of what it has.
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


# --- joining -----------------------------------------------------------------------------------

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Generous: the other ranks wait here while rank 0 saves. The pulse notices dead ranks sooner."""


@contextmanager
def joined(device: torch.device, parallel: Parallel, seconds: int) -> Iterator[World]:
    """Join the world that torchrun, or a cluster's own launcher, started this process in.

    A rank that is silent for so many `seconds` counts as dead. The other ranks raise DeadRank.
    """
    environment = os.environ
    size = int(environment.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    rank, backend = int(environment["RANK"]), "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)  # collectives without a tensor use the current one
        backend = "cpu:gloo,cuda:nccl"
    hosts = rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store, limit = open_store(hosts=hosts), COLLECTIVE_TIMEOUT
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    pulse = Pulse(open_store(), rank, size, seconds, hosts=hosts)
    machine = int(environment.get("GROUP_RANK", "0"))
    local_rank = int(environment.get("LOCAL_RANK", rank))
    try:
        yield World(rank, size, parallel, machine, local_rank, pulse)
        dist.barrier()
        pulse.rest()
        dist.barrier()  # nobody closes the store while another rank still asks it
        dist.destroy_process_group()
    except BaseException as error:
        missing = None
        if type(error) is RuntimeError or isinstance(error, dist.DistError):  # of a collective
            with handled(signal.SIG_IGN):  # torchrun ends everybody as soon as one is gone
                missing = pulse.missing()
        pulse.leave(f"{type(error).__name__}: {error}")
        if missing:
            raise DeadRank(f"{missing}; the same command continues the run") from error
        raise


def rank_device(name: str) -> str:
    """Return the device of this rank: `cuda` becomes the GPU that belongs to it on its machine.

    Raises UsageError if one GPU is named for several ranks.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and name.startswith("cuda:"):
        raise UsageError(f"--device {name} is one GPU for {ranks} ranks: give --device cuda")
    if ranks == 1 or name != "cuda":
        return name
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    return f"cuda:{local_rank % torch.cuda.device_count()}"


SAVING_SECONDS = 600
"""Time for ranks to save after a signal; torch's agent would kill them after 30 s."""


def launch(ranks: int, arguments: Sequence[str]) -> int:
    """Run `mdm` with `arguments` in `ranks` processes that find each other; return the status.

    A signal to this process reaches all of them, and they save before they leave.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVING_SECONDS))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    # The agent's own log repeats the messages of the ranks.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    signals = "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"
    command = ["-m", "matryoshka_diffusion.cli", *arguments]
    try:
        torchrun(["--standalone", f"--nproc-per-node={ranks}", signals, *command])
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:  # the rank has said what was wrong
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        print(f"mdm: rank {rank} was ended by {name}", file=sys.stderr)
        return 128 - failure.exitcode
    return 0


# --- comparing ---------------------------------------------------------------------------------


class RanksDiffer(RuntimeError):
    """The ranks do not work on the same run, or two of them work on the same samples."""


def compare_data(world: World, keys: Sequence[str], shapes: Sequence[int]) -> None:
    """Raise RanksDiffer if a rank has other images than rank 0, in another order or other shapes.

    A step has a part for each shape, so ranks that disagree on them would wait for each other.
    """
    digest = hashlib.sha256()
    for key, shape in zip(keys, shapes, strict=True) if world.size > 1 else ():
        digest.update(key.encode("utf-8", "surrogatepass") + f"\0{shape}\0".encode())
    first, *others = world.gather((len(keys), digest.hexdigest()))
    for rank, other in enumerate(others, start=1):
        if other != first:
            raise RanksDiffer(
                f"rank {rank} was given other data than rank 0 ({other[0]:,} images and "
                f"{first[0]:,}): every machine needs the same files under --data"
            )
