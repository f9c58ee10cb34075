"""Files of the package that run a function: until the first training step, in a step, in a sample.

    python -m benchmarks.files_touched
    python -m benchmarks.files_touched --src ../other/src    # another checkout of the package

A file counts as called when a function or method that is defined in it is called; the number of
imported ones stands beside it. Each part runs in a fresh process, with `sys.setprofile` in all its
threads: `openmoji` shrunk to one stage of 64 images on 16 pictures with captions, and one
`mdm sample` of the shipped model. Commands start through `python -m matryoshka_diffusion.cli`, and
torch's hook on optimizers tells steps apart, so the script works on any version of the package.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
PACKAGE = "matryoshka_diffusion"
STEADY = (5, 6)
"""Optimizer steps between which a steady step lies: nothing is started, saved or logged there."""
SETTINGS = (
    "data.source=folder",
    "train.stages=[{levels: 3, images: 64, batch_size: 8, lr: 0.001}]",
    "train.log_every_images=64",
    "train.preview_every_images=1000000",
    "train.checkpoint_every_images=1000000",
)


class Files(NamedTuple):
    """Files of the package whose functions were called, and how many were imported by then."""

    called: list[str]
    imported: int


class Watch:
    """The files below a folder whose functions have been called."""

    def __init__(self, folder: Path) -> None:
        self._start, self.files = f"{folder}{os.sep}", set[str]()

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code  # bodies of modules and classes are not optimized
        if event == "call" and code.co_flags & CO_OPTIMIZED:
            path = code.co_filename
            if path.startswith(self._start):
                self.files.add(path.removeprefix(self._start))

    def take(self) -> Files:
        """The files up to now; begins anew."""
        called, self.files = sorted(self.files), set()
        return Files(called, sum(name.split(".")[0] == PACKAGE for name in sys.modules))


def watch_command(src: Path, words: Sequence[str]) -> dict[str, Files]:
    """Run `mdm` with these words in this process; returns the files of each part of its work."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    torch.set_num_threads(1)
    sys.path.insert(0, str(src))
    watch, parts, steps = Watch(src / PACKAGE), {}, 0

    def after_step(*_: object) -> None:
        nonlocal steps
        steps += 1
        if steps in (1, *STEADY):
            parts[steps] = watch.take()

    register_optimizer_step_post_hook(after_step)
    sys.argv = ["mdm", *words]
    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        runpy.run_module(f"{PACKAGE}.cli", run_name="__main__")
    except SystemExit as leaving:
        if leaving.code:
            raise
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # pyright: ignore[reportArgumentType]
    if words[0] == "sample":
        return {"one sample of the shipped model": watch.take()}
    first, steady = parts[1], parts[STEADY[1]]
    return {"until the first training step": first, "one steady step": steady}


def write_pictures(folder: Path, count: int = 16) -> None:
    """Pictures of 64 pixels, each of one colour, with captions."""
    from PIL import Image

    for n in range(count):
        Image.new("RGB", (64, 64), (n * 15, 128, 255 - n * 15)).save(folder / f"{n:02}.png")
        (folder / f"{n:02}.txt").write_text(f"colour {n}", "utf-8")


def measure(src: Path) -> dict[str, Files]:
    """The files of every part, each command in a process of its own."""
    found: dict[str, Files] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pictures").mkdir()
        write_pictures(folder / "pictures")
        changes = [word for change in SETTINGS for word in ("--set", change)]
        train = ["train", "openmoji", "--data", "pictures", "--out", "run", *changes]
        sample = ["sample", "openmoji", "-p", "red apple", "--steps", "2", "-o", "apple.png"]
        for words in (train, sample):
            command = [sys.executable, str(Path(__file__).resolve()), "--src", str(src), "--child"]
            done = subprocess.run(
                [*command, *words],
                cwd=folder,
                env={**os.environ, "MDM_CACHE": str(folder / "cache"), "PYTHONPATH": str(src)},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise SystemExit(f"mdm {' '.join(words)}\n{done.stdout}{done.stderr}")
            parts = json.loads(done.stdout.splitlines()[-1])
            found |= {part: Files(*files) for part, files in parts.items()}
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Files]:
    """Print the number and the names of the files of each part; returns the names."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--src", type=Path, default=ROOT / "src", help="folder of the package")
    options.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    values = options.parse_args(arguments)
    src = values.src.resolve()
    if values.child is not None:
        found = watch_command(src, values.child)
        print(json.dumps(found))
        return found
    found = measure(src)
    for part, files in found.items():
        print(f"{part}: {len(files.called)} files called, {files.imported} imported")
        print(f"  {' '.join(files.called)}")
    return found


if __name__ == "__main__":
    main()
