"""The curves of runs, side by side in one picture, out of their `metrics.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matryoshka_diffusion.config import UsageError, load_config
from matryoshka_diffusion.files import require, write_atomically

_SMALLER = {
    "gradient norm": ("grad_norm", "log"),
    "learning rate": ("lr", "linear"),
    "images per second": ("images_per_second", "linear"),
}
_HEIGHT, _WIDTH = 2.6, 9.0  # inches of a panel


class Curves(NamedTuple):
    """A run's name, what its levels are called, and its lines of metrics."""

    name: str
    sizes: tuple[str, ...]
    lines: list[dict[str, Any]]


def read_curves(run: Path) -> Curves:
    """The curves of a run folder.

    Raises:
        UsageError: it is no run folder, or the run has not logged anything yet.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UsageError(f"{run}: no run folder with a metrics.jsonl in it")
    lines = [json.loads(line) for line in _whole(path.read_text("utf-8").splitlines(True))]
    if not lines:
        raise UsageError(f"{path}: nothing has been logged yet")
    levels = load_config(run / "config.yaml").model.levels
    return Curves(run.name, tuple(level.size for level in levels), lines)


def _whole(lines: Iterable[str]) -> Iterable[str]:
    """All but a line that is just being written."""
    return (line for line in lines if line.endswith("\n"))


def plot(runs: Sequence[Path], path: Path) -> None:
    """Draw the loss of every level (dashed: held out) and what else a run logs, over images seen.

    Raises:
        MissingExtra: matplotlib is not installed.
        UsageError: see `read_curves`.
    """
    require("matplotlib", "plots", "mdm plot")
    from matplotlib.figure import Figure

    curves = [read_curves(run) for run in runs]
    sizes = sorted({size for one in curves for size in one.sizes}, key=_pixels)
    panels = len(sizes) + len(_SMALLER)
    figure = Figure(figsize=(_WIDTH, _HEIGHT * panels), layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True)
    for axis, size in zip(axes, sizes, strict=False):
        axis.set_ylabel(f"loss at {size}")
        axis.set_yscale("log")
        for color, one in enumerate(curves):
            _loss(axis, one, size, f"C{color}")
    for axis, (title, (key, scale)) in zip(axes[len(sizes) :], _SMALLER.items(), strict=True):
        axis.set_ylabel(title)
        axis.set_yscale(scale)
        for color, one in enumerate(curves):
            _draw(axis, _points(one.lines, key), f"C{color}", label=one.name)
    axes[-1].set_xlabel("images seen")
    axes[-1].legend()
    form = path.suffix.removeprefix(".") or "png"
    write_atomically(path, lambda file: figure.savefig(file, format=form, dpi=100))


def _pixels(size: str) -> tuple[int, ...]:
    """Clips after pictures of their side."""
    *frames, side = map(int, size.split("x"))
    return side, *frames


def _loss(axis: Any, one: Curves, size: str, color: str) -> None:
    if size not in one.sizes:
        return
    level = one.sizes.index(size)
    _draw(axis, _points(one.lines, "loss_per_level", level), color, label=one.name)
    for kind, style in (("seen", ":"), ("held_out", "--")):
        points = _points(one.lines, f"{kind}_loss_per_level", level)
        _draw(axis, points, color, style, label=f"{one.name}, {kind.replace('_', ' ')}")
    axis.legend()


def _points(
    lines: Sequence[dict[str, Any]], key: str, level: int | None = None
) -> list[tuple[int, float]]:
    """(images seen, value) wherever there is a value; of one level if there is a list of them."""
    points = []
    for line in lines:
        value = line.get(key)
        if isinstance(value, list):
            assert level is not None, "only losses have a value for each level"
            value = value[level] if level < len(value) else None
        if value is not None:
            points.append((line["images_seen"], value))
    return points


def _draw(
    axis: Any, points: Sequence[tuple[int, float]], color: str, style: str = "-", *, label: str
) -> None:
    if points:
        axis.plot(*zip(*points, strict=True), style, color=color, label=label, linewidth=1.2)
