"""The paper's figures again, drawn from the results that are there.

Lines go through means over the seeds that all results of a panel have. Bars reach from the lowest
to the highest of them. One more figure has every trial by its steps with the finest level.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

import numpy as np

from matryoshka_diffusion.files import write_atomically
from matryoshka_diffusion.metrics.networks import NAME
from studies.results import (
    FAMILIES,
    GROUPS,
    LEVELS,
    SHARES,
    TITLES,
    Group,
    Result,
    Results,
    final,
    fine_steps,
    prompt_shares,
)
from studies.trials import SETS

CHANCE = 0.2
"""The share by which two trials of one seed each may well differ."""
ALIKE = {
    **{name: FAMILIES[name] for name in list(FAMILIES)[:4]},
    **{f"{share} of the compute on the coarsest": SHARES[share] for share in ("0.25", "0.75")},
    **{f"{count} levels, jointly": LEVELS[count] for count in ("2", "3", "4")},
    "half of the rows stay coarse": "mixed",
}
"""Trials of one loss in pixels that differ in how long which levels are trained."""
PANEL = (4.6, 4.1)  # inches
DPI = 150

Measured: TypeAlias = dict[str, list[Result]]
"""The results over seeds by the value of a group."""
Points: TypeAlias = dict[Any, list[float]]
"""The numbers over seeds by their place on the horizontal axis."""


def draw_all(results: Results, folder: Path) -> list[Path]:
    """Draw the figures that there are results for, with a panel for each set that has some."""
    paths = []
    for name, group in GROUPS.items():
        measured = {pictures: _measured(results, group, pictures) for pictures in TITLES}
        if there := {pictures: x for pictures, x in measured.items() if x}:
            figure, path = _figure(group, there), folder / f"{name}.png"
            write_atomically(path, lambda file, figure=figure: figure.savefig(file, dpi=DPI))
            paths.append(path)
    compared = {pictures: _by_steps(results, pictures) for pictures in SETS}
    if there := {name: x for name, x in compared.items() if len({n for n, _ in x.values()}) > 2}:
        figure, path = _steps_figure(there), folder / "fine-steps.png"
        write_atomically(path, lambda file: figure.savefig(file, dpi=DPI))
        paths.append(path)
    return paths


def _by_steps(results: Results, pictures: str) -> dict[tuple[str, str], tuple[float, float]]:
    """Steps with the finest level, and the distance, by variant and seed."""
    return {
        (variant, seed): (fine_steps(x), final(x))
        for (name, variant), by_seed in results.items()
        if name == pictures and variant in ALIKE.values()
        for seed, x in by_seed.items()
    }


def _steps_figure(sets: dict[str, dict[tuple[str, str], tuple[float, float]]]) -> Any:
    """All trials of a set, and the power of the number of steps that fits them best."""
    from matplotlib.figure import Figure

    width, height = PANEL
    figure = Figure(figsize=(width * len(sets), 1.3 * height), layout="constrained")
    figure.suptitle("Equal compute: distance against the finest level's steps", fontsize=11)
    axes = figure.subplots(1, len(sets), squeeze=False)[0]
    for axis, (pictures, points) in zip(axes, sets.items(), strict=True):
        steps, distances = np.log(np.array([*points.values()]).T)
        slope, offset = np.polyfit(steps, distances, 1)
        explained = np.corrcoef(steps, distances)[0, 1] ** 2
        ends = np.array([steps.min(), steps.max()])
        label = f"steps to the power of {slope:.2f}: {100 * explained:.0f} % of the variance"
        axis.plot(np.exp(ends), np.exp(offset + slope * ends), "--", color="0.5", label=label)
        for n, (name, variant) in enumerate(ALIKE.items()):
            if own := [x for (other, _), x in points.items() if other == variant]:
                style = {"color": f"C{n}", "marker": "os^vDPXh<>"[n], "linestyle": "none"}
                axis.plot(*zip(*own, strict=True), label=name, **style)
        axis.set(xscale="log", yscale="log", xlabel="steps with the finest level")
        axis.set_ylabel(f"{NAME} ↓")
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_formatter("{x:g}")
            ticks.set_minor_formatter("{x:g}")
        axis.set_title(TITLES[pictures], fontsize=10)
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.17), frameon=False)
        axis.grid(alpha=0.25, which="both")
    return figure


def _measured(results: Results, group: Group, pictures: str) -> Measured:
    """The results of the seeds that all of a panel have; none if only the base has any."""
    variants = group.variants(pictures)
    there = {x: results[pictures, v] for x, v in variants.items() if (pictures, v) in results}
    seeds = set[str]().union(*there.values()).intersection(*there.values())
    kept = {x: [y[seed] for seed in sorted(seeds)] for x, y in there.items() if seeds}
    return kept if any(variants[x] != group.base for x in kept) else {}


def _figure(group: Group, sets: dict[str, Measured]) -> Any:
    """A panel for each set, under one title and over one legend."""
    from matplotlib.figure import Figure

    width, height = PANEL
    figure = Figure(figsize=(max(width * len(sets), 1.3 * width), height), layout="constrained")
    figure.suptitle(group.title, fontsize=11)
    axes = figure.subplots(1, len(sets), squeeze=False)[0]
    for axis, (pictures, measured) in zip(axes, sets.items(), strict=True):
        axis.set_title(TITLES[pictures], fontsize=10)
        axis.set(xlabel=group.varied, ylabel=f"{NAME} ↓")
        axis.grid(alpha=0.25)
        if group is GROUPS["a-families"]:
            _along_training(axis, measured)
        else:
            bases = [x for x, v in group.variants(pictures).items() if v == group.base]
            _by_value(axis, measured, bases, prompts=group is GROUPS["d-guidance"])
    labelled = [axis.get_legend_handles_labels() for axis in figure.axes]
    entries = {label: handle for pair in labelled for handle, label in zip(*pair, strict=True)}
    if entries:  # below all panels, where it covers nothing
        place = {"loc": "outside lower center", "ncols": 2 if len(sets) == 1 else 3}
        figure.legend(entries.values(), entries, fontsize=9, frameon=False, **place)
    return figure


def _along_training(axis: Any, measured: Measured) -> None:
    """Distances against the TFLOPs until then, with a codec's before."""
    for n, (family, results) in enumerate(measured.items()):
        points = {}
        for index, point in enumerate(results[0]["points"]):
            flops = fmean(x["codec_flops"] + point["share"] * x["flops"] for x in results)
            points[flops / 1e12] = [x["points"][index][NAME] for x in results]
        _line(axis, points, n, family)
    axis.set(xlabel="training compute (TFLOPs)", yscale="log", ylabel=f"{NAME} ↓ (log scale)")


def _by_value(axis: Any, measured: Measured, bases: list[str], *, prompts: bool) -> None:
    """Final distances, joined where the values are numbers; prompts found on a second axis."""
    numeric = all(value.replace(".", "").isdigit() for value in measured)
    points = {x: [*map(final, results)] for x, results in measured.items()}
    _line(axis, points, 0, "distance" if prompts else "", "-" if numeric else "none")
    for base in set(bases) & points.keys():
        label, place = "what the others are compared with", (base, fmean(points[base]))
        axis.plot(*place, "o", color="C0", fillstyle="none", markersize=11, label=label)
    axis.tick_params(axis="x", labelrotation=0 if numeric else 90)
    low, high = axis.get_ylim()  # at least a fifth, below which differences are chance
    middle, half = (low + high) / 2, max((high - low) / 2, CHANCE / 4 * (low + high))
    axis.set_ylim(middle - half, middle + half)
    if prompts:
        other, shares = axis.twinx(), {x: prompt_shares(y) for x, y in measured.items()}
        _line(other, {x: y for x, y in shares.items() if y}, 1, "prompts found")
        other.set_ylabel("share of prompts found ↑")


def _line(axis: Any, points: Points, n: int, label: str, joined: str = "-") -> None:
    """The n-th line of a panel, through the means, with bars over the ranges."""
    style = {"color": f"C{n}", "marker": "os^vDPX"[n], "markersize": 5, "linestyle": joined}
    axis.plot([*points], [*map(fmean, points.values())], label=label, **style)
    for place, values in points.items():
        axis.plot([place, place], [min(values), max(values)], color=f"C{n}", linewidth=1)
