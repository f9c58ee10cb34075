"""Whether the other ranks are alive: each leaves a beat in a shared store and reads the others'.

A collective waits for a dead rank for as long as its time limit, and then does not say whom it
waited for. The pulse runs in a thread beside it: a rank that is silent for too long is named, and
this process ends rather than hang.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore

BEAT_SECONDS = 0.5


class DeadRank(RuntimeError):
    """Another rank died or left; the message names it."""


class Pulse:
    """The beats of all ranks, in a store that belongs to the pulse's threads and its owner.

    After `limit` seconds without a beat of some rank, which has not said why it left, or without an
    answer of the store, the process ends with status 1 and says so. Seconds in which this process
    was stopped itself do not count.
    """

    def __init__(
        self, store: Store, rank: int, size: int, limit: int, *, hosts: bool = False
    ) -> None:
        self.store, self.rank, self.limit, self.hosts = store, rank, limit, hosts
        self.others = [other for other in range(size) if other != rank]
        self._lock = threading.Lock()  # a client of the store serves one thread at a time
        self._count = 0
        self._answered = time.monotonic()
        self._beats: dict[int, tuple[bytes, float]] = dict.fromkeys(
            self.others, (b"", self._answered)
        )
        self._stop = threading.Event()
        self._threads = [
            # The store may never answer; so one thread asks it, and the other only looks at clocks.
            threading.Thread(target=run, name="pulse", daemon=True)
            for run in (self._run, self._watch)
        ]
        for thread in self._threads:
            thread.start()

    # --- what ranks tell each other ----------------------------------------------------------

    def tell(self, what: str) -> None:
        """Let the ranks that wait for `what` go on."""
        with self._lock:
            self.store.set(f"done/{what}", "1")

    def wait_for(self, what: str) -> None:
        """Wait until a rank tells `what`; the pulse ends the process if the others die."""
        while True:
            with self._lock:
                if self.store.check([f"done/{what}"]):
                    return
            time.sleep(0.1)

    def rest(self) -> None:
        """Beat no more, and watch no more."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=4 * BEAT_SECONDS)

    def leave(self, reason: str) -> None:
        """Say why this rank goes; the one that keeps the store waits a moment for the others."""
        self.rest()
        if any(thread.is_alive() for thread in self._threads):
            return  # the store does not answer
        with suppress(RuntimeError):  # the store went first, with the rank that kept it
            self.store.set(f"left/{self.rank}", reason)
            until = time.monotonic() + (4 * BEAT_SECONDS if self.hosts else 0.0)
            while time.monotonic() < until and len(self._left()) < len(self.others):
                time.sleep(0.1)

    def missing(self) -> str | None:
        """Which rank is gone, and why if it said so; None if all beat within a few beats.

        A failed collective asks this to find out whose fault it was.
        """
        asked = time.monotonic()
        while time.monotonic() - asked < 6 * BEAT_SECONDS:
            try:
                if told := self._reasons():
                    return told
            except RuntimeError:
                return "rank 0 is gone, and the store with it"
            time.sleep(BEAT_SECONDS / 2)
        silent = [rank for rank, (_, at) in self._beats.items() if at < asked + BEAT_SECONDS]
        return f"rank {_listed(silent)} does not answer any more" if silent else None

    # --- the threads -------------------------------------------------------------------------

    def _run(self) -> None:
        """Leave beats and read the others'."""
        while not self._stop.wait(BEAT_SECONDS):
            try:
                self._beat()
                told = self._reasons() if self._silent() else None
            except RuntimeError as error:
                if not self._stop.is_set():
                    _give_up(
                        f"the ranks' common store is gone, with the rank that kept it: {error}"
                    )
                return
            if told and not self._stop.is_set():
                _give_up(told)

    def _watch(self) -> None:
        """End this process when a rank, or the store, has been silent for too long."""
        before = time.monotonic()
        while not self._stop.wait(BEAT_SECONDS):
            now = time.monotonic()
            if now - before > 4 * BEAT_SECONDS:  # it was this process that stood still
                self._answered = now
                self._beats = {rank: (beat, now) for rank, (beat, _) in self._beats.items()}
            before = now
            if now - self._answered > self.limit:
                _give_up(f"the ranks' common store has not answered for {self.limit} s")
            # A beat more, in which the other thread may learn why a rank has left.
            if silent := self._silent(BEAT_SECONDS):
                _give_up(f"rank {_listed(silent)} has given no sign of life for {self.limit} s")

    def _beat(self) -> None:
        self._count += 1
        with self._lock:
            self.store.set(f"beat/{self.rank}", str(self._count))
            known = [rank for rank in self.others if self.store.check([f"beat/{rank}"])]
            beats = self.store.multi_get([f"beat/{rank}" for rank in known]) if known else []
        now = self._answered = time.monotonic()
        for rank, beat in zip(known, beats, strict=True):
            if beat != self._beats[rank][0]:
                self._beats[rank] = (beat, now)

    def _silent(self, more: float = 0.0) -> list[int]:
        """The ranks that have not beaten for the limit, and so much more."""
        now = time.monotonic()
        return [rank for rank, (_, at) in self._beats.items() if now - at > self.limit + more]

    def _left(self) -> list[int]:
        """The ranks that have said why they left."""
        with self._lock:
            return [rank for rank in self.others if self.store.check([f"left/{rank}"])]

    def _reasons(self) -> str | None:
        """What the ranks that left have said."""
        left = self._left()
        with self._lock:
            told = [
                f"rank {rank} has left: {self.store.get(f'left/{rank}').decode()}" for rank in left
            ]
        return "; ".join(told) or None


def open_store(*, hosts: bool = False) -> Store:
    """The store that all ranks share, as the launcher's environment names it; for one thread.

    One of them `hosts` it unless the launcher does. A launcher that starts dead ranks anew keeps
    the old store, with the dead ranks' addresses: what is stored belongs to one such start.
    """
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=hosts,
        wait_for_workers=False,
        timeout=timedelta(minutes=5),
    )
    return PrefixStore(f"mdm/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _listed(ranks: list[int]) -> str:
    return ", ".join(str(rank) for rank in ranks)


def _give_up(reason: str) -> None:
    """End this process: its main thread may hang in a collective that never returns."""
    print(f"mdm: {reason}; the same command continues from the newest checkpoint", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)
