"""Run the scenarios, print what happened, and say by the exit status whether all promises held."""

from __future__ import annotations

import argparse
import os
import random
import secrets
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from faults import crowd, data, disk, kills, nonfinite, ranks, rivals, servers
from faults.product import Workshop, prepare
from faults.report import Result, table

Scenario = Callable[[Workshop, Result, float], None]
SCENARIOS: dict[str, tuple[int, Scenario]] = {
    "kill -9 at every third moment of a save": (2, kills.at_every_moment),
    "errors of the disk": (3, disk.failing),
    "a rank killed, and all started anew": (5, ranks.restarted),
    "NaN and Inf on one rank of two": (8, ranks.skipped),
    "one rank, two, two others, one": (6, ranks.resized),
    "corrupt samples in shards": (9, data.corrupt),
    "a signal at a random step": (4, kills.stopped),
    "a signal to one rank of two": (4, ranks.signalled),
    "a dead rank and a silent one": (5, ranks.dead),
    "power cuts at every renaming": (2, kills.power_cuts),
    "a limit on the size of files": (3, disk.limited),
    "a disk that is full, then read-only": (3, disk.small),
    "a second signal": (4, kills.stopped_twice),
    "two ranks with the same samples": (7, ranks.same),
    "NaN and Inf in some steps": (8, nonfinite.skipped),
    "NaN in every step": (8, nonfinite.bounded),
    "two processes in one folder": (19, rivals.two_processes),
    "data that changes between two starts": (20, rivals.other_data),
    "folders that cannot be synced": (3, disk.unsynced),
    "a server that fails": (22, servers.failing),
    "a crowd at the studio": (15, crowd.at_the_studio),
    "kill -9 at random times": (2, kills.at_random),
}
"""Number of the promise and function. The last takes the rest of the time."""

AT_A_TIME = 2


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="of all scenarios together")
    parser.add_argument("--seed", type=int, help="of all that is random; repeats a failure")
    parser.add_argument("--only", type=int, action="append", metavar="N", help="promise N alone")
    options = parser.parse_args(arguments)
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    only = options.only or [promise for promise, _ in SCENARIOS.values()]
    chosen = [title for title, (promise, _) in SCENARIOS.items() if promise in only]
    folder = Path(tempfile.mkdtemp(prefix="mdm-chaos-"))
    os.environ["MDM_CACHE"] = str(folder / "cache")
    began = time.monotonic()
    results = run(chosen, folder, seed, 60 * options.minutes)
    print(f"\n{table(results)}\nin {(time.monotonic() - began) / 60:.1f} minutes")
    broken = [result for result in results if result.failures]
    for result in broken:
        print(f"\npromise {result.promise}, {result.title}:")
        print("\n".join(f"  {failure}" for failure in result.failures))
    if broken:
        print(f"\nThe runs are in {folder}; --seed {seed} repeats what was random.")
        return 1
    shutil.rmtree(folder)
    return 0


def run(titles: Sequence[str], folder: Path, seed: int, seconds: float) -> list[Result]:
    """Run the scenarios of these titles, some at a time, each in a process of its own."""
    until = time.monotonic() + seconds
    shop = prepare(folder)
    print(
        f"seed {seed}; undisturbed, a run takes {shop.startup:.1f} s to start and "
        f"{shop.training:.1f} s to train",
        flush=True,
    )
    with ProcessPoolExecutor(AT_A_TIME, mp_context=get_context("spawn")) as pool:
        begun = [pool.submit(attempt, title, shop, seed, until) for title in titles]
        results = []
        for done in as_completed(begun):
            result = done.result()
            results.append(result)
            print(f"{result.title}: {result.verdict} ({result.seconds:.0f} s)", flush=True)
    return results


def attempt(title: str, shop: Workshop, seed: int, until: float) -> Result:
    """Run one scenario in a folder of its own; any exception is a failure."""
    promise, scenario = SCENARIOS[title]
    result, began = Result(promise, title), time.monotonic()
    folder = shop.folder / title.replace(" ", "-")
    folder.mkdir()
    own = replace(shop, folder=folder, chance=random.Random(f"{seed} {title}"))
    try:
        scenario(own, result, until)
    except Exception:  # noqa: BLE001  the others go on, and the table is printed
        result.failures.append(traceback.format_exc())
    result.seconds = time.monotonic() - began
    return result
