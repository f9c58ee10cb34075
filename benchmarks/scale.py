"""A data set of a million pictures: time, memory and open files until the first batch.

    python -m benchmarks.scale                       # 2 GB in the folder of temporary files
    python -m benchmarks.scale --shards 100 --rows 10000 --stages open batch check

Tar shards of 100 pictures, and one parquet file, hold the smallest PNG and a caption a row. Each is
opened in a fresh process, first without the cache of indexes (cold), then with it (warm). `check`
is what `mdm data check` does: it decodes all pictures. Memory is the peak of a stage above that of
the process with its imports.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from PIL import Image

from benchmarks.harness import ROOT, parse, parser, report
from benchmarks.resume import resident
from matryoshka_diffusion.config import DataConfig
from matryoshka_diffusion.data import decoded
from matryoshka_diffusion.data.check import describe
from matryoshka_diffusion.data.loader import Loader
from matryoshka_diffusion.data.source import Source, open_source
from matryoshka_diffusion.files import require

SIDE = 64
IN_A_SHARD = 100
IN_A_GROUP = 64
"""Rows of a row group, as docs/data.md advises."""


def smallest_png() -> bytes:
    """A picture of 8 x 8 pixels, the smallest that a data set may have."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, format="PNG")
    return file.getvalue()


def write_shards(folder: Path, count: int) -> str:
    """Tar shards of pictures with captions; returns their pattern.

    All have the same bytes: the name of a shard is a part of its keys.
    """
    shard = io.BytesIO()
    with tarfile.open(fileobj=shard, mode="w") as archive:
        for n in range(IN_A_SHARD):
            for suffix, data in (("png", smallest_png()), ("txt", f"picture {n}".encode())):
                info = tarfile.TarInfo(f"{n:06}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    for n in range(count):
        (folder / f"{n:06}.tar").write_bytes(shard.getvalue())
    return str(folder / "*.tar")


def write_parquet(folder: Path, rows: int) -> str:
    """A parquet file of pictures with captions, in row groups of the size that docs/data.md has."""
    arrow, parquet = (require(x, "parquet", "") for x in ("pyarrow", "pyarrow.parquet"))
    path, group = folder / "pictures.parquet", 1024 * IN_A_GROUP
    schema = arrow.schema([("image", arrow.binary()), ("caption", arrow.string())])
    with parquet.ParquetWriter(path, schema) as file:
        for first in range(0, rows, group):
            captions = [f"picture {n}" for n in range(first, min(first + group, rows))]
            table = arrow.table([[smallest_png()] * len(captions), captions], schema=schema)
            file.write_table(table, row_group_size=IN_A_GROUP)
    return str(path)


# --- in a fresh process --------------------------------------------------------------------------


class OpenFiles(threading.Thread):
    """The most files that this process has open at a time, as far as a glance now and then says."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self._done = 0, threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.01):
            self.most = max(self.most, len(os.listdir("/proc/self/fd")))

    def stop(self) -> int:
        self._done.set()
        self.join()
        return self.most


def measured(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """The result of a call, and its seconds, CPU seconds, memory and open files."""
    Path("/proc/self/clear_refs").write_text("5", "utf-8")  # the peak begins anew
    files = OpenFiles()
    files.start()
    began, before = time.perf_counter(), time.process_time()
    result = call()
    seconds, spent = time.perf_counter() - began, time.process_time() - before
    return result, {
        "seconds": seconds,
        "CPU seconds": spent,
        "peak": resident("VmHWM"),
        "open files": files.stop(),
    }


def stages(data: DataConfig, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Open the data set and use it, in this process; a small one as if it were large."""
    usual = resident("VmRSS")
    with mock.patch.object(decoded, "CACHED_PICTURES", 0):
        source, row = measured(lambda: open_source(data, SIDE))
    rows = {"open": row}
    if "batch" in names:
        _, rows["batch"] = measured(partial(_first_batch, source, data))
    if "check" in names:
        _, rows["check"] = measured(partial(describe, source))
    return {
        name: {"samples": len(source), "peak MB": (row.pop("peak") - usual) / 1e6, **row}
        for name, row in rows.items()
    }


def _first_batch(source: Source, data: DataConfig) -> object:
    return Loader.of(source, 0, data).batch(range(64))


# --- the benchmark -------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> Path | None:
    """Run the benchmark; returns the file of results."""
    options = parser(__doc__)
    options.add_argument("--shards", type=int, default=10_000)
    options.add_argument("--rows", type=int, default=1_000_000, help="of the parquet file")
    options.add_argument("--stages", nargs="+", default=["open", "batch"], help="and check")
    options.add_argument("--child", help=argparse.SUPPRESS)
    values = parse(options, arguments)
    if values.child is not None:
        found = stages(DataConfig.model_validate_json(values.child), values.stages)
        print(json.dumps(found))
        return None
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shards").mkdir()
        sets = {
            "shards": write_shards(folder / "shards", values.shards),
            "parquet": write_parquet(folder, values.rows),
        }
        for source, path in sets.items():
            data = DataConfig.model_validate({"source": source, "path": path})
            for cache in ("cold", "warm"):
                for stage, found in _in_a_child(data, values.stages, folder / "cache").items():
                    rows.append({"data": source, "cache": cache, "stage": stage, **found})
    return report("scale", rows, values)


def _in_a_child(data: DataConfig, names: Sequence[str], cache: Path) -> dict[str, Any]:
    words = ["--stages", *names, "--child", data.model_dump_json()]
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.scale", *words],
        cwd=ROOT,
        env={**os.environ, "MDM_CACHE": str(cache)},
        check=True,
        stdout=subprocess.PIPE,
    )
    return json.loads(child.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
