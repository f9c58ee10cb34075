"""Memory that restoring a checkpoint takes, relative to what is restored.

    python -m benchmarks.resume      # S64 at full size: 7 GB on disk and in memory

A child process restores the training state (weights, average, two moments) and tells how far its
peak of resident memory is above where it began. Pages of files that are mapped into the process
count, too. Needs Linux, which keeps both numbers.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness import ROOT, parse, parser, report
from matryoshka_diffusion.config import RunConfig
from matryoshka_diffusion.presets import preset
from matryoshka_diffusion.training import checkpoint
from matryoshka_diffusion.training.step import diffusion
from matryoshka_diffusion.training.trainer import Trainer


def run_config(name: str) -> RunConfig:
    """A preset as a run's folder has it."""
    config = preset(name)
    decided = config.train.model_copy(update={"precision": "fp32", "layout": "nchw", "threads": 1})
    return config.model_copy(update={"train": decided})


def write(config: RunConfig, folder: Path) -> int:
    """A checkpoint with moments; returns the bytes of its tensors."""
    trainer = Trainer(diffusion(config), images_seen=config.train.images)
    for parameter in trainer.net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    snapshot = trainer.snapshot()
    checkpoint.save(folder, snapshot, keep=1)
    parts = (snapshot.weights, snapshot.ema, snapshot.optimizer)
    return sum(value.nbytes for part in parts for value in part.values())


def restore(name: str, folder: Path) -> int:
    """Restore it in this process; returns how many bytes more it held at its peak."""
    before = resident("VmRSS")
    path = checkpoint.newest(folder)
    assert path is not None
    snapshot = checkpoint.read(path)
    trainer = Trainer(diffusion(run_config(name)), images_seen=snapshot.state["images_seen"])
    trainer.restore(snapshot, where=str(path))
    assert trainer.optimizer.state
    return resident("VmHWM") - before


def resident(key: str) -> int:
    """Resident bytes of this process: `VmRSS` now, `VmHWM` at its peak.

    `ru_maxrss` would not do: a child's begins at what its parent held.
    """
    status = Path("/proc/self/status").read_text("utf-8")
    found = re.search(rf"^{key}:\s*(\d+) kB", status, re.MULTILINE)
    assert found
    return 1024 * int(found[1])


def main(arguments: Sequence[str] | None = None) -> Path | None:
    """Run the benchmark; returns the file of results."""
    options = parser(__doc__)
    options.add_argument("--model", default="cc12m-64")
    options.add_argument("--child", type=Path, help="restore from this folder and tell (internal)")
    values = parse(options, arguments)
    if values.child is not None:
        print(json.dumps(restore(values.model, values.child)))
        return None
    with tempfile.TemporaryDirectory() as folder:
        size = write(run_config(values.model), Path(folder))
        command = [sys.executable, "-m", "benchmarks.resume", "--model", values.model]
        child = subprocess.run(
            [*command, "--child", folder], cwd=ROOT, check=True, stdout=subprocess.PIPE
        )
    rose = int(child.stdout)
    row = {"model": values.model, "state MB": size / 1e6, "rise MB": rose / 1e6}
    return report("resume", [row | {"rise / state": rose / size}], values)


if __name__ == "__main__":
    main()
