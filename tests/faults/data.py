"""Promise 9: corrupt data is counted, attributed and bounded; good data is still delivered."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter

from faults import shards
from faults.product import CONFIG, Workshop, environment
from faults.report import Result

ROUNDS = 4
SHORT = "train.stages=[{levels: 1, images: 192, batch_size: 8, lr: 0.001}]"
"""Four epochs of what is left."""

_LISTED = re.compile(r"^    (\d\.tar:(?:byte \d+|\w+)): .+ \(at byte [\d,]+\)$", re.MULTILINE)
ON_DEMAND = {"on_demand": 0}
"""Decode while training, whatever the size of the set."""


def corrupt(shop: Workshop, result: Result, until: float) -> None:
    """Sets in which every kind of damage lies at random places, read in both ways."""
    for number in range(ROUNDS):
        folder = shop.folder / f"corrupt-{number}"
        damage = shards.write_damaged(folder, shop.chance)
        data = str(folder / "*.tar")
        result.counts["corrupt samples"] += len(damage.reported)
        total = _check(result, data, damage)
        early = len(damage.reported) - len(damage.late)
        for faults, allowed in (({}, 0.01), (ON_DEMAND, early / total + 1e-6)):
            _deliver(shop, result, data, damage, faults)
            _refuse(shop, result, data, allowed, faults)


def _check(result: Result, data: str, damage: shards.Damage) -> int:
    """`mdm data check` lists each bad sample with its offset; return how many samples it saw."""
    module = [sys.executable, "-m", "matryoshka_diffusion.cli"]
    command = [*module, "data", "check", data, "--preset", str(CONFIG)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    listed = _LISTED.findall(done.stdout)
    result.counts["reported"] += len(listed)
    result.expect(
        Counter(listed) == Counter(damage.reported) and done.returncode == 1,
        f"{data}: {done.stdout}{done.stderr} instead of {sorted(damage.reported)}",
        "not reported",
    )
    counts = re.search(r"refuse this: (\d+) of (\d+) files are bad", done.stderr)
    assert counts, done.stderr
    return int(counts[2])


def _deliver(
    shop: Workshop, result: Result, data: str, damage: shards.Damage, faults: dict[str, int]
) -> None:
    """Training gets all good samples in every epoch, and nothing else."""
    run = shop.run("corrupt", SHORT, "data.max_bad_fraction=0.9", data=data)
    log = run.folder.with_suffix(".jsonl")
    ended = run.go(record=str(log), **faults)
    result.expect(ended.status == 0, f"{run.folder}: {ended.errors}")
    pairs = dict(json.loads(line) for line in log.read_text("utf-8").splitlines())
    keys = [pairs[number] for number in range(len(pairs))]
    epoch = len(damage.good) + bool(faults) * len(damage.late)
    for start in range(0, len(keys) - epoch + 1, epoch):
        counts = Counter(keys[start : start + epoch])
        result.counts["good samples delivered"] += len(counts.keys() & damage.good)
        right = counts.keys() == damage.good and (faults or counts.total() == len(counts))
        result.expect(bool(right), f"{run.folder}: {counts}", "wrongly delivered")
    if faults:
        named = re.findall(r"warning: (\d\.tar:\d+): .*; the next good one", ended.errors)
        result.expect(
            sorted(named) == sorted(damage.late),
            f"{run.folder}: named {named} instead of {damage.late}",
            "not reported",
        )


def _refuse(
    shop: Workshop, result: Result, data: str, allowed: float, faults: dict[str, int]
) -> None:
    """If more is bad than is allowed, training ends with an error that says so."""
    run = shop.run("refused", SHORT, f"data.max_bad_fraction={allowed:.6f}", data=data)
    ended = run.go(**faults)
    result.counts["sets refused"] += 1
    line = re.search(r"mdm: shards .*: \d+ of \d+ files cannot be used \(\d\.tar", ended.errors)
    clear = ended.status == 1 and line is not None and "Traceback" not in ended.errors
    result.expect(clear, f"{run.folder}: {ended}", "not refused")
