"""The paper's figures again, drawn from the results that are there.

Lines go through means over the seeds that all results of a panel have. Bands and bars reach from
the lowest to the highest of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matryoshka_diffusion.files import write_atomically
from matryoshka_diffusion.metrics.networks import NAME
from studies.results import (
    BASE,
    FAMILIES,
    GROUPS,
    NOISED,
    TITLES,
    Group,
    Results,
    Spread,
    curve,
    distance,
    found_first,
    seeds_of,
    shared,
)
from studies.trials import SETS, SOLVERS, PictureSet

DISTANCE = f"{NAME} ↓"  # lower is better
MARKERS = "os^vDPX"
CHANCE = 0.2
"""The share by which two trials of one seed each may well differ."""
PANEL = (4.6, 4.1)  # inches
DPI = 150

Points = Sequence[tuple[float, Spread]]


def draw_all(results: Results, folder: Path) -> list[Path]:
    """Draw the figures that there are results for, with a panel for each set that has some."""
    paths = []
    for name, draw in FIGURES.items():
        group = GROUPS[name]
        there = [
            each
            for each in SETS.values()
            for others in [{*group.variants(each).values()} - {group.base}]
            if any(seeds_of(results, each.name, variant) for variant in others)
        ]
        if there:
            figure = _figure(results, group, draw, there)
            path = folder / f"{name}.png"
            write_atomically(path, lambda file, figure=figure: figure.savefig(file, dpi=DPI))
            paths.append(path)
    return paths


def _figure(
    results: Results,
    group: Group,
    draw: Callable[[Any, Results, PictureSet], None],
    sets: Sequence[PictureSet],
) -> Any:
    """A panel for each set, under one title and over one legend."""
    from matplotlib.figure import Figure

    width, height = PANEL
    figure = Figure(figsize=(max(width * len(sets), 1.3 * width), height), layout="constrained")
    figure.suptitle(group.title, fontsize=11)
    panels = figure.subplots(1, len(sets), squeeze=False)[0]
    for axis, pictures in zip(panels, sets, strict=True):
        axis.set_title(TITLES[pictures.name], fontsize=10)
        axis.grid(alpha=0.25)
        variants = group.variants(pictures).values()
        draw(axis, shared(results, pictures.name, variants), pictures)
    labelled = [axis.get_legend_handles_labels() for axis in figure.axes]
    entries = {label: handle for pair in labelled for handle, label in zip(*pair, strict=True)}
    if entries:  # below all panels, where it covers nothing
        columns = 2 if len(figure.axes) == 1 else 3
        place = {"loc": "outside lower center", "ncols": columns}
        figure.legend(entries.values(), entries, fontsize=9, frameon=False, **place)
    return figure


# --- the figures ---------------------------------------------------------------------------------


def _families(axis: Any, results: Results, pictures: PictureSet) -> None:
    """(a) Fig. 4: the distance along the training, and the cascade at its best noise."""
    for n, (label, variant) in enumerate(FAMILIES.items()):
        if found := seeds_of(results, pictures.name, variant):
            points = [(flops / 1e12, spread) for flops, spread in curve(found)]
            _line(axis, points, n, label)
            axis.fill_between(*_ranges(points), color=f"C{n}", alpha=0.15, linewidth=0)
            noised = [distance(seeds_of(results, pictures.name, v)) for v in NOISED.values()]
            if variant == "cascade" and any(noised):
                best = min(spread.mean for spread in noised if spread is not None)
                at_best = "cascaded DM, at its best noise"
                axis.plot(points[-1][0], best, "*", color=f"C{n}", label=at_best, markersize=11)
    axis.set_xlim(left=0.0)
    axis.set_xlabel("training compute (TFLOPs)")
    _of_distances(axis)


def _numbers(name: str, axis: Any, results: Results, pictures: PictureSet) -> None:
    """The final distance along a group whose values are numbers."""
    variants = GROUPS[name].variants(pictures)
    points = _finals(results, pictures, {float(x): v for x, v in variants.items()})
    _line(axis, points, 0, "")
    axis.vlines(*_ranges(points), color="C0", linewidth=1)
    for x, spread in points:
        if variants[f"{x:g}"] == GROUPS[name].base:
            label = "what the others are compared with"
            axis.plot(x, spread.mean, "o", color="C0", fillstyle="none", markersize=11, label=label)
    axis.set_xticks([float(x) for x in variants], list(variants))
    axis.set_xlabel(GROUPS[name].varied)
    axis.set_ylabel(DISTANCE)
    low, high = axis.get_ylim()  # at least a fifth, below which differences are chance
    middle, half = (low + high) / 2, max((high - low) / 2, CHANCE / 2 * (low + high) / 2)
    axis.set_ylim(middle - half, middle + half)


def _guidance(axis: Any, results: Results, pictures: PictureSet) -> None:
    """(d) Fig. 8c: guidance against the distance, and against retrieval where there are prompts."""
    _numbers("d-guidance", axis, results, pictures)
    variants = GROUPS["d-guidance"].variants(pictures)
    points = _finals(results, pictures, {float(x): v for x, v in variants.items()}, found_first)
    if points:
        axis.lines[0].set_label("distance")
        other = axis.twinx()
        _line(other, points, 1, "prompts found")
        other.vlines(*_ranges(points), color="C1", linewidth=1)
        other.set_ylabel("share of prompts found ↑")


def _solvers(axis: Any, results: Results, pictures: PictureSet) -> None:
    """(e): solver and steps."""
    for n, sampler in enumerate(dict.fromkeys(how["sampler"] for how in SOLVERS.values())):
        mine = {
            float(how["steps"]): f"mdm/{name}"
            for name, how in SOLVERS.items()
            if how["sampler"] == sampler
        }
        points = _finals(results, pictures, mine)
        _line(axis, points, n, sampler)
        axis.vlines(*_ranges(points), color=f"C{n}", linewidth=1)
    steps = sorted({how["steps"] for how in SOLVERS.values()})
    axis.set_xscale("log")
    axis.set_xticks(steps, map(str, steps))
    axis.set_xticks([], minor=True)
    axis.set_xlabel("steps of the sampler (log scale)")
    _of_distances(axis)


def _choices(axis: Any, results: Results, pictures: PictureSet) -> None:
    """(f): every open choice, and how far from the base it leads."""
    variants = GROUPS["f-choices"].variants(pictures)
    rows = [(v, distance(seeds_of(results, pictures.name, v)), x) for x, v in variants.items()]
    there = [(v, spread, x) for v, spread, x in reversed(rows) if spread is not None]
    for row, (variant, spread, _) in enumerate(there):
        color = "C0" if variant == BASE else "0.3"
        axis.plot([spread.low, spread.high], [row, row], color=color)
        axis.plot(spread.mean, row, "o", color=color)
        if variant == BASE:
            axis.axvline(spread.mean, color=color, linestyle=":", label="the base of the study")
    axis.set_yticks(range(len(there)), [x for *_, x in there])
    axis.set_xlabel(DISTANCE)


FIGURES: dict[str, Callable[[Any, Results, PictureSet], None]] = {
    "a-families": _families,
    "a-cascade-noise": partial(_numbers, "a-cascade-noise"),
    "b-coarse-training": partial(_numbers, "b-coarse-training"),
    "c-levels": partial(_numbers, "c-levels"),
    "d-guidance": _guidance,
    "e-solvers": _solvers,
    "f-choices": _choices,
}


def _finals(
    results: Results,
    pictures: PictureSet,
    variants: Mapping[float, str],
    measure: Callable[[Any], Spread | None] = distance,
) -> Points:
    """The final distances of the variants that have results, or another measure of them."""
    found = {x: measure(seeds_of(results, pictures.name, v)) for x, v in variants.items()}
    return [(x, spread) for x, spread in found.items() if spread is not None]


def _line(axis: Any, points: Points, n: int, label: str) -> None:
    """The n-th line of a panel, through the means."""
    x, means = [x for x, _ in points], [spread.mean for _, spread in points]
    axis.plot(x, means, color=f"C{n}", marker=MARKERS[n], markersize=5, label=label)


def _ranges(points: Points) -> tuple[list[float], list[float], list[float]]:
    """The places of the points, and the lowest and the highest over seeds there."""
    spreads = [spread for _, spread in points]
    return [x for x, _ in points], [s.low for s in spreads], [s.high for s in spreads]


def _of_distances(axis: Any) -> None:
    """A vertical axis for distances of different orders."""
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(MaxNLocator(6))
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_ylabel(f"{DISTANCE} (log scale)")
