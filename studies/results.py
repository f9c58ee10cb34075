"""The results as numbers over seeds, in groups that belong together, and as Markdown tables."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from matryoshka_diffusion.metrics.networks import NAME
from studies.queue import Task
from studies.trials import CHOICES, COARSE_NOISES, GUIDANCE, SETS, SOLVERS, PictureSet, agrees

Result = dict[str, Any]
Results = Mapping[str, Result]

BASE = "mdm"
"""The variant that every other is compared with."""


# --- numbers over seeds --------------------------------------------------------------------------


class Spread(NamedTuple):
    """A number over seeds: the mean, and the lowest and highest of them."""

    mean: float
    low: float
    high: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread | None:
        """The spread of the values; None of no value."""
        return Spread(fmean(values), min(values), max(values), len(values)) if values else None

    def __str__(self) -> str:
        """The mean, and the range where there are several seeds.

        >>> str(Spread(2.0, 1.0, 3.5, 2)), str(Spread(1234.5, 1234.5, 1234.5, 1))
        ('2 (1 to 3.5)', '1,234')
        """
        mean, low, high = (f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}" for x in self[:3])
        return mean if self.count == 1 else f"{mean} ({low} to {high})"

    def as_change(self) -> str:
        """A change in per cent, with the range where there are several seeds.

        >>> Spread(0.05, -0.011, 0.1, 2).as_change(), Spread(-0.2, -0.2, -0.2, 1).as_change()
        ('+5.0% (-1.1 to +10.0)', '-20.0%')
        """
        mean, low, high = (f"{100 * x:+.1f}" for x in self[:3])
        return f"{mean}%" if self.count == 1 else f"{mean}% ({low} to {high})"


def read_results(folder: Path) -> dict[str, Result]:
    """Every result by the name of its task; of those that failed, only that they did."""
    found = (json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*/*.json")))
    return {result["task"]: result for result in found}


def of_today(results: Results, tasks: Sequence[Task]) -> dict[str, Result]:
    """The results that answer what the tasks ask today."""
    asked = {task.name: task.asked for task in tasks}
    return {
        name: result
        for name, result in results.items()
        if name in asked and agrees(result.get("asked"), asked[name])
    }


def by_seed(results: Results, pictures: str, variant: str) -> dict[str, Result]:
    """The results of a variant, `mdm` or `mdm/ddim-10`, for each of its seeds, failed or not."""
    name, *setting = variant.split("/")
    split = {task: task.split("/") for task in results}
    return {
        parts[2]: results[task]
        for task, parts in split.items()
        if parts[:2] == [pictures, name] and parts[3:] == setting
    }


def seeds_of(results: Results, pictures: str, variant: str) -> list[Result]:
    """The results of a variant over its seeds that did not fail."""
    return [x for x in by_seed(results, pictures, variant).values() if "failed" not in x]


def distance(results: Sequence[Result]) -> Spread | None:
    """The final distance over seeds."""
    return Spread.of([_final(result) for result in results])


def found_first(results: Sequence[Result]) -> Spread | None:
    """The share of prompts whose image is the nearest, over seeds."""
    return Spread.of([x["prompts_found"] for x in results if x["prompts_found"] is not None])


def shared(results: Results, pictures: str, variants: Iterable[str]) -> dict[str, Result]:
    """The results of the seeds that all of these variants have, apart from those without any.

    A panel then compares results of the same seeds.
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
    both = [seed for seed in other if seed in first]
    return Spread.of([_final(other[seed]) / _final(first[seed]) - 1.0 for seed in both])


def curve(results: Sequence[Result]) -> list[tuple[float, Spread]]:
    """The distance along the training, against the FLOPs until then, with a codec's before."""
    line = []
    for share in sorted({point["share"] for result in results for point in result["points"]}):
        there = [(x, p) for x in results for p in x["points"] if p["share"] == share]
        spread = Spread.of([point[NAME] for _, point in there])
        assert spread is not None, "a share comes from a point"
        line.append((fmean(x["codec_flops"] + share * x["flops"] for x, _ in there), spread))
    return line


def _final(result: Result) -> float:
    """The distance of a trial at its end, or of a drawing."""
    return result["points"][-1][NAME] if "points" in result else result[NAME]


# --- groups: one for each figure, and for each table ---------------------------------------------

FAMILIES = {
    "MDM": BASE,
    "MDM, no progressive training": "joint",
    "simple DM": "levels-1",
    "nested, finest loss only": "finest",
    "cascaded DM": "cascade",
    "latent DM, after its codec": "latent",
    "MDM on codes, likewise": "codes",
}
NOISED = {f"{noise:g}": f"cascade/noise-{noise:g}" for noise in COARSE_NOISES}
TITLES = {"fashion": "Fashion-MNIST 32", "emoji": "OpenMoji 64"}


class Group(NamedTuple):
    """Results that differ in one thing: what `varied` names, on an axis or in a column.

    `variants` gives the variant (`mdm`, `mdm/ddim-10`) for each value of it, on a data set. The
    others are compared with `base`.
    """

    title: str
    varied: str
    variants: Callable[[PictureSet], dict[str, str]]
    base: str = BASE


def _levels(pictures: PictureSet) -> dict[str, str]:
    own = {"fashion": 2, "emoji": 3}[pictures.name]
    return {str(n): "joint" if n == own else f"levels-{n}" for n in range(1, own + 2)}


def _same(variants: dict[str, str]) -> Callable[[PictureSet], dict[str, str]]:
    return lambda _: variants


SHARES = {"0": "joint", "0.25": "coarse-0.25", "0.5": BASE, "0.75": "coarse-0.75"}
GUIDED = {f"{weight:g}": f"mdm/guidance-{weight:g}" for weight in GUIDANCE}
SOLVED = {name: f"mdm/{name}" for name in SOLVERS}
CHOSEN = {"x0-v_clipped": BASE, **{name: name for name in (*CHOICES, "mixed")}}
GROUPS = {
    "a-families": Group(
        "(a) Families of models at equal compute (Fig. 4)", "family", _same(FAMILIES)
    ),
    "a-cascade-noise": Group(
        "(a) Noise between a cascade's networks (Appendix D.1)",
        "time of the noise on the coarse picture",
        _same(NOISED),
    ),
    "b-coarse-training": Group(
        "(b) Length of the coarse training (Fig. 8a)",
        "share of compute on the coarsest level alone",
        _same(SHARES),
    ),
    "c-levels": Group(
        "(c) Number of nested levels, trained jointly (Fig. 8b)", "levels", _levels, base="joint"
    ),
    "d-guidance": Group("(d) Guidance (Fig. 8c)", "guidance weight", _same(GUIDED)),
    "e-solvers": Group("(e) Solver and steps", "solver and steps", _same(SOLVED)),
    "f-choices": Group("(f) What the paper leaves open", "choice", _same(CHOSEN)),
}


# --- tables, for docs/results.md -----------------------------------------------------------------

FAILED = "failed: not finite"
OTHER_LOSSES = ("levels-", "shift-power-", "finest", "eps-")
"""Variants whose losses are not comparable: another number of levels, other noise, untrained
predictions, or an x that is the prediction divided by a signal near 0."""
PLACE = re.compile(r"(?s)(<!-- table (\S+) (\S+) -->\n).*?(<!-- /table -->)")
"""The place of a table on a page, by the names of its group and of its data set."""


def filled(page: str, results: Results) -> str:
    """The page with each of its tables replaced by that of the results.

    Raises:
        KeyError: the page names a group or a data set that does not exist.
    """
    return PLACE.sub(
        lambda found: f"{found[1]}{table(results, GROUPS[found[2]], SETS[found[3]])}\n{found[4]}",
        page,
    )


def tables(results: Results) -> str:
    """A section for each group, in it a table for each data set that has results of it."""
    sections = []
    for group in GROUPS.values():
        parts = [part for each in SETS.values() if (part := table(results, group, each))]
        if parts:
            sections.append("\n\n".join([f"### {group.title}", *parts]))
    return "\n\n".join(sections)


def table(results: Results, group: Group, pictures: PictureSet) -> str:
    """A row of measurements for each variant that has a result; empty if only the base has.

    Numbers are means over seeds, with the range of the distances. A column that no row fills is
    left out.
    """
    there = {
        value: variant
        for value, variant in group.variants(pictures).items()
        if by_seed(results, pictures.name, variant)
    }
    if not {*there.values()} - {group.base}:
        return ""
    rows = [_row(results, group, pictures, *each) for each in there.items()]
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    lines = [columns, ["---"] * len(columns), *([row[name] for name in columns] for row in rows)]
    done = [x for each in there.values() for x in seeds_of(results, pictures.name, each)]
    head = ": ".join([TITLES[pictures.name], *dict.fromkeys(x["metric"] for x in done)])
    return "\n".join([head, "", *("| " + " | ".join(line) + " |" for line in lines)])


def _row(
    results: Results, group: Group, pictures: PictureSet, value: str, variant: str
) -> dict[str, str]:
    done = seeds_of(results, pictures.name, variant)
    failed = len(by_seed(results, pictures.name, variant)) - len(done)
    ratio = against(results, pictures.name, variant, group.base)
    change = "" if ratio is None else ratio.as_change()
    counts = done[0].get("parameters", ()) if done else ()
    losses = [] if variant.startswith(OTHER_LOSSES) else [x.get("held_out_loss") for x in done]
    losses = [loss for loss in losses if loss]
    means = {side: fmean(x[side] for x in losses) for side in (losses[0] if losses else ())}
    return {
        group.varied: value,
        NAME: str(distance(done) or FAILED),
        "against the base": "the base" if variant == group.base else change,
        "seeds": f"{len(done)}, {failed} {FAILED}" if done and failed else str(len(done) + failed),
        "prompts found": str(found_first(done) or ""),
        "held-out loss": ", ".join(f"{side}: {mean:.3g}" for side, mean in means.items()),
        "parameters": " + ".join(f"{count / 1e6:.2g} M" for count in counts),
        "wall seconds": _mean(done, "seconds"),
        "evaluations a sample": _mean(done, "evaluations"),
    }


def _mean(results: Sequence[Result], key: str) -> str:
    """The mean over seeds of a number that only trainings have, or only drawings."""
    found = [x[key] for x in results if key in x]
    return f"{fmean(found):,.0f}" if found else ""
