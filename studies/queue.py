"""A queue that any number of workers go through: done once, continued after a kill.

A task is done when its result file is whole and answers what the task asks today. A worker claims
it by a lock on a file, which the system releases when the worker ends, however it ends.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from matryoshka_diffusion.files import write_atomically
from studies.trials import Asked, agrees


class Task(Protocol):
    """A `Trial` or a `Drawing`; `needs` are the tasks that come before it, and what they ask."""

    @property
    def name(self) -> str: ...
    @property
    def needs(self) -> Mapping[str, Asked]: ...
    @property
    def asked(self) -> Asked: ...


def result_path(results: Path, name: str) -> Path:
    """The file of a task's result: `emoji/mdm-0.json` for `emoji/mdm/0`."""
    set_name, rest = name.split("/", 1)
    return results / set_name / f"{rest.replace('/', '-')}.json"


def is_done(results: Path, task: Task) -> bool:
    """True if the result of the task is there."""
    return _has(results, task.name, task.asked)


def missing(results: Path, task: Task) -> list[str]:
    """The needs of a task that have no results."""
    return [name for name, asked in task.needs.items() if not _has(results, name, asked)]


def _has(results: Path, name: str, asked: Asked) -> bool:
    path = result_path(results, name)
    return path.is_file() and agrees(json.loads(path.read_text("utf-8")).get("asked"), asked)


def work(
    tasks: Sequence[Task], do: Callable[[Any], dict[str, Any]], results: Path, locks: Path
) -> Iterator[tuple[str, Exception | None]]:
    """Do what is neither done nor in the hands of another worker, until there is no more.

    Yields each task's name with None, or with its error: a task that fails is left, others go on.
    """
    failed: set[str] = set()
    before = None
    while before != (now := (len(failed), sum(is_done(results, task) for task in tasks))):
        before = now
        for task in tasks:
            path = result_path(results, task.name)
            if task.name in failed or is_done(results, task) or missing(results, task):
                continue
            with claimed(locks / f"{path.parent.name}-{path.stem}.lock") as mine:
                if not mine or is_done(results, task):
                    continue
                error = None
                try:
                    text = json.dumps({**do(task), "asked": task.asked}, indent=1) + "\n"
                    write_atomically(path, lambda file, text=text: file.write(text.encode()))
                except (ValueError, OSError, RuntimeError) as problem:
                    failed.add(task.name)
                    error = problem
            yield task.name, error


@contextmanager
def claimed(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """True if the lock was free; the block holds it until its end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
