"""The curves of runs, side by side in one image, from their `metrics.jsonl`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.configfile import load_config
from matryoshka_diffusion.files import require, write_atomically

_OTHER_PANELS = {
    "gradient norm": ("grad_norm", "log"),
    "learning rate": ("lr_per_level", "linear"),
    "images per second": ("images_per_second", "linear"),
}
_LOSSES = {"": "-", "seen_": ":", "held_out_": "--"}  # line styles
_HEIGHT, _WIDTH = 2.6, 9.0  # inches of a panel


class Curves(NamedTuple):
    """A run's name, the sizes of its levels, and its lines of metrics."""

    name: str
    sizes: tuple[str, ...]
    lines: list[dict[str, Any]]

    @property
    def trained(self) -> list[str]:
        """Sizes of the levels that have losses so far."""
        return [s for n, s in enumerate(self.sizes) if self.points("loss_per_level", n)]

    def points(self, key: str, level: int | None = None) -> list[tuple[int, float]]:
        """(images seen, value) for each line that has a value; `level` picks from a list."""
        values = [(line["images_seen"], line.get(key)) for line in self.lines]
        if level is not None:
            lists = [(n, value) for n, value in values if isinstance(value, list)]
            values = [(n, losses[level]) for n, losses in lists if level < len(losses)]
        return [(n, value) for n, value in values if isinstance(value, int | float)]


def read_curves(run: Path) -> Curves:
    """Read the curves of a run folder.

    Raises:
        UsageError: it is no run folder, its metrics are damaged, or nothing has been logged yet.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UsageError(f"{run}: no run folder with a metrics.jsonl in it")
    lines = []
    for number, text in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if text.endswith(b"\n"):  # a run may be writing its last line
            try:
                lines.append(json.loads(text))
                math.isfinite(lines[-1]["images_seen"])  # a number
            except (ValueError, TypeError, LookupError, RecursionError) as error:
                raise UsageError(f"{path}: line {number} is damaged: remove it") from error
    if not lines:
        raise UsageError(f"{path}: nothing has been logged yet")
    levels = load_config(run / "config.yaml").model.levels
    return Curves(run.name, tuple(level.size for level in levels), lines)


def measured(curves: Sequence[Curves]) -> dict[str, str]:
    """Titles and keys of what `train.eval_every_images` measured, such as "FD ↓, 256 samples"."""
    names = {"fd": "FD ↓", "retrieval": "Retrieval ↑"}
    keys = {key for run in curves for line in run.lines for key in line}
    found = [(key, *key.rpartition("_")[::2]) for key in sorted(keys)]
    return {f"{names[name]}, {count} samples": key for key, name, count in found if name in names}


def plot(runs: Sequence[Path], path: Path) -> None:
    """Draw the loss of every level (dashed: held out) and a run's other numbers over images seen.

    Raises:
        MissingExtra: matplotlib is not installed.
        UsageError: as `read_curves`, or the suffix of `path` is none that matplotlib writes.
    """
    require("matplotlib", "plots", "mdm plot")
    from matplotlib.figure import Figure

    curves = [read_curves(run) for run in runs]
    sizes = sorted({size for run in curves for size in run.trained}, key=_pixels)
    others = {title: (key, "linear") for title, key in measured(curves).items()} | _OTHER_PANELS
    panels = len(sizes) + len(others)
    figure = Figure(figsize=(_WIDTH, _HEIGHT * panels), layout="constrained")
    form = path.suffix.removeprefix(".").lower() or "png"
    if form not in figure.canvas.get_supported_filetypes():
        raise UsageError(f"{path}: name it .png, .svg or .pdf")
    axes = figure.subplots(panels, 1, sharex=True)
    for axis, size in zip(axes, sizes, strict=False):
        axis.set(ylabel=f"loss at {size}", yscale="log")
        for color, run in enumerate(curves):
            for kind, style in _LOSSES.items() if size in run.sizes else ():
                points = run.points(f"{kind}loss_per_level", run.sizes.index(size))
                label = f"{run.name}{', ' if kind else ''}{kind[:-1].replace('_', ' ')}"
                _draw(axis, points, f"C{color}", style, label)
        axis.legend()
    for axis, (title, (key, scale)) in zip(axes[len(sizes) :], others.items(), strict=True):
        axis.set(ylabel=title, yscale=scale)
        for color, run in enumerate(curves):
            for level in range(len(run.sizes)) if key.endswith("_per_level") else (None,):
                _draw(axis, run.points(key, level), f"C{color}", "-", run.name)
    axes[-1].set_xlabel("images seen")
    if axes[-1].get_lines():  # else the legend is an empty box, with a warning
        axes[-1].legend()
    write_atomically(path, lambda file: figure.savefig(file, format=form, dpi=100))


def _pixels(size: str) -> tuple[int, ...]:
    """Sort key of a level's size: by side, images before clips."""
    *frames, side = map(int, size.split("x"))
    return side, *frames


def _draw(
    axis: Any, points: Sequence[tuple[int, float]], color: str, style: str, label: str
) -> None:
    if points:
        dot = "." if len(points) == 1 else None  # which has no line
        options = {"color": color, "label": label, "linewidth": 1.2, "marker": dot}
        axis.plot(*zip(*points, strict=True), style, **options)
