"""Promise 15: nothing that clients of `mdm studio` send or leave makes it stop or grow."""

from __future__ import annotations

import signal
import socket
import sys
import threading
import time

from faults.product import PATIENCE_SECONDS, Process, Workshop
from faults.report import Result
from studio_server import Posted, exported, odd_request
from test_pipeline import class_model, plain_model

REQUESTS, LEAVING, AT_A_TIME = 1_000, 200, 8
MOST_GROWN = 50.0  # MB
WISHES = ({"model": "0", "label": 1}, {"model": "1"})


def at_the_studio(shop: Workshop, result: Result, until: float) -> None:
    """Send odd requests, then let clients leave midway, many at a time; measure the memory."""
    models = [str(exported(class_model(), shop.folder / "a", name="a"))]
    models += [str(exported(plain_model(), shop.folder / "b", name="b"))]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "matryoshka_diffusion.cli", "studio", *models]
    process = Process([*command, "--port", str(port), "--device", "cpu"], shop.folder / "log")
    _wait_for(port)
    for _ in range(REQUESTS // 5):  # what is loaded once, and the allocator's first blocks
        _ask(shop, result, port)
    before = process.memory()
    for _ in range(REQUESTS - REQUESTS // 5):
        _ask(shop, result, port)
    for _ in range(LEAVING // AT_A_TIME):
        visits = [threading.Thread(target=_leave, args=(port, n)) for n in range(AT_A_TIME)]
        for visit in visits:
            visit.start()
        for visit in visits:
            visit.join()
        result.counts["clients that left"] += AT_A_TIME
    last = Posted(port, {"model": "1", "steps": 2}).rest()[-1]
    result.expect("done" in last, f"it draws no more: {last}")
    grown = process.memory() - before
    result.counts["MB grown"] = round(grown)
    result.expect(abs(grown) < MOST_GROWN, f"{grown:+.1f} MB of memory")
    process.send(signal.SIGINT)
    ended = process.end()
    result.expect("Traceback" not in ended.errors, ended.errors)


def _wait_for(port: int) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until:
        try:
            Posted(port, {"model": "1", "steps": 1}).rest()
            return
        except OSError:  # noqa: PERF203, it waits anyway
            time.sleep(0.2)
    raise TimeoutError(f"nobody listens at {port}")


def _ask(shop: Workshop, result: Result, port: int) -> None:
    path, body = odd_request(shop.chance, WISHES)
    answer = Posted(port, body, path)
    lines = answer.rest()
    result.counts["drawn" if "done" in lines[-1] else "answered or refused"] += 1
    served = answer.status in (200, 400, 404, 413)
    result.expect(served and "Traceback" not in str(lines), f"{body!r}: {answer.status} {lines}")


def _leave(port: int, number: int) -> None:
    answer = Posted(port, {"model": "1", "steps": 250}, client=str(number))
    for _ in range(number % 4 if answer.status == 200 else 0):
        answer.line()
    answer.leave()
