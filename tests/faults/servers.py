"""Promise 22: a server that fails is tried again; one that stays away costs no step and no file."""

from __future__ import annotations

import re
from pathlib import Path

from faults.product import Run, Workshop
from faults.report import Result
from serving import Server

EVERY = 50
"""One request of so many fails, each time in another way."""

FAULTS = (503, "cut", "whole", 429, "short")
ABSENCES = 3
WAIT_SECONDS = 0.05
"""Before each new attempt, in place of a minute in all."""

HOW = {"on_demand": 0, "impatient": WAIT_SECONDS}


def failing(shop: Workshop, result: Result, until: float) -> None:
    """Read the data from a server that fails now and then, and then for good, at random moments."""
    server = Server(Path(shop.data).parent)
    data = f"{server.address}/{{0..3}}.tar"
    run = shop.run("served", data=data)

    def now_and_then(number: int, method: str) -> str | int:
        bad = number % EVERY == 0
        result.counts["failed requests"] += bad
        return FAULTS[number // EVERY % len(FAULTS)] if bad else ""

    server.fault = now_and_then
    ended = run.go(**HOW)
    result.expect(ended.status == 0, f"{run.folder}: {ended}")
    _judge(result, run)
    shop.compare(result, run)
    for _ in range(ABSENCES):
        run = shop.run("unserved", data=data)
        last = server.requests.total() + shop.chance.randrange(60, 300)
        server.fault = lambda number, method, last=last: 503 if number > last else ""
        ended = run.go(**HOW)
        result.counts["servers that stayed away"] += 1
        line = (re.findall(r"^mdm: .*", ended.errors, re.MULTILINE) or [""])[-1]
        clear = ended.status == 1 and server.address in line and "503" in line
        result.expect(clear and "Traceback" not in ended.errors, f"{run.folder}: {ended}")
        reached = f"{run.folder}: saved {run.newest()}, reached {run.reached()}"
        result.expect(run.newest() == run.reached() > 0, reached, "lost checkpoints")
        _judge(result, run)
        server.fault = lambda number, method: ""
        shop.finish(result, run)
    server.close()


def _judge(result: Result, run: Run) -> None:
    """No file is called bad."""
    good = not (run.folder / "bad.jsonl").exists()
    result.expect(good, f"{run.folder}: files are called bad", "good files called bad")
