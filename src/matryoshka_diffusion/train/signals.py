"""Ctrl-C, SIGTERM and SIGUSR1 as a question that the training loop asks between two steps."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGUSR1"):  # not on Windows
    SIGNALS.append(signal.SIGUSR1)  # what clusters send some time before they end a job


class Stopped(Exception):
    """Training was asked to stop and has saved. `code` is the exit status: 130, 143 or 138.

    That is 128 + the signal's number, as shells report it.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.code = 128 + number


class Interrupts:
    """While entered, the first of `SIGNALS` is only noted; a second one leaves at once.

    Leaving at once loses nothing that is saved: checkpoints appear whole or not at all. Python
    lets only the main thread handle signals; in another one this does nothing.

    Attributes:
        received: the number of the first signal; 0 so far.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = number
        os.write(2, b"\nmdm: stopping after this step, saving first; again leaves at once\n")


@contextmanager
def unswayed() -> Iterator[None]:
    """Let the signals pass unheard, for the seconds that it takes to say why a run ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
