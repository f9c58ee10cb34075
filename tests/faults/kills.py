"""Promise 2: kill -9 never costs more than one interval, at whatever moment it comes."""

from __future__ import annotations

import shutil
import subprocess
import time

from faults.product import INTERVAL, Ended, Process, Run, Workshop
from faults.report import Result

RENAMES = ("replace", "rename")
LEAST_KILLS = 5
"""At random times, however late it is by then."""


def at_random(shop: Workshop, result: Result, until: float) -> None:
    """Kill run after run at random times, until it ends all the same, while there is time."""
    while True:
        run = shop.run("killed")
        while not run.finished:
            before, process = run.newest(), run.start()
            if time.monotonic() > until and result.counts["kills"] >= LEAST_KILLS:
                ended = process.end()
            else:
                ended = _killed_later(process, _delay(shop))
            _judge(result, run, before, ended)
        _finish(shop, result, run)
        if time.monotonic() > until and result.counts["kills"] >= LEAST_KILLS:
            return


def _delay(shop: Workshop) -> float:
    """Seconds until the kill: one in five hits the start, the others some steps of training."""
    if shop.chance.random() < 0.2:
        return shop.chance.uniform(0.0, shop.startup)
    return shop.startup + shop.chance.uniform(0.0, shop.training / 3)


def _killed_later(process: Process, delay: float) -> Ended:
    try:
        return process.end(within=delay)
    except subprocess.TimeoutExpired:  # which has killed it
        return process.end()


def at_every_moment(shop: Workshop, result: Result, until: float) -> None:
    """Kill a run before every third thing that its next save does to the disk.

    With which one it begins is up to chance, so a few runs of the tool meet all of them; within one
    process `test_checkpoint.py` does at any time.
    """
    _walk(shop, result, then="kill", least=13, stride=3)


def power_cuts(shop: Workshop, result: Result, until: float) -> None:
    """The same before each renaming, and what was not synced by then is lost as well."""
    _walk(shop, result, then="power", least=6, kinds=RENAMES)


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
    ended = run.go()
    result.expect(ended.status == 0, f"{run.folder}: did not end: {ended.errors}")
    _finish(shop, result, run)


def _judge(result: Result, run: Run, before: int, ended: Ended) -> None:
    """After a kill, the newest checkpoint is complete and at most an interval old."""
    killed = ended.status == -9
    result.counts["kills"] += killed
    result.counts["checkpoints read back"] += 1
    result.expect(
        killed or ended.status == 0, f"{run.folder}: status {ended.status}: {ended.errors}"
    )
    now, reached, torn = run.newest(), run.reached(), run.torn()
    where = f"{run.folder}, {ended.fault or 'killed at a random time'}"
    result.expect(now >= before, f"{where}: {before} is gone, {now} is left", "lost checkpoints")
    result.expect(not torn, f"{where}: {torn}", "torn checkpoints")
    result.expect(
        reached - now <= INTERVAL,
        f"{where}: {reached} images were seen, and only {now} are saved",
        "lost more than an interval",
    )


def _finish(shop: Workshop, result: Result, run: Run) -> None:
    """The run has ended: nothing is left of its interruptions, and it learnt what it should."""
    same = run.digest() == shop.expected
    result.counts["runs ended"] += 1
    result.expect(same, f"{run.folder}: not what an undisturbed run learns", "mismatched hashes")
    result.expect(not run.leftovers(), f"{run.folder}: {run.leftovers()}", "leftovers")
    if same:
        shutil.rmtree(run.folder)  # there may be hundreds
