"""How many bad files are too many, and how they are listed."""

from __future__ import annotations

from collections.abc import Sequence

from matryoshka_diffusion.data.batch import BadFile


def some(bad: Sequence[BadFile], count: int = 5) -> str:
    """' (a.png: reason; ...)' of the first bad files, for errors; empty if there are none."""
    shown = [f"{path}: {reason}" for path, reason in bad[:count]]
    more = [f"and {len(bad) - count} more"] if len(bad) > count else []
    return f" ({'; '.join([*shown, *more])})" if bad else ""


def refuse_too_many(name: str, bad: Sequence[BadFile], total: int, max_bad_fraction: float) -> None:
    """Raise ValueError if all files are bad, or more than the share `max_bad_fraction`."""
    if len(bad) >= total or len(bad) > max_bad_fraction * total:
        raise ValueError(
            f"{name}: {len(bad)} of {total} files cannot be used{some(bad)}: repair or remove "
            f"them, or raise data.max_bad_fraction (now {max_bad_fraction:g})"
        )
