"""One thread that draws: a queue in which clients take turns, and lines handed to their streams."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from matryoshka_diffusion.studio.requests import Limits, Refused
from matryoshka_diffusion.studio.streams import error_line, line

MOST_PENDING = 8_000_000
"""Bytes of lines that wait to be sent. A client that reads more slowly misses states."""


CLOSING_SECONDS = 5.0
"""Ctrl-C waits so long for threads: one that computes when Python ends aborts the process."""


class Stopped(Exception):
    """The client of a drawing has left."""


class Job:
    """A request in the queue: its work, and the lines of its stream that are not sent yet.

    Made in the event loop of the server, which takes the lines. The worker's thread adds them.
    """

    def __init__(self, client: str, work: Callable[[Job], None], limits: Limits) -> None:
        self.client, self.work, self._limits = client, work, limits
        self._loop, self._ready = asyncio.get_running_loop(), asyncio.Event()
        self._lines, self._lock = deque[bytes](), threading.Lock()
        self._ended, self._stopped, self._place = False, False, -1
        self._deadline = float("inf")
        self.timer: asyncio.TimerHandle | None = None

    # --- in the worker's thread ---

    def begin(self) -> None:
        """Start the time that the drawing may take."""
        self._deadline = time.monotonic() + self._limits.seconds

    def check(self) -> None:
        """Raise `Stopped` or `Refused` if the client has left, or the drawing takes too long."""
        if self._stopped:
            raise Stopped
        if time.monotonic() > self._deadline:
            seconds = self._limits.seconds
            raise Refused(503, f"it took longer than {seconds:g} s: ask for fewer steps or images")

    def put(self, text: bytes) -> None:
        """Hand a line over."""
        with self._lock:
            self._lines.append(text)
        self._wake()

    def offer(self, text: bytes) -> None:
        """Hand a state over, unless the client is so far behind that the memory would fill."""
        with self._lock:
            pending = sum(map(len, self._lines))
        if not pending or pending + len(text) <= MOST_PENDING:
            self.put(text)

    def move(self, place: int) -> None:
        """Tell the client its place in the queue, if that has changed; 0: it is being drawn."""
        if place != self._place:
            self._place = place
            self.put(line(queued=place))

    def end(self) -> None:
        """Let the stream end after the lines that are there."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        with suppress(RuntimeError):  # the server has stopped, and its loop is closed
            self._loop.call_soon_threadsafe(self._ready.set)

    # --- in the event loop ---

    def stop(self) -> None:
        """Stop the drawing at its next step, and end the stream at once."""
        self._stopped = self._ended = True
        with self._lock:
            self._lines.clear()
        self._ready.set()

    async def lines(self) -> AsyncIterator[bytes]:
        """Yield the lines as they come, until the end."""
        while True:
            self._ready.clear()
            ended = self._ended  # before the lines are looked at: no line comes after the end
            with self._lock:
                lines = list(self._lines)
                self._lines.clear()
            for text in lines:
                yield text
            if ended:
                return
            await self._ready.wait()


class Worker:
    """The thread that draws, one job at a time, and the jobs that wait.

    Clients take turns: however much one of them asks for, another waits for one drawing of each.
    """

    def __init__(self, limits: Limits, report: Callable[[Exception], str]) -> None:
        """`report` notes an unexpected error and returns the sentence for the client."""
        self._limits, self._report = limits, report
        self._waiting: dict[str, deque[Job]] = {}  # in the order of turns
        self._drawn: Job | None = None  # the one in work
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)
        self._thread.start()

    def submit(self, client: str, work: Callable[[Job], None]) -> Job:
        """Queue `work`, which is called with its job. Raises `Refused`: the queue is full."""
        with self._changed:
            count = sum(map(len, self._waiting.values()))
            if count >= self._limits.queue:
                raise Refused(503, f"{count} requests are waiting already: try again in a moment")
            if len(self._waiting.get(client, ())) >= self._limits.queue_of_client:
                most = self._limits.queue_of_client
                raise Refused(429, f"{most} of your requests are waiting: let one end first")
            job = Job(client, work, self._limits)
            self._waiting.setdefault(client, deque()).append(job)
            self._tell_places()
            self._changed.notify()
        loop = asyncio.get_running_loop()
        job.timer = loop.call_later(self._limits.queue_seconds, self._expire, job)
        return job

    def leave(self, job: Job) -> None:
        """Take a job out, whether it waits, is being drawn, or has ended."""
        job.stop()
        if job.timer is not None:
            job.timer.cancel()
        with self._changed:
            self._remove(job)

    def close(self) -> None:
        """Stop the drawing in work at its next step, and wait for the end of the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            if self._drawn is not None:
                self._drawn.stop()
        self._thread.join(CLOSING_SECONDS)

    def _expire(self, job: Job) -> None:
        with self._changed:
            waited = self._remove(job)
        if waited:
            seconds = self._limits.queue_seconds
            job.put(error_line(f"it waited for {seconds:g} s: try again when fewer people draw"))
            job.end()

    def _remove(self, job: Job) -> bool:
        """Take a job out of the queue; False if it does not wait. The caller holds the lock."""
        jobs = self._waiting.get(job.client, deque())
        if job not in jobs:
            return False
        jobs.remove(job)
        if not jobs:
            del self._waiting[job.client]
        self._tell_places()
        return True

    def _tell_places(self) -> None:
        rounds = itertools.zip_longest(*self._waiting.values())
        order = (job for turn in rounds for job in turn if job is not None)
        for place, job in enumerate(order, start=1):
            job.move(place)

    def _next(self) -> Job | None:
        """Wait for a job and take it; None: the worker is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            client = next(iter(self._waiting))
            jobs = self._waiting.pop(client)
            job = jobs.popleft()
            if jobs:  # behind all other clients
                self._waiting[client] = jobs
            job.move(0)
            self._tell_places()
            self._drawn = job
            return job

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                job.begin()
                job.check()
                job.work(job)
            except Stopped:
                pass
            except Refused as error:
                job.put(error_line(str(error), error.field))
            except Exception as error:  # noqa: BLE001, the thread serves the next job
                job.put(error_line(self._report(error)))
            job.end()
            self._drawn = None
            del job  # with its pictures
