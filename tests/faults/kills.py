"""Promises 2 and 4: kill -9 costs one interval at most at any time; a signal costs nothing."""

from __future__ import annotations

import shutil
import time

from faults.product import (
    INTERRUPTIONS,
    INTERVAL,
    Ended,
    Run,
    Workshop,
    judge_stop,
    killed_later,
)
from faults.report import Result

LEAST_KILLS = 5
"""At random times, however late it is by then."""

GRACE_SECONDS = 30.0
"""Usual time of clusters between SIGTERM and SIGKILL."""


def at_random(shop: Workshop, result: Result, until: float) -> None:
    """Kill run after run at random times, until it ends all the same, while there is time."""

    def late() -> bool:
        return time.monotonic() > until and result.counts["kills"] >= LEAST_KILLS

    while True:
        run = shop.run("killed")
        while not run.finished:
            before, process = run.newest(), run.start()
            delay = shop.startup + shop.chance.uniform(0.0, shop.training / 3)
            if shop.chance.random() < 0.2:  # hit the start
                delay = shop.chance.uniform(0.0, shop.startup)
            _judge(result, run, before, process.end() if late() else killed_later(process, delay))
        _end(shop, result, run)
        if late():
            return


def at_every_moment(shop: Workshop, result: Result, until: float) -> None:
    """Kill a run before every third thing that its next save does to the disk.

    Chance picks the first, so a few runs of the tool meet all; `test_checkpoint.py` always does.
    """
    _walk(shop, result, then="kill", least=13, stride=3)


def power_cuts(shop: Workshop, result: Result, until: float) -> None:
    """The same before each renaming, and what was not synced by then is lost as well."""
    _walk(shop, result, then="power", least=6, kinds=("replace", "rename"))


def _walk(shop: Workshop, result: Result, *, least: int, stride: int = 1, **plan: object) -> None:
    run, saves = shop.run("moments"), set()
    moment = -shop.chance.randrange(stride)
    while not run.finished:
        moment, before = moment + stride, run.newest()
        ended = run.go(disk={"moment": moment, **plan})
        _judge(result, run, before, ended)
        if f"{before + 2 * INTERVAL:010d}" in ended.fault:
            break  # the save is over: this was a moment of the next one
        saves.add(ended.fault.partition(" at ")[2].replace(str(before + INTERVAL), "N"))
    result.counts["moments of a save"] += len(saves)
    result.expect(len(saves) >= least, f"only {len(saves)} moments of a save were met")
    shop.finish(result, run)


def _judge(result: Result, run: Run, before: int, ended: Ended) -> None:
    """After a kill, the newest checkpoint is complete and at most an interval old."""
    result.counts["kills"] += ended.status == -9
    result.counts["checkpoints read back"] += 1
    where = f"{run.folder}, {ended.fault or 'killed at a random time'}"
    result.expect(ended.status in (-9, 0), f"{where}: {ended}")
    now, reached, torn = run.newest(), run.reached(), run.torn()
    result.expect(now >= before, f"{where}: {before} is gone, {now} is left", "lost checkpoints")
    result.expect(not torn, f"{where}: {torn}", "torn checkpoints")
    result.expect(
        reached - now <= INTERVAL,
        f"{where}: {reached} images were seen, and only {now} are saved",
        "lost more than an interval",
    )


def _end(shop: Workshop, result: Result, run: Run) -> None:
    failures = len(result.failures)
    shop.compare(result, run)
    if len(result.failures) == failures:
        shutil.rmtree(run.folder)  # there may be hundreds


# --- signals -----------------------------------------------------------------------------------


def stopped(shop: Workshop, result: Result, until: float) -> None:
    """Each signal three times, at random steps of one run, which saves at no other time."""
    run = shop.run("stopped", "train.checkpoint_every_images=1000000")
    for number in 3 * INTERRUPTIONS:
        before, process = run.newest(), run.start()
        run.wait_for(before)
        time.sleep(shop.chance.uniform(0.0, shop.training / 15))
        process.send(number)
        judge_stop(result, run, before, process.end(within=GRACE_SECONDS), 128 + number)
    shop.finish(result, run)


def stopped_twice(shop: Workshop, result: Result, until: float) -> None:
    """The first signal waits for a step that takes a minute; the second does not."""
    run = shop.run("stopped-twice")
    for first, second in zip(INTERRUPTIONS, INTERRUPTIONS[1:] + INTERRUPTIONS[:1], strict=True):
        before, process = run.newest(), run.start(hold=4)
        process.wait_to_say("fault: holding")
        process.send(first)
        process.wait_to_say("mdm: stopping after this step")
        began = time.monotonic()
        process.send(second)
        ended = process.end()
        result.counts["second signals"] += 1
        where = f"{run.folder}, {first.name} and {second.name}"
        result.expect(ended.status == 128 + second, f"{where}: {ended}", "wrong statuses")
        result.expect(time.monotonic() - began < GRACE_SECONDS, f"{where}: it waited", "hangs")
        result.expect(run.newest() >= before, f"{where}: {before} is gone", "lost checkpoints")
    shop.finish(result, run)
