"""A queue that any number of workers go through: done once, continued after a kill.

A task is done when its result file is there, whole, and answers what the task asks today. It is
claimed by a lock on a file, which the system releases when the worker dies, however it dies.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from matryoshka_diffusion.files import write_atomically
from studies.asked import Asked, agrees


class Task(Protocol):
    """Something with a name, which is its place among the results.

    `asked` is all that the result depends on, which is stored with it: what does not agree is of an
    earlier form of the task, and done anew. `needs` are the tasks whose results come first, and
    what they ask.
    """

    @property
    def name(self) -> str: ...
    @property
    def needs(self) -> Mapping[str, Asked]: ...
    @property
    def asked(self) -> Asked: ...


class Outcome(NamedTuple):
    """What became of a task: done if there is no error."""

    name: str
    error: Exception | None


def result_path(results: Path, name: str) -> Path:
    """Where the result of a task lies: `emoji/mdm/0` in `emoji/mdm-0.json`."""
    set_name, rest = name.split("/", 1)
    return results / set_name / f"{rest.replace('/', '-')}.json"


def is_done(results: Path, task: Task) -> bool:
    """Whether the task's result is there."""
    return _has(results, task.name, task.asked)


def missing(results: Path, task: Task) -> list[str]:
    """The tasks that it needs and whose results are not there."""
    return [name for name, asked in task.needs.items() if not _has(results, name, asked)]


def _has(results: Path, name: str, asked: Asked) -> bool:
    path = result_path(results, name)
    return path.is_file() and agrees(json.loads(path.read_text("utf-8")).get("asked"), asked)


def of_today(
    results: Mapping[str, dict[str, Any]], tasks: Sequence[Task]
) -> dict[str, dict[str, Any]]:
    """Those of the results that are of the tasks as they are."""
    asked = {task.name: task.asked for task in tasks}
    return {
        name: result
        for name, result in results.items()
        if name in asked and agrees(result.get("asked"), asked[name])
    }


def work(
    tasks: Sequence[Task], do: Callable[[Any], dict[str, Any]], results: Path, locks: Path
) -> Iterator[Outcome]:
    """Do what is neither done nor in the hands of another worker, until there is no more.

    A task that fails is reported and left; the others go on.
    """
    failed: set[str] = set()
    while True:
        before = len(failed), _count_done(tasks, results)
        for task in tasks:
            if task.name not in failed and (outcome := _try(task, do, results, locks)) is not None:
                if outcome.error is not None:
                    failed.add(task.name)
                yield outcome
        if before == (len(failed), _count_done(tasks, results)):
            return


def _try(
    task: Task, do: Callable[[Any], dict[str, Any]], results: Path, locks: Path
) -> Outcome | None:
    """Do a task if it is this worker's to do, and its needs are there."""
    if missing(results, task):
        return None
    path = result_path(results, task.name)
    with claimed(locks / f"{path.parent.name}-{path.stem}.lock") as mine:
        if not mine or is_done(results, task):
            return None
        try:
            text = json.dumps({**do(task), "asked": task.asked}, indent=1) + "\n"
            write_atomically(path, lambda file: file.write(text.encode()))
        except (ValueError, OSError, RuntimeError) as error:
            return Outcome(task.name, error)
    return Outcome(task.name, None)


def _count_done(tasks: Sequence[Task], results: Path) -> int:
    return sum(is_done(results, task) for task in tasks)


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
