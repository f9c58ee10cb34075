"""What commands tell whoever waits for them: lines and progress bars on stderr."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

PLAIN_SECONDS = 30.0
"""Between two lines where there is no terminal to draw a bar on."""


class Bar:
    """A progress bar as a callable for (done, total).

    Where there is no terminal to draw it on: with `announce` one line at first, with `tell` one
    line now and then.
    """

    def __init__(
        self, what: str, unit: str, *, announce: bool = False, tell: bool = False, **options: Any
    ) -> None:
        self._announce, self._tell = announce, tell
        self._began = self._told = time.monotonic()
        self._options = {"desc": what, "unit": unit, "leave": False, **options}
        self._bar: Any = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:  # it appears with the first step, if there is one
            from tqdm import tqdm

            shown = sys.stderr.isatty()
            if self._announce and not shown:
                say(self._options["desc"], 0)
            self._bar = tqdm(total=total, disable=not shown, **self._options)
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        if self._tell and self._bar.disable:
            self._say_now_and_then(done, total)

    def _say_now_and_then(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._told >= PLAIN_SECONDS:
            self._told, rate = now, done / (now - self._began)
            what, unit = self._options["desc"], self._options["unit"].strip()
            left = duration((total - done) / rate)
            say(f"{what}: {done:,} of {total:,}, {rate:.3g} {unit}/s, {left} left", 0)


class Bars:
    """Bars one after the other, as a callable for (what is being done, done, total)."""

    def __init__(self) -> None:
        self._what, self._done, self._bar = "", 0, Bar("", "")

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.__exit__(*error)

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._what or done < self._done:
            self._bar.__exit__()
            self._what, self._bar = what, Bar(what, " pictures", tell=True)
        self._done = done
        if leads():
            self._bar(done, total)


def leads() -> bool:
    """Whether this process speaks for all: it is alone, or rank 0 of several."""
    return os.environ.get("RANK", "0") == "0"


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """One line on stderr, in the place of `warnings.showwarning`."""
    say(f"warning: {one_line(message)}", 0)


def one_line(error: object) -> str:
    """What an error says, in one line; its type if it says nothing."""
    if isinstance(error, OSError) and error.strerror and error.filename is None:
        error = error.strerror  # our own, without the number before it
    return " ".join(str(error).split()) or type(error).__name__


def say(text: str, status: int) -> int:
    """One line on stderr; returns the status."""
    text = text if text.startswith("mdm") else f"mdm: {text}"
    if not leads():
        text = text.replace("mdm: ", f"mdm: rank {os.environ['RANK']}: ", 1)
    if "tqdm" in sys.modules:  # a bar may be on the screen
        sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)
    else:
        print(text, file=sys.stderr, flush=True)
    return status


def size_text(count: int) -> str:
    """Bytes in words: 3.46 kB."""
    amount = float(count)
    for unit in ("bytes", "kB", "MB"):
        if amount < 999.5:  # three digits round larger amounts to 1,000
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:,.1f} GB"


def duration(seconds: float) -> str:
    """Seconds in words: 4 s, 10 min, 2.0 hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{seconds / 3600:,.1f} hours"
