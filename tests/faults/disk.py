"""Promise 3: a full, read-only or failing disk is told at once and costs nothing that is saved."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
from typing import NamedTuple

from faults.product import Run, Workshop, wait_for
from faults.report import Result

OF_A_CHECKPOINT = r"checkpoints/\d+ of [\d,]+ bytes"


class Failure(NamedTuple):
    """An error of the disk: which one, and at which of the things that are done to it."""

    error: str
    kind: str
    moment: int


DURING_A_SAVE = (
    Failure("EROFS", "mkdir", 1),
    Failure("ENOSPC", "open", 1),
    *(Failure("ENOSPC", "write", 4 * file + 3) for file in range(5)),  # half of it is written
    Failure("EIO", "fsync", 1),
    Failure("EDQUOT", "fsync", 5),
    Failure("ENOSPC", "replace", 3),
    Failure("EIO", "rename", 1),
)
ELSEWHERE = ("config.yaml", "environment.json", "metrics.jsonl", "model.safetensors")

SMALL_DISK = """
mount -t tmpfs -o size=14m tmpfs "$0" || exit 3
"$@"; full=$?; cp -a "$0/." "$0.full"
mount -o remount,size=200m,ro "$0"
echo "--- read-only" >&2; "$@"; readonly=$?; cp -a "$0/." "$0.readonly"
mount -o remount,rw "$0"
echo "--- repaired" >&2; "$@" && cp -a "$0/." "$0.repaired"
[ $full = 1 ] && [ $readonly = 1 ]
"""
"""Room for two checkpoints and a half; then for many, but read-only; then all is well."""


def failing(shop: Workshop, result: Result, until: float) -> None:
    """Errors at many moments of one run's saves, and in its other files."""
    run = shop.run("failing")
    process = run.start()
    wait_for(run, 40)
    process.send(signal.SIGTERM)
    process.end()
    for error, kind, moment in DURING_A_SAVE:
        before = run.kept()
        ended = run.go(disk={"moment": moment, "then": error, "kinds": [kind]})
        _judge(result, run, before, error, OF_A_CHECKPOINT, ended.errors)
    _finish(shop, result, run)
    for name in ELSEWHERE:
        run = shop.run("failing")
        ended = run.go(disk={"moment": 1, "then": "ENOSPC", "inside": name, "kinds": ["write"]})
        _judge(result, run, {}, "ENOSPC", re.escape(name), ended.errors)
        _finish(shop, result, run)


def limited(shop: Workshop, result: Result, until: float) -> None:
    """The system itself refuses to let a file grow."""
    run = shop.run("limited")
    process = run.start()
    process.limit(resource.RLIMIT_FSIZE, 500_000)
    _judge(result, run, {}, "EFBIG", OF_A_CHECKPOINT, process.end().errors)
    _finish(shop, result, run)


def small(shop: Workshop, result: Result, until: float) -> None:
    """A disk that is really full, and one that is really read-only, where one can be mounted."""
    run = shop.run("small")
    run.folder.mkdir()
    mounted = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", SMALL_DISK)
    ended = run.start(*mounted, str(run.folder)).end()
    if ended.status == 3 or "unshare" in ended.errors:
        result.counts["disks that cannot be mounted here"] += 1
        return
    result.expect(ended.status == 0, f"{run.folder}: {ended.errors}", "wrong statuses")
    full, rest = ended.errors.split("--- read-only")
    states = [Run(run.folder.with_suffix(f".{name}"), "") for name in ("full", "readonly")]
    before = states[0].kept()
    _judge(result, states[0], before, "ENOSPC", OF_A_CHECKPOINT, full)
    result.expect(states[0].newest() > 0, f"{states[0].folder}: no checkpoint fitted")
    _judge(result, states[1], before, "EROFS", "environment.json", rest.split("--- repaired")[0])
    _compare(shop, result, Run(run.folder.with_suffix(".repaired"), ""))


def _judge(
    result: Result, run: Run, before: dict[str, str], error: str, told: str, errors: str
) -> None:
    """The command failed in one line, and nothing that was there before has changed."""
    where = f"{run.folder}, {error}"
    result.counts["errors of the disk"] += 1
    said = [line for line in errors.splitlines() if line.startswith("mdm: ")]
    message = said[-1] if said else ""
    loud = os.strerror(getattr(errno, error)) in message and re.search(told, message) is not None
    result.expect(loud and "Traceback" not in errors, f"{where}: {errors}", "not told")
    now = run.kept()
    lost = [name for name, digest in before.items() if now.get(name) != digest]
    result.expect(not lost, f"{where}: changed or gone: {lost}", "lost checkpoints")
    result.expect(not run.leftovers(), f"{where}: {run.leftovers()}", "leftovers")


def _finish(shop: Workshop, result: Result, run: Run) -> None:
    """Where the disk works again, the same command ends the run as if nothing had been."""
    ended = run.go()
    result.expect(ended.status == 0, f"{run.folder}: {ended.errors}")
    _compare(shop, result, run)


def _compare(shop: Workshop, result: Result, run: Run) -> None:
    same = run.digest() == shop.expected
    result.counts["runs ended"] += 1
    result.expect(same, f"{run.folder}: not what an undisturbed run learns", "mismatched hashes")
