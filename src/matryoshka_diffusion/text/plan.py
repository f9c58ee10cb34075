"""What storing the features of a data set would take, said before it begins."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import NamedTuple


class Plan(NamedTuple):
    """Captions to be stored, and what their features would take.

    Attributes:
        captions: how many different ones there are.
        missing: those whose features are not stored yet.
        tokens: the mean number of tokens of the missing ones, from a sample.
        cut: the share of the missing ones that have more tokens than are used.
        needed: bytes that their features would take, about.
        folder: where they would be.
    """

    captions: int
    missing: list[str]
    tokens: float
    cut: float
    needed: int
    folder: Path

    def describe(self) -> str:
        """Lines for people."""
        stored = self.captions - len(self.missing)
        lines = [f"{self.captions:,} different captions, {stored:,} of them stored already"]
        if self.missing:
            cut = f" ({self.cut:.1%} of them are cut)" if self.cut else ""
            lines += [
                f"about {self.tokens:.1f} tokens each{cut}: {size(self.needed)} to write to",
                f"{self.folder} ({size(self._free())} free)",
            ]
        return "\n".join(lines)

    def refuse_full_disk(self) -> None:
        """Raise OSError, with the bytes needed and free, if the features would not fit."""
        free = self._free()
        if self.needed > free:
            raise OSError(
                errno.ENOSPC,
                f"the features do not fit into {self.folder}: about {self.needed:,} bytes needed, "
                f"{free:,} bytes free; set MDM_CACHE to a folder on a larger disk",
            )

    def _free(self) -> int:
        return shutil.disk_usage(self.folder).free


def size(count: int) -> str:
    """Bytes for people."""
    amount = float(count)
    for unit in ("bytes", "kB", "MB"):
        if amount < 999.5:  # what three digits round to less than 1,000
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:,.1f} GB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{seconds / 3600:,.1f} hours"
