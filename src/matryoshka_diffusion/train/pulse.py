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
    """The beats of all ranks, in a store that belongs to the pulse's thread and its owner.

    After `limit` seconds without a beat of some rank, which has not said why it left, the process
    ends with status 1 and names it.
    """

    def __init__(self, store: Store, rank: int, size: int, limit: int) -> None:
        self.store, self.rank, self.limit = store, rank, limit
        self.others = [other for other in range(size) if other != rank]
        self._lock = threading.Lock()  # a client of the store serves one thread at a time
        self._count = 0
        self._beats = {other: (b"", time.monotonic()) for other in self.others}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

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

    def leave(self, reason: str) -> None:
        """Say why this rank goes, and stop beating."""
        self._stop.set()
        self._thread.join()
        with suppress(RuntimeError):  # the store went first, with the rank that kept it
            self.store.set(f"left/{self.rank}", reason)

    def missing(self) -> str | None:
        """Which rank is gone, and why if it said so; None if all beat within three beats.

        A failed collective asks this to find out whose fault it was.
        """
        asked = time.monotonic()
        while time.monotonic() - asked < 6 * BEAT_SECONDS:
            try:
                if told := self._reasons():
                    return told
            except RuntimeError:
                return "rank 0 is gone, and the store with it"
            if not self._thread.is_alive():
                break
            time.sleep(BEAT_SECONDS / 2)
        silent = [rank for rank, (_, at) in self._beats.items() if at < asked + BEAT_SECONDS]
        return f"rank {_listed(silent)} does not answer any more" if silent else None

    # --- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                self._beat()
                silent = self._silent_for(self.limit)
                told = self._reasons() if silent else None
            except RuntimeError as error:
                if not self._stop.is_set():
                    _give_up(
                        f"the ranks' common store is gone, with the rank that kept it: {error}"
                    )
                return
            if silent and not self._stop.is_set():
                _give_up(
                    told or f"rank {_listed(silent)} has given no sign of life for {self.limit} s"
                )

    def _beat(self) -> None:
        self._count += 1
        with self._lock:
            self.store.set(f"beat/{self.rank}", str(self._count))
            known = [rank for rank in self.others if self.store.check([f"beat/{rank}"])]
            beats = self.store.multi_get([f"beat/{rank}" for rank in known]) if known else []
        now = time.monotonic()
        for rank, beat in zip(known, beats, strict=True):
            if beat != self._beats[rank][0]:
                self._beats[rank] = (beat, now)

    def _silent_for(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return [rank for rank, (_, at) in self._beats.items() if now - at > seconds]

    def _reasons(self) -> str | None:
        """What the ranks that left have said."""
        with self._lock:
            left = [rank for rank in self.others if self.store.check([f"left/{rank}"])]
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
