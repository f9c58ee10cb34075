"""Ctrl-C, SIGTERM and SIGUSR1 as a question that the training loop asks between two steps."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGUSR1"):  # not on Windows
    SIGNALS.append(signal.SIGUSR1)  # what clusters send some time before they end a job


class Stopped(Exception):
    """Training was asked to stop and has saved. `code` is the exit status: 130, 143 or 138."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Interrupts:
    """While entered, the first of `SIGNALS` is only noted; a second one leaves at once.

    Leaving at once loses nothing that is saved: checkpoints appear whole or not at all. Python
    lets only the main thread handle signals; in another one this does nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it."""
        assert self.received is not None
        return 128 + self.received

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
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number)
        os.write(2, b"\nmdm: stopping after this step, saving first; again leaves at once\n")
