"""Several ranks under torchrun: promises 4 to 8 where they are about more than one process."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

from faults.nonfinite import EVERY_STEP, judge
from faults.product import BATCH, Process, Run, Workshop, wait_for
from faults.report import Result

SIZE, IMAGES = 2, 192
SETTINGS = (
    "train.stages=[{levels: 1, images: 96, batch_size: 8, lr: 0.001},"
    " {levels: 2, images: 96, batch_size: 8, lr: 0.001, mix: [0.25, 0.75]}]",
    # What dropout draws inside the network belongs to a micro-batch, hence to its rank.
    "model.levels[0].dropout=0",
    "model.levels[1].dropout=0",
)
RANK_TIMEOUT_SECONDS = 6
GRACE_SECONDS = 10.0
"""For a busy machine: from when a rank counts as dead to when that is said."""

AT_FIRST, OVER_THE_RUN = 1e-6, 1e-5
"""How much losses may differ, relatively, from those of one process: sums in another order."""


class Ranks(Run):
    """A run folder in which two ranks train, under torchrun."""

    def __init__(self, run: Run, parallel: str = "ddp", restarts: int = 0) -> None:
        super().__init__(run.folder, run.data, run.settings)
        self._words = ["--parallel", parallel, "--rank-timeout", str(RANK_TIMEOUT_SECONDS)]
        self._agent = [
            *("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={SIZE}"),
            *(f"--max-restarts={restarts}", f"--log-dir={run.folder}.torchrun"),
        ]

    def command(self, faults: dict[str, Any]) -> list[str]:
        python, *words = super().command({"pids": str(self._pids), **faults})
        return [python, *self._agent, *words, *self._words]

    def launch(self) -> Process:
        """Begin or go on by `mdm train --gpus 2`, which leaves with the status of its ranks."""
        return self._begin([*super().command({}), *self._words, "--gpus", str(SIZE)])

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank of the newest start."""
        os.kill(int((self._pids / str(rank)).read_text("utf-8")), number)

    @property
    def _pids(self) -> Path:
        return self.folder.with_suffix(".pids")


# --- promise 4 ---------------------------------------------------------------------------------


def signalled(shop: Workshop, result: Result, until: float) -> None:
    """SIGTERM to the launcher, then to one rank: all save at the same step; one process ends."""
    one = shop.run("signalled", *SETTINGS)
    run = Ranks(one)
    process = run.launch()
    wait_for(run, 0)
    process.send(signal.SIGTERM)
    ended = process.end()
    _saved(result, run, 0, ended.errors)
    result.expect(ended.status == 128 + signal.SIGTERM, f"{run.folder}: {ended}", "wrong statuses")

    before, rank, process = run.newest(), shop.chance.randrange(SIZE), run.start()
    wait_for(run, before)
    run.send(rank, signal.SIGTERM)
    ended = process.end()
    _saved(result, run, before, ended.errors)
    told = re.search(rf"exitcode *: {128 + signal.SIGTERM}", ended.errors)
    result.expect(
        ended.status == 1 and told is not None, f"{run.folder}: {ended}", "wrong statuses"
    )
    _finish_alone(result, one, _alone(shop))


def _saved(result: Result, run: Run, before: int, errors: str) -> None:
    """All ranks have stopped at one step, which is saved."""
    result.counts["signals"] += 1
    said = re.search(r"stopped at ([\d,]+) of", errors)
    told = int(said[1].replace(",", "")) if said else None
    result.expect(
        told == run.newest() == run.reached() > before,
        f"{run.folder}: stopped at {told}, saved {run.newest()}, reached {run.reached()}: {errors}",
        "lost checkpoints",
    )


# --- promise 5 ---------------------------------------------------------------------------------


def dead(shop: Workshop, result: Result, until: float) -> None:
    """One rank is killed, then one stops answering: the other names it and leaves in time."""
    run = Ranks(shop.run("dead", *SETTINGS))
    for number, words in (
        (signal.SIGKILL, "does not answer any more"),
        (signal.SIGSTOP, f"has given no sign of life for {RANK_TIMEOUT_SECONDS} s"),
    ):
        before, reached = run.newest(), run.reached()
        rank, process = shop.chance.randrange(SIZE), run.start()
        wait_for(run, reached + BATCH)
        run.send(rank, number)
        began = time.monotonic()
        process.wait_to_say(f"rank {rank} {words}; the same command continues")
        seconds = time.monotonic() - began
        if number == signal.SIGSTOP:
            run.send(rank, signal.SIGKILL)  # torchrun would wait half a minute for it
        ended = process.end()
        result.counts["dead ranks"] += 1
        where = f"{run.folder}, {number.name} of rank {rank}"
        result.expect(
            seconds < RANK_TIMEOUT_SECONDS + GRACE_SECONDS, f"{where}: {seconds:.0f} s", "hangs"
        )
        result.expect(ended.status == 1, f"{where}: {ended}", "wrong statuses")
        result.expect(run.newest() >= before, f"{where}: {before} is gone", "lost checkpoints")


def restarted(shop: Workshop, result: Result, until: float) -> None:
    """A rank is killed at a random moment; torchrun starts all anew, and they go on by themselves.

    Two ranks sum in one order only, so the end is bit for bit that of two ranks left in peace.
    """
    for parallel in ("ddp", "fsdp"):
        peaceful = Ranks(shop.run(f"{parallel}-in-peace", *SETTINGS), parallel)
        ended = peaceful.go()
        result.expect(ended.status == 0, f"{peaceful.folder}: {ended}")
        run = Ranks(shop.run(f"{parallel}-killed", *SETTINGS), parallel, restarts=3)
        process = run.start()
        wait_for(run, BATCH * shop.chance.randrange(IMAGES // BATCH - 4))
        time.sleep(shop.chance.uniform(0.0, 0.2))
        run.send(shop.chance.randrange(SIZE), signal.SIGKILL)
        ended = process.end()
        result.counts["kills"] += 1
        result.counts["dead ranks"] += 1
        result.counts["runs ended"] += 1
        starts = len(json.loads((run.folder / "environment.json").read_text("utf-8")))
        result.expect(ended.status == 0 and starts == 2, f"{run.folder}: {starts} starts: {ended}")
        result.expect(
            run.digest() == peaceful.digest(),
            f"{run.folder}: not what two ranks learn in peace",
            "mismatched hashes",
        )


# --- promise 6 ---------------------------------------------------------------------------------


def resized(shop: Workshop, result: Result, until: float) -> None:
    """A run of one process goes on with two ranks (DDP), with two others (FSDP2), and alone."""
    alone = _alone(shop)
    one = shop.run("resized", *SETTINGS)
    log = one.folder.with_suffix(".learnt")
    forms: list[Run] = [one, Ranks(one), Ranks(one, "fsdp")]
    places = sorted(shop.chance.sample(range(2, IMAGES // BATCH - 4), len(forms)))
    for number, (run, place) in enumerate(zip(forms, places, strict=True)):
        before, process = run.newest(), run.start(learnt=f"{log}-{number}")
        wait_for(run, max(before, BATCH * place))
        if isinstance(run, Ranks):
            run.send(shop.chance.randrange(SIZE), signal.SIGTERM)
        else:
            process.send(signal.SIGTERM)
        _saved(result, run, before, process.end().errors)
    _finish_alone(result, one, alone, learnt=f"{log}-{len(forms)}")
    starts = json.loads((one.folder / "environment.json").read_text("utf-8"))
    ranks = [start["ranks"] for start in starts]
    result.expect(ranks == [1, 2, 2, 1], f"{one.folder}: began with {ranks} ranks")
    learnt, expected = _learnt(log), _learnt(alone.folder.with_suffix(".learnt"))
    result.counts["samples compared"] += len(expected)
    result.expect(
        learnt == expected and [number for number, _ in learnt] == list(range(IMAGES)),
        f"{one.folder}: learnt from {learnt} instead of {expected}",
        "skipped or repeated samples",
    )


def _learnt(log: Path) -> list[list[Any]]:
    """What all starts and ranks learnt from, numbers and keys; each of them in rising order."""
    logs = [
        [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for path in log.parent.glob(f"{log.name}*")
    ]
    assert all(pairs == sorted(pairs) for pairs in logs), log
    return sorted(pair for pairs in logs for pair in pairs)


# --- promise 7 ---------------------------------------------------------------------------------


def same(shop: Workshop, result: Result, until: float) -> None:
    """Both ranks take the rows of rank 0: they say so and learn nothing."""
    run = Ranks(shop.run("same", *SETTINGS))
    ended = run.go(same_rows=None)
    result.counts["collisions"] += 1
    result.expect(
        ended.status == 1 and "ranks 0 and 1 were given the same sample or noise" in ended.errors,
        f"{run.folder}: {ended}",
        "not refused",
    )
    result.expect(
        not run.checkpoints.exists() and not run.lines(), f"{run.folder}: it learnt", "not refused"
    )


# --- promise 8 ---------------------------------------------------------------------------------


def skipped(shop: Workshop, result: Result, until: float) -> None:
    """NaN in a pixel and Inf in a gradient, each on one rank: all skip these steps.

    Whichever rank it is that is struck, nothing is learnt from the step: so the ends are equal.
    """
    nan, inf = sorted(shop.chance.sample(range(2, IMAGES // BATCH - 2, 3), SIZE))
    ends: list[Run] = []
    for parallel, rank in (("ddp", 0), ("ddp", 1), ("fsdp", 1)):
        run = Ranks(shop.run(f"{parallel}-not-finite", *SETTINGS, *EVERY_STEP), parallel)
        sample = BATCH * nan + SIZE * shop.chance.randrange(BATCH // SIZE) + rank
        ended = run.go(poison=[sample], ranks={str(SIZE - 1 - rank): {"overflow": inf + 1}})
        samples = {nan: [sample], inf: list(range(BATCH * inf, BATCH * (inf + 1)))}
        judge(result, run, ended, samples, IMAGES // BATCH)
        ends.append(run)
    first, second, shared = ends
    kept = [_without_metrics(run.digest()) for run in (first, second)]
    result.expect(kept[0] == kept[1], f"{second.folder}: not as before", "mismatched hashes")
    _compare(result, shared, first)


def _without_metrics(digest: dict[str, str]) -> dict[str, str]:
    """Metrics name the samples that were struck."""
    return {name: value for name, value in digest.items() if name != "metrics"}


# --- one process ---------------------------------------------------------------------------------


def _alone(shop: Workshop) -> Run:
    """The run of one process that takes its batches whole, the ranks' being cut into parts."""
    run = shop.run("alone", *SETTINGS, "train.accumulate=1")
    ended = run.go(learnt=str(run.folder.with_suffix(".learnt")))
    assert ended.status == 0, ended
    return run


def _finish_alone(result: Result, run: Run, alone: Run, **faults: Any) -> None:
    """One process ends what ranks began."""
    ended = run.go(**faults)
    result.counts["runs ended"] += 1
    result.expect(ended.status == 0, f"{run.folder}: {ended}")
    _compare(result, run, alone)


def _compare(result: Result, run: Run, other: Run) -> None:
    """The losses of two runs are equal but for rounding."""
    ours, theirs = run.lines(), other.lines()
    result.expect(len(ours) == len(theirs), f"{run.folder}: {len(ours)} lines, not {len(theirs)}")
    for number, (one, two) in enumerate(zip(ours, theirs, strict=False)):
        result.counts["losses compared"] += 1
        allowed = OVER_THE_RUN if number else AT_FIRST
        losses = [math.nan if line["loss"] is None else line["loss"] for line in (one, two)]
        both_skipped = all(map(math.isnan, losses))
        result.expect(
            both_skipped or math.isclose(*losses, rel_tol=allowed),
            f"{run.folder}, step {number}: loss {one['loss']} instead of {two['loss']}",
            "differing losses",
        )
