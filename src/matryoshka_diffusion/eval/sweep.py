"""Sampling settings tried one after the other, and which of them are best.

Every point is an evaluation like any other, through the same files: a sweep that is interrupted
goes on, and shares its samples with `mdm eval`.
"""

from __future__ import annotations

import itertools
import json
import shlex
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from matryoshka_diffusion.cascade import Cascade, Model
from matryoshka_diffusion.codec.autoencoder import with_own_codec
from matryoshka_diffusion.configfile import load_config
from matryoshka_diffusion.eval.results import Result
from matryoshka_diffusion.files import write_atomically
from matryoshka_diffusion.models.find import count_levels, merged
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.train import checkpoint
from matryoshka_diffusion.train.averages import average_of, synthesise
from matryoshka_diffusion.train.precision import Precision

EMA = "ema"
"""The axis whose values are other weights, and not settings of a sampler."""

MATCHED = 0.05
"""How far an average's profile may be off without a warning, as in `mdm ema`."""

OPTIONS = {
    "guidance": "--cfg",
    "guidance_interval": "--interval",
    "rescale": "--rescale",
    "steps": "--steps",
    "sampler": "--sampler",
    "grid": "--grid",
    "threshold": "--threshold",
    "eta": "--eta",
    "coarse_noise": "--coarse-noise",
    "precision": "--precision",
    "base": "--base",
}
"""How `mdm sample` is told of a setting."""


@dataclass(frozen=True)
class Point:
    """One combination.

    Attributes:
        values: the value on each axis of the sweep.
        cost: evaluations of the network for a sample.
        results: what was measured, the metrics in the order in which they were asked for.
    """

    values: Mapping[str, Any]
    cost: int
    results: tuple[Result, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the values that are settings of a sampler."""
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
    """Every combination of the axes' values, measured.

    Args:
        open_model: the model whose weights are the average of this length, or its usual ones.
        axes: values by the names of `SamplingConfig`, or of `EMA`.
        measure: the numbers of a model with these settings.
        fixed: settings that all combinations share, of which a point says nothing.
        progress: called with (points done, points in all).
    """
    lengths, all_settings = axes.get(EMA, [None]), combinations(axes)
    points = []
    for length in lengths:
        model = open_model(length)
        for settings in all_settings:
            values = settings if length is None else {EMA: length, **settings}
            given = {**(fixed or {}), **settings}
            cost = model.evaluations(given)
            points.append(Point(values, cost, tuple(measure(model, given))))
            if progress is not None:
                progress(len(points), len(lengths) * len(all_settings))
    return points


def combinations(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values of the axes that are settings of a sampler."""
    rest = {name: values for name, values in axes.items() if name != EMA}
    return [dict(zip(rest, one, strict=True)) for one in itertools.product(*rest.values())]


def averaged(
    run: Path,
    length: float,
    usual: Model,
    *,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
) -> Model:
    """A run's model with the average of this length for its weights, as `mdm ema` writes it.

    Where the run is an upsampler, the base of its `usual` model draws with it.

    Raises:
        FileNotFoundError, ValueError: the run has no snapshots, or there is no such average.
    """
    where = f"{run / 'ema'} at length {length:g}"
    average = synthesise(run / "ema", length)
    if average.error > MATCHED:
        warnings.warn(f"{where}: its profile is off by {average.error:.0%}", stacklevel=2)
    config = average_of(with_own_codec(load_config(run / "config.yaml"), run), length)
    weights, config = merged(average.weights, config, where=where)
    model = config.model.first(count_levels(weights))
    net = checkpoint.load_network(model, weights, where=where)
    model = Matryoshka(net, config, device=device, precision=precision)
    return Cascade(usual.base, model) if isinstance(usual, Cascade) else model


# --- which are best ----------------------------------------------------------------------------


def badness(result: Result) -> float:
    """The number with its sign turned where higher is better."""
    return -result.value if result.higher_is_better else result.value


def best(points: Sequence[Point]) -> Point:
    """The best quality; of several equal ones the cheapest, then the first."""
    return min(points, key=lambda point: (badness(point.quality), point.cost))


def pareto(pairs: Sequence[tuple[float, float]]) -> list[int]:
    """The places of the pairs that no other pair beats, smaller being better in both.

    A pair beats another if it is as small in both and smaller in one.

    Example:
        >>> pareto([(1.0, 3.0), (2.0, 2.0), (2.0, 3.0), (3.0, 1.0)])
        [0, 1, 3]
    """

    def beaten(pair: tuple[float, float]) -> bool:
        return any(o != pair and o[0] <= pair[0] and o[1] <= pair[1] for o in pairs)

    return [place for place, pair in enumerate(pairs) if not beaten(pair)]


def front(points: Sequence[Point]) -> list[int]:
    """The places of the points for which less cost means less quality."""
    return pareto([(float(point.cost), badness(point.quality)) for point in points])


def command(run: str, point: Point, fixed: Mapping[str, Any]) -> str:
    """The lines that draw samples with these settings.

    `fixed` are those that all points of the sweep share, by the names of `OPTIONS`.
    """
    lines, model = [], run
    if EMA in point.values:
        model = f"{run}-ema{point.values[EMA]:g}"
        length = f"{point.values[EMA]:g}"
        lines.append(shlex.join(["mdm", "ema", run, "--length", length, "-o", model]))
    options = [
        word
        for name, value in {**point.values, **fixed}.items()
        if name != EMA
        for word in (OPTIONS[name], *_words(value))
    ]
    lines.append(shlex.join(["mdm", "sample", model, *options]))
    return "\n".join(lines)


# --- on the screen and in a file ---------------------------------------------------------------


def table(points: Sequence[Point]) -> str:
    """A line for each point, the best and the front marked, and below what the columns are."""
    chosen, on_front = best(points), front(points)
    names = list(points[0].values)
    heads = [result.metric.split(" [")[0] for result in points[0].results]
    rows = [[*names, "evaluations", *heads, ""]]
    for place, point in enumerate(points):
        mark = "best" if point is chosen else "front" if place in on_front else ""
        values = [_plain(point.values[name]) for name in names]
        measured = [f"{result.value:.4g}" for result in point.results]
        rows.append([*values, str(point.cost), *measured, mark])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(map(str.rjust, row, widths)).rstrip() for row in rows]
    notes = [_note(result) for result in points[0].results]
    return "\n".join([*lines, *notes])


def _note(result: Result) -> str:
    way = "higher" if result.higher_is_better else "lower"
    counts = result.sentence().rsplit(":", 1)[0]
    return f"{counts}; {way} is better"


def _words(value: Any) -> list[str]:
    """A value on a command line; an interval is two words."""
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else [_plain(value)]


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def write(points: Sequence[Point], path: Path) -> None:
    """All points with all their results, as JSON."""
    chosen, on_front = best(points), front(points)
    listed = [
        {
            "values": dict(point.values),
            "evaluations": point.cost,
            "best": point is chosen,
            "front": place in on_front,
            "results": [result.record() for result in point.results],
        }
        for place, point in enumerate(points)
    ]
    text = json.dumps(listed, indent=1).encode()
    write_atomically(path, lambda file: file.write(text))


def lines_of(points: Iterable[Point], axis: str) -> dict[str, list[Point]]:
    """The points by all their values but that on `axis`, each group in the order of that."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        rest = [f"{name} {_plain(value)}" for name, value in point.values.items() if name != axis]
        groups.setdefault(", ".join(rest), []).append(point)
    return {
        name: sorted(group, key=lambda point: point.values[axis]) for name, group in groups.items()
    }
