"""All trials in the order in which they are run: trainings, then other ways of sampling them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from matryoshka_diffusion.presets.small import WAKE
from studies.longer import late_trials, longer_trials
from studies.trials import SAMPLES, SETS, Trial, short_trials

UNGUIDED = {"guidance": [1.0]}
COARSE_NOISES = (0.0, 0.1, 0.3, 0.5, 0.7)
GUIDANCE = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SOLVERS = {
    f"{name}-{steps}": {"sampler": name, "steps": steps, **UNGUIDED}
    for name, counts in {"ddpm": (250,), "ddim": (10, 25, 50), "dpmpp-2m": (10, 25, 50)}.items()
    for steps in counts
}


def _settings(run: Trial) -> dict[str, dict[str, Any]]:
    """Other sampling: solvers, waking, noise between a cascade's networks, guidance (Fig. 8c)."""
    pictures, variant, seed = run.name.split("/")
    if variant == "paper":
        return {"ddpm-250": {**SOLVERS["ddpm-250"], "grid": "trailing"}}
    if variant == "awake":
        return {"late": {"wake": list(WAKE)}}
    if variant == "cascade":
        return {f"noise-{x:g}": {"coarse_noise": x, **UNGUIDED} for x in COARSE_NOISES}
    if variant != "mdm":
        return {}
    guided = {f"guidance-{weight:g}": {"guidance": [weight]} for weight in GUIDANCE}
    return SOLVERS | guided if int(seed) < SETS[pictures].ablation_seeds else SOLVERS


def all_trials(scale: float = 1.0, samples: int = SAMPLES) -> list[Trial]:
    """Every run, with a share of its compute, then the samples of each under other settings."""
    runs = [*short_trials(scale, samples), *longer_trials(scale, samples), *late_trials(samples)]
    other = [(run, name, how) for run in runs for name, how in _settings(run).items()]
    sampled = [replace(run, name=f"{run.name}/{name}", settings=how) for run, name, how in other]
    return [*runs, *sampled]
