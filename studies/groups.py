"""Which results belong together: a group for each figure, and for each table."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from studies.drawings import COARSE_NOISES, GUIDANCE, SOLVERS
from studies.spread import BASE
from studies.trials import CHOICES, PictureSet

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
    """Results that differ in one thing.

    Attributes:
        title: what is asked, and where the paper does.
        varied: what differs, for an axis or a column.
        variants: which variant (`mdm`, `mdm/ddim-10`) has which value of it, on a set of pictures.
        base: the variant that the others are compared with.
    """

    title: str
    varied: str
    variants: Callable[[PictureSet], dict[str, str]]
    base: str = BASE


def _levels(pictures: PictureSet) -> dict[str, str]:
    own = {"fashion": 2, "emoji": 3}[pictures.name]
    return {str(n): "joint" if n == own else f"levels-{n}" for n in range(1, own + 2)}


def _choices(_: PictureSet) -> dict[str, str]:
    return {"x0-v_clipped": BASE, **{name: name for name in (*CHOICES, "mixed")}}


GROUPS = {
    "a-families": Group(
        "(a) Families of models at equal compute (Fig. 4)", "family", lambda _: FAMILIES
    ),
    "a-cascade-noise": Group(
        "(a) Noise between a cascade's networks (Appendix D.1)",
        "time of the noise on the coarse picture",
        lambda _: NOISED,
    ),
    "b-coarse-training": Group(
        "(b) Length of the coarse training (Fig. 8a)",
        "share of compute on the coarsest level alone",
        lambda _: {"0": "joint", "0.25": "coarse-0.25", "0.5": BASE, "0.75": "coarse-0.75"},
    ),
    "c-levels": Group(
        "(c) Number of nested levels, trained jointly (Fig. 8b)", "levels", _levels, base="joint"
    ),
    "d-guidance": Group(
        "(d) Guidance (Fig. 8c)",
        "guidance weight",
        lambda _: {f"{weight:g}": f"mdm/guidance-{weight:g}" for weight in GUIDANCE},
    ),
    "e-solvers": Group(
        "(e) Solver and steps",
        "solver and steps",
        lambda _: {name: f"mdm/{name}" for name in SOLVERS},
    ),
    "f-choices": Group("(f) What the paper leaves open", "choice", _choices),
}
