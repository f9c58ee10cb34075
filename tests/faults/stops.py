"""Promise 4: a signal saves at that step; a second one leaves at once."""

from __future__ import annotations

import re
import signal
import time

from faults.product import Run, Workshop, wait_for
from faults.report import Result

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
NO_INTERVAL = "train.checkpoint_every_images=1000000"
"""So that every checkpoint before the last is one of a signal."""

GRACE_SECONDS = 30.0
"""What clusters commonly give between SIGTERM and SIGKILL."""


def once(shop: Workshop, result: Result, until: float) -> None:
    """Each signal three times, at random steps of one run."""
    run = shop.run("stopped", NO_INTERVAL)
    for number in 3 * SIGNALS:
        before, process = run.newest(), run.start()
        wait_for(run, before)
        time.sleep(shop.chance.uniform(0.0, shop.training / 15))
        process.send(number)
        ended = process.end(within=GRACE_SECONDS)
        result.counts["signals"] += 1
        where = f"{run.folder}, {number.name}"
        result.expect(
            ended.status == 128 + number,
            f"{where}: status {ended.status}: {ended.errors}",
            "wrong statuses",
        )
        said = re.search(r"stopped at ([\d,]+) of", ended.errors)
        told = int(said[1].replace(",", "")) if said else None
        result.expect(
            told == run.newest() == run.reached() > before,
            f"{where}: stopped at {told}, saved {run.newest()}, reached {run.reached()}",
            "lost checkpoints",
        )
    _finish(shop, result, run)


def twice(shop: Workshop, result: Result, until: float) -> None:
    """The first signal waits for a step that takes a minute; the second does not."""
    run = shop.run("stopped-twice")
    for first, second in zip(SIGNALS, SIGNALS[1:] + SIGNALS[:1], strict=True):
        before, process = run.newest(), run.start(hold=4)
        process.wait_to_say("fault: holding")
        process.send(first)
        process.wait_to_say("mdm: stopping after this step")
        began = time.monotonic()
        process.send(second)
        ended = process.end()
        result.counts["second signals"] += 1
        where = f"{run.folder}, {first.name} and {second.name}"
        result.expect(
            ended.status == 128 + second, f"{where}: status {ended.status}", "wrong statuses"
        )
        result.expect(time.monotonic() - began < GRACE_SECONDS, f"{where}: it waited", "hangs")
        result.expect(run.newest() >= before, f"{where}: {before} is gone", "lost checkpoints")
    _finish(shop, result, run)


def _finish(shop: Workshop, result: Result, run: Run) -> None:
    ended = run.go()
    result.counts["runs ended"] += 1
    result.expect(
        ended.status == 0 and run.digest() == shop.expected,
        f"{run.folder}: not what an undisturbed run learns",
        "mismatched hashes",
    )
