"""`mdm` with a fault: a disk, a picture or a gradient that goes wrong at a chosen moment.

    python child.py '{"disk": {"moment": 7, "then": "kill"}}' train CONFIG --out RUN

The product is not changed; the functions that it calls are. A fault is named on stderr.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn

WRITES = "wxa+"
MOMENTS = ("open", "write", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir")


def tell(fault: str) -> None:
    os.write(2, f"\nfault: {fault}\n".encode())


# --- the disk ----------------------------------------------------------------------------------


class Disk:
    """Counts accesses to files below a folder; at one moment, something happens instead.

    Args:
        inside: text that a path must contain to count.
        kinds: those of `MOMENTS` that count. A `write` is several moments: before it, after 8 bytes
            (in a safetensors file, the length of the header), half way, and before its last byte.
        moment: number of the access at which it happens, counted from 1.
        then: "kill" for kill -9, "power" for that and the loss of all that was not synced, or the
            name of an error, such as "ENOSPC".
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

    def strikes(self, kind: str, path: str) -> bool:
        """True if this is the moment."""
        if self.left == 0 or kind not in self.kinds or self.inside not in path:
            return False
        self.left -= 1
        if self.left == 0:
            tell(f"{self.then} at {kind} {path}")
        return self.left == 0

    def visit(self, kind: str, path: str) -> None:
        """Count an access, or fail if this is the moment."""
        if self.strikes(kind, path):
            self.strike()

    def strike(self) -> NoReturn:
        if self.then not in ("kill", "power"):
            code = getattr(errno, self.then)
            raise OSError(code, os.strerror(code))
        if self.then == "power":
            for path in filter(os.path.exists, self.unsynced):
                os.truncate(path, 0)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")

    def _watched(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **options: Any) -> Any:
            self.visit(kind, absolute(path, options.get("dir_fd")))
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
            self.visit("fsync", path)
            real(descriptor)
            self.unsynced.discard(path)

        return call

    def _open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            path = "" if isinstance(file, int) else absolute(file)
            if self.inside not in path or not set(mode) & set(WRITES):
                return real(file, mode, *args, **options)
            self.visit("open", path)
            self.unsynced.add(path)
            return File(real(file, mode, *args, **options), path, self)

        return call


class File:
    """An open file each of whose writes is several moments."""

    def __init__(self, file: Any, path: str, disk: Disk) -> None:
        self._file, self._path, self._disk = file, path, disk

    def write(self, data: Any) -> int:
        for cut in (0, 8, len(data) // 2, len(data) - 1):
            if self._disk.strikes("write", f"{self._path} after {cut} of {len(data)}"):
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


def unsynced_folders(code: str) -> None:
    """Refuse fsync of every folder with an error of that name."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            tell(f"{code} at fsync {name_of(descriptor)}")
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
        real(descriptor)

    os.fsync = fsync


# --- numbers -----------------------------------------------------------------------------------


def poison(samples: Collection[int]) -> None:
    """Put NaN into a pixel of the samples of these numbers."""

    def spoil(batch: Any) -> None:
        for row, number in enumerate(batch.ids.tolist()):
            if number in samples:
                tell(f"NaN in sample {number} ({batch.keys[row]})")
                picture = batch.numbers()
                picture[row, 0, 0, 0] = float("nan")
                object.__setattr__(batch, "picture", picture)

    at_batches(spoil)


def overflow(step: int) -> None:
    """Put an infinite number into one gradient of a step, counted from 1 in a process."""
    from matryoshka_diffusion.training.distributed import local

    def strike(gradients: list[Any]) -> None:
        tell(f"Inf in a gradient of step {step}")
        local(gradients[0]).view(-1)[0] = float("inf")

    at_step(step, strike)


def hold(step: int) -> None:
    """Let a step take a minute longer; signals are still handled."""

    def strike(gradients: list[Any]) -> None:
        tell("holding")
        time.sleep(60)

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


def at_batches(look: Callable[[Any], None]) -> None:
    """Call `look` with every batch, before it is used."""
    from matryoshka_diffusion.data.loader import Loader

    real: Callable[..., Any] = Loader.batch

    def batch(*args: Any) -> Any:
        made = real(*args)
        look(made)
        return made

    setattr(Loader, "batch", batch)  # noqa: B010  of another type


# --- several ranks, logs, data ------------------------------------------------------------------


def pids(folder: str) -> None:
    """Leave the number of this process in a file that has the name of its rank."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, os.environ["RANK"]), "w", encoding="utf-8") as file:
        file.write(str(os.getpid()))


def same_rows(_: None) -> None:
    """Every rank takes the samples of rank 0."""
    from matryoshka_diffusion.training.distributed import World

    World.mine = lambda self, numbers: numbers[:: self.size]


def learnt(path: str) -> None:
    """Log number and key of each sample that was learnt from, in one file for each rank."""
    from matryoshka_diffusion.training.trainer import Trainer

    real: Callable[..., Any] = Trainer.step

    def learn(self: Any, inputs: Any) -> Any:
        outcome = real(self, inputs)
        _log(f"{path}-{self.world.rank}", inputs.ids, inputs.keys)
        return outcome

    Trainer.step = learn


def record(path: str) -> None:
    """Log number and key of each sample that training asks for."""
    at_batches(lambda batch: _log(path, batch.ids.tolist(), batch.keys))


def _log(path: str, ids: Sequence[int], keys: Sequence[str]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(pair) + "\n" for pair in zip(ids, keys, strict=True))


def on_demand(at_least: int) -> None:
    """Sets of more than `at_least` pictures are decoded while training."""
    from matryoshka_diffusion.data import decoded

    decoded.CACHED_PICTURES = at_least


def impatient(seconds: float) -> None:
    """Wait that long before each new attempt to reach a server."""
    from matryoshka_diffusion.data import remote

    remote.WAITS = (seconds,) * len(remote.WAITS)


FAULTS: dict[str, Callable[..., None]] = {
    "disk": lambda plan: Disk(**plan).install(),
    "ranks": lambda plans: bring(plans.get(os.environ["RANK"], {})),  # rank -> its faults
    **{f.__name__: f for f in (poison, overflow, hold, record, on_demand, pids, same_rows, learnt)},
    **{f.__name__: f for f in (unsynced_folders, impatient)},
}


def bring(plan: Mapping[str, Any]) -> None:
    for name, value in plan.items():
        FAULTS[name](value)


def main() -> int:
    from matryoshka_diffusion.cli import main as cli
    from matryoshka_diffusion.training import trainer  # noqa: F401  importing is spared the faults

    bring(json.loads(sys.argv[1]))
    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
