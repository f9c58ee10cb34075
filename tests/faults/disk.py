"""Promise 3: a full, read-only or failing disk is an error at once and costs nothing saved."""

from __future__ import annotations

import errno
import os
import re
import signal

from faults.product import Run, Workshop
from faults.report import Result

OF_A_CHECKPOINT = r"checkpoints/\d+ of [\d,]+ bytes"
DURING_A_SAVE = (
    ("EROFS", "mkdir", 1),
    ("ENOSPC", "open", 1),
    *(("ENOSPC", "write", 4 * file + 3) for file in range(5)),  # half of it is written
    ("EIO", "fsync", 1),
    ("EDQUOT", "fsync", 5),
    ("ENOSPC", "replace", 3),
    ("EIO", "rename", 1),
)
"""Error, kind of access and the number of the access that fails."""

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
    run.wait_for(40)
    process.send(signal.SIGTERM)
    process.end()
    for error, kind, moment in DURING_A_SAVE:
        before = run.kept()
        ended = run.go(disk={"moment": moment, "then": error, "kinds": [kind]})
        _judge(result, run, before, error, OF_A_CHECKPOINT, ended.errors)
    shop.finish(result, run)
    for name in ELSEWHERE:
        run = shop.run("failing")
        ended = run.go(disk={"moment": 1, "then": "ENOSPC", "inside": name, "kinds": ["write"]})
        _judge(result, run, {}, "ENOSPC", re.escape(name), ended.errors)
        shop.finish(result, run)


def limited(shop: Workshop, result: Result, until: float) -> None:
    """The system itself refuses to let a file grow."""
    run = shop.run("limited")
    process = run.start()
    process.limit_files(500_000)
    _judge(result, run, {}, "EFBIG", OF_A_CHECKPOINT, process.end().errors)
    shop.finish(result, run)


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
    text, _, rest = ended.errors.partition("--- read-only")
    full, readonly, repaired = (
        Run(run.folder.with_suffix(f".{name}"), "") for name in ("full", "readonly", "repaired")
    )
    before = full.kept()
    _judge(result, full, before, "ENOSPC", OF_A_CHECKPOINT, text)
    result.expect(full.newest() > 0, f"{full.folder}: no checkpoint fitted")
    _judge(result, readonly, before, "EROFS", r"\.lock", rest.split("--- repaired")[0])
    shop.compare(result, repaired)


def unsynced(shop: Workshop, result: Result, until: float) -> None:
    """A file system that refuses to sync folders, as some network and FUSE systems do."""
    for code in ("EINVAL", "ENOTSUP"):
        run = shop.run("unsynced")
        ended = run.go(unsynced_folders=code)
        result.expect(ended.status == 0, f"{run.folder}: {ended}", "refused folders")
        result.expect(bool(ended.fault), f"{run.folder}: no folder was synced")
        shop.compare(result, run)


def _judge(
    result: Result, run: Run, before: dict[str, str], error: str, path: str, errors: str
) -> None:
    """The command failed in one line with path and reason; files from before have not changed."""
    where = f"{run.folder}, {error}"
    result.counts["errors of the disk"] += 1
    line = (re.findall(r"^mdm: .*", errors, re.MULTILINE) or [""])[-1]
    clear = os.strerror(getattr(errno, error)) in line and re.search(path, line) is not None
    result.expect(clear and "Traceback" not in errors, f"{where}: {errors}", "not told")
    now = run.kept()
    lost = [name for name, digest in before.items() if now.get(name) != digest]
    result.expect(not lost, f"{where}: changed or gone: {lost}", "lost checkpoints")
    result.expect(not run.leftovers(), f"{where}: {run.leftovers()}", "leftovers")
