"""Hints in errors: the known name nearest to a mistyped one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` with the nearest known name, or nothing if none is near.

    Example:
        >>> did_you_mean("sampel", ["sample", "sweep"]), did_you_mean("conjure", ["sample"])
        (' (did you mean sample?)', '')
    """
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
