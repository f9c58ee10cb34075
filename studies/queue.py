"""A queue that any number of workers go through: done once, continued after a kill.

A task is done when its result file is there, whole. It is claimed by a lock on a file beside it,
which the system releases when the worker dies, however it dies.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from matryoshka_diffusion.files import write_atomically


class Task(Protocol):
    """Something with a name, which is its place among the results.

    `needs` are the names of tasks whose results come first.
    """

    @property
    def name(self) -> str: ...
    @property
    def needs(self) -> tuple[str, ...]: ...


def result_path(results: Path, name: str) -> Path:
    """Where the result of a task lies: `emoji/mdm/0` in `emoji/mdm-0.json`."""
    set_name, rest = name.split("/", 1)
    return results / set_name / f"{rest.replace('/', '-')}.json"


def work(
    tasks: Iterable[Task], do: Callable[[Any], dict[str, Any]], results: Path, locks: Path
) -> Iterator[str]:
    """Do what is neither done nor in the hands of another worker; yields the names done.

    Tasks whose needs are not there yet are left out; another call finds them.
    """
    for task in tasks:
        path = result_path(results, task.name)
        if not all(result_path(results, name).is_file() for name in task.needs):
            continue
        with claimed(locks / f"{path.parent.name}-{path.stem}.lock") as mine:
            if not mine or path.is_file():
                continue
            text = json.dumps(do(task), indent=1) + "\n"
            write_atomically(path, lambda file, text=text: file.write(text.encode()))
        yield task.name


@contextmanager
def claimed(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether the lock could be had; it is held until the end of the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
