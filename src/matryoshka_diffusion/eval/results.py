"""A number with all that is needed to understand it, and to make it again."""

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
from typing import Any

from matryoshka_diffusion.metrics.naming import flagged

FILE = "results.jsonl"


@dataclass(frozen=True)
class Result:
    """One number.

    Attributes:
        of: whose samples: the model's name, or that of a set of pictures.
        key: what was asked for, such as "fid".
        metric: its name with its protocol and everything that is wrong with it, such as
            "FID-50K" or "FID-2K [n = 2,000 <= 2,048 features: rank-deficient]".
        others: what belongs to it, such as the standard deviation of a KID.
        n: how many samples.
        frames: of each, where they are clips; None for pictures.
        words: the whole number for people, where it has a sentence of its own.
        flags: what is wrong with all numbers of this model; in `metric`, too.
        weights: a hash of the model's weights, of a cascade "<upsampler's> after <base's>"; empty
            for pictures.
        conditions: what the samples were asked to show.
        reference: what they were compared with; empty where they are not compared.
        reference_count: of how many pictures; None where nobody says.
        extractor: which network looked at the pictures; empty where none did.
        extractor_weights: the beginning of the SHA-256 of its file.
        resize: how it brings pictures to its side.
        sampling: the resolved settings, of a cascade the upsampler's with the base's under `base`;
            empty for pictures.
        seed: of the first sample.
        device: the type of what they were drawn on, such as "cuda".
        higher_is_better: which way is good.
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
            return flagged(self.words, *self.flags)
        made, real = ("samples", "pictures") if self.frames is None else ("clips", "clips")
        counts = f" of {self.n:,} {made}"
        if self.reference:
            known = self.reference_count is not None
            counts += f" to {self.reference_count:,} {real}" if known else f" to {self.reference}"
        others = "".join(f", {name} {value:.4g}" for name, value in self.others.items())
        return f"{self.metric}{counts}: {_shown(self.value)}{others}"

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
        return {
            **asdict(self),
            "version": package_version(),
            "commit": commit(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }


def report(results: Sequence[Result]) -> str:
    """Every number, and below those that share it, where they are from."""
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
        if file.tell() and not _ends_its_line(file.name):
            text = "\n" + text  # of a line that a crash has cut off
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _ends_its_line(path: str) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _shown(value: float) -> str:
    """Three digits after the point, more where the number is small."""
    return f"{value:.3f}" if abs(value) >= 1.0 else f"{value:.4f}"


def _settings(sampling: Mapping[str, Any]) -> str:
    given = {name: value for name, value in sampling.items() if value is not None}
    return ", ".join(f"{name} {_plain(value)}" for name, value in given.items())


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({_settings(value)})"
    if isinstance(value, list | tuple):
        return "/".join(_plain(one) for one in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def package_version() -> str:
    """Of the installed package."""
    try:
        return version("matryoshka-diffusion")
    except PackageNotFoundError:  # run from its source
        return "unknown"


@cache
def commit() -> str | None:
    """The commit that this code was run from, with "+" if it was changed; None if nobody knows."""
    here = Path(__file__)
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None  # no git, or a repository that only happens to hold the installed package
    changed = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
    return f"{_git(here.parent, 'rev-parse', 'HEAD')}{'+' if changed else ''}"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        found = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
