"""What happened: counts and failures of each scenario, and the table at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

MUST_BE_ZERO: tuple[str, ...] = (
    "lost checkpoints",
    "torn checkpoints",
    "leftovers",
    "mismatched hashes",
    "hangs",
)


@dataclass
class Result:
    """One scenario.

    Attributes:
        promise: its number in the list of promises.
        title: what was injected.
        counts: how often what happened.
        failures: what should not have happened; empty if the promise was kept.
    """

    promise: int
    title: str
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def expect(self, holds: bool, otherwise: str, count: str | None = None) -> None:
        """Note a failure unless it `holds`; `count` is what it adds to."""
        if count is not None:
            self.counts[count] += not holds
        if not holds:
            self.failures.append(otherwise)

    @property
    def verdict(self) -> str:
        return "BROKEN" if self.failures else "kept"


def table(results: Sequence[Result]) -> str:
    """A row for each scenario, then the sums of all counts."""
    rows = [("promise", "what was done", "counts", "seconds", "")]
    for result in sorted(results, key=lambda result: result.promise):
        number, title = str(result.promise), result.title
        seconds = f"{result.seconds:.0f}"
        first, *more = _wrapped(result.counts)
        rows.append((number, title, first, seconds, result.verdict))
        rows += [("", "", line, "", "") for line in more]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    total: Counter[str] = Counter(dict.fromkeys(MUST_BE_ZERO, 0))
    for name, count in (item for result in results for item in result.counts.items()):
        total[name] += count
    return "\n".join([*lines, "", "in all: " + ", ".join(_told(total))])


def _told(counts: Counter[str]) -> list[str]:
    return [f"{name} {count:,}" for name, count in counts.items()]


def _wrapped(counts: Counter[str], width: int = 60) -> list[str]:
    """Counts on lines of at most `width` characters, if a count fits."""
    lines = [""]
    for text in _told(counts):
        if lines[-1] and len(lines[-1]) + 2 + len(text) > width:
            lines[-1] += ","
            lines.append(text)
        else:
            lines[-1] += f", {text}" if lines[-1] else text
    return lines
