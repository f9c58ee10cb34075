"""Messages and progress bars for the person at the terminal."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from matryoshka_diffusion.escape import printable

LOG_SECONDS = 30.0
"""Time between two lines of progress in a log, which is not a terminal."""


def escape_unknown_letters() -> None:
    """Let stdout and stderr print letters that their encoding lacks, such as cp1252, as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def output() -> Iterator[None]:
    """Print results to stdout; end the process quietly if nobody reads them, as after `| head`."""
    try:
        yield
        print(end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is not flushed
        raise SystemExit(141) from None  # as a shell reports SIGPIPE


def show(text: str) -> None:
    """Print a result to stdout."""
    with output():
        print(printable(text))


def say(text: str, status: int = 0) -> int:
    """Print a message to stderr as one line; returns the status."""
    text = text if text.startswith("mdm") else f"mdm: {text}"
    if not leads():
        text = text.replace("mdm: ", f"mdm: rank {os.environ['RANK']}: ", 1)
    text = printable(" ".join(text.split()))
    if "tqdm" in sys.modules:  # a bar may be on the screen
        sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)
    else:
        print(text, file=sys.stderr, flush=True)
    return status


def one_line(error: object) -> str:
    """The message of an error or warning in one line; its type if the message is empty."""
    if isinstance(error, OSError) and error.strerror and error.filename is None:
        error = error.strerror  # our own message, without the number before it
    return " ".join(str(error).split()) or type(error).__name__


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Replace `warnings.showwarning`: one line on stderr."""
    say(f"warning: {one_line(message)}")


def leads() -> bool:
    """True in the process that speaks for all ranks."""
    return os.environ.get("RANK", "0") == "0"


def show_traceback(*error: Any) -> None:
    """Replace `sys.excepthook`: messages may hold names and texts from files."""
    print(end=printable("".join(traceback.format_exception(*error))), file=sys.stderr)


class Bar:
    """A progress bar as a callable for (done, total) or (title, done, total).

    A new title, or work that begins anew, begins a new bar. Where stderr is no terminal, there is a
    line every `LOG_SECONDS`.
    """

    def __init__(self, title: str = "", unit: str = " images", **options: Any) -> None:
        self._title, self._options = title, {"unit": unit, "leave": False, **options}
        self._bar: Any = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, *progress: Any) -> None:
        *title, done, total = progress
        if title != [self._title][: len(title)] or (self._bar is not None and done < self._bar.n):
            self.__exit__()
            self._title, self._bar = (*title, self._title)[0], None
        if self._bar is None and leads():  # a bar appears with the first step
            from tqdm import tqdm

            log: dict[str, Any] = {"delay": LOG_SECONDS, "mininterval": LOG_SECONDS}
            log["bar_format"] = "mdm: {desc}: {n_fmt} of {total_fmt}, {remaining} left\n"
            log = {} if sys.stderr.isatty() else log
            self._bar = tqdm(total=total, desc=printable(self._title), **log, **self._options)
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)
