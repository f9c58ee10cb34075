"""What cannot be used: how it is listed, how much of it is too much, and what a run remembers."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matryoshka_diffusion.files import write_atomically


class BadFile(NamedTuple):
    """A file or sample that was left out, and why.

    Attributes:
        path: the file in a folder; SHARD:KEY or FILE:ROW in larger files.
        offset: where it lies in its shard, in bytes.
    """

    path: str
    reason: str
    offset: int | None = None

    def __str__(self) -> str:
        where = "" if self.offset is None else f" (at byte {self.offset:,})"
        return f"{self.path}: {self.reason}{where}"


def some(bad: Sequence[BadFile], count: int = 5) -> str:
    """' (a.png: reason; ...)' of the first bad files, for errors; empty if there are none."""
    shown = [str(file) for file in bad[:count]]
    more = [f"and {len(bad) - count} more"] if len(bad) > count else []
    return f" ({'; '.join([*shown, *more])})" if bad else ""


class NoneUsable(ValueError):
    """All files of a set are bad, if there are any; `bad` are all of them."""

    def __init__(self, message: str, bad: Sequence[BadFile]) -> None:
        super().__init__(message)
        self.bad = tuple(bad)


def refuse_too_many(name: str, bad: Sequence[BadFile], total: int, max_bad_fraction: float) -> None:
    """Refuse a set that has too many bad files.

    Raises:
        NoneUsable: all of them are bad, which no setting allows.
        ValueError: more than the share `max_bad_fraction`.
    """
    said = f"{name}: {len(bad)} of {total} files cannot be used{some(bad)}"
    if len(bad) >= total:
        raise NoneUsable(f"{said}: none is left to learn from", bad)
    if len(bad) > max_bad_fraction * total:
        raise ValueError(
            f"{said}: repair or remove them, or raise data.max_bad_fraction "
            f"(now {max_bad_fraction:g})"
        )


class Quarantine:
    """The bad samples of a set: those known from the start, and those found while reading it.

    What was found belongs to a run. It is saved with every checkpoint and restored before anything
    is read again, so that a resumed run neither reads nor reports it a second time, and what may be
    bad is a share of the whole run. Any thread may use it.

    Args:
        name: of the set, for people.
        known: what was left out at the start.
        total: good and bad samples together.
        max_bad_fraction: the share of them that may be bad.
    """

    def __init__(
        self,
        name: str = "",
        known: Sequence[BadFile] = (),
        total: int = 0,
        max_bad_fraction: float = 1.0,
    ) -> None:
        self._name, self._known = name, tuple(known)
        self._total, self._max_bad_fraction = total, max_bad_fraction
        self._found: dict[str, BadFile] = {}
        self._lock = threading.RLock()

    def __contains__(self, key: str) -> bool:
        """Whether the sample of that key was found to be bad."""
        return key in self._found

    @property
    def bad(self) -> tuple[BadFile, ...]:
        """All of it, in the order of its paths."""
        with self._lock:
            return tuple(sorted([*self._known, *self._found.values()]))

    def add(self, file: BadFile) -> None:
        """Put a sample aside, with a warning; one that is there already is not told of again.

        Raises:
            ValueError: now it is too many.
        """
        with self._lock:
            if file.path in self:
                return
            self._found[file.path] = file
            bad = self.bad
        warnings.warn(
            f"{file}; the next good one stands in for it ({len(bad)} bad so far)",
            stacklevel=4,
        )
        refuse_too_many(self._name, bad, self._total, self._max_bad_fraction)

    def check(self) -> None:
        """Raise ValueError if it is too much by now, with what other processes have found."""
        if self._found:
            refuse_too_many(self._name, self.bad, self._total, self._max_bad_fraction)

    def state(self) -> list[list[str | int | None]]:
        """What was found, as plain values for JSON."""
        with self._lock:
            return [list(file) for file in sorted(self._found.values())]

    def restore(self, state: Iterable[Sequence[Any]]) -> None:
        """Add what `state` returned, of this run or of another process of it."""
        with self._lock:
            self._found.update((row[0], BadFile(*row)) for row in state)

    def write(self, path: Path) -> None:
        """List all of it in a file, a JSON object a line; no file if there is nothing.

        Raises:
            OSError: the file cannot be written.
        """
        text = "".join(f"{json.dumps(file._asdict(), ensure_ascii=False)}\n" for file in self.bad)
        if text:
            data = text.encode("utf-8", "backslashreplace")
            write_atomically(path, lambda file: file.write(data), needed=len(data))
