"""A trained network, sampled in other ways: guidance (Fig. 8c), solvers, a cascade's noise."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from studies.asked import SAMPLES, Asked, measuring
from studies.trials import SETS, PictureSet, all_trials

COARSE_NOISES = (0.0, 0.1, 0.3, 0.5, 0.7)
GUIDANCE = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
UNGUIDED = {"guidance": [1.0]}
SOLVERS = {
    "ddpm-250": {"sampler": "ddpm", "steps": 250},
    **{f"ddim-{steps}": {"sampler": "ddim", "steps": steps} for steps in (10, 25, 50)},
    **{f"dpmpp-2m-{steps}": {"sampler": "dpmpp-2m", "steps": steps} for steps in (10, 25, 50)},
}


@dataclass(frozen=True)
class Drawing:
    """Samples of a finished trial under `settings`; `name` is set/variant/seed/setting.

    `network` is what the trial asks.
    """

    name: str
    settings: dict[str, Any] = field(hash=False)
    network: Asked = field(default_factory=dict, hash=False)
    samples: int = SAMPLES

    @property
    def trial(self) -> str:
        """The name of the trial whose network draws."""
        return self.name.rsplit("/", 1)[0]

    @property
    def needs(self) -> dict[str, Asked]:
        """The trial must have ended, as it is today."""
        return {self.trial: self.network}

    @property
    def asked(self) -> Asked:
        """What is drawn, how it is measured, and the training before it."""
        measured = measuring(self.samples)
        return {"trial": self.network, "settings": self.settings, "measured": measured}


def all_drawings(scale: float = 1.0, samples: int = SAMPLES) -> list[Drawing]:
    """Every drawing, first one seed of everything, then the others; from `all_trials` of these."""
    rounds = range(max(pictures.seeds for pictures in SETS.values()))
    networks = {trial.name: trial.asked for trial in all_trials(scale, samples)}
    return [
        replace(each, network=networks[each.trial], samples=samples)
        for seed in rounds
        for pictures in SETS.values()
        for each in _of(pictures, seed)
    ]


def _of(pictures: PictureSet, seed: int) -> list[Drawing]:
    solvers = {f"mdm/{seed}/{name}": {**how, **UNGUIDED} for name, how in SOLVERS.items()}
    noised = {
        f"cascade/{seed}/noise-{noise:g}": {"coarse_noise": noise, **UNGUIDED}
        for noise in COARSE_NOISES
    }
    guided = {f"mdm/{seed}/guidance-{weight:g}": {"guidance": [weight]} for weight in GUIDANCE}
    wanted = {**solvers, **noised} if seed < pictures.seeds else {}
    wanted |= guided if seed < pictures.ablation_seeds else {}
    return [Drawing(f"{pictures.name}/{name}", settings) for name, settings in wanted.items()]
