"""Promise 19: one process has a run; a second one changes nothing and says who has it."""

from __future__ import annotations

import time

from faults.product import Workshop
from faults.report import Result

DELAYS = (0.0, 0.3, 1.0, 2.0)
"""Seconds between the starts of two processes with the same command."""


def two_processes(shop: Workshop, result: Result, until: float) -> None:
    """Start the same command twice: one ends the run undisturbed, the other leaves with 2."""
    for delay in DELAYS:
        run = shop.run("rivals")
        first = run.start()
        time.sleep(delay)
        ended = [process.end() for process in (run.start(), first)]
        result.counts["rivals"] += 1
        where = f"{run.folder}, {delay} s apart: {ended}"
        statuses = sorted(process.status for process in ended)
        result.expect(statuses == [0, 2], where, "wrong statuses")
        refusal = next((process.errors for process in ended if process.status == 2), "")
        result.expect("is in use by" in refusal, where)
        shop.compare(result, run)
