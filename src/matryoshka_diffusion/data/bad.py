"""Bad samples: how they are listed, what share is too much, and what a run remembers of them."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matryoshka_diffusion.escape import on_one_line, printable
from matryoshka_diffusion.files import write_atomically


class PictureError(ValueError):
    """A sample that cannot be used; the message is the reason, without its name."""


class BadFile(NamedTuple):
    """A file in a folder, SHARD:KEY or FILE:ROW that is left out; `offset` is a shard's byte."""

    path: str
    reason: str
    offset: int | None = None

    def __str__(self) -> str:
        where = "" if self.offset is None else f" (at byte {self.offset:,})"
        return f"{self.path}: {self.reason}{where}"


class NoneUsable(ValueError):
    """A data set without a usable file; `bad` are all of its files."""

    def __init__(self, message: str, bad: Sequence[BadFile]) -> None:
        super().__init__(message)
        self.bad = tuple(bad)


def listed(items: Sequence[object], most: int = 20) -> list[str]:
    """Texts of the first items, each on one line, and how many more there are."""
    more = [f"and {len(items) - most:,} more"] if len(items) > most else []
    return [*(on_one_line(str(item)) for item in items[:most]), *more]


def some(bad: Sequence[BadFile]) -> str:
    """Text such as ' (a.png: reason; ...)' of the first bad files, for errors; empty for none."""
    return f" ({'; '.join(listed(bad, 5))})" if bad else ""


class Quarantine:
    """Bad samples of a data set: those known from the start, and those found while reading.

    The second are saved with every checkpoint and restored before anything is read again. So a
    resumed run neither reads nor reports them again, and the share that may be bad is a share of
    the whole run. Any thread may use this. `total` counts good and bad samples.
    """

    def __init__(
        self,
        name: str = "",
        known: Sequence[BadFile] = (),
        total: int = 0,
        max_bad_fraction: float = 1.0,
    ) -> None:
        self.total = total
        self._name, self._known, self._max_bad_fraction = name, tuple(known), max_bad_fraction
        self._found: dict[str, BadFile] = {}
        self._lock = threading.RLock()

    def __contains__(self, key: str) -> bool:
        """True if the sample of that key turned out bad on reading."""
        return key in self._found

    @property
    def bad(self) -> tuple[BadFile, ...]:
        """All bad samples, in the order of their paths."""
        with self._lock:
            return tuple(sorted([*self._known, *self._found.values()]))

    def add(self, file: BadFile) -> None:
        """Put a sample aside, with a warning the first time. Raises as `check` does."""
        with self._lock:
            if file.path in self:
                return
            self._found[file.path] = file
            count = len(self.bad)
        warnings.warn(
            f"{file}; the next good one stands in for it ({count} bad so far)", stacklevel=4
        )
        self.check()

    def check(self) -> None:
        """Refuse too many bad samples, with the findings of other processes.

        Raises:
            NoneUsable: all of them are bad, which no setting allows.
            ValueError: more than the share `max_bad_fraction` is bad.
        """
        bad = self.bad
        message = f"{self._name}: {len(bad)} of {self.total} files cannot be used{some(bad)}"
        if bad and len(bad) >= self.total:
            raise NoneUsable(f"{message}: none is left to learn from", bad)
        if len(bad) > self._max_bad_fraction * self.total:
            raise ValueError(
                f"{message}: repair or remove them, or raise data.max_bad_fraction "
                f"(now {self._max_bad_fraction:g})"
            )

    def state(self) -> list[list[str | int | None]]:
        """Samples found while reading, as plain values for JSON."""
        with self._lock:
            return [list(file) for file in sorted(self._found.values())]

    def restore(self, state: Iterable[Sequence[Any]]) -> None:
        """Add the `state` of an earlier process of this run, or of another rank."""
        with self._lock:
            self._found.update((row[0], BadFile(*row)) for row in state)

    def write(self, path: Path) -> None:
        """List all bad samples in a file, a JSON object a line; write none without any."""
        rows = (json.dumps(file._asdict(), ensure_ascii=False) for file in self.bad)
        if text := "".join(f"{row}\n" for row in rows):
            data = printable(text).encode()  # people read the file in a terminal
            write_atomically(path, lambda file: file.write(data), needed=len(data))
