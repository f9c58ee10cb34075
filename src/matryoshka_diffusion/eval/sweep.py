"""Sweeps: sampling settings tried one after the other, and which of them are best.

Every point is an ordinary evaluation through the same files: an interrupted sweep goes on, and
shares its samples with `mdm eval`.
"""

from __future__ import annotations

import itertools
import json
import math
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from matryoshka_diffusion.cascade import Cascade, Model
from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.eval.result import Result, plain, with_error
from matryoshka_diffusion.files import require, write_atomically
from matryoshka_diffusion.models.save import average_model
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.training.precision import PrecisionSetting

EMA = "ema"  # the axis whose values are other weights, not sampling settings
MAX_PROFILE_ERROR = 0.05  # of an average without a warning, as in `mdm ema`
MAX_VALUES = 1000
RENAMED = {"guidance": "cfg", "guidance_interval": "interval"}
"""Sampling settings whose options of `mdm sample` have other names."""


@dataclass(frozen=True)
class Point:
    """One combination."""

    values: Mapping[str, Any]  # on each axis of the sweep
    cost: int  # evaluations of the network a sample
    results: tuple[Result, ...]  # in the order of the metrics

    @property
    def settings(self) -> dict[str, Any]:
        """The values that are sampling settings."""
        return {name: value for name, value in self.values.items() if name != EMA}

    @property
    def quality(self) -> Result:
        """The number that decides: the first one."""
        return self.results[0]


def sweep(
    open_model: Callable[[float | None], Model],
    axes: Mapping[str, Sequence[Any]],
    measure: Callable[[Model, dict[str, Any]], Sequence[Result]],
    *,
    fixed: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Point]:
    """Measure every combination of the axes' values, by names of `SamplingConfig` fields or `EMA`.

    `open_model` opens the model with the average of a length as its weights, or its usual ones.
    Settings that all combinations share (`fixed`) are not among a point's values. `progress` is
    called with (points done, points in all).
    """
    lengths, all_settings = axes.get(EMA, [None]), combinations(axes)
    points = []
    for length in lengths:
        model = open_model(length)
        for settings in all_settings:
            values = settings if length is None else {EMA: length, **settings}
            everything = {**(fixed or {}), **settings}
            cost = model.evaluations(everything)
            points.append(Point(values, cost, tuple(measure(model, everything))))
            if progress is not None:
                progress(len(points), len(lengths) * len(all_settings))
    return points


def combinations(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the sampling settings on the axes."""
    rest = {name: values for name, values in axes.items() if name != EMA}
    return [dict(zip(rest, one, strict=True)) for one in itertools.product(*rest.values())]


def averaged(
    run: Path,
    length: float,
    usual: Model,
    *,
    device: torch.device | str = "cpu",
    precision: PrecisionSetting = "auto",
) -> Model:
    """Open the model that `mdm ema` writes: a run with the average of this length as its weights.

    If the run is an upsampler, the base of its `usual` model draws with it. Raises
    `FileNotFoundError` or `ValueError` as `average_model` does.
    """
    with TemporaryDirectory() as folder:
        error = average_model(run, length, Path(folder) / "model")
        model = Matryoshka.load(Path(folder) / "model", device=device, precision=precision)
        _ = model.codec  # read before the folder is removed
    if error > MAX_PROFILE_ERROR:
        warnings.warn(
            f"{run} at length {length:g}: its profile is off by {error:.0%}", stacklevel=2
        )
    return Cascade(usual.base, model) if isinstance(usual, Cascade) else model


def parse_numbers(text: str) -> tuple[float, ...]:
    """Numbers of a list such as `10,25,50` or `1:3:0.25`, a range with both ends, or both mixed.

    Computed in decimals, so that 0.1:0.3:0.1 ends at 0.3. Raises `UsageError` for anything else,
    or for more than 1,000 numbers.

    Examples:
        >>> parse_numbers("1:2:0.25,5")
        (1.0, 1.25, 1.5, 1.75, 2.0, 5.0)
    """
    numbers: list[Decimal] = []
    for part in text.split(","):
        try:
            ends = [Decimal(end.strip()) for end in part.split(":")]
            first, last, step = ends if len(ends) > 1 else (*ends, *ends, Decimal(1))
            # A division may have too many digits, and a float ends at 1e308.
            valid = all(map(math.isfinite, (first, last, step))) and step > 0
            valid = valid and 0 <= last - first < MAX_VALUES * step
        except (InvalidOperation, ValueError):
            first, last, step, valid = Decimal(0), Decimal(0), Decimal(1), False
        if not valid:
            raise UsageError(
                f"{text!r}: {part!r} is no number, nor a range FIRST:LAST:STEP of at most "
                f"{MAX_VALUES:,} numbers; give a list such as 1,2,5 or 1:3:0.25"
            )
        numbers += [first + place * step for place in range(int((last - first) // step) + 1)]
    return tuple(dict.fromkeys(map(float, numbers)))


def badness(result: Result) -> float:
    """The number, with its sign turned if higher is better."""
    return -result.value if result.higher_is_better else result.value


def best(points: Sequence[Point]) -> Point:
    """The best quality; among equal ones the cheapest, then the first."""
    return min(points, key=lambda point: (badness(point.quality), point.cost))


def pareto(pairs: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the pairs that no other pair beats; smaller is better in both.

    Examples:
        >>> pareto([(1.0, 3.0), (2.0, 2.0), (2.0, 3.0), (3.0, 1.0)])
        [0, 1, 3]
    """

    def beaten(pair: tuple[float, float]) -> bool:
        return any(o != pair and o[0] <= pair[0] and o[1] <= pair[1] for o in pairs)

    return [place for place, pair in enumerate(pairs) if not beaten(pair)]


def front(points: Sequence[Point]) -> list[int]:
    """Indices of the points for which less cost means less quality."""
    return pareto([(float(point.cost), badness(point.quality)) for point in points])


def table(points: Sequence[Point]) -> str:
    """A line for each point, the best and the front marked; notes on the columns below."""
    chosen, ahead, names = best(points), front(points), list(points[0].values)
    heads = [result.metric.split(" [")[0] for result in points[0].results]
    rows = [[*names, "evaluations", *heads, ""]]
    for place, point in enumerate(points):
        values = [plain(point.values[name]) for name in names]
        numbers = [with_error(r.value, r.error, ".4g") for r in point.results]
        mark = "best" if point is chosen else "front" if place in ahead else ""
        rows.append([*values, str(point.cost), *numbers, mark])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.rjust, row, widths)).rstrip() for row in rows]
    for result in points[0].results:
        way = "higher" if result.higher_is_better else "lower"
        lines.append(f"{result.sentence().rsplit(':', 1)[0]}; {way} is better")
    return "\n".join(lines)


def write(points: Sequence[Point], path: Path) -> None:
    """Write all points with all their results, as JSON."""
    chosen, ahead = best(points), front(points)
    listed = [
        {
            "values": dict(point.values),
            "evaluations": point.cost,
            "best": point is chosen,
            "front": place in ahead,
            "results": [result.record() for result in point.results],
        }
        for place, point in enumerate(points)
    ]
    text = json.dumps(listed, indent=1).encode()
    write_atomically(path, lambda file: file.write(text))


def command(run: str, point: Point, settings: Mapping[str, Any]) -> str:
    """The command lines that draw samples with the weights of a point and with `settings`."""
    lines, model = [], run
    if EMA in point.values:
        length = f"{point.values[EMA]:g}"
        model = f"{run}-ema{length}"
        lines.append(shlex.join(["mdm", "ema", run, "--length", length, "-o", model]))
    words = ["mdm", "sample", model]
    for name, value in settings.items():
        values = [*map(plain, value if isinstance(value, list | tuple) else [value])]
        values = [",".join(values)] if name == "guidance" else values
        option = f"--{RENAMED.get(name, name).replace('_', '-')}"
        words += [option, *values]
    return "\n".join([*lines, shlex.join(words)])


def draw(points: Sequence[Point], path: Path) -> None:
    """Write a PNG: quality along an axis, against cost, and distance against alignment.

    The axis is guidance if numbers of it were swept, else the first of numbers; other settings
    have a line each. The last panel is there if both a distance and an alignment were measured.
    """
    require("matplotlib", "plots", "the picture of mdm sweep")
    from matplotlib.figure import Figure

    axes = {name: {point.values[name] for point in points} for name in points[0].values}
    numbers = [
        name
        for name, values in axes.items()
        if len(values) > 1 and all(isinstance(value, int | float) for value in values)
    ]
    axis = "guidance" if "guidance" in numbers else next(iter(numbers), None)
    keys = [result.key for result in points[0].results]
    kinds = (("fd", "fid", "fvd"), ("clip", "retrieval"))
    pair = [next((at for at, key in enumerate(keys) if key in kind), -1) for kind in kinds]
    count = 1 + bool(axis) + (min(pair) >= 0)
    figure = Figure(figsize=(4.2 * count, 4.2), layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    titles = [one.metric.replace(" [", "\n[") for one in points[0].results]

    def with_front(panel: Any, pairs: Any, ahead: Sequence[int], x: str, y: str) -> None:
        """Draw all pairs grey and those `ahead` as a line."""
        panel.plot(*zip(*pairs, strict=True), "o", color="0.6")
        panel.plot(*zip(*sorted(pairs[place] for place in ahead), strict=True), "o-", label="front")
        panel.set(xlabel=x, ylabel=y)

    if axis:
        lines: dict[str, list[tuple[Any, float]]] = {}
        for point in sorted(points, key=lambda point: point.values[axis]):
            rest = [f"{name} {plain(v)}" for name, v in point.values.items() if name != axis]
            place = (point.values[axis], point.quality.value)
            lines.setdefault(", ".join(rest) or titles[0], []).append(place)
        for name, places in lines.items():
            panels[0].plot(*zip(*places, strict=True), "o-", label=name)
        panels[0].set(xlabel=axis, ylabel=titles[0])
    panel, chosen = panels[bool(axis)], best(points)
    costs = [(float(point.cost), point.quality.value) for point in points]
    panel.plot([chosen.cost], [chosen.quality.value], "*", markersize=14, label="best", zorder=3)
    with_front(panel, costs, front(points), "evaluations of the network", titles[0])
    if min(pair) >= 0:
        y, x = ([point.results[at] for point in points] for at in pair)
        ahead = pareto([(badness(a), badness(b)) for a, b in zip(x, y, strict=True)])
        both = [(a.value, b.value) for a, b in zip(x, y, strict=True)]
        with_front(panels[-1], both, ahead, titles[pair[1]], titles[pair[0]])
    for panel in panels:
        panel.legend(fontsize="small")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
