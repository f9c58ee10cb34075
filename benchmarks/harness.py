"""Shared parts of all benchmarks: taking turns, medians, a table and a file of results.

Variants run in one process and take turns, so that other work of the machine slows all of them
alike: ratios survive a noise that seconds do not. A ratio is the median over rounds of (baseline's
seconds / variant's seconds) within the round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
ROOT = Path(__file__).parent.parent
Seconds = Mapping[str, Sequence[float]]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--repeats", type=int, default=10, help="rounds (default 10)")
    options.add_argument("--threads", type=int, help="of torch on a CPU (default: its own choice)")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON"
    )
    return options


def add_clock(options: argparse.ArgumentParser) -> None:
    """An option for machines on which other programs run: their turns are no CPU seconds."""
    options.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: seconds of all threads (default wall)"
    )


def parse(options: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options and set the number of threads."""
    words = sys.argv[1:] if arguments is None else arguments
    values = options.parse_args(words, argparse.Namespace(words=tuple(words), began=Usage.now()))
    if values.threads is not None:
        torch.set_num_threads(values.threads)
    return values


def take_turns(
    variants: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every variant in every round, after a round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, run in variants.items():
            synchronize(device)
            began = clock()
            run()
            synchronize(device)
            if turn > 0:
                seconds[name].append(clock() - began)
    return seconds


def clock_of(device: torch.device) -> Callable[[], float]:
    """The clock for variants that compute in one thread on a CPU: that of the process.

    It stands while the process waits for a core. Several threads wait for each other in loops,
    which it would count, and a GPU computes by itself.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def speed(seconds: Seconds, variant: str, baseline: str) -> float:
    """Speed of a variant relative to the baseline, as a median over rounds."""
    rounds = zip(seconds[baseline], seconds[variant], strict=True)
    return statistics.median(slow / fast for slow, fast in rounds)


def report(
    name: str, rows: Sequence[Mapping[str, Any]], values: argparse.Namespace, **about: Any
) -> Path:
    """Print the rows as a table; write them with machine and command to `<name>-<kind>.json`."""
    device = torch.device(values.device)
    here = machine(device)
    command = shlex.join(["python", "-m", f"benchmarks.{name}", *values.words])
    print(f"{command}\n{here['processor']}, {here['threads']} threads\n")
    print(table(rows))
    load = Usage.now().cores_of_others(values.began)
    if load is not None:
        print(f"\nOther processes kept {load:.1f} of {os.cpu_count()} cores busy.")
    content = {
        "benchmark": name,
        "command": command,
        "commit": commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": here,
        "cores that others kept busy": load,
        **about,
        "rows": list(rows),
    }
    values.out.mkdir(parents=True, exist_ok=True)
    path = values.out / f"{name}-{kind_of(here['processor'])}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as columns of equal width, headed by the keys of the first."""
    lines = [[str(key) for key in rows[0]], *([_text(value) for value in r.values()] for r in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- where it ran --------------------------------------------------------------------------------


class Usage(NamedTuple):
    """Seconds until now: of the clock, of all busy cores (None if unknown), of this process."""

    clock: float
    busy: float | None
    own: float

    @classmethod
    def now(cls) -> Usage:
        try:
            line = Path("/proc/stat").read_text("utf-8").splitlines()[0]
        except OSError:  # another system than Linux
            return cls(time.monotonic(), None, 0.0)
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, line.split()[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return cls(time.monotonic(), busy, sum(os.times()[:4]))

    def cores_of_others(self, before: Usage) -> float | None:
        """The number of cores that other processes kept busy since `before`, on average."""
        if self.busy is None or before.busy is None:
            return None
        others = self.busy - before.busy - (self.own - before.own)
        return max(0.0, others / (self.clock - before.clock))


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the hardware and the versions that the numbers depend on."""
    gpu = device.type == "cuda"
    return {
        "processor": torch.cuda.get_device_name(device) if gpu else cpu_model(),
        "capability": "" if gpu else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "matryoshka-diffusion": package_version(),
    }


def package_version() -> str:
    """The version that is installed; "" where the package runs from its source."""
    try:
        return version("matryoshka-diffusion")
    except PackageNotFoundError:
        return ""


def cpu_model() -> str:
    """The processor's name as the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:  # another system than Linux
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()


def kind_of(processor: str) -> str:
    """A processor's name as part of a file's name.

    >>> kind_of("AMD EPYC 9354 32-Core Processor")
    'amd-epyc-9354-32-core-processor'
    """
    return re.sub(r"[^a-z0-9]+", "-", processor.lower()).strip("-")


def commit() -> str:
    """The commit that was measured, marked where files differ from it; "" outside git."""
    return output_of("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def output_of(*command: str) -> str:
    """The output of a command that runs in the checkout; "" if it fails or is not there."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
