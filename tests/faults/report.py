"""Counts and failures of each scenario, and the table at the end."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

MUST_BE_ZERO = ("lost checkpoints", "torn checkpoints", "leftovers", "mismatched hashes", "hangs")


@dataclass
class Result:
    """One scenario.

    Attributes:
        promise: its number in the list of promises.
        title: what was injected.
        counts: how often each event happened.
        failures: messages; empty if the promise was kept.
    """

    promise: int
    title: str
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def expect(self, holds: bool, message: object, count: str | None = None) -> None:
        """Note a failure unless it `holds`; `count` is the event that a failure adds to."""
        if count is not None:
            self.counts[count] += not holds
        if not holds:
            self.failures.append(str(message))

    @property
    def verdict(self) -> str:
        return "BROKEN" if self.failures else "kept"


def table(results: Sequence[Result]) -> str:
    """Lay out a row for each scenario, then the sums of all counts."""
    rows = [("promise", "what was done", "counts", "seconds", "")]
    for result in sorted(results, key=lambda result: result.promise):
        # A count and its name stay on one line.
        unbroken = ", ".join(text.replace(" ", "\xa0") for text in _listed(result.counts))
        first, *more = textwrap.wrap(unbroken, 60) or [""]
        seconds = f"{result.seconds:.0f}"
        rows.append((str(result.promise), result.title, first, seconds, result.verdict))
        rows += [("", "", line, "", "") for line in more]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    total: Counter[str] = Counter(dict.fromkeys(MUST_BE_ZERO, 0))
    for result in results:
        total.update(dict(result.counts))
    return "\n".join([*lines, "", f"in all: {', '.join(_listed(total))}"]).replace("\xa0", " ")


def _listed(counts: Counter[str]) -> list[str]:
    return [f"{name} {count:,}" for name, count in counts.items()]
