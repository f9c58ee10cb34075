"""The paper's figures again, drawn from the results that are there.

Lines go through means over the seeds that all of a panel's results have; bands and bars reach from
the lowest to the highest of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matryoshka_diffusion.files import write_atomically
from matryoshka_diffusion.metrics.networks import NAME
from studies.drawings import SOLVERS
from studies.groups import FAMILIES, GROUPS, NOISED, TITLES, Group
from studies.spread import BASE, Results, Spread, curve, distance, found_first, seeds_of, shared
from studies.trials import SETS, PictureSet

DISTANCE = f"{NAME} ↓"  # lower is better
MARKERS = "os^vDPX"
CHANCE = 0.2
"""The share by which two trials of one seed each may well differ."""
_PANEL = (4.6, 4.1)  # inches
_DPI = 150

Points = Sequence[tuple[float, Spread]]


def draw_all(results: Results, folder: Path) -> list[Path]:
    """Draw the figures that there are results for, with a panel for each set that has some."""
    paths = []
    for name, draw in FIGURES.items():
        there = [each for each in SETS.values() if _has_results(results, GROUPS[name], each)]
        if there:
            path = folder / f"{name}.png"
            figure = _figure(results, GROUPS[name], draw, there)
            write_atomically(path, lambda file, figure=figure: figure.savefig(file, dpi=_DPI))
            paths.append(path)
    return paths


def _has_results(results: Results, group: Group, pictures: PictureSet) -> bool:
    """Whether there is more than the base, which nearly every group has."""
    others = {*group.variants(pictures).values()} - {group.base}
    return any(seeds_of(results, pictures.name, variant) for variant in others)


def _figure(
    results: Results,
    group: Group,
    draw: Callable[[Any, Results, PictureSet], None],
    sets: Sequence[PictureSet],
) -> Any:
    """A panel for each set, under one title and over one legend."""
    from matplotlib.figure import Figure

    width, height = _PANEL
    figure = Figure(figsize=(max(width * len(sets), 1.3 * width), height), layout="constrained")
    figure.suptitle(group.title, fontsize=11)
    panels = figure.subplots(1, len(sets), squeeze=False)[0]
    for axis, pictures in zip(panels, sets, strict=True):
        axis.set_title(TITLES[pictures.name], fontsize=10)
        axis.grid(alpha=0.25)
        variants = group.variants(pictures).values()
        draw(axis, shared(results, pictures.name, variants), pictures)
    _legend(figure)
    return figure


def _legend(figure: Any) -> None:
    """One legend below all panels, where it covers nothing."""
    labelled = [axis.get_legend_handles_labels() for axis in figure.axes]
    entries = {label: handle for pair in labelled for handle, label in zip(*pair, strict=True)}
    if entries:
        figure.legend(
            entries.values(),
            entries,
            loc="outside lower center",
            ncols=2 if len(figure.axes) == 1 else 3,
            fontsize=9,
            frameon=False,
        )


# --- the figures ---------------------------------------------------------------------------------


def _families(axis: Any, results: Results, pictures: PictureSet) -> None:
    """(a) Fig. 4: the distance along the training."""
    for n, (label, variant) in enumerate(FAMILIES.items()):
        if found := seeds_of(results, pictures.name, variant):
            points = [(flops / 1e12, spread) for flops, spread in curve(found)]
            _line(axis, points, n, label)
            _band(axis, points, n)
            if variant == "cascade" and (best := _best_noise(results, pictures)):
                at_best = "cascaded DM, at its best noise"
                axis.plot(points[-1][0], best, "*", color=f"C{n}", label=at_best, markersize=11)
    axis.set_xlim(left=0.0)
    axis.set_xlabel("training compute (TFLOPs)")
    _of_distances(axis)


def _best_noise(results: Results, pictures: PictureSet) -> float | None:
    """The cascade's lowest distance over the noises on its coarse picture, the mean over seeds."""
    spreads = [distance(seeds_of(results, pictures.name, v)) for v in NOISED.values()]
    return min((spread.mean for spread in spreads if spread is not None), default=None)


def _numbers(name: str, axis: Any, results: Results, pictures: PictureSet) -> None:
    """The final distance along a group whose values are numbers."""
    variants = GROUPS[name].variants(pictures)
    points = _finals(results, pictures, {float(x): v for x, v in variants.items()})
    _line(axis, points, 0, "")
    _bars(axis, points, 0)
    for x, spread in points:
        if variants[f"{x:g}"] == GROUPS[name].base:
            label = "what the others are compared with"
            axis.plot(x, spread.mean, "o", color="C0", fillstyle="none", markersize=11, label=label)
    axis.set_xticks([float(x) for x in variants], list(variants))
    axis.set_xlabel(GROUPS[name].varied)
    axis.set_ylabel(DISTANCE)
    _show_chance(axis)


def _noise(axis: Any, results: Results, pictures: PictureSet) -> None:
    """(a) Appendix D.1: the noise on the picture between a cascade's networks."""
    _numbers("a-cascade-noise", axis, results, pictures)


def _coarse(axis: Any, results: Results, pictures: PictureSet) -> None:
    """(b) Fig. 8a: the share of compute that went to the coarsest level first."""
    _numbers("b-coarse-training", axis, results, pictures)


def _levels(axis: Any, results: Results, pictures: PictureSet) -> None:
    """(c) Fig. 8b: the number of nested levels."""
    _numbers("c-levels", axis, results, pictures)


def _guidance(axis: Any, results: Results, pictures: PictureSet) -> None:
    """(d) Fig. 8c: guidance against the distance, and against retrieval where there are prompts."""
    _numbers("d-guidance", axis, results, pictures)
    variants = GROUPS["d-guidance"].variants(pictures)
    found = {
        float(w): found_first(seeds_of(results, pictures.name, v)) for w, v in variants.items()
    }
    if points := [(weight, spread) for weight, spread in found.items() if spread is not None]:
        axis.lines[0].set_label("distance")
        other = axis.twinx()
        _line(other, points, 1, "prompts found")
        _bars(other, points, 1)
        other.set_ylabel("share of prompts found ↑")


def _solvers(axis: Any, results: Results, pictures: PictureSet) -> None:
    """(e): solver and steps."""
    samplers = dict.fromkeys(how["sampler"] for how in SOLVERS.values())
    for n, sampler in enumerate(samplers):
        mine = {how["steps"]: name for name, how in SOLVERS.items() if how["sampler"] == sampler}
        variants = {float(steps): f"mdm/{name}" for steps, name in mine.items()}
        points = _finals(results, pictures, variants)
        _line(axis, points, n, sampler)
        _bars(axis, points, n)
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
    "a-cascade-noise": _noise,
    "b-coarse-training": _coarse,
    "c-levels": _levels,
    "d-guidance": _guidance,
    "e-solvers": _solvers,
    "f-choices": _choices,
}


# --- their parts ---------------------------------------------------------------------------------


def _finals(results: Results, pictures: PictureSet, variants: Mapping[float, str]) -> Points:
    """The final distances of the variants that have results."""
    found = {x: distance(seeds_of(results, pictures.name, v)) for x, v in variants.items()}
    return [(x, spread) for x, spread in found.items() if spread is not None]


def _line(axis: Any, points: Points, n: int, label: str) -> None:
    """The n-th line of a panel, through the means."""
    x, means = [x for x, _ in points], [spread.mean for _, spread in points]
    axis.plot(x, means, color=f"C{n}", marker=MARKERS[n], markersize=5, label=label)


def _band(axis: Any, points: Points, n: int) -> None:
    """The range over seeds all along a line."""
    axis.fill_between(*_ranges(points), color=f"C{n}", alpha=0.15, linewidth=0)


def _bars(axis: Any, points: Points, n: int) -> None:
    """The range over seeds at each point, where points differ in the number of seeds."""
    axis.vlines(*_ranges(points), color=f"C{n}", linewidth=1)


def _ranges(points: Points) -> tuple[list[float], list[float], list[float]]:
    """Where the points are, and the lowest and the highest over seeds there."""
    return (
        [x for x, _ in points],
        [spread.low for _, spread in points],
        [spread.high for _, spread in points],
    )


def _show_chance(axis: Any) -> None:
    """Let the vertical axis span a fifth at least, below which differences are chance."""
    low, high = axis.get_ylim()
    middle, half = (low + high) / 2, (high - low) / 2
    half = max(half, CHANCE / 2 * middle)
    axis.set_ylim(middle - half, middle + half)


def _of_distances(axis: Any) -> None:
    """A vertical axis for distances of different orders."""
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(MaxNLocator(6))
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_ylabel(f"{DISTANCE} (log scale)")
