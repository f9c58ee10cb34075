"""Promises 19 and 20: a run belongs to one process, and to the data that it began with."""

from __future__ import annotations

import shutil
import time

from faults import shards
from faults.product import Workshop, killed_later
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


def other_data(shop: Workshop, result: Result, until: float) -> None:
    """Kill a run, change its data, start it again: it is refused until the data is back."""
    folder = shop.folder / "data"
    shutil.copytree(shop.folder.parent / "shards", folder)
    changes = {
        "one shard more": lambda: shards.write(folder / "9.tar", shards.sample(99)),
        "one shard less": lambda: (folder / "0.tar").unlink(),
        "another caption": lambda: shards.write(
            folder / "0.tar",
            [
                (name, b"another" if name.endswith("5.txt") else data)
                for number in range(shards.PER_SHARD)
                for name, data in shards.sample(number)
            ],
        ),
    }
    for title, change in changes.items():
        run = shop.run("changed", data=str(folder / "*.tar"))
        delay = shop.startup + shop.chance.uniform(0.2, 0.8) * shop.training
        killed_later(run.start(), delay)
        kept = run.kept()
        change()
        ended = run.go()
        result.counts["other data"] += 1
        refused = ended.status == 2 and "was trained on other data" in ended.errors
        where = f"{run.folder}, {title}: {ended}"
        result.expect(refused or not kept, where, "not refused")
        result.expect(run.kept() == kept, f"{where}: it changed", "lost checkpoints")
        shutil.rmtree(folder)
        shutil.copytree(shop.folder.parent / "shards", folder)
        shop.finish(result, run)
