"""CPU time of a first `mdm sample` in a fresh process, with all that it imports and loads.

    python -m benchmarks.cold_start --threads 1 --repeats 7
    python -m benchmarks.cold_start --threads 1 --repeats 7 --before ../other/src

`--before` names the `src` of another checkout, which takes turns with this one. The time is that of
the whole process, user and system together, so a busy machine changes it little. `import torch`
alone is what no command can be faster than. The first prompt has stored features, the second one
needs the text encoder.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import ROOT, parse, parser, report, speed

TORCH = "import torch"


def cpu_seconds(words: Sequence[str], src: Path, threads: int) -> float:
    """User and system seconds of a fresh Python that runs `words` with the package of `src`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        environment = {"PYTHONPATH": str(src), "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(
            [sys.executable, *words],
            cwd=folder,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"python {' '.join(words)}\n{done.stdout}{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark; returns the file of results."""
    options = parser(__doc__)
    options.add_argument("--before", type=Path, help="src of another checkout, to compare with")
    options.add_argument("--prompts", nargs="+", default=["red apple", "yellow bicycle"])
    options.add_argument("--steps", type=int, default=25)
    values = parse(options, arguments)
    packages = {"now": ROOT / "src"}
    if values.before is not None:
        packages = {"before": values.before.resolve(), **packages}
    sample = ["-m", "matryoshka_diffusion.cli", "sample", "openmoji"]
    commands = {TORCH: ["-c", TORCH]}
    for prompt in values.prompts:
        commands[prompt] = [*sample, "-p", prompt, "--steps", str(values.steps)]
    seconds: dict[str, dict[str, list[float]]] = {
        name: {package: [] for package in packages} for name in commands
    }
    for turn in range(values.repeats + 1):  # the first round fills caches and does not count
        for name, command in commands.items():
            for package, src in packages.items():
                spent = cpu_seconds(command, src, values.threads or 1)
                seconds[name][package] += [spent] * (turn > 0)
    rows = [
        {
            "what": name,
            "package": package,
            "CPU seconds": statistics.median(each),
            "least": min(each),
            "most": max(each),
            "speed": speed(seconds[name], package, next(iter(packages))),
        }
        for name, rounds in seconds.items()
        for package, each in rounds.items()
    ]
    return report("cold_start", rows, values, steps=values.steps)


if __name__ == "__main__":
    main()
