"""A sweep as a picture: quality along its first axis, against cost, and against alignment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matryoshka_diffusion.eval.results import Result
from matryoshka_diffusion.eval.sweep import Point, badness, best, front, lines_of, pareto
from matryoshka_diffusion.files import require, write_atomically

DISTANCES = ("fd", "fid", "fvd")
ALIGNMENTS = ("clip", "retrieval")
_SIDE = 4.2  # inches of a panel


def draw(points: Sequence[Point], path: Path) -> None:
    """Write a PNG with a panel for each question that the points answer.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    require("matplotlib", "plots", "the picture of mdm sweep")
    from matplotlib.figure import Figure

    panels: list[Any] = [_cost]
    if axis := numeric_axis(points):
        panels.insert(0, lambda drawing, points: _along(drawing, points, axis))
    if trade_off(points):
        panels.append(_trade_off)
    figure = Figure(figsize=(_SIDE * len(panels), _SIDE), layout="constrained")
    for panel, drawing in zip(
        panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True
    ):
        panel(drawing, points)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def numeric_axis(points: Sequence[Point]) -> str | None:
    """What quality is drawn along: guidance if it was swept, else the first axis of numbers."""
    values = {
        name: {point.values[name] for point in points}
        for name in points[0].values
        if not isinstance(points[0].values[name], str)
    }
    swept = [name for name, found in values.items() if len(found) > 1]
    return "guidance" if "guidance" in swept else next(iter(swept), None)


def trade_off(points: Sequence[Point]) -> list[tuple[Result, Result]]:
    """The distance and the alignment of each point; empty unless both were measured."""
    kinds = [[r for r in points[0].results if r.key in keys] for keys in (DISTANCES, ALIGNMENTS)]
    if not all(kinds):
        return []
    places = [points[0].results.index(kind[0]) for kind in kinds]
    return [(point.results[places[0]], point.results[places[1]]) for point in points]


def _along(drawing: Any, points: Sequence[Point], axis: str) -> None:
    for name, group in lines_of(points, axis).items():
        places = [point.values[axis] for point in group]
        drawing.plot(places, [point.quality.value for point in group], "o-", label=name or None)
    drawing.set_xlabel(axis)
    drawing.set_ylabel(_title(points[0].quality))
    if len(points[0].values) > 1:
        drawing.legend(fontsize="small")


def _cost(drawing: Any, points: Sequence[Point]) -> None:
    drawing.plot([p.cost for p in points], [p.quality.value for p in points], "o", color="0.6")
    ahead = sorted((points[place] for place in front(points)), key=lambda point: point.cost)
    drawing.plot([p.cost for p in ahead], [p.quality.value for p in ahead], "o-", label="front")
    chosen = best(points)
    drawing.plot([chosen.cost], [chosen.quality.value], "*", markersize=14, label="best")
    drawing.set_xlabel("evaluations of the network")
    drawing.set_ylabel(_title(points[0].quality))
    drawing.legend(fontsize="small")


def _trade_off(drawing: Any, points: Sequence[Point]) -> None:
    pairs = trade_off(points)
    drawing.plot([y.value for _, y in pairs], [x.value for x, _ in pairs], "o", color="0.6")
    ahead = sorted(
        (pairs[place] for place in pareto([(badness(x), badness(y)) for x, y in pairs])),
        key=lambda pair: pair[1].value,
    )
    drawing.plot([y.value for _, y in ahead], [x.value for x, _ in ahead], "o-", label="front")
    drawing.set_xlabel(_title(pairs[0][1]))
    drawing.set_ylabel(_title(pairs[0][0]))
    drawing.legend(fontsize="small")


def _title(result: Result) -> str:
    """The metric's name, its flags in a line of their own."""
    return result.metric.replace(" [", "\n[")
