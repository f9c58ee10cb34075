"""Images/s of `mdm train openmoji` at each of its stages, here and in another checkout, in turns.

    python -m benchmarks.stages --repeats 5 --before ../other/src
    python -m benchmarks.stages --repeats 5 --before ../other/src --busy

Each run is a process of its own with torch's own choice of threads, and takes a few steps of one
stage. Its speed is that of its later steps, from its metrics. `--busy` keeps one core busy with
another program, and adds this checkout on one thread alone.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.harness import ROOT, parse, parser, report
from matryoshka_diffusion.presets import preset

ONE = "now, one thread"


def images_per_second(src: Path, stage: int, steps: int, threads: int | None) -> float:
    """Run some steps of a stage with the package in `src`; return the speed of the second half."""
    config = preset("openmoji").train.stages[stage].model_dump(mode="json")
    half = config["batch_size"] * -(-steps // 2)
    words = {
        "train.stages": json.dumps([{**config, "images": 2 * half}]),
        "train.log_every_images": str(half),
        "train.preview_every_images": "0",
        "train.warmup_images": "0",
    }
    own = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "matryoshka_diffusion.cli", "train", "openmoji"]
        for key, value in words.items():
            command += ["--set", f"{key}={value}"]
        done = subprocess.run(
            [*command, "--out", f"{folder}/run"],
            cwd=folder,
            env={**environment, **own, "PYTHONPATH": str(src)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    speeds = [json.loads(line).get("images_per_second") for line in lines]
    return [speed for speed in speeds if speed is not None][-1]


@contextmanager
def other_work(wanted: bool) -> Iterator[None]:
    """Keep one core busy with another program, if `wanted`."""
    program = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if wanted else None
    try:
        yield
    finally:
        if program is not None:
            program.kill()
            program.wait()


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark; return the file of results."""
    options = parser(__doc__)
    options.add_argument("--before", type=Path, help="src of another checkout, to compare with")
    options.add_argument("--steps", type=int, default=12, help="of each process (default 12)")
    options.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--busy", action="store_true", help="with another program on one core")
    values = parse(options, arguments)
    packages: dict[str, tuple[Path, int | None]] = {"now": (ROOT / "src", values.threads)}
    if values.before is not None:
        packages = {"before": (values.before.resolve(), values.threads), **packages}
    if values.busy:
        packages[ONE] = (ROOT / "src", 1)
    rows = []
    with other_work(values.busy):
        for stage in values.stages:
            speeds: dict[str, list[float]] = {name: [] for name in packages}
            for _ in range(values.repeats):
                for name, (src, threads) in packages.items():
                    speeds[name].append(images_per_second(src, stage, values.steps, threads))
            first = next(iter(packages))
            for name, each in speeds.items():
                pairs = zip(each, speeds[first], strict=True)
                row = {"stage": stage + 1, "package": name, "images/s": statistics.median(each)}
                row |= {"least": min(each), "most": max(each)}
                row["speed"] = statistics.median(own / other for own, other in pairs)
                rows.append(row)
    return report("stages", rows, values, busy=values.busy)


if __name__ == "__main__":
    main()
