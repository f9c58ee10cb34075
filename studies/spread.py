"""The results that are there, as numbers over seeds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from matryoshka_diffusion.metrics.networks import NAME

Result = dict[str, Any]
Results = Mapping[str, Result]

BASE = "mdm"
"""The variant that every other is compared with."""


class Spread(NamedTuple):
    """A number over seeds: the mean, and the lowest and highest that it is of."""

    mean: float
    low: float
    high: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread | None:
        """The spread of the values; None of no value."""
        if not values:
            return None
        return Spread(fmean(values), min(values), max(values), len(values))


def read_results(folder: Path) -> dict[str, Result]:
    """Every result by the name of its task; of those that failed, only that they did."""
    found = (json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*/*.json")))
    return {result["task"]: result for result in found}


def by_seed(results: Results, pictures: str, variant: str) -> dict[str, Result]:
    """The results of a variant, `mdm` or `mdm/ddim-10`, for each of its seeds, failed or not."""
    name, *setting = variant.split("/")
    return {
        task.split("/")[2]: result
        for task, result in results.items()
        if task.split("/")[:2] == [pictures, name] and task.split("/")[3:] == setting
    }


def seeds_of(results: Results, pictures: str, variant: str) -> list[Result]:
    """The results of a variant over its seeds that did not fail."""
    return [x for x in by_seed(results, pictures, variant).values() if "failed" not in x]


def distance(results: Sequence[Result]) -> Spread | None:
    """The final distance over seeds."""
    return Spread.of([_final(result) for result in results])


def found_first(results: Sequence[Result]) -> Spread | None:
    """The share of prompts whose picture is the nearest, over seeds."""
    return Spread.of([x["prompts_found"] for x in results if x["prompts_found"] is not None])


def shared(results: Results, pictures: str, variants: Iterable[str]) -> dict[str, Result]:
    """The results of the seeds that all of these variants have, those without any left aside.

    What is drawn side by side is then of the same seeds.
    """
    there = [set(found) for each in variants if (found := by_seed(results, pictures, each))]
    seeds = set[str]().union(*there).intersection(*there)
    return {task: result for task, result in results.items() if task.split("/")[2] in seeds}


def against(results: Results, pictures: str, variant: str, base: str) -> Spread | None:
    """How much larger the final distance is than that of `base` and the same seed, as a share."""
    first, other = (
        {seed: x for seed, x in by_seed(results, pictures, name).items() if "failed" not in x}
        for name in (base, variant)
    )
    return Spread.of(
        [_final(other[seed]) / _final(first[seed]) - 1.0 for seed in other if seed in first]
    )


def curve(results: Sequence[Result]) -> list[tuple[float, Spread]]:
    """The distance along the training, against the FLOPs that were spent until then.

    Those of a codec come before.
    """
    shares = sorted({point["share"] for result in results for point in result["points"]})
    line = []
    for share in shares:
        there = [(x, p) for x in results for p in x["points"] if p["share"] == share]
        spread = Spread.of([point[NAME] for _, point in there])
        assert spread is not None, "a share comes from a point"
        line.append((fmean(x["codec_flops"] + share * x["flops"] for x, _ in there), spread))
    return line


def _final(result: Result) -> float:
    """A trial's distance at its end, or a drawing's."""
    return result["points"][-1][NAME] if "points" in result else result[NAME]
