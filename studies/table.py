"""The results that are there, as numbers over seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from matryoshka_diffusion.eval.features import NAME

Result = dict[str, Any]


class Spread(NamedTuple):
    """A number over seeds: the mean, and the lowest and highest that it is of."""

    mean: float
    low: float
    high: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return Spread(fmean(values), min(values), max(values), len(values))

    def __str__(self) -> str:
        if self.count == 1:
            return f"{self.mean:.3g}"
        return f"{self.mean:.3g} ({self.low:.3g} to {self.high:.3g}, {self.count} seeds)"


def read_results(folder: Path) -> dict[str, Result]:
    """Every result by the name of its task; of those that failed, only that they did."""
    found = (json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*/*.json")))
    return {result["task"]: result for result in found}


def seeds_of(results: Mapping[str, Result], pictures: str, variant: str) -> list[Result]:
    """The results of a variant, `mdm` or `mdm/ddim-10`, over its seeds that did not fail."""
    name, *setting = variant.split("/")
    return [
        result
        for task, result in results.items()
        if task.split("/")[:2] == [pictures, name]
        and task.split("/")[3:] == setting
        and "failed" not in result
    ]


def distance(results: Sequence[Result]) -> Spread | None:
    """The final distance over seeds."""
    values = [
        result["points"][-1][NAME] if "points" in result else result[NAME] for result in results
    ]
    return Spread.of(values) if values else None


def found_first(results: Sequence[Result]) -> Spread | None:
    """The share of prompts whose picture is the nearest, over seeds."""
    values = [x["prompts_found"] for x in results if x["prompts_found"] is not None]
    return Spread.of(values) if values else None


def curve(results: Sequence[Result], of: str) -> list[tuple[float, Spread]]:
    """The distance along the training, against `of` a point: `share`, `images` or `seconds`."""
    shares = sorted({point["share"] for result in results for point in result["points"]})
    line = []
    for share in shares:
        points = [p for result in results for p in result["points"] if p["share"] == share]
        where = fmean(point[of] for point in points)
        line.append((where, Spread.of([point[NAME] for point in points])))
    return line


OTHER_LOSSES = ("levels-", "shift-power-", "finest")
"""Variants whose losses are not those of the others: another number of levels, of other noise, or
of predictions that nobody trained."""


def summary(results: Mapping[str, Result], pictures: str) -> str:
    """A table of all trials of a set, for docs/results.md."""
    variants = dict.fromkeys(task.split("/")[1] for task in results if task.startswith(pictures))
    rows = []
    for variant in variants:
        found = seeds_of(results, pictures, variant)
        if (spread := distance(found)) is not None:
            row = (
                variant,
                spread,
                found_first(found) or "",
                "" if variant.startswith(OTHER_LOSSES) else _losses(found),
                f"{sum(found[0]['parameters']) / 1e6:.2g} M",
                f"{fmean(x['seconds'] for x in found):.0f}",
            )
            rows.append(row)
    rows.sort(key=lambda row: row[1].mean)
    header = ("variant", NAME, "prompts found", "held-out losses", "parameters", "seconds")
    return _markdown(header, rows)


def _losses(results: Sequence[Result]) -> str:
    """The held-out loss at each side, the mean over seeds."""
    told = [result["held_out_loss"] for result in results if result["held_out_loss"]]
    sides = told[0] if told else ()
    return ", ".join(f"{side}: {fmean(loss[side] for loss in told):.3g}" for side in sides)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
