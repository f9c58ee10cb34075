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
    """Every result by the name of its task."""
    found = (json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*/*.json")))
    return {result["task"]: result for result in found}


def seeds_of(results: Mapping[str, Result], pictures: str, variant: str) -> list[Result]:
    """The results of a variant, `mdm` or `mdm/ddim-10`, over its seeds."""
    name, *setting = variant.split("/")
    return [
        result
        for task, result in results.items()
        if task.split("/")[:2] == [pictures, name] and task.split("/")[3:] == setting
    ]


def distance(results: Sequence[Result]) -> Spread | None:
    """The final distance over seeds."""
    values = [
        result["points"][-1][NAME] if "points" in result else result[NAME] for result in results
    ]
    return Spread.of(values) if values else None


def found_first(results: Sequence[Result]) -> Spread | None:
    """The share of prompts whose picture is the nearest, over seeds."""
    values = [result["retrieval"]["first"] for result in results if result.get("retrieval")]
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


def summary(results: Mapping[str, Result], pictures: str) -> str:
    """A table of all trials of a set, for docs/results.md."""
    variants = dict.fromkeys(task.split("/")[1] for task in results if task.startswith(pictures))
    rows = []
    for variant in variants:
        found = seeds_of(results, pictures, variant)
        if found:
            held_out = [x["held_out_loss_per_level"] for x in found if x["held_out_loss_per_level"]]
            losses = [fmean(level) for level in zip(*held_out, strict=True)]
            rows.append(
                (
                    variant,
                    distance(found),
                    found_first(found) or "",
                    " ".join(f"{loss:.3g}" for loss in losses),
                    f"{fmean(sum(x['parameters']) for x in found) / 1e6:.2g} M",
                    f"{fmean(x['seconds'] for x in found):.0f}",
                )
            )
    rows.sort(key=lambda row: row[1].mean if row[1] else 0.0)
    header = ("variant", NAME, "prompts found", "held-out losses", "parameters", "seconds")
    return _markdown(header, rows)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
