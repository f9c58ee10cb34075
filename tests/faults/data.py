"""Promise 9: corrupt data is counted, attributed and bounded; what is good is still delivered."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from faults import shards
from faults.product import CONFIG, Run, Workshop, environment
from faults.report import Result

ROUNDS = 4
SHORT = "train.stages=[{levels: 1, images: 192, batch_size: 8, lr: 0.001}]"
"""Four epochs of what is left."""

_LISTED = re.compile(r"^    (\d\.tar:(?:byte \d+|\w+)): .+ \(at byte [\d,]+\)$", re.MULTILINE)


def corrupt(shop: Workshop, result: Result, until: float) -> None:
    """Sets in which every kind of damage lies at random places, read in both ways."""
    for number in range(ROUNDS):
        folder = shop.folder / f"corrupt-{number}"
        damage = shards.write_damaged(folder, shop.chance)
        data = str(folder / "*.tar")
        result.counts["corrupt samples"] += len(damage.reported)
        total = _check(result, data, damage)
        _deliver(shop, result, data, damage, on_demand=False)
        _deliver(shop, result, data, damage, on_demand=True)
        _refuse(shop, result, data, 0.01, on_demand=False)
        early = len(damage.reported) - len(damage.late)
        _refuse(shop, result, data, early / total + 1e-6, on_demand=True)


def _check(result: Result, data: str, damage: shards.Damage) -> int:
    """`mdm data check` lists each bad sample with its offset; returns how many samples it saw."""
    command = [sys.executable, "-m", "matryoshka_diffusion.cli", "data", "check", data]
    done = subprocess.run(
        [*command, "--preset", str(CONFIG)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    listed = _LISTED.findall(done.stdout)
    result.counts["reported"] += len(listed)
    result.expect(
        Counter(listed) == Counter(damage.reported) and done.returncode == 1,
        f"{data}: {done.stdout}{done.stderr} instead of {sorted(damage.reported)}",
        "not reported",
    )
    found = re.search(r"refuse this: (\d+) of (\d+) files are bad", done.stderr)
    assert found, done.stderr
    return int(found[2])


def _deliver(
    shop: Workshop, result: Result, data: str, damage: shards.Damage, *, on_demand: bool
) -> None:
    """Training is shown all that is good in every epoch, and nothing else."""
    run = shop.run("corrupt", SHORT, "data.max_bad_fraction=0.9", data=data)
    log = run.folder.with_suffix(".jsonl")
    ended = run.go(record=str(log), **({"on_demand": 0} if on_demand else {}))
    result.expect(ended.status == 0, f"{run.folder}: {ended.errors}")
    keys = _in_order(log)
    epoch = len(damage.good) + on_demand * len(damage.late)
    for start in range(0, len(keys) - epoch + 1, epoch):
        shown = Counter(keys[start : start + epoch])
        result.counts["good samples delivered"] += len(shown.keys() & damage.good)
        once = on_demand or shown.total() == len(shown)
        result.expect(
            shown.keys() == damage.good and once, f"{run.folder}: {shown}", "wrongly delivered"
        )
    if on_demand:
        told = re.findall(r"warning: (\d\.tar:\d+): .*; the next good one", ended.errors)
        result.expect(
            sorted(told) == sorted(damage.late),
            f"{run.folder}: told {told} instead of {damage.late}",
            "not reported",
        )


def _in_order(log: Path) -> list[str]:
    """The keys of samples 0, 1, 2, ... that training asked for."""
    pairs = dict(json.loads(line) for line in log.read_text("utf-8").splitlines())
    assert sorted(pairs) == list(range(len(pairs)))
    return [pairs[number] for number in sorted(pairs)]


def _refuse(shop: Workshop, result: Result, data: str, allowed: float, *, on_demand: bool) -> None:
    """Where more is bad than is allowed, training ends with an error that says so."""
    setting = f"data.max_bad_fraction={allowed:.6f}"
    run: Run = shop.run("refused", SHORT, setting, data=data)
    ended = run.go(**({"on_demand": 0} if on_demand else {}))
    result.counts["sets refused"] += 1
    said = re.search(r"mdm: shards .*: \d+ of \d+ files cannot be used \(\d\.tar", ended.errors)
    result.expect(
        ended.status == 1 and said is not None and "Traceback" not in ended.errors,
        f"{run.folder}: status {ended.status}: {ended.errors}",
        "not refused",
    )
