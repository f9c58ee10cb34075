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
from pathlib import Path
from textwrap import indent
from typing import Any, Literal

from matryoshka_diffusion import __version__
from matryoshka_diffusion.files import cache_folder, digest

FILE = "results.jsonl"


@dataclass(frozen=True)
class Result:
    """One number."""

    of: str  # name of the model, or of a set of images
    key: str = ""  # name of the metric in METRICS, such as "fid"
    metric: str = ""  # its name with protocol and remarks, such as "FID-2K [n = 2,000 <= ...]"
    value: float = math.nan
    error: float | None = None  # standard error of the value over samples, if it is known
    n: int = 0  # number of samples
    frames: int | None = None  # frames of each sample; None for images
    flags: tuple[str, ...] = ()  # remarks on all numbers of this model; they are in `metric`, too
    higher_is_better: bool = False
    others: Mapping[str, float] = field(default_factory=dict)  # such as the deviation of a KID
    errors: Mapping[str, float] = field(default_factory=dict)  # standard errors of the others
    weights: str = ""  # hash of the model's weights, of a cascade "<upsampler's> after <base's>"
    conditions: str = ""  # the rule of captions or classes
    reference: str = ""
    reference_count: int | None = None  # number of its images, if it is known
    extractor: str = ""  # network that looked at the images, if one did
    extractor_weights: str = ""  # first digits of the SHA-256 of its file
    resize: str = ""  # how it resizes images
    sampling: Mapping[str, Any] = field(default_factory=dict)  # of a cascade the base's in `base`
    seed: int | None = None  # of the first sample
    precision: str = ""
    device: str = ""  # type of the device that drew the samples, such as "cuda"
    batch_size: int | None = None
    sheet: str = ""  # path of a picture of some samples, if the metric draws one

    def sentence(self) -> str:
        """The number for people."""
        made, real = ("samples", "images") if self.frames is None else ("clips", "clips")
        counts = f" of {self.n:,} {made}"
        if self.reference:
            known = self.reference_count is not None
            counts += f" to {self.reference_count:,} {real}" if known else f" to {self.reference}"
        digits = 3 if abs(self.value) >= 1.0 else 4
        value = with_error(self.value, self.error, f".{digits}f")
        others = "".join(
            f", {name} {with_error(other, self.errors.get(name), '.4g')}"
            for name, other in self.others.items()
        )
        sheet = f" ({self.sheet})" if self.sheet else ""
        return f"{self.metric}{counts}: {value}{others}{sheet}"

    def provenance(self) -> str:
        """Lines that say where the number is from."""
        weights = " ".join(word[:16] for word in self.weights.split())
        network = f"{self.extractor} (weights {self.extractor_weights}), {self.resize}"
        parts = [
            self.of + (f" (weights {weights})" if weights else ""),
            self.conditions,
            self.reference and f"reference {self.reference}",
            self.extractor and network,
            _settings(self.sampling),
            "" if self.seed is None else f"seed {self.seed}",
            f"{self.precision} on {self.device}" if self.device else self.precision,
            f"matryoshka-diffusion {__version__}",
            f"commit {revision[:12]}" if (revision := commit()) else "",
        ]
        return "\n".join(filter(None, parts))

    def record(self) -> dict[str, Any]:
        """The number as JSON."""
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return {**asdict(self), "version": __version__, "commit": commit(), "date": date}


def with_error(value: float, error: float | None, form: str) -> str:
    """A value for people, with its standard error if that is known: "0.984 ± 0.011"."""
    return f"{value:{form}}" + ("" if error is None else f" ± {error:.2g}")


def flagged(name: str, flags: Iterable[str | None]) -> str:
    """A name with its remarks, if there are any, such as "FID [no EMA]"."""
    raised = "; ".join(filter(None, flags))
    return f"{name} [{raised}]" if raised else name


def plain(value: Any) -> str:
    """A setting for people."""
    if isinstance(value, Mapping):
        return f"({_settings(value)})"
    if isinstance(value, list | tuple):
        return "/".join(map(plain, value))
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _settings(sampling: Mapping[str, Any]) -> str:
    settings = ((name, value) for name, value in sampling.items() if value is not None)
    return ", ".join(f"{name} {plain(value)}" for name, value in settings)


def report(results: Sequence[Result]) -> str:
    """Every number, and below the numbers that share it, their provenance."""
    groups = itertools.groupby(results, Result.provenance)
    lines = [[*(one.sentence() for one in group), indent(origin, "  ")] for origin, group in groups]
    return "\n".join(itertools.chain(*lines))


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


@cache
def commit() -> str | None:
    """Commit of the running code, with "+" if it was changed; None if it is unknown."""

    def git(*words: str) -> str:
        how: dict[str, Any] = {"text": True, "stderr": subprocess.DEVNULL, "timeout": 10}
        return subprocess.check_output(["git", *words], cwd=Path(__file__).parent, **how).strip()

    try:
        # Fails in a repository that only happens to hold the installed package.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        changed = git("status", "--porcelain", "--untracked-files=no")
        return f"{git('rev-parse', 'HEAD')}{'+' if changed else ''}"
    except (OSError, subprocess.SubprocessError):
        return None
