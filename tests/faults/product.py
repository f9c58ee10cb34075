"""`mdm train` as a process, and what it leaves in its run folder."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
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
from matryoshka_diffusion.train import checkpoint

HERE = Path(__file__).parent
CONFIG = HERE / "chaos.yaml"
INTERVAL, BATCH, IMAGES = 16, 8, 480
"""Images between two checkpoints, in a step and in the run, as `chaos.yaml` says."""

PATIENCE_SECONDS = 120.0
"""A process that takes longer than this hangs."""

_CLOCK = {"seconds", "images_per_second", "data_wait", "peak_memory_bytes"}


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status (-9 after kill -9) and what it said on stderr."""

    status: int
    errors: str

    @property
    def fault(self) -> str:
        """What the injected fault was; empty if its moment never came."""
        lines = [line for line in self.errors.splitlines() if line.startswith("fault: ")]
        return lines[0].removeprefix("fault: ") if lines else ""


class Process:
    """A command that runs; its stderr goes to a file, so that no pipe is ever full."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._log = log
        with open(log, "wb") as file:
            self._process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=file, env=environment()
            )

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def errors(self) -> str:
        return self._log.read_text("utf-8", errors="replace")

    def wait_to_say(self, words: str) -> None:
        """Wait until stderr holds these words. Raises TimeoutError if they do not come."""
        until = time.monotonic() + PATIENCE_SECONDS
        while words not in self.errors():
            if time.monotonic() > until or not self.runs:
                raise TimeoutError(f"{self._log} does not say: {words}")
            time.sleep(0.01)

    def limit(self, what: int, most: int) -> None:
        """Lower a limit of the system, such as `resource.RLIMIT_FSIZE`."""
        resource.prlimit(self._process.pid, what, (most, most))

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self, within: float = PATIENCE_SECONDS) -> Ended:
        """Wait for the end. Raises `subprocess.TimeoutExpired` after killing what hangs."""
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

    def command(self, faults: dict[str, Any]) -> list[str]:
        """`mdm train`, with faults if there are any."""
        program = (
            ["-m", "faults.child", json.dumps(faults)]
            if faults
            else ["-m", "matryoshka_diffusion.cli"]
        )
        changes = [word for setting in self.settings for word in ("--set", setting)]
        where = ["--data", self.data, "--out", str(self.folder), "--device", "cpu"]
        return [sys.executable, *program, "train", str(CONFIG), *where, *changes]

    def start(self, *before: str, **faults: Any) -> Process:
        """Begin the run or go on with it; `before` are words to put before the command."""
        return self._begin([*before, *self.command(faults)])

    def _begin(self, command: list[str]) -> Process:
        logs = (self.folder.parent / f"{self.folder.name}.{n}.log" for n in itertools.count(1))
        return Process(command, next(log for log in logs if not log.exists()))

    def go(self, **faults: Any) -> Ended:
        """Start, and wait for the end."""
        return self.start(**faults).end()

    # --- what is there -------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def finished(self) -> bool:
        return (self.folder / "model" / "config.json").exists()

    def newest(self) -> int:
        """Images seen at the newest complete checkpoint, which is read whole; 0 without any."""
        path, _ = self._found()
        if path is None:
            return 0
        found = checkpoint.read(path)
        assert found.state["images_seen"] == int(path.name)
        return int(path.name)

    def torn(self) -> list[str]:
        """Checkpoints that have their name and are not complete."""
        return self._found()[1]

    def _found(self) -> tuple[Path | None, list[str]]:
        """The newest complete checkpoint, and what is said of those that are not."""
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                path = checkpoint.newest(self.checkpoints)
            except checkpoint.CheckpointError:  # there are only torn ones
                path = None
        return path, [str(warning.message) for warning in told]

    def snapshot(self, images_seen: int | None = None) -> checkpoint.Snapshot:
        """What was saved at `images_seen`; without it, at the newest complete checkpoint."""
        name = f"{self.newest() if images_seen is None else images_seen:010d}"
        return checkpoint.read(self.checkpoints / name)

    def kept(self) -> dict[str, str]:
        """All files of the checkpoints with their hashes."""
        return {
            str(path.relative_to(self.checkpoints)): digest_of(path)
            for path in sorted(self.checkpoints.rglob("*"))
            if path.is_file()
        }

    def leftovers(self) -> list[str]:
        """Files of saves that did not end."""
        return [str(path.relative_to(self.folder)) for path in self.folder.rglob("*.tmp")]

    def lines(self) -> list[dict[str, Any]]:
        """Whole lines of metrics."""
        path = self.folder / "metrics.jsonl"
        text = path.read_text("utf-8") if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]

    def reached(self) -> int:
        """Images seen after the last step that was logged."""
        return max((line["images_seen"] for line in self.lines()), default=0)

    def digest(self) -> dict[str, str]:
        """What the run has learnt and told: equal for runs that went through the same steps."""
        last = checkpoint.newest(self.checkpoints)
        assert last is not None
        paths = [*last.glob("*.safetensors"), self.folder / "model" / "model.safetensors"]
        told = [{key: line[key] for key in line.keys() - _CLOCK} for line in self.lines()]
        metrics = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        return {"metrics": metrics, **{path.name: digest_of(path) for path in sorted(paths)}}


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class Workshop:
    """Where a scenario works, and what it compares with.

    Attributes:
        folder: for its runs; what went well is removed.
        data: the shards that are whole.
        chance: all that is random.
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


def prepare(folder: Path) -> Workshop:
    """Make the shards, and time the run that nothing disturbs."""
    shards.write_whole(folder / "shards")
    data = str(folder / "shards" / "*.tar")
    run, began = Run(folder / "undisturbed", data), time.monotonic()
    process = run.start()
    wait_for(run, 0)
    first_step = time.monotonic()
    ended = process.end()
    assert ended.status == 0, ended.errors
    seconds = first_step - began, time.monotonic() - first_step
    return Workshop(folder, data, random.Random(0), run.digest(), *seconds)


def wait_for(run: Run, images_seen: int) -> None:
    """Wait until the run has logged a step beyond `images_seen`."""
    until = time.monotonic() + PATIENCE_SECONDS
    while run.reached() <= images_seen:
        if time.monotonic() > until:
            raise TimeoutError(f"{run.folder}: no step within {PATIENCE_SECONDS:.0f} seconds")
        time.sleep(0.01)
