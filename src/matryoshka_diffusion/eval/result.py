"""A number with everything that is needed to understand it, and to make it again."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from matryoshka_diffusion.files import cache_folder, digest

FILE = "results.jsonl"


@dataclass(frozen=True)
class Result:
    """One number.

    Attributes:
        of: whose samples: the model's name, or that of a set of images.
        key: name of the metric in METRICS, such as "fid".
        metric: name of the number with its protocol and remarks, such as "FID-50K" or
            "FID-2K [n = 2,000 <= 2,048 features: rank-deficient]".
        others: companions of the value, such as the standard deviation of a KID.
        n: number of samples.
        frames: frames of each sample; None for images.
        words: the whole number for people, if it has a sentence of its own.
        flags: remarks on all numbers of this model; they are in `metric`, too.
        weights: hash of the model's weights, of a cascade "<upsampler's> after <base's>"; empty
            for images.
        conditions: the rule of captions or classes.
        reference: name of the reference; empty if there is none.
        reference_count: number of its images; None if it is unknown.
        extractor: network that looked at the images; empty if none did.
        extractor_weights: first digits of the SHA-256 of its file.
        resize: how it resizes images.
        sampling: resolved settings, of a cascade the upsampler's with the base's under `base`;
            empty for images.
        seed: seed of the first sample.
        device: type of the device that drew the samples, such as "cuda".
    """

    of: str
    key: str = ""
    metric: str = ""
    value: float = math.nan
    n: int = 0
    frames: int | None = None
    words: str = ""
    flags: tuple[str, ...] = ()
    higher_is_better: bool = False
    others: Mapping[str, float] = field(default_factory=dict)
    weights: str = ""
    conditions: str = ""
    reference: str = ""
    reference_count: int | None = None
    extractor: str = ""
    extractor_weights: str = ""
    resize: str = ""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    precision: str = ""
    device: str = ""
    batch_size: int | None = None

    def sentence(self) -> str:
        """The number for people."""
        if self.words:
            return flagged(self.words, self.flags)
        made, real = ("samples", "pictures") if self.frames is None else ("clips", "clips")
        counts = f" of {self.n:,} {made}"
        if self.reference:
            known = self.reference_count is not None
            counts += f" to {self.reference_count:,} {real}" if known else f" to {self.reference}"
        others = "".join(f", {name} {value:.4g}" for name, value in self.others.items())
        value = f"{self.value:.3f}" if abs(self.value) >= 1.0 else f"{self.value:.4f}"
        return f"{self.metric}{counts}: {value}{others}"

    def provenance(self) -> str:
        """One line that says where the number is from."""
        weights = " ".join(word[:16] for word in self.weights.split())
        parts = [
            self.of + (f" (weights {weights})" if weights else ""),
            self.conditions,
            f"reference {self.reference}" if self.reference else "",
            f"{self.extractor} (weights {self.extractor_weights}), {self.resize}"
            if self.extractor
            else "",
            _settings(self.sampling),
            "" if self.seed is None else f"seed {self.seed}",
            f"{self.precision} on {self.device}" if self.device else self.precision,
            f"matryoshka-diffusion {package_version()}",
            f"commit {found[:12]}" if (found := commit()) else "",
        ]
        return "; ".join(part for part in parts if part)

    def record(self) -> dict[str, Any]:
        """The number as JSON."""
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return {**asdict(self), "version": package_version(), "commit": commit(), "date": date}


def flagged(name: str, flags: Iterable[str | None]) -> str:
    """A name with its remarks, if there are any.

    Example:
        >>> flagged("FID", ["no EMA", None])
        'FID [no EMA]'
    """
    raised = [flag for flag in flags if flag]
    return f"{name} [{'; '.join(raised)}]" if raised else name


def _settings(sampling: Mapping[str, Any]) -> str:
    given = {name: value for name, value in sampling.items() if value is not None}
    return ", ".join(f"{name} {_plain(value)}" for name, value in given.items())


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({_settings(value)})"
    if isinstance(value, list | tuple):
        return "/".join(_plain(one) for one in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def report(results: Sequence[Result]) -> str:
    """Every number, and below the numbers that share it, their provenance."""
    lines = []
    for result, following in itertools.zip_longest(results, results[1:]):
        lines.append(result.sentence())
        if following is None or following.provenance() != result.provenance():
            lines.append(f"  {result.provenance()}")
    return "\n".join(lines)


def append(results: Iterable[Result], path: Path) -> None:
    """Add a line of JSON for each number to the end of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(result.record()) + "\n" for result in results)
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            text = text if file.read() == b"\n" else "\n" + text  # after a line cut by a crash
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def folder_of(run: str, kind: Literal["eval", "sweep"]) -> Path:
    """`RUN/eval` or `RUN/sweep` of a folder; else the cache, in which each sweep has a folder."""
    path = Path(run)
    if path.is_dir():
        return path / kind
    if kind == "eval":
        return cache_folder("eval")
    name = f"{path.stem}-{digest(str(path.resolve()))[:8]}" if path.is_file() else run
    return cache_folder("sweep") / name


def package_version() -> str:
    """Version of the installed package."""
    try:
        return version("matryoshka-diffusion")
    except PackageNotFoundError:  # run from its source
        return "unknown"


@cache
def commit() -> str | None:
    """Commit of the running code, with "+" if it was changed; None if it is unknown."""
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None  # no git, or a repository that only happens to hold the installed package
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return f"{_git('rev-parse', 'HEAD')}{'+' if changed else ''}"


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
