"""Record everything that the command computes, to show that a change moves no number.

    python tests/recordings.py record --src src --out before.json [--only NAME ...] [--jobs 2]
    python tests/recordings.py compare before.json after.json [--tolerance 1e-5]

`record` runs the command lines of `recorded_cases.py`, each in a process of its own, so names of
modules, classes and weights do not matter. It notes the content of the files that a case leaves:
every line of metrics, hashes of weights, averages and moments, hashes of the pixels of samples, and
measured numbers. Two recordings on one machine must be equal, bit for bit. Between machines the
last bits differ: record both on one, or let `compare` skip hashes (`--tolerance`). Sums of weights
then differ by more than losses do, because the gradient of a bias in front of a group norm is
rounding alone.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from recorded_cases import CASES, Command, in_version_010
from recorded_data import MAKERS

Content = dict[str, Any]
"""The content of the files that a case leaves, by the name of the file and of its part."""
SPELLINGS = {"present": lambda words: words, "0.1.0": in_version_010}
"""Functions that turn a command line of `CASES` into one of a version."""

# --- run the commands --------------------------------------------------------------------------


class Problem(Exception):
    """A command did not end as it must."""


class Recorder:
    """A folder with `made/`, a folder for each case, and a folder for the cache of each case."""

    def __init__(self, root: Path, source: Path, released: Path, spelling: str) -> None:
        self.root, self.source, self.released = root.resolve(), source, released
        self.spell, self._lock = SPELLINGS[spelling], threading.Lock()

    def run(self, name: str) -> Content:
        """Run the commands of a case; return the content that they leave."""
        case, folder = CASES[name], self.root / name
        folder.mkdir()
        content: Content = {}
        cache = self.root / "caches" / (case.cache or name)
        for number, command in enumerate(case.commands):
            output = self._run(command, folder, cache)
            if command.keeps_output:
                content[f"output {number}"] = without_places(output.splitlines(), self.root)
        content |= content_of(folder, self.root)
        if case.cache is None:  # measurements that belong to no run lie in the cache
            measured = content_of(cache / "eval", self.root)
            content |= {f"cache/{name}": value for name, value in measured}
        return content

    def _run(self, command: Command, folder: Path, cache: Path) -> str:
        for name in re.findall(r"\.\./made/([\w-]+)", " ".join(command.words)):
            self._make(name)
        words = [*self.spell(command.words)]
        settings = {
            "PYTHONPATH": str(self.source),
            "MDM_CACHE": str(cache),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
            "COLUMNS": "100",
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "matryoshka_diffusion.cli", *words],
            cwd=folder,
            env={**os.environ, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if command.stop is not None:
            _stop(process, folder / "run" / "metrics.jsonl", command)
        output, errors = process.communicate()
        if process.returncode != command.status:
            raise Problem(
                f"mdm {shlex.join(words)} ended with {process.returncode}, not {command.status}: "
                f"{errors.strip()[-2000:]}"
            )
        return output

    def _make(self, name: str) -> None:
        target = self.root / "made" / name
        with self._lock:
            target.parent.mkdir(exist_ok=True)
            if name == "released":
                shutil.copy(self.released, target.with_suffix(".pth"))
            elif not target.exists():
                MAKERS[name](target)


def _stop(process: subprocess.Popen[str], metrics: Path, command: Command) -> None:
    """Send a process its signal after it has logged enough lines."""
    assert command.stop is not None, "only called for commands that are stopped"
    while process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= command.stop_after:
            process.send_signal(command.stop)
            return
        time.sleep(0.002)


# --- content of files --------------------------------------------------------------------------

SKIPPED_KEYS = {
    *("images_per_second", "data_wait", "peak_memory_bytes", "seconds"),
    *("version", "commit", "date"),
    "weights",
}
"""Keys about the machine or the moment, and a hash that depends on names."""
FEATURE_FOLDER = re.compile(r"[0-9a-f]{16}$")
"""Folders of features, which are named by hashes of names and paths."""
LETTERED = {"curves.png", "data.png"}
"""Images with paths and times in them; only their existence is recorded."""
IMAGES = {".png", ".webp", ".gif", ".mp4"}


def content_of(folder: Path, root: Path) -> Iterator[tuple[str, Any]]:
    """Names and content of the files below a folder, without hidden files and features."""
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        name, parts = inside.as_posix(), inside.parts
        if path.is_dir() or any(p.startswith(".") or FEATURE_FOLDER.match(p) for p in parts):
            continue
        if path.suffix == ".jsonl":
            rows = map(json.loads, path.read_text("utf-8").splitlines())
            lines = [without_places(row, root) for row in rows]
            if name.endswith("metrics.jsonl"):
                for column in dict.fromkeys(key for line in lines for key in line):
                    yield f"{name} {column}", [line[column] for line in lines if column in line]
            else:
                yield name, lines
        elif path.name == "sweep.json":
            yield name, without_places(json.loads(path.read_text("utf-8")), root)
        elif path.suffix == ".safetensors":
            yield name, summary_of_tensors(path)
        elif path.name in LETTERED:
            yield name, {"frames": 1}
        elif path.suffix in IMAGES:
            yield name, summary_of_pixels(path)


def without_places(data: Any, root: Path) -> Any:
    """JSON data or output without folders of this computer, commits, versions and times."""
    if isinstance(data, dict):
        items = data.items()
        return {key: without_places(value, root) for key, value in items if key not in SKIPPED_KEYS}
    if isinstance(data, list):
        return [without_places(value, root) for value in data]
    if not isinstance(data, str):
        return data
    text = data.replace(str(root), "ROOT")
    text = re.sub(r"\(weights [0-9a-f ]+\)", "(weights W)", text)
    text = re.sub(r"commit [0-9a-f]+\+?", "commit C", text)
    return re.sub(r"matryoshka-diffusion \d\S*", "matryoshka-diffusion V", text)


def summary_of_tensors(path: Path) -> dict[str, Any]:
    """Count, sum and hash of the tensors in a file; the names do not matter."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(path).values()
    hashes = [
        hashlib.sha256(
            f"{value.dtype} {tuple(value.shape)} ".encode()
            + value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for value in tensors
    ]
    return {
        "tensors": len(hashes),
        "numbers": sum(value.numel() for value in tensors),
        "sum": math.fsum(value.double().abs().sum().item() for value in tensors),
        "sha256": hashlib.sha256("\n".join(sorted(hashes)).encode()).hexdigest(),
    }


def summary_of_pixels(path: Path) -> dict[str, Any]:
    """Count of frames, mean and hash of the pixels of an image or a video."""
    digest, means = hashlib.sha256(), []
    for frame in _video_frames(path) if path.suffix == ".mp4" else _image_frames(path):
        digest.update(f"{frame.shape} ".encode() + frame.tobytes())
        means.append(float(frame.mean()))
    mean = sum(means) / max(len(means), 1)
    return {"frames": len(means), "mean": mean, "sha256": digest.hexdigest()}


def _image_frames(path: Path) -> Iterator[np.ndarray]:
    with Image.open(path) as image:
        for frame in ImageSequence.Iterator(image):
            yield np.asarray(frame.convert("RGB"))


def _video_frames(path: Path) -> Iterator[np.ndarray]:
    import av

    with av.open(str(path)) as video:
        for frame in video.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


# --- record ------------------------------------------------------------------------------------


def record(options: argparse.Namespace) -> int:
    """Run the cases and write the content that they leave; return the exit status."""
    names = options.only or list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        raise SystemExit(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    source = options.src.resolve()
    released = source.parent / "tests" / "data" / "reference" / "vis_model_nested32.pth"
    contents: dict[str, Content] = {}
    problems: dict[str, str] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(Path(folder), source, released, options.spelling)
        for name, result, seconds in _run_all(recorder, _with_needed(names), options.jobs):
            if isinstance(result, Exception):
                problems[name], remark = str(result), f"PROBLEM: {result}"
            else:
                contents[name], remark = result, f"{len(result)} items"
                if twin := CASES[name].same:
                    keys = _different_keys(result, contents[twin])
                    remark += f", PROBLEM: not as {twin}: {keys}" if keys else f", as {twin}"
                    problems |= {name: f"not as {twin}: {keys}"} if keys else {}
            print(f"{name:24} {seconds:6.1f} s, {remark}", flush=True)
    recording = {
        "made with": {
            "spelling": options.spelling,
            "python": platform.python_version(),
            "machine": platform.machine(),
            **{name: version(name) for name in ("torch", "numpy", "pillow", "transformers")},
        },
        "problems": problems,
        "cases": {name: contents[name] for name in CASES if name in names and name in contents},
    }
    options.out.write_text(json.dumps(recording, indent=1) + "\n", encoding="utf-8")
    count, seconds = len(recording["cases"]), time.monotonic() - began
    print(f"{options.out}: {count} cases in {seconds:.0f} s, {len(problems)} problems")
    return 1 if problems else 0


def _with_needed(names: Sequence[str]) -> list[str]:
    """The cases and those that they use, in the order of the table."""
    needed = set(names)
    while more := {after for name in needed for after in CASES[name].after} - needed:
        needed |= more
    return [name for name in CASES if name in needed]


def _run_all(
    recorder: Recorder, names: Sequence[str], jobs: int
) -> Iterator[tuple[str, Content | Exception, float]]:
    """Run `jobs` cases at a time, each after the cases that it uses."""
    waiting, done, broken = [*names], set[str](), set[str]()
    running: dict[Future[Content], tuple[str, float]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            for name in [one for one in waiting if set(CASES[one].after) <= done]:
                if len(running) == jobs:
                    break
                waiting.remove(name)
                if broken & set(CASES[name].after):
                    broken.add(name)
                    done.add(name)
                    yield name, Problem("a case that it uses had a problem"), 0.0
                else:
                    running[pool.submit(recorder.run, name)] = (name, time.monotonic())
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, began = running.pop(future)
                done.add(name)
                error = future.exception()
                if error is not None and not isinstance(error, Exception):
                    raise error
                if error is not None:
                    broken.add(name)
                yield name, error or future.result(), time.monotonic() - began


def _different_keys(one: Content, other: Content) -> str:
    """Names of the parts in which the runs of two cases differ."""
    keys = [key for key in {**other, **one} if key.startswith("run/")]
    return ", ".join(key for key in keys if one.get(key) != other.get(key))


# --- compare -----------------------------------------------------------------------------------


def compare(options: argparse.Namespace) -> int:
    """Print a table of two recordings; return 1 if they differ."""
    first, second = (
        json.loads(path.read_text("utf-8")) for path in (options.first, options.second)
    )
    if first["made with"] != second["made with"]:
        print(f"made with {first['made with']}\n      and {second['made with']}")
    differences: list[str] = []
    print(f"{'case':24} {'items':>6} {'equal':>6} {'other':>6}")
    for name in options.only or dict.fromkeys([*first["cases"], *second["cases"]]):
        if not all(name in recording["cases"] for recording in (first, second)):
            differences.append(f"{name}: it is not in both recordings")
            continue
        one, other = first["cases"][name], second["cases"][name]
        keys = dict.fromkeys([*one, *other])
        unequal = [k for k in keys if not is_equal(one.get(k), other.get(k), options.tolerance)]
        counts = f"{len(keys):6} {len(keys) - len(unequal):6} {len(unequal) or '-':>6}"
        print(f"{name:24} {counts}")
        differences += [f"{name}: {key}: {_first_difference(one, other, key)}" for key in unequal]
    for path, recording in ((options.first, first), (options.second, second)):
        for name, problem in recording["problems"].items():
            if not options.only or name in options.only:
                differences.append(f"{path}: {name} had a problem: {problem}")
    print("\n".join(differences) or "no difference")
    return 1 if differences else 0


def is_equal(one: Any, other: Any, tolerance: float) -> bool:
    """True for equal values. With a tolerance, hashes beside numbers are skipped."""
    if isinstance(one, dict) and isinstance(other, dict):
        if "sha256" in one and one["sha256"] == other.get("sha256"):
            return True  # the sum depends on the order of the names
        skipped = {"sha256"} if tolerance else set()
        keys = one.keys() - skipped
        return keys == other.keys() - skipped and all(
            is_equal(one[key], other[key], tolerance) for key in keys
        )
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(
            is_equal(*pair, tolerance) for pair in zip(one, other, strict=True)
        )
    if tolerance and isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance)
    return one == other


def _first_difference(one: Mapping[str, Any], other: Mapping[str, Any], key: str) -> str:
    """The first difference of a value, as a line for people."""
    if key not in one or key not in other:
        return f"only in the {'first' if key in one else 'second'}"
    before, after = one[key], other[key]
    if isinstance(before, list) and isinstance(after, list):
        pairs = enumerate(itertools.zip_longest(before, after))
        place = next(place for place, pair in pairs if pair[0] != pair[1])
        before, after = before[place : place + 1], after[place : place + 1]
        return f"at {place} {before} became {after}"
    return f"{before} became {after}"


def main() -> int:
    """Run `record` or `compare`; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("record", help="run the cases and note the files they leave")
    command.set_defaults(run=record)
    command.add_argument("--src", type=Path, required=True, help="the folder of the package")
    command.add_argument("--out", type=Path, required=True, metavar="FILE")
    command.add_argument("--only", nargs="+", metavar="NAME", help="these cases (all)")
    command.add_argument("--jobs", type=int, default=1, help="cases at a time (1)")
    command.add_argument("--spelling", choices=SPELLINGS, default="present")

    command = commands.add_parser("compare", help="print the differences of two recordings")
    command.set_defaults(run=compare)
    command.add_argument("first", type=Path)
    command.add_argument("second", type=Path)
    command.add_argument("--only", nargs="+", metavar="NAME", help="these cases (all)")
    command.add_argument("--tolerance", type=float, default=0.0, help="of numbers; no hashes (0)")
    options = parser.parse_args()
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
