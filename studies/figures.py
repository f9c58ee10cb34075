"""The paper's figures again, drawn from the results that are there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matryoshka_diffusion.eval.features import NAME
from matryoshka_diffusion.files import write_atomically
from studies.drawings import COARSE_NOISES, GUIDANCE
from studies.table import Result, Spread, curve, distance, found_first, seeds_of
from studies.trials import CHOICES, SETS, PictureSet

Results = Mapping[str, Result]

FAMILIES = {
    "mdm": "MDM",
    "joint": "MDM, no progressive training",
    "levels-1": "simple DM",
    "finest": "nested, finest loss only",
    "cascade": "cascaded DM",
    "latent": "latent DM (its codec comes on top)",
    "codes": "MDM on codes (likewise)",
}
TITLES = {"fashion": "Fashion-MNIST 32", "emoji": "OpenMoji 64"}
NOISED = {noise: f"cascade/noise-{noise:g}" for noise in COARSE_NOISES}
_PANEL = (4.6, 3.6)


def draw_all(results: Results, folder: Path) -> list[Path]:
    """Draw every figure into `folder`; what has no result yet is left out of it."""
    from matplotlib.figure import Figure

    paths = []
    for name, draw in FIGURES.items():
        figure = Figure(figsize=(_PANEL[0] * len(SETS), _PANEL[1]), layout="constrained")
        for axis, pictures in zip(figure.subplots(1, len(SETS)), SETS.values(), strict=True):
            axis.set_title(TITLES[pictures.name])
            draw(axis, results, pictures)
        path = folder / f"{name}.png"
        write_atomically(path, lambda file, figure=figure: figure.savefig(file, dpi=110))
        paths.append(path)
    return paths


def _families(axis: Any, results: Results, pictures: PictureSet) -> None:
    """(a) Fig. 4: the distance along the training."""
    for color, (variant, label) in enumerate(FAMILIES.items()):
        if found := seeds_of(results, pictures.name, variant):
            _line(axis, curve(found, "share"), f"C{color}", label)
            if variant == "cascade" and (best := _best_noise(results, pictures)):
                axis.plot([1.0], [best], "*", color=f"C{color}", label="the same, best noise")
    axis.set_xlabel("share of the training compute")
    axis.set_ylabel(NAME)
    _legend(axis)


def _best_noise(results: Results, pictures: PictureSet) -> float | None:
    """The cascade's lowest distance over the noises on its coarse picture, the mean over seeds."""
    spreads = [distance(seeds_of(results, pictures.name, v)) for v in NOISED.values()]
    return min((spread.mean for spread in spreads if spread is not None), default=None)


def _noise(axis: Any, results: Results, pictures: PictureSet) -> None:
    """(a) Appendix D.1: the noise on the picture between a cascade's networks."""
    _final(axis, results, pictures, NOISED)
    axis.set_xlabel("time of the noise on the coarse picture")


def _coarse(axis: Any, results: Results, pictures: PictureSet) -> None:
    """(b) Fig. 8a: the share of compute that went to the coarsest level first."""
    variants = {0.0: "joint", 0.25: "coarse-0.25", 0.5: "mdm", 0.75: "coarse-0.75"}
    _final(axis, results, pictures, variants)
    axis.set_xlabel("share of compute on the coarsest level alone")


def _levels(axis: Any, results: Results, pictures: PictureSet) -> None:
    """(c) Fig. 8b: the number of nested levels."""
    own = {"fashion": 2, "emoji": 3}[pictures.name]
    names = ("levels-1", "levels-2", "levels-3", "levels-4")
    variants = {float(n): "mdm" if n == own else name for n, name in enumerate(names, 1)}
    _final(axis, results, pictures, variants)
    axis.set_xlabel("levels")
    axis.set_xticks(range(1, own + 2))


def _guidance(axis: Any, results: Results, pictures: PictureSet) -> None:
    """(d) Fig. 8c: guidance against the distance, and against retrieval where there are prompts."""
    variants: dict[float, str] = {weight: f"mdm/guidance-{weight:g}" for weight in GUIDANCE}
    _final(axis, results, pictures, variants)
    axis.set_xlabel("guidance weight")
    found = {w: found_first(seeds_of(results, pictures.name, v)) for w, v in variants.items()}
    points = [(weight, spread) for weight, spread in found.items() if spread is not None]
    if points:
        other = axis.twinx()
        _line(other, points, "C1", "prompts found")
        other.set_ylabel("share of prompts found")


def _solvers(axis: Any, results: Results, pictures: PictureSet) -> None:
    """(e): solver and steps."""
    for color, (solver, steps) in enumerate(
        {"ddpm": (250,), "ddim": (10, 25, 50), "dpmpp-2m": (10, 25, 50)}.items()
    ):
        variants: dict[float, str] = {n: f"mdm/{solver}-{n}" for n in steps}
        _final(axis, results, pictures, variants, f"C{color}", solver)
    axis.set_xscale("log")
    axis.set_xlabel("steps")
    _legend(axis)


def _choices(axis: Any, results: Results, pictures: PictureSet) -> None:
    """(f): every open choice beside the base."""
    names = ["mdm", *CHOICES, "mixed"]
    rows = [(name, distance(seeds_of(results, pictures.name, name))) for name in names]
    there = [(name, spread) for name, spread in reversed(rows) if spread is not None]
    for row, (name, spread) in enumerate(there):
        axis.barh(row, spread.mean, color="C0" if name == "mdm" else "0.7")
        axis.plot([spread.low, spread.high], [row, row], color="k")
    axis.set_yticks(
        range(len(there)), ["x0-v_clipped (base)" if n == "mdm" else n for n, _ in there]
    )
    axis.set_xlabel(NAME)


FIGURES: dict[str, Callable[[Any, Results, PictureSet], None]] = {
    "a-families": _families,
    "a-cascade-noise": _noise,
    "b-coarse-training": _coarse,
    "c-levels": _levels,
    "d-guidance": _guidance,
    "e-solvers": _solvers,
    "f-choices": _choices,
}


def _final(
    axis: Any,
    results: Results,
    pictures: PictureSet,
    variants: Mapping[float, str],
    color: str = "C0",
    label: str = "",
) -> None:
    """A line through the final distances of variants."""
    found = {x: distance(seeds_of(results, pictures.name, v)) for x, v in variants.items()}
    points = [(x, spread) for x, spread in found.items() if spread is not None]
    if points:
        _line(axis, points, color, label)
    axis.set_ylabel(NAME)


def _line(axis: Any, points: list[tuple[float, Spread]], color: str, label: str) -> None:
    """The means as a line, the range over seeds as a band."""
    x = [where for where, _ in points]
    axis.plot(x, [s.mean for _, s in points], "o-", color=color, label=label, markersize=4)
    low, high = ([getattr(s, end) for _, s in points] for end in ("low", "high"))
    axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def _legend(axis: Any) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
