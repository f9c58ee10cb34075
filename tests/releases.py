"""Runs of past releases, kept as what is in their files: layout, names, shapes and plain values.

`python tests/releases.py 0.1.0` trains a very small run with the code as it is and notes it in
`tests/data/releases/0.1.0`. Numbers that were learnt would take megabytes, so the tensors are made
by a formula when the run is put together again; how the code of that day went on from there is
noted, too.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from matryoshka_diffusion.config import LevelConfig, RunConfig, StageConfig
from matryoshka_diffusion.configfile import load_config
from matryoshka_diffusion.train.trainer import train
from tiny_run import TinyPictures, encode, tiny_config

FOLDER = Path(__file__).parent / "data" / "releases"
SAVED_AT = 8


def config() -> RunConfig:
    """Five steps, one level and then two, with as few parts as have weights of their own."""
    stages = (
        StageConfig(levels=1, images=4, batch_size=2, lr=1e-2),
        StageConfig(levels=2, images=12, batch_size=4, lr=1e-2, mix=(0.5, 0.5)),
    )
    base = tiny_config(stages=stages, dropout=0.0, checkpoint_every_images=SAVED_AT)
    inner = base.model.levels[0].model_copy(update={"blocks": (0,)})
    outer = LevelConfig(side=16, patch=2, widths=(32,), blocks=(0,), attention=(0,))
    return base.model_copy(
        update={"model": base.model.model_copy(update={"levels": (inner, outer)})}
    )


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Small numbers that belong to a name; positive where they are averages of squares."""
    if name.endswith(".step"):
        return np.full(shape, 3.0, np.float32)
    places = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()))
    mixed = (places * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    values = (mixed.astype(np.float64) / 2**24 - 0.5).astype(np.float32).reshape(shape)
    return 1e-2 + np.abs(values) if name.endswith(".exp_avg_sq") else 0.2 * values


def write(release: str) -> None:
    """Note a run of today's code as that of `release`."""
    target = FOLDER / release
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        train(config(), TinyPictures(), run, encode=encode)
        checkpoint = run / "checkpoints" / f"{SAVED_AT:010d}"
        shapes = {
            path.name: {key: _told(value.shape) for key, value in sorted(load_file(path).items())}
            for path in sorted(checkpoint.glob("*.safetensors"))
        }
        target.mkdir(parents=True)
        shutil.copy(run / "config.yaml", target)
        shutil.copy(checkpoint / "state.json", target)
        (target / "tensors.json").write_text(json.dumps(shapes, indent=0) + "\n")
    with tempfile.TemporaryDirectory() as name:
        losses = go_on(rebuilt(release, Path(name) / "run"))
        (target / "losses.json").write_text(json.dumps(losses) + "\n")


def rebuilt(release: str, run: Path) -> Path:
    """The run folder as that release left it, in the layout of 0.1.0."""
    source, folder = FOLDER / release, run / "checkpoints" / f"{SAVED_AT:010d}"
    folder.mkdir(parents=True)
    shutil.copy(source / "config.yaml", run)
    shutil.copy(source / "state.json", folder)
    for file, shapes in json.loads((source / "tensors.json").read_text("utf-8")).items():
        tensors = {key: tensor(key, tuple(map(int, text.split()))) for key, text in shapes.items()}
        save_file(tensors, folder / file)
    manifest = {path.name: _fingerprint(path) for path in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return run


def _told(shape: tuple[int, ...]) -> str:
    return " ".join(map(str, shape))


def _fingerprint(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def go_on(run: Path) -> list[float]:
    """Finish a run; returns the loss of every step."""
    train(load_config(run / "config.yaml"), TinyPictures(), run, encode=encode)
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


if __name__ == "__main__":
    torch.set_num_threads(1)
    write(*sys.argv[1:])
