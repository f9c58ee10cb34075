"""The trials: for each data set one base, and variants that differ from it in one thing.

The bases are the presets' networks and rates with the plainest progressive training: half of the
compute on the coarsest level, half on all levels, every row with all of them. A drawing samples a
trained trial in other ways.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from matryoshka_diffusion import configfile
from matryoshka_diffusion.config import (
    CodecRunConfig,
    LevelConfig,
    RunConfig,
    StageConfig,
    WeightingConfig,
)
from matryoshka_diffusion.presets import CODECS, preset
from studies.compute import with_budget

BATCH_SIZE = 32
SAMPLES = 1024  # of a distance
PRECISION = "bf16"  # of the network that draws them
NEW = 0.1  # share of its last stage that a network has behind it before it is measured
DECAY = 0.3  # share of the last stage in which the rate decays (see presets.small.DECAY)
CURVE = (0.25, 0.7, 1.0)  # shares of the compute at which a compared trial is measured
COMMON_WEIGHT = (WeightingConfig(name="v_clipped"),)
"""The weighting that held-out losses are compared under, whatever the training had."""

Asked = dict[str, Any]
"""Everything that a result depends on. It is stored with the result, to know an outdated one."""


def agrees(then: Any, today: Any) -> bool:
    """True if a stored `Asked` is that of today; a field that is new since then may be missing.

    >>> agrees({"lr": 0.1}, {"lr": 0.1, "warmup": 0}), agrees({"lr": 0.1}, {"lr": 0.2})
    (True, False)
    """
    if isinstance(then, dict) and isinstance(today, dict):
        return all(key in today and agrees(value, today[key]) for key, value in then.items())
    if isinstance(then, list) and isinstance(today, list):
        return len(then) == len(today) and all(map(agrees, then, today))
    return then == today


def _measuring(samples: int) -> Asked:
    weights = [weight.model_dump(mode="json") for weight in COMMON_WEIGHT]
    return {"samples": samples, "precision": PRECISION, "new": NEW, "held_out_loss": weights}


@dataclass(frozen=True)
class PictureSet:
    """A data set, and the compute of each of its trials."""

    name: str
    preset: str
    flops: float
    held_out: float  # share of the images without training
    seeds: int  # of the comparison with the baselines
    ablation_seeds: int
    scale: float = 1.0  # share of the study's compute that `flops` already is, for the codec

    @property
    def codec(self) -> CodecRunConfig:
        """The training of the set's codec."""
        config = CODECS[f"{self.preset}-codec"]
        return config.model_copy(update={"images": round(self.scale * config.images)})


SETS = {
    "fashion": PictureSet("fashion", "fashion-mnist", 2.4e13, 0.02, 3, 3),
    "emoji": PictureSet("emoji", "openmoji", 5.0e13, 0.05, 3, 1),
}


@dataclass(frozen=True)
class Trial:
    """A run of the product; its name is set/variant/seed.

    An upsampler has a `base` that is trained first. A model of latents has a `codec`, which all
    trials of a set share; its training is not part of their compute.
    """

    name: str
    config: RunConfig
    points: tuple[float, ...] = (1.0,)  # shares of the compute at which it is measured
    base: RunConfig | None = None
    codec: CodecRunConfig | None = None
    samples: int = SAMPLES
    needs: dict[str, Asked] = field(default_factory=dict, hash=False)  # no other trial

    @property
    def set(self) -> PictureSet:
        """The data set of the trial."""
        return SETS[self.name.split("/")[0]]

    @property
    def parts(self) -> tuple[RunConfig, ...]:
        """The runs that its compute goes into, in their order."""
        return (self.config,) if self.base is None else (self.base, self.config)

    @property
    def trained(self) -> Asked:
        """All that its networks depend on, and when they are measured."""
        runs = [part.model_dump(mode="json") for part in self.parts]
        codec = None if self.codec is None else self.codec.model_dump(mode="json")
        return {"runs": runs, "codec": codec, "points": list(self.points)}

    @property
    def asked(self) -> Asked:
        """All that its result depends on."""
        return {"trained": self.trained, "measured": _measuring(self.samples)}


@dataclass(frozen=True)
class Drawing:
    """Samples of a finished trial under other settings; its name is set/variant/seed/setting."""

    name: str
    settings: dict[str, Any] = field(hash=False)
    trial: Trial
    samples: int = SAMPLES

    @property
    def needs(self) -> dict[str, Asked]:
        """The trial in its form of today."""
        return {self.trial.name: self.trial.asked}

    @property
    def asked(self) -> Asked:
        """The settings, the measure, and the training before them."""
        measured = _measuring(self.samples)
        return {"trial": self.trial.asked, "settings": self.settings, "measured": measured}


def changed(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """The config with the values at these paths replaced."""
    return configfile.changed(config, changes.items())


def _staged(
    config: RunConfig,
    pictures: PictureSet,
    stages: Sequence[StageConfig],
    shares: Sequence[float],
) -> RunConfig:
    """The run with these stages, sized by their shares, and with what all trials have in common."""
    stages = [stage.model_copy(update={"batch_size": BATCH_SIZE}) for stage in stages]
    sized = with_budget(config.model, stages, shares, pictures.flops)
    decay = DECAY * sized[-1].images / sum(stage.images for stage in sized)
    return changed(
        config,
        {
            "data.held_out": pictures.held_out,
            "train.stages": [stage.model_dump() for stage in sized],
            "train.decay_share": decay,
            "train.precision": "bf16",
            # A third of the presets' length needs shorter memories and smaller batches.
            "train.ema_decay": 0.99,
            "train.warmup_images": 1_600,
            "train.preview_every_images": 0,
            "train.checkpoint_every_images": 20_000,
            "train.keep_checkpoints": 1,
            "train.log_every_images": 1_000,
        },
    )


def base(pictures: PictureSet, *, coarse: float = 0.5) -> RunConfig:
    """The run that every variant is compared with; `coarse` is the coarsest level's compute."""
    config = preset(pictures.preset)
    first, last = config.train.stages[0], config.train.stages[-1]
    plain = last.model_copy(update={"mix": ()})
    return _staged(config, pictures, (first, plain), (coarse, 1.0 - coarse))


def _compared_with(pictures: PictureSet, kind: str, compute: float = 1.0) -> RunConfig:
    """A baseline of the paper with a share of the compute, the same for each of its stages."""
    config = preset(pictures.preset, kind)
    stages = [stage.model_copy(update={"mix": ()}) for stage in config.train.stages]
    return _staged(config, pictures, stages, (compute / len(stages),) * len(stages))


NESTS: dict[str, dict[str, dict[int, dict[str, Any]]]] = {
    # The levels of the preset, coarse to fine, under another number of them. A level that takes
    # the place of two has their halvings; a level below the coarsest takes its deep half.
    "fashion": {
        "levels-3": {
            8: {"widths": (128,), "blocks": (1,), "attention": (1,)},
            16: {"widths": (64, 64), "blocks": (1, 0), "attention": (0, 0)},
            32: {"widths": (64, 64), "blocks": (1, 0), "attention": (0, 0)},
        },
    },
    "emoji": {
        "levels-2": {
            16: {"widths": (96, 192), "blocks": (1, 1), "attention": (0, 1)},
            64: {"widths": (32, 32, 32), "blocks": (0, 0, 0), "attention": (0, 0, 0)},
        },
        "levels-4": {
            8: {"widths": (192,), "blocks": (1,), "attention": (1,)},
            16: {"widths": (96, 96), "blocks": (1, 0), "attention": (0, 0)},
            32: {"widths": (64, 32), "blocks": (0, 0), "attention": (0, 0)},
            64: {"widths": (32, 32), "blocks": (0, 0), "attention": (0, 0)},
        },
    },
}


def _nest(pictures: PictureSet, levels: dict[int, dict[str, Any]]) -> RunConfig:
    """Fig. 8b: another number of levels, all trained from the start as in `joint`."""
    config = preset(pictures.preset)
    finest = config.model.levels[-1].model_dump()
    ratio = finest["shift_ratio"] / finest["side"]  # a side has the shift that it has in the base
    built = [
        {**finest, "side": side, **parts, "shift_ratio": ratio * side}
        for side, parts in levels.items()
    ]
    stage = config.train.stages[-1].model_copy(update={"mix": (), "levels": len(levels)})
    nest = {"model.levels": built, "train.stages": [stage.model_dump()]}
    return _staged(changed(config, nest), pictures, (stage,), (1.0,))


# --- what the paper leaves open ------------------------------------------------------------------

Change = Callable[[RunConfig], RunConfig]


def _set(path: str, value: Any) -> Change:
    return lambda config: changed(config, {path: value})


def _process(prediction: str, weighting: str) -> Change:
    weightings = [{"name": weighting}]
    return _set("process", {"prediction": prediction, "weighting": weightings})


def _with_levels(config: RunConfig, update: Callable[[LevelConfig], dict[str, Any]]) -> RunConfig:
    levels = [{**level.model_dump(), **update(level)} for level in config.model.levels]
    return changed(config, {"model.levels": levels})


def _unsquared(config: RunConfig) -> RunConfig:
    """Shifts that grow with the side, not with its square, from the same one at the coarsest."""
    first = config.model.levels[0]
    squared = first.shift_ratio**first.shift_power
    return _with_levels(
        config, lambda x: {"shift_power": 1.0, "shift_ratio": squared * x.side / first.side}
    )


def _analytic(config: RunConfig) -> RunConfig:
    """Scaling by the root mean square of the pixels of both sets at all levels, 0.84 to 0.91."""
    scaled = _with_levels(config, lambda _: {"input_scaling": "analytic"})
    return changed(scaled, {"model.data_std": 0.87})


CHOICES: dict[str, Change] = {
    "x0-v": _process("x0", "v"),
    "x0-min_snr": _process("x0", "min_snr"),
    "x0-sigmoid": _process("x0", "sigmoid"),
    "v-v": _process("v", "v"),
    "v-v_clipped": _process("v", "v_clipped"),
    "v-sigmoid": _process("v", "sigmoid"),
    "eps-eps": _process("eps", "eps"),
    "shift-power-1": _unsquared,
    "scaling-std": lambda config: _with_levels(config, lambda _: {"input_scaling": "std"}),
    "scaling-analytic": _analytic,
    "dropout-0.1": lambda config: _with_levels(config, lambda _: {"dropout": 0.1}),
    "time-log-snr": _set("model.time_input", "log-snr"),
}


def _mixed(config: RunConfig, pictures: PictureSet) -> RunConfig:
    """Mixed resolutions in the last stage, at its compute; half of the rows have all levels."""
    first, last = config.train.stages
    count = len(config.model.levels)
    mixed = last.model_copy(update={"mix": (*[0.5 / (count - 1)] * (count - 1), 0.5)})
    return _staged(config, pictures, (first, mixed), (0.5, 0.5))


# --- the lists -----------------------------------------------------------------------------------

COMPARED = ("mdm", "joint", "levels-1", "finest", "cascade", "latent", "codes")
"""Variants that are measured along their training, and with all seeds."""


def _variants(pictures: PictureSet) -> dict[str, RunConfig]:
    """Every variant by its name; that of the cascade is its upsampler."""
    plain = base(pictures)
    joint, some, most = (base(pictures, coarse=share) for share in (0.0, 0.25, 0.75))
    weights = [*[0.0] * (len(joint.model.levels) - 1), 1.0]
    latents = ("latent", "codes") if pictures.name == "emoji" else ("latent",)
    return {
        "mdm": plain,
        "joint": joint,
        "levels-1": _compared_with(pictures, "simple"),
        "finest": changed(joint, {"process.level_weights": weights}),
        "cascade": _compared_with(pictures, "upsampler", 0.5),
        **{kind: _compared_with(pictures, kind) for kind in latents},
        "coarse-0.25": some,
        "coarse-0.75": most,
        **{name: _nest(pictures, levels) for name, levels in NESTS[pictures.name].items()},
        **{name: change(plain) for name, change in CHOICES.items()},
        "mixed": _mixed(plain, pictures),
    }


def all_trials(scale: float = 1.0, samples: int = SAMPLES) -> list[Trial]:
    """Every trial, with a share of its compute; first one seed of everything, then the others."""
    sets = [replace(each, flops=scale * each.flops, scale=scale) for each in SETS.values()]
    rounds = range(max(pictures.seeds for pictures in sets))
    return [trial for seed in rounds for each in sets for trial in _round(each, seed, samples)]


def _round(pictures: PictureSet, seed: int, samples: int) -> list[Trial]:
    if seed >= pictures.seeds:
        return []
    seeded = {"train.seed": seed}
    small = changed(_compared_with(pictures, "base", 0.5), seeded)
    return [
        Trial(
            f"{pictures.name}/{name}/{seed}",
            changed(config, {**seeded, "name": f"{pictures.name}-{name}"}),
            CURVE if name in COMPARED else (1.0,),
            base=small if name == "cascade" else None,
            codec=pictures.codec if config.codec is not None else None,
            samples=samples,
        )
        for name, config in _variants(pictures).items()
        if name in COMPARED or seed < pictures.ablation_seeds
    ]


COARSE_NOISES = (0.0, 0.1, 0.3, 0.5, 0.7)
GUIDANCE = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SOLVERS: dict[str, dict[str, Any]] = {
    "ddpm-250": {"sampler": "ddpm", "steps": 250},
    **{f"ddim-{steps}": {"sampler": "ddim", "steps": steps} for steps in (10, 25, 50)},
    **{f"dpmpp-2m-{steps}": {"sampler": "dpmpp-2m", "steps": steps} for steps in (10, 25, 50)},
}


def all_drawings(scale: float = 1.0, samples: int = SAMPLES) -> list[Drawing]:
    """Every drawing: solvers, noise between a cascade's networks, guidance (Fig. 8c)."""
    unguided = {"guidance": [1.0]}
    of_mdm = {name: {**how, **unguided} for name, how in SOLVERS.items()}
    noised = {f"noise-{noise:g}": {"coarse_noise": noise, **unguided} for noise in COARSE_NOISES}
    guided = {f"guidance-{weight:g}": {"guidance": [weight]} for weight in GUIDANCE}
    found = []
    for trial in all_trials(scale, samples):
        _, variant, seed = trial.name.split("/")
        settings = {"mdm": of_mdm, "cascade": noised}.get(variant, {})
        if variant == "mdm" and int(seed) < trial.set.ablation_seeds:
            settings = {**settings, **guided}
        for name, how in settings.items():
            found.append(Drawing(f"{trial.name}/{name}", how, trial, samples))
    return found
