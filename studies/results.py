"""The results over seeds, in groups that belong together, and as Markdown tables."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypeAlias

from matryoshka_diffusion.metrics.networks import NAME
from studies.queue import COARSE_NOISES, GUIDANCE, SOLVERS
from studies.trials import CHOICES, Trial, agrees

Result: TypeAlias = dict[str, Any]
Results: TypeAlias = dict[tuple[str, str], dict[str, Result]]
"""Results by seed, for each data set and variant, such as ("emoji", "mdm/ddim-10")."""

TITLES = {
    "fashion": "Fashion-MNIST 32",
    "emoji": "OpenMoji 64",
    "fashion-long": "Fashion-MNIST 32, longer trials",
    "emoji-long": "OpenMoji 64, longer trials",
    "late": "OpenMoji 256",
}
OTHER_LOSSES = ("levels-", "shift-power-", "finest", "eps-")
"""Variants whose losses are not comparable: another number of levels, other noise, untrained
predictions, or an x that is the prediction divided by a signal near 0."""


class Group(NamedTuple):
    """Variants that differ in one thing: a figure and a table for each data set."""

    title: str
    varied: str  # its name, on an axis or above a column
    names: dict[str, str]  # of the variants, by value
    base: str = "mdm"  # the variant that the others are compared with

    def variants(self, pictures: str) -> dict[str, str]:
        """The variants of a data set; the one with the preset's number of levels is `joint`."""
        own = f"levels-{OWN_LEVELS[pictures]}"
        return {value: "joint" if name == own else name for value, name in self.names.items()}


OWN_LEVELS = {"fashion": 2, "emoji": 3, "fashion-long": 2, "emoji-long": 3, "late": 3}
FAMILIES = {
    "MDM": "mdm",
    "MDM, no progressive training": "joint",
    "simple DM": "levels-1",
    "nested, finest loss only": "finest",
    "cascaded DM": "cascade",
    "latent DM, after its codec": "latent",
    "MDM on codes, likewise": "codes",
}
NOISES = {f"{noise:g}": f"cascade/noise-{noise:g}" for noise in COARSE_NOISES}
SHARES = {"0": "joint", "0.25": "coarse-0.25", "0.5": "mdm", "0.75": "coarse-0.75"}
LEVELS = {f"{count}": f"levels-{count}" for count in (1, 2, 3, 4)}
WEIGHTS = {f"{weight:g}": f"mdm/guidance-{weight:g}" for weight in GUIDANCE}
SOLVED = {name: f"mdm/{name}" for name in SOLVERS}
CHOSEN = {"x0-v_clipped": "mdm", **{name: name for name in CHOICES}}
RECIPES = {
    "MDM: the paper's recipe": "paper",
    "the same, 250 steps of DDPM": "paper/ddpm-250",
    "MDM-plus, a third of the compute": "plus",
    "with a perceptual loss": "perceptual",
    "with a semantic coarsest level": "semantic",
}
WOKEN = {
    "awake": "awake",
    "sampled late": "awake/late",
    "mixed, awake": "awake-mixed",
    "mixed, late": "late",
    "late, more of 64": "late-middle",
}
_CASCADE = "(a) Noise between a cascade's networks (Appendix D.1)"
_NOISE = "time of the noise on the coarse picture"
_SHARE = "share of compute on the coarsest level alone"
_LEVELS = "(c) Number of nested levels, trained jointly (Fig. 8b)"
GROUPS = {
    "a-families": Group("(a) Families of models at equal compute (Fig. 4)", "family", FAMILIES),
    "a-cascade-noise": Group(_CASCADE, _NOISE, NOISES),
    "b-coarse-training": Group("(b) Length of the coarse training (Fig. 8a)", _SHARE, SHARES),
    "c-levels": Group(_LEVELS, "levels", LEVELS, base="joint"),
    "d-guidance": Group("(d) Guidance (Fig. 8c)", "guidance weight", WEIGHTS),
    "e-solvers": Group("(e) Solver and steps", "solver and steps", SOLVED),
    "f-choices": Group("(f) What the paper leaves open", "choice", CHOSEN),
    "g-recipes": Group("(g) The paper's recipe and the presets'", "recipe", RECIPES, base="paper"),
    "h-waking": Group("(h) Levels that wake late", "levels", WOKEN, base="awake"),
}


def read_results(folder: Path, trials: Sequence[Trial]) -> tuple[Results, list[str]]:
    """The results that are of today's form, and the names of the others."""
    forms = {trial.name: trial.form for trial in trials}
    results, outdated = defaultdict(dict), []
    for path in sorted(folder.glob("*/*.json")):
        result = json.loads(path.read_text("utf-8"))
        name = result["task"]
        if name in forms and agrees(result.get("asked"), forms[name]):
            pictures, variant, seed, *setting = name.split("/")
            results[pictures, "/".join([variant, *setting])][seed] = result
        else:
            outdated.append(name)
    return dict(results), outdated


def ending(result: Result) -> Result:
    """What was measured on the samples of a trial at its end, or of a drawing."""
    return result["points"][-1] if "points" in result else result


def final(result: Result) -> float:
    """The distance of a trial at its end, or of a drawing."""
    return ending(result)[NAME]


def fine_steps(result: Result) -> float:
    """Steps of a training that have the finest level in some or all rows."""
    config = result["config"]
    stages, levels = config["train"]["stages"], len(config["model"]["levels"])
    return sum(x["images"] / x["batch_size"] for x in stages if x["levels"] == levels)


def prompt_shares(results: Sequence[Result], key: str = "prompts_found") -> list[float]:
    """The shares of prompts whose image is the nearest, without models that have no prompts."""
    return [x[key] for x in results if x.get(key) is not None]


HEAD = """# Tables of the study

Written by `python -m studies page` from `studies/results`. [The claims](results.md) says how the
trials were made and what follows from them. Numbers are means over seeds, with the lowest and the
highest where there are several.

"""


def tables(results: Results) -> str:
    """A section for each group: its figure, and a table for each data set with results of it."""
    sections = []
    for name, group in GROUPS.items():
        parts = [part for pictures in TITLES if (part := table(results, group, pictures))]
        figure = f"![{group.title}](pictures/study/{name}.png)"
        sections += ["\n\n".join([f"## {group.title}", figure, *parts])] if parts else []
    return "\n\n".join(sections)


def table(results: Results, group: Group, pictures: str) -> str:
    """A row of measurements for each variant that has a result; empty if only the base has.

    Numbers are means over seeds, with the range of the distances. A column that no row fills is
    left out.
    """
    there = {
        value: variant
        for value, variant in group.variants(pictures).items()
        if (pictures, variant) in results
    }
    if not {*there.values()} - {group.base}:
        return ""
    rows = [_row(results, group, pictures, *each) for each in there.items()]
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    lines = [columns, ["---"] * len(columns), *([row[name] for name in columns] for row in rows)]
    measured = [x for name in there.values() for x in results[pictures, name].values()]
    head = ": ".join([TITLES[pictures], *dict.fromkeys(x["metric"] for x in measured)])
    return "\n".join([head, "", *("| " + " | ".join(line) + " |" for line in lines)])


def _row(results: Results, group: Group, pictures: str, value: str, variant: str) -> dict[str, str]:
    by_seed, base = results[pictures, variant], results.get((pictures, group.base), {})
    done = list(by_seed.values())
    changes = [final(x) / final(base[seed]) - 1.0 for seed, x in by_seed.items() if seed in base]
    against = spread(changes, lambda change: f"{100 * change:+.1f}", "%")
    comparable = not variant.startswith(OTHER_LOSSES)
    losses = [x["held_out_loss"] for x in done if comparable and x.get("held_out_loss")]
    means = {side: fmean(x[side] for x in losses) for side in (losses[0] if losses else ())}
    return {
        group.varied: value,
        NAME: spread([final(x) for x in done], _number),
        "against the base": "the base" if variant == group.base else against,
        "seeds": str(len(done)),
        "in its class": spread(_values(done, "class_accuracy"), _number),
        "FD-Classifier": spread(_values(done, "fd_classes"), _number),
        "prompts found": spread(prompt_shares(done), _number),
        "in one step": spread(prompt_shares(done, "prompts_found_in_one_step"), _number),
        "held-out loss": ", ".join(f"{side}: {mean:.3g}" for side, mean in means.items()),
        "parameters": " + ".join(f"{x / 1e6:.2g} M" for x in done[0].get("parameters", ())),
        "wall seconds": _mean(done, "seconds"),
        "evaluations a sample": _mean(done, "evaluations"),
    }


def _values(results: Sequence[Result], key: str) -> list[float]:
    """The values of a number that only samples with classes have."""
    return [end[key] for end in map(ending, results) if key in end]


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def spread(values: Sequence[float], show: Callable[[float], str], unit: str = "") -> str:
    """The mean, and the range where there are several values; nothing for none."""
    if not values:
        return ""
    extent = f" ({show(min(values))} to {show(max(values))})" if len(values) > 1 else ""
    return f"{show(fmean(values))}{unit}{extent}"


def _mean(results: Sequence[Result], key: str) -> str:
    """The mean over seeds of a number that only trainings have, or only drawings."""
    numbers = [x[key] for x in results if key in x]
    return f"{fmean(numbers):,.0f}" if numbers else ""
