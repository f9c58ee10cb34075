"""Several ranks under torchrun: promises 4 to 8 with more than one process."""

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
from faults.product import BATCH, Process, Run, Workshop, judge_stop
from faults.report import Result

SIZE, IMAGES = 2, 192
SETTINGS = (
    "train.stages=[{levels: 1, images: 96, batch_size: 8, lr: 0.001},"
    " {levels: 2, images: 96, batch_size: 8, lr: 0.001, mix: [0.25, 0.75]}]",
    # Dropout inside the network is drawn for a micro-batch, hence differs between ranks.
    "model.levels[0].dropout=0",
    "model.levels[1].dropout=0",
)
RANK_TIMEOUT_SECONDS = 6
GRACE_SECONDS = 10.0
"""For a busy machine: from when a rank counts as dead to when that is said."""

AT_FIRST, OVER_THE_RUN = 1e-6, 1e-5
"""Relative difference of losses from those of one process: sums have another order."""


class Ranks(Run):
    """A run folder in which two ranks train, under torchrun."""

    def __init__(self, run: Run, parallel: str = "ddp", restarts: int = 0) -> None:
        super().__init__(run.folder, run.data, run.settings)
        self._pids = self.folder.with_suffix(".pids")
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
        return self.begin([*super().command({}), *self._words, "--gpus", str(SIZE)])

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank of the newest start."""
        os.kill(int((self._pids / str(rank)).read_text("utf-8")), number)

    def starts(self) -> list[int]:
        """Numbers of ranks of all starts of the run."""
        text = (self.folder / "environment.json").read_text("utf-8")
        return [start["ranks"] for start in json.loads(text)]


def signalled(shop: Workshop, result: Result, until: float) -> None:
    """SIGTERM to the launcher, then to one rank: all save at the same step; one process ends."""
    one = shop.run("signalled", *SETTINGS)
    run = Ranks(one)
    process = run.launch()
    run.wait_for(0)
    process.send(signal.SIGTERM)
    judge_stop(result, run, 0, process.end(), 128 + signal.SIGTERM)

    before, process = run.newest(), run.start()
    run.wait_for(before)
    run.send(shop.chance.randrange(SIZE), signal.SIGTERM)
    ended = process.end()
    judge_stop(result, run, before, ended, 1)
    status = re.search(rf"exitcode *: {128 + signal.SIGTERM}", ended.errors)
    result.expect(status is not None, f"{run.folder}: {ended}", "wrong statuses")
    _finish_alone(result, one, _alone(shop))


def dead(shop: Workshop, result: Result, until: float) -> None:
    """One rank is killed, then one stops answering: the other names it and leaves in time."""
    run = Ranks(shop.run("dead", *SETTINGS))
    for number, words in (
        (signal.SIGKILL, "does not answer any more"),
        (signal.SIGSTOP, f"has given no sign of life for {RANK_TIMEOUT_SECONDS} s"),
    ):
        before, reached = run.newest(), run.reached()
        rank, process = shop.chance.randrange(SIZE), run.start()
        run.wait_for(reached + BATCH)
        run.send(rank, number)
        began = time.monotonic()
        process.wait_to_say(f"rank {rank} {words}; the same command continues")
        seconds = time.monotonic() - began
        if number == signal.SIGSTOP:
            run.send(rank, signal.SIGKILL)  # torchrun would wait half a minute for it
        ended = process.end()
        result.counts["dead ranks"] += 1
        where = f"{run.folder}, {number.name} of rank {rank}"
        in_time = seconds < RANK_TIMEOUT_SECONDS + GRACE_SECONDS
        result.expect(in_time, f"{where}: {seconds:.0f} s", "hangs")
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
        run.wait_for(BATCH * shop.chance.randrange(IMAGES // BATCH - 4))
        time.sleep(shop.chance.uniform(0.0, 0.2))
        run.send(shop.chance.randrange(SIZE), signal.SIGKILL)
        ended = process.end()
        result.counts.update(["kills", "dead ranks", "runs ended"])
        begun = len(run.starts()) == 2
        result.expect(ended.status == 0 and begun, f"{run.folder}: {run.starts()}: {ended}")
        same = run.digest() == peaceful.digest()
        result.expect(same, f"{run.folder}: not as in peace", "mismatched hashes")


def resized(shop: Workshop, result: Result, until: float) -> None:
    """A run of one process goes on with two ranks (DDP), with two others (FSDP2), and alone."""
    alone, one = _alone(shop), shop.run("resized", *SETTINGS)
    log = one.folder.with_suffix(".learnt")
    forms: list[Run] = [one, Ranks(one), Ranks(one, "fsdp")]
    places = sorted(shop.chance.sample(range(2, IMAGES // BATCH - 4), len(forms)))
    for number, (run, place) in enumerate(zip(forms, places, strict=True)):
        before, process = run.newest(), run.start(learnt=f"{log}-{number}")
        run.wait_for(max(before, BATCH * place))
        if isinstance(run, Ranks):
            run.send(shop.chance.randrange(SIZE), signal.SIGTERM)
        else:
            process.send(signal.SIGTERM)
        status = 1 if isinstance(run, Ranks) else 128 + signal.SIGTERM
        judge_stop(result, run, before, process.end(), status)
    _finish_alone(result, one, alone, learnt=f"{log}-{len(forms)}")
    starts = Ranks(one).starts()
    result.expect(starts == [1, 2, 2, 1], f"{one.folder}: began with {starts} ranks")
    learnt, expected = _learnt(log), _learnt(alone.folder.with_suffix(".learnt"))
    result.counts["samples compared"] += len(expected)
    result.expect(
        learnt == expected and [number for number, _ in learnt] == list(range(IMAGES)),
        f"{one.folder}: learnt from {learnt} instead of {expected}",
        "skipped or repeated samples",
    )


def _learnt(log: Path) -> list[list[Any]]:
    """Numbers and keys of the samples of all starts and ranks; each of them in rising order."""
    logs = [
        [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for path in log.parent.glob(f"{log.name}*")
    ]
    assert all(pairs == sorted(pairs) for pairs in logs), log
    return sorted(pair for pairs in logs for pair in pairs)


def same(shop: Workshop, result: Result, until: float) -> None:
    """Both ranks take the rows of rank 0: they say so and learn nothing."""
    run = Ranks(shop.run("same", *SETTINGS))
    ended = run.go(same_rows=None)
    result.counts["collisions"] += 1
    named = "ranks 0 and 1 were given the same sample or noise" in ended.errors
    result.expect(ended.status == 1 and named, f"{run.folder}: {ended}", "not refused")
    learnt = run.checkpoints.exists() or run.lines()
    result.expect(not learnt, f"{run.folder}: it learnt", "not refused")


def skipped(shop: Workshop, result: Result, until: float) -> None:
    """NaN in a pixel and Inf in a gradient, each on one rank: all skip these steps.

    Nothing is learnt from these steps, so the ends do not depend on the rank that has the fault.
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
    first, second, sharded = ends
    # Metrics name the samples that are not finite.
    one, two = ({**run.digest(), "metrics": ""} for run in (first, second))
    result.expect(one == two, f"{second.folder}: not as before", "mismatched hashes")
    _compare(result, sharded, first)


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
    for number, lines in enumerate(zip(ours, theirs, strict=False)):
        result.counts["losses compared"] += 1
        losses = [math.nan if line["loss"] is None else line["loss"] for line in lines]
        equal = math.isclose(*losses, rel_tol=OVER_THE_RUN if number else AT_FIRST)
        result.expect(
            equal or all(map(math.isnan, losses)),
            f"{run.folder}, step {number}: losses {losses}",
            "differing losses",
        )
