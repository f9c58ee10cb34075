"""`mdm` with a fault: a disk, a picture or a gradient that goes wrong at a chosen moment.

    python child.py '{"disk": {"moment": 7, "then": "kill"}}' train CONFIG --out RUN

The product is not changed; what it calls is. A fault is told on stderr when it happens.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

WRITES = "wxa+"
MOMENTS = ("open", "write", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir")


def tell(what: str) -> None:
    os.write(2, f"\nfault: {what}\n".encode())


# --- the disk ----------------------------------------------------------------------------------


class Disk:
    """Counts what is done to files below a folder; at one moment, something happens instead.

    Args:
        inside: what a path must contain to count.
        kinds: which of `MOMENTS` count. A `write` is several moments: before it, after 8 bytes (in
            a safetensors file, the length of the header), half way, and before its last byte.
        moment: at which of them it happens, counted from 1.
        then: "kill" for kill -9, "power" for that and the loss of what was not synced, or the name
            of an error, such as "ENOSPC".
    """

    def __init__(
        self,
        *,
        moment: int,
        then: str,
        inside: str = "/checkpoints",
        kinds: Collection[str] = MOMENTS,
    ) -> None:
        self.left, self.then, self.inside, self.kinds = moment, then, inside, kinds
        self.unsynced: set[str] = set()

    def install(self) -> None:
        for name in ("replace", "rename", "mkdir", "unlink", "rmdir"):
            setattr(os, name, self._watched(name, getattr(os, name)))
        setattr(os, "fsync", self._fsync(os.fsync))  # noqa: B010
        builtins.open = io.open = self._open(open)

    def moment(self, kind: str, path: str) -> bool:
        """Whether this is the moment."""
        if self.left == 0 or kind not in self.kinds or self.inside not in path:
            return False
        self.left -= 1
        if self.left == 0:
            tell(f"{self.then} at {kind} {path}")
        return self.left == 0

    def strike(self) -> NoReturn:
        if self.then not in ("kill", "power"):
            code = getattr(errno, self.then)
            raise OSError(code, os.strerror(code))
        if self.then == "power":
            for path in self.unsynced:
                if os.path.exists(path):
                    os.truncate(path, 0)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")

    def _watched(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **options: Any) -> Any:
            if self.moment(kind, absolute(path, options.get("dir_fd"))):
                self.strike()
            done = real(path, *args, **options)
            if kind in ("replace", "rename"):
                self._renamed(str(path), str(args[0]))
            return done

        return call

    def _renamed(self, old: str, new: str) -> None:
        """Files keep being unsynced under their new names, and below a new folder name."""
        moved = {path for path in self.unsynced if path == old or path.startswith(f"{old}/")}
        self.unsynced = (self.unsynced - moved) | {new + path[len(old) :] for path in moved}

    def _fsync(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def call(descriptor: int) -> None:
            path = name_of(descriptor)
            if self.moment("fsync", path):
                self.strike()
            real(descriptor)
            self.unsynced.discard(path)

        return call

    def _open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            path = "" if isinstance(file, int) else absolute(file)
            if self.inside not in path or not set(mode) & set(WRITES):
                return real(file, mode, *args, **options)
            if self.moment("open", path):
                self.strike()
            self.unsynced.add(path)
            return File(real(file, mode, *args, **options), path, self)

        return call


class File:
    """An open file each of whose writes is several moments."""

    def __init__(self, file: Any, path: str, disk: Disk) -> None:
        self._file, self._path, self._disk = file, path, disk

    def write(self, data: Any) -> int:
        for cut in (0, 8, len(data) // 2, len(data) - 1):
            if self._disk.moment("write", f"{self._path} after {cut} of {len(data)}"):
                self._file.write(data[:cut])
                self._file.flush()
                self._disk.strike()
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> File:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def absolute(path: Any, folder: int | None = None) -> str:
    """The whole path; `folder` is the open one that a relative path is in."""
    start = os.getcwd() if folder is None else name_of(folder)
    return os.path.join(start, os.fspath(path))


def name_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


# --- numbers -----------------------------------------------------------------------------------


def poison(samples: Collection[int]) -> None:
    """NaN in a pixel of the samples of these numbers."""

    def spoil(batch: Any) -> None:
        for row, number in enumerate(batch.ids.tolist()):
            if number in samples:
                tell(f"NaN in sample {number} ({batch.keys[row]})")
                batch.picture[row, 0, 0, 0] = float("nan")

    at_batches(spoil)


def overflow(step: int) -> None:
    """An infinite number in one gradient of optimizer step `step`, counted from 1 in a process."""

    from matryoshka_diffusion.train.distributed import local

    def strike(gradients: list[Any]) -> None:
        tell(f"Inf in a gradient of step {step}")
        local(gradients[0]).view(-1)[0] = float("inf")

    at_step(step, strike)


def hold(step: int) -> None:
    """Optimizer step `step` takes a minute longer."""

    def strike(gradients: list[Any]) -> None:
        tell("holding")
        time.sleep(60)  # signals are still handled

    at_step(step, strike)


def at_step(step: int, strike: Callable[[list[Any]], None]) -> None:
    """Call `strike` with all gradients of a step, before they are clipped."""
    from torch import nn

    real, count = nn.utils.clip_grad_norm_, 0

    def clip(parameters: Any, *args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        listed = list(parameters)
        if count == step:
            strike([p.grad for p in listed if p.grad is not None])
        return real(listed, *args, **options)

    nn.utils.clip_grad_norm_ = clip


# --- several ranks -----------------------------------------------------------------------------


def pids(folder: str) -> None:
    """Leave the number of this process in a file that has the name of its rank."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, os.environ["RANK"]), "w", encoding="utf-8") as file:
        file.write(str(os.getpid()))


def same_rows(_: None) -> None:
    """Every rank takes the samples of rank 0."""
    from matryoshka_diffusion.train.distributed import World

    World.mine = lambda self, numbers: numbers[:: self.size]


def on_ranks(plans: Mapping[str, Mapping[str, Any]]) -> None:
    """Faults for some of the ranks: rank -> plan."""
    bring(plans.get(os.environ["RANK"], {}))


def learnt(path: str) -> None:
    """Add a line to `path` and the rank for each sample that was learnt from: number and key."""
    from matryoshka_diffusion.train.trainer import Trainer

    real: Callable[..., Any] = Trainer.step

    def learn(self: Any, inputs: Any) -> Any:
        outcome = real(self, inputs)
        with open(f"{path}-{self.world.rank}", "a", encoding="utf-8") as file:
            for pair in zip(inputs.ids, inputs.keys, strict=True):
                file.write(json.dumps(pair) + "\n")
        return outcome

    Trainer.step = learn


# --- everything else ---------------------------------------------------------------------------


def record(path: str) -> None:
    """Add a line to the file `path` for each sample that training asks for: number and key."""

    def write(batch: Any) -> None:
        with open(path, "a", encoding="utf-8") as file:
            for pair in zip(batch.ids.tolist(), batch.keys, strict=True):
                file.write(json.dumps(pair) + "\n")

    at_batches(write)


def at_batches(look: Callable[[Any], None]) -> None:
    """Call `look` with every batch, before it is used."""
    from matryoshka_diffusion.data.loader import Loader

    real: Callable[..., Any] = Loader.batch

    def batch(*asked: Any) -> Any:
        found = real(*asked)
        look(found)
        return found

    setattr(Loader, "batch", batch)  # noqa: B010  of another type


def decode_on_demand(at_least: int) -> None:
    """Sets of more than `at_least` pictures are decoded while training."""
    from matryoshka_diffusion.data import decoded

    decoded.CACHED_PICTURES = at_least


FAULTS: dict[str, Callable[..., None]] = {
    "disk": lambda plan: Disk(**plan).install(),
    "poison": poison,
    "overflow": overflow,
    "hold": hold,
    "record": record,
    "on_demand": decode_on_demand,
    "pids": pids,
    "same_rows": same_rows,
    "ranks": on_ranks,
    "learnt": learnt,
}


def bring(plan: Mapping[str, Any]) -> None:
    for name, value in plan.items():
        FAULTS[name](value)


def main() -> int:
    from matryoshka_diffusion.cli import main as cli
    from matryoshka_diffusion.train import trainer  # noqa: F401  importing is spared the faults

    bring(json.loads(sys.argv[1]))
    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
