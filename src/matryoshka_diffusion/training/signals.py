"""Ends of a run from outside: signals to this process, and another rank that died."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore

SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGUSR1"):  # not on Windows
    SIGNALS.append(signal.SIGUSR1)  # clusters send it some time before they end a job


class Stopped(Exception):
    """Training stopped after a signal and has saved.

    `code` is the exit status: 130, 143 or 138 (128 + the signal's number, as shells report it).
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.code = 128 + number


class Interrupts:
    """The first of `SIGNALS` to arrive, as `received` (0 before it); a second leaves at once.

    Leaving loses nothing that is saved: checkpoints appear whole or not at all.
    """

    received = 0

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if self.received:
            os._exit(128 + number)
        self.received = number
        os.write(2, b"\nmdm: stopping after this step, saving first; again leaves at once\n")


@contextmanager
def handled(handler: object) -> Iterator[None]:
    """Handle `SIGNALS` inside the block. Other threads than the main one cannot, and do not."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number in SIGNALS}  # pyright: ignore
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


# --- dead ranks --------------------------------------------------------------------------------

BEAT_SECONDS = 0.5
LEFT = "left: "


class DeadRank(RuntimeError):
    """Another rank died or left; the message names it."""


class Pulse:
    """Beats of all ranks in a shared store, to name a dead rank, which torch's time limits do not.

    Those run for living ranks too, which may wait for half an hour while rank 0 draws previews. So
    they would have to be longer, and a rank that hangs would be noticed no sooner.

    After `limit` seconds without a beat of some rank, or an answer of the store, the process says
    so and ends with status 1. Seconds in which it was itself suspended do not count.
    """

    def __init__(
        self, store: Store, rank: int, size: int, limit: int, *, hosts: bool = False
    ) -> None:
        self.store, self.rank, self.limit, self.hosts = store, rank, limit, hosts
        self._lock = threading.Lock()  # a client of the store serves one thread at a time
        self._answered = now = time.monotonic()
        # The last beat of each rank, and when it came.
        self._beats = {other: ("", now) for other in range(size) if other != rank}
        self._stop = threading.Event()
        # The store may never answer; so one thread asks it, and the other only reads clocks.
        self._threads = [threading.Thread(target=f, daemon=True) for f in (self._ask, self._watch)]
        for thread in self._threads:
            thread.start()

    def tell(self, event: str) -> None:
        """Let the ranks that wait for `event` go on."""
        with self._lock:
            self.store.set(f"done/{event}", "1")

    def wait_for(self, event: str) -> None:
        """Wait until a rank tells `event`, for as long as all ranks are alive."""
        while True:
            with self._lock:
                if self.store.check([f"done/{event}"]):
                    return
            time.sleep(0.1)

    def rest(self) -> None:
        """Stop both threads."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=4 * BEAT_SECONDS)

    def leave(self, reason: str) -> None:
        """Tell why this rank ends; the host of the store stays until the others have heard."""
        self.rest()
        if any(thread.is_alive() for thread in self._threads):
            return  # the store does not answer
        with suppress(RuntimeError):  # the store went first, with the rank that hosted it
            self.store.set(f"beat/{self.rank}", LEFT + reason)
            time.sleep(4 * BEAT_SECONDS if self.hosts else 0.0)

    def missing(self) -> str | None:
        """Name the ranks that are gone after a collective failed; None if all beat within 3 s."""
        began = time.monotonic()
        while time.monotonic() - began < 6 * BEAT_SECONDS:
            if reasons := self._reasons():
                return reasons
            time.sleep(BEAT_SECONDS / 2)
        silent = self._silent_since(began + BEAT_SECONDS)
        return f"rank {silent} does not answer any more" if silent else None

    def _reasons(self) -> str:
        """Ranks that have left, with the reasons that they gave; empty if none has."""
        left = {rank: beat for rank, (beat, _) in self._beats.items() if beat.startswith(LEFT)}
        return "; ".join(f"rank {r} has left: {b.removeprefix(LEFT)}" for r, b in left.items())

    def _silent_since(self, moment: float) -> str:
        return ", ".join(str(rank) for rank, (_, at) in self._beats.items() if at < moment)

    def _ask(self) -> None:
        """Leave beats and read the others'."""
        count = 0
        while not self._stop.wait(BEAT_SECONDS):
            count += 1
            try:
                with self._lock:
                    self.store.set(f"beat/{self.rank}", str(count))
                    begun = [rank for rank in self._beats if self.store.check([f"beat/{rank}"])]
                    beats = {rank: self.store.get(f"beat/{rank}").decode() for rank in begun}
            except RuntimeError as error:
                if not self._stop.is_set():
                    _give_up(f"rank 0 is gone, and the ranks' common store with it: {error}")
                return
            self._answered = now = time.monotonic()
            new = {rank: beat for rank, beat in beats.items() if beat != self._beats[rank][0]}
            self._beats |= {rank: (beat, now) for rank, beat in new.items()}

    def _watch(self) -> None:
        """End this process when a rank, or the store, has been silent for too long."""
        before = time.monotonic()
        while not self._stop.wait(BEAT_SECONDS):
            now = time.monotonic()
            if now - before > 4 * BEAT_SECONDS:  # this process itself was suspended
                self._answered = now
                self._beats = {rank: (beat, now) for rank, (beat, _) in self._beats.items()}
            before = now
            if now - self._answered > self.limit:
                _give_up(f"the ranks' common store has not answered for {self.limit} s")
            if silent := self._silent_since(now - self.limit):
                sign = f"rank {silent} has given no sign of life for {self.limit} s"
                _give_up(self._reasons() or sign)


def open_store(*, hosts: bool = False) -> Store:
    """Open the store that all ranks share, named by the launcher's environment, for one thread.

    A launcher that starts dead ranks anew keeps the store with the dead ranks' keys, so each such
    start has a prefix of its own.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    wait = timedelta(minutes=5)
    store = TCPStore(address, port, is_master=hosts, wait_for_workers=False, timeout=wait)
    return PrefixStore(f"mdm/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _give_up(reason: str) -> None:
    """End this process: its main thread may hang in a collective that never returns."""
    print(f"mdm: {reason}; the same command continues from the newest checkpoint", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)
