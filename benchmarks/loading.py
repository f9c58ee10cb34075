"""Samples a second out of tar shards with one worker, against what a training step consumes.

    python -m benchmarks.loading --threads 2

The shards hold JPEG pictures, read and decoded as a large set's are: on demand, every time anew. A
small set is decoded once and then read from an array; that is a row of its own.
"""

from __future__ import annotations

import io
import os
import statistics
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import parse, parser, report, take_turns
from benchmarks.steps import trainer
from matryoshka_diffusion.config import DataConfig
from matryoshka_diffusion.data import decoded
from matryoshka_diffusion.data.loader import Loader
from matryoshka_diffusion.data.source import open_source
from matryoshka_diffusion.presets import preset

SHARD = 500
"""Samples in a shard."""


def write_shards(folder: Path, count: int, side: int) -> str:
    """Shards of smooth random pictures with captions; returns their pattern."""
    draw = np.random.default_rng(0)
    for first in range(0, count, SHARD):
        with tarfile.open(folder / f"{first:06}.tar", "w") as archive:
            for n in range(first, min(first + SHARD, count)):
                for suffix, data in (("jpg", _jpeg(draw, side)), ("txt", f"picture {n}".encode())):
                    info = tarfile.TarInfo(f"{n:06}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return str(folder / "*.tar")


def _jpeg(draw: np.random.Generator, side: int) -> bytes:
    """As many bytes a pixel as photographs have: about a seventh."""
    coarse = draw.integers(0, 256, (side // 8, side // 8, 3), np.uint8)
    smooth = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    grain = draw.normal(0, 6, (side, side, 1))
    pixels = (np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=85)
    return file.getvalue()


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark; returns the file of results."""
    options = parser(__doc__)
    options.add_argument("--model", default="openmoji")
    options.add_argument("--batch", type=int, default=48)
    options.add_argument("--pictures", type=int, default=2_000)
    options.add_argument("--sides", type=int, nargs="+", default=[64, 256], help="of the pictures")
    values = parse(options, arguments)
    device, batch = torch.device(values.device), values.batch
    side = preset(values.model).model.levels[-1].side
    steps = {
        precision: trainer(values.model, batch, device, precision=precision).step
        for precision in ("fp32", "bf16")
    }
    variants, rows = dict(steps), []
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, MDM_CACHE=folder):
        for original in values.sides:
            where = Path(folder, str(original))
            where.mkdir()
            data = DataConfig(source="shards", path=write_shards(where, values.pictures, original))
            for kind, once in (("on demand", 0), ("decoded once", values.pictures)):
                with mock.patch.multiple(decoded, CACHED_PICTURES=once, THREADS=1):
                    loader = Loader(open_source(data, side), seed=0)
                variants[f"loader, {original} px, {kind}"] = _Batches(loader, batch)
        seconds = take_turns(variants, values.repeats, device)
    needed = min(statistics.median(seconds[name]) for name in steps)
    rows = [
        {
            "variant": name if name not in steps else f"step in {name}",
            "images/s": batch / statistics.median(seconds[name]),
            "times the fastest step": needed / statistics.median(seconds[name]),
        }
        for name in variants
    ]
    return report("loading", rows, values, side=side)


class _Batches:
    """One batch of a loader after the other."""

    def __init__(self, loader: Loader, size: int) -> None:
        self.loader, self.size, self.first = loader, size, 0

    def __call__(self) -> None:
        self.loader.batch(range(self.first, self.first + self.size))
        self.first += self.size


if __name__ == "__main__":
    main()
