"""Bad samples: how they are listed, what share is too much, and what a run remembers of them."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matryoshka_diffusion.files import write_atomically


class PictureError(ValueError):
    """A file that cannot be used; the message is the reason, without the path."""


class BadFile(NamedTuple):
    """A file or sample that is left out, and the reason.

    Attributes:
        path: the file in a folder; SHARD:KEY or FILE:ROW in larger files.
        offset: its place in the shard, in bytes.
    """

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


def some(bad: Sequence[BadFile], count: int = 5) -> str:
    """Text such as ' (a.png: reason; ...)' of the first bad files, for errors; empty for none."""
    texts = [str(file) for file in bad[:count]]
    more = [f"and {len(bad) - count} more"] if len(bad) > count else []
    return f" ({'; '.join([*texts, *more])})" if bad else ""


def refuse_too_many(name: str, bad: Sequence[BadFile], total: int, max_bad_fraction: float) -> None:
    """Refuse a data set with too many bad files.

    Raises:
        NoneUsable: all of them are bad, which no setting allows.
        ValueError: more than the share `max_bad_fraction` is bad.
    """
    message = f"{name}: {len(bad)} of {total} files cannot be used{some(bad)}"
    if len(bad) >= total:
        raise NoneUsable(f"{message}: none is left to learn from", bad)
    if len(bad) > max_bad_fraction * total:
        raise ValueError(
            f"{message}: repair or remove them, or raise data.max_bad_fraction "
            f"(now {max_bad_fraction:g})"
        )


class Quarantine:
    """Bad samples of a data set: those known from the start, and those found while reading.

    The second are saved with every checkpoint and restored before anything is read again. So a
    resumed run neither reads nor reports them again, and the share that may be bad is a share of
    the whole run. Any thread may use this.

    Args:
        name: of the data set, for messages.
        known: samples that were left out at the start.
        total: number of samples, good and bad.
        max_bad_fraction: the share of them that may be bad.
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
        """Put a sample aside, with a warning the first time.

        Raises:
            ValueError: too many are bad now.
        """
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
        """Raise ValueError if too many are bad by now, with the findings of other processes."""
        if self._found:
            refuse_too_many(self._name, self.bad, self.total, self._max_bad_fraction)

    def state(self) -> list[list[str | int | None]]:
        """Samples found while reading, as plain values for JSON."""
        with self._lock:
            return [list(file) for file in sorted(self._found.values())]

    def restore(self, state: Iterable[Sequence[Any]]) -> None:
        """Add the `state` of an earlier process of this run, or of another rank."""
        with self._lock:
            self._found.update((row[0], BadFile(*row)) for row in state)

    def write(self, path: Path) -> None:
        """List all bad samples in a file, a JSON object a line; write no file without any.

        Raises:
            OSError: the file cannot be written.
        """
        text = "".join(f"{json.dumps(file._asdict(), ensure_ascii=False)}\n" for file in self.bad)
        if text:
            data = text.encode("utf-8", "backslashreplace")
            write_atomically(path, lambda file: file.write(data), needed=len(data))
