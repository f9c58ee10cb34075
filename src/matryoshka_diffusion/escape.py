"""Text from files, made fit for a terminal and for lines of a report."""

from __future__ import annotations

import json


def printable(text: str) -> str:
    """Escape control characters, which could steer a terminal, as JSON does."""
    return "".join(x if x.isprintable() or x == "\n" else json.dumps(x)[1:-1] for x in text)


def on_one_line(text: str) -> str:
    """Text with its line breaks as `\\n`, so that no name looks like a line of a report."""
    return "\\n".join(text.splitlines())
