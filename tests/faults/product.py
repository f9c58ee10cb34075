"""`mdm train` as a process, the run folder that it leaves, and the workshop of a scenario."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults import shards
from faults.report import Result
from matryoshka_diffusion.training import checkpoint

HERE = Path(__file__).parent
CONFIG = HERE / "chaos.yaml"
INTERVAL, BATCH, IMAGES = 16, 8, 480
"""Images between two checkpoints, in a step and in the run, as `chaos.yaml` says."""

PATIENCE_SECONDS = 120.0
"""A process that takes longer than this hangs."""

_CLOCK = {"seconds", "images_per_second", "data_wait", "peak_memory_bytes"}


@dataclass(frozen=True)
class Ended:
    """Exit status of a process (-9 after kill -9) and its stderr."""

    status: int
    errors: str

    @property
    def fault(self) -> str:
        """The fault that was injected; empty if its moment never came."""
        return "".join(re.findall(r"^fault: (.*)", self.errors, re.MULTILINE)[:1])


class Process:
    """A command that runs; its stderr goes to a file, so that no pipe is ever full."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._log = log
        with open(log, "wb") as file:
            self._process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=file, env=environment()
            )
        self.send = self._process.send_signal

    def memory(self) -> float:
        """Resident memory in MB."""
        pages = Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize() / 1e6

    def errors(self) -> str:
        return self._log.read_text("utf-8", errors="replace")

    def wait_to_say(self, words: str) -> None:
        """Wait until stderr holds these words. Raises TimeoutError if they do not come."""
        until = time.monotonic() + PATIENCE_SECONDS
        while words not in self.errors():
            if time.monotonic() > until or self._process.poll() is not None:
                raise TimeoutError(f"{self._log} does not say: {words}")
            time.sleep(0.01)

    def limit_files(self, most: int) -> None:
        """Let no file grow beyond so many bytes."""
        resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE, (most, most))

    def end(self, within: float = PATIENCE_SECONDS) -> Ended:
        """Wait for the end. Raises `subprocess.TimeoutExpired` after killing a hanging process."""
        try:
            status = self._process.wait(within)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise
        return Ended(status, self.errors())


def environment() -> dict[str, str]:
    """One thread, so that sums have one order, and the faults can be imported."""
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path.rstrip(os.pathsep)}


class Run:
    """A run folder and the command that trains in it."""

    def __init__(self, folder: Path, data: str, settings: tuple[str, ...] = ()) -> None:
        self.folder, self.data, self.settings = folder, data, settings
        self.checkpoints = folder / "checkpoints"

    def command(self, faults: dict[str, Any]) -> list[str]:
        """`mdm train`, with faults if there are any."""
        module = ["faults.child", json.dumps(faults)] if faults else ["matryoshka_diffusion.cli"]
        changes = [word for setting in self.settings for word in ("--set", setting)]
        places = ["--data", self.data, "--out", str(self.folder), "--device", "cpu"]
        return [sys.executable, "-m", *module, "train", str(CONFIG), *places, *changes]

    def start(self, *before: str, **faults: Any) -> Process:
        """Begin the run or go on with it; `before` are words to put before the command."""
        return self.begin([*before, *self.command(faults)])

    def begin(self, command: list[str]) -> Process:
        logs = (self.folder.parent / f"{self.folder.name}.{n}.log" for n in itertools.count(1))
        return Process(command, next(log for log in logs if not log.exists()))

    def go(self, **faults: Any) -> Ended:
        """Start, and wait for the end."""
        return self.start(**faults).end()

    # --- files of the folder -------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        return (self.folder / "model" / "config.json").exists()

    def newest(self) -> int:
        """Images seen at the newest complete checkpoint, which is read whole; 0 without any."""
        path = self._newest()[0]
        if path is None:
            return 0
        assert checkpoint.read(path).state["images_seen"] == int(path.name)
        return int(path.name)

    def torn(self) -> list[str]:
        """Checkpoints that have their name and are not complete."""
        return self._newest()[1]

    def _newest(self) -> tuple[Path | None, list[str]]:
        """The newest complete checkpoint, and warnings of those that are not."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                path = checkpoint.newest(self.checkpoints)
            except checkpoint.CheckpointError:  # there are only torn ones
                path = None
        return path, [str(warning.message) for warning in caught]

    def kept(self) -> dict[str, str]:
        """Hashes of all files of the checkpoints."""
        return {
            str(path.relative_to(self.checkpoints)): digest_of(path)
            for path in sorted(self.checkpoints.rglob("*"))
            if path.is_file()
        }

    def leftovers(self) -> list[Path]:
        """Files of saves that did not end."""
        return list(self.folder.rglob("*.tmp"))

    def lines(self) -> list[dict[str, Any]]:
        """Whole lines of metrics."""
        path = self.folder / "metrics.jsonl"
        text = path.read_text("utf-8") if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]

    def reached(self) -> int:
        """Images seen after the last step that was logged."""
        return max((line["images_seen"] for line in self.lines()), default=0)

    def wait_for(self, images_seen: int) -> None:
        """Wait until the run has logged a step beyond `images_seen`."""
        until = time.monotonic() + PATIENCE_SECONDS
        while self.reached() <= images_seen:
            if time.monotonic() > until:
                raise TimeoutError(f"{self.folder}: no step within {PATIENCE_SECONDS:.0f} seconds")
            time.sleep(0.01)

    def digest(self) -> dict[str, str]:
        """Hashes of weights and metrics: equal for runs that went through the same steps."""
        last = checkpoint.newest(self.checkpoints)
        assert last is not None
        paths = [*last.glob("*.safetensors"), self.folder / "model" / "model.safetensors"]
        lines = [{key: line[key] for key in line.keys() - _CLOCK} for line in self.lines()]
        metrics = hashlib.sha256(json.dumps(lines, sort_keys=True).encode()).hexdigest()
        return {"metrics": metrics, **{path.name: digest_of(path) for path in sorted(paths)}}


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class Workshop:
    """Place of a scenario, and the numbers that it compares with.

    Attributes:
        folder: holds its runs; those that went well are removed.
        data: the shards that are whole.
        chance: source of all that is random.
        expected: the digest of a run that nothing disturbed.
        startup: seconds until such a run has taken its first step.
        training: seconds from there to its end.
    """

    folder: Path
    data: str
    chance: random.Random
    expected: dict[str, str]
    startup: float
    training: float
    runs: int = 0

    def run(self, name: str, *settings: str, data: str | None = None) -> Run:
        """A new run, on the whole shards unless `data` names others."""
        self.runs += 1
        return Run(self.folder / f"{self.runs:03}-{name}", data or self.data, settings)

    def finish(self, result: Result, run: Run) -> None:
        """The same command ends the run as if nothing had happened, and nothing is left over."""
        ended = run.go()
        result.expect(ended.status == 0, f"{run.folder}: did not end: {ended.errors}")
        self.compare(result, run)

    def compare(self, result: Result, run: Run) -> None:
        """The run has learnt the same as one that nothing disturbed."""
        same = run.finished and run.digest() == self.expected
        result.counts["runs ended"] += 1
        result.expect(same, f"{run.folder}: learnt otherwise", "mismatched hashes")
        result.expect(not run.leftovers(), run.leftovers(), "leftovers")


def judge_stop(result: Result, run: Run, before: int, ended: Ended, status: int) -> None:
    """After a signal: the step that was reached is saved and named, and the status is right."""
    result.counts["signals"] += 1
    result.expect(ended.status == status, f"{run.folder}: {ended}", "wrong statuses")
    match = re.search(r"stopped at ([\d,]+) of", ended.errors)
    named = int(match[1].replace(",", "")) if match else None
    result.expect(
        named == run.newest() == run.reached() > before,
        f"{run.folder}: stopped at {named}, saved {run.newest()}, reached {run.reached()}: {ended}",
        "lost checkpoints",
    )


def prepare(folder: Path) -> Workshop:
    """Make the shards, and time the run that nothing disturbs."""
    shards.write_whole(folder / "shards")
    data = str(folder / "shards" / "*.tar")
    run, began = Run(folder / "undisturbed", data), time.monotonic()
    process = run.start()
    run.wait_for(0)
    first_step = time.monotonic()
    ended = process.end()
    assert ended.status == 0, ended.errors
    seconds = first_step - began, time.monotonic() - first_step
    return Workshop(folder, data, random.Random(0), run.digest(), *seconds)


def killed_later(process: Process, delay: float) -> Ended:
    """Kill a process after so many seconds, unless it ends by itself."""
    try:
        return process.end(within=delay)
    except subprocess.TimeoutExpired:  # which has killed it
        return process.end()


INTERRUPTIONS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
