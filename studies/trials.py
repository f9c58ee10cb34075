"""What is trained: for each set of pictures one base, and variants that differ in one thing.

The bases are the presets' networks and rates with the plainest progressive training: half of the
compute on the coarsest level, half on all levels, every row with all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from matryoshka_diffusion.config import CodecRunConfig, RunConfig, StageConfig
from matryoshka_diffusion.configfile import from_dict
from matryoshka_diffusion.presets import CODECS, preset
from studies.asked import SAMPLES, Asked, measuring
from studies.compute import with_budget

BATCH_SIZE = 32

DECAY = 0.3
"""The share of a run's last stage, its last, in which the rate decays.

It is the same in every trial. As a share of all images it would be most of a last stage that is
short, and the finest level of a progressive run would hardly be trained at the full rate.
"""

Change = Callable[[RunConfig], RunConfig]


@dataclass(frozen=True)
class PictureSet:
    """Pictures that are studied.

    Attributes:
        preset: the run that the base is made of.
        flops: the compute of every trial.
        held_out: share of the pictures that is not trained on.
        seeds: of the comparison with the baselines; ablations have the first `ablation_seeds`.
        scale: the share of the study's compute that `flops` already is, for the codec.
    """

    name: str
    preset: str
    flops: float
    held_out: float
    seeds: int
    ablation_seeds: int
    scale: float = 1.0

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
    """A run: `name` is set/variant/seed, `points` are shares of the compute to be measured at.

    At each, a distance is one of so many `samples`. An upsampler has a `base` that is trained
    first. A model of codes has a `codec`, which all trials of a set share; its training is not part
    of their compute.
    """

    name: str
    config: RunConfig
    points: tuple[float, ...] = (1.0,)
    base: RunConfig | None = None
    codec: CodecRunConfig | None = None
    samples: int = SAMPLES

    @property
    def needs(self) -> dict[str, Asked]:
        """No other trial."""
        return {}

    @property
    def set(self) -> PictureSet:
        """The set of pictures it is about."""
        return SETS[self.name.split("/")[0]]

    @property
    def asked(self) -> Asked:
        """All that its result depends on."""
        return {"trained": self.trained, "measured": measuring(self.samples)}

    @property
    def trained(self) -> Asked:
        """All that its networks depend on, and when they are looked at."""
        runs = [part.model_dump(mode="json") for part in self.parts]
        codec = None if self.codec is None else self.codec.model_dump(mode="json")
        return {"runs": runs, "codec": codec, "points": list(self.points)}

    @property
    def parts(self) -> tuple[RunConfig, ...]:
        """The runs that its compute goes into, in their order."""
        return (self.config,) if self.base is None else (self.base, self.config)


def base(pictures: PictureSet, *, coarse: float = 0.5) -> RunConfig:
    """The run that every variant is compared with; `coarse` is the coarsest level's compute."""
    config = preset(pictures.preset)
    first, last = config.train.stages[0], config.train.stages[-1]
    plain = last.model_copy(update={"mix": ()})
    return _staged(config, pictures, (first, plain), (coarse, 1.0 - coarse))


def _staged(
    config: RunConfig,
    pictures: PictureSet,
    stages: Sequence[StageConfig],
    shares: Sequence[float],
) -> RunConfig:
    """The run with these stages, sized, and with what all trials have in common."""
    stages = [stage.model_copy(update={"batch_size": BATCH_SIZE}) for stage in stages]
    sized = with_budget(config.model, stages, shares, pictures.flops)
    images = sum(stage.images for stage in sized)
    return changed(
        config,
        {
            "data.held_out": pictures.held_out,
            "train.stages": [stage.model_dump() for stage in sized],
            "train.decay_share": DECAY * sized[-1].images / images,
            "train.precision": "bf16",
            # A third of the presets' length asks for shorter memories and smaller batches.
            "train.ema_decay": 0.99,
            "train.warmup_images": 1_600,
            "train.preview_every_images": 0,
            "train.checkpoint_every_images": 20_000,
            "train.keep_checkpoints": 1,
            "train.log_every_images": 1_000,
        },
    )


def changed(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """The config with the values at these paths replaced."""
    data = config.model_dump()
    for path, value in changes.items():
        *parents, last = path.split(".")
        node = data
        for key in parents:
            node = node[key]
        node[last] = value
    return from_dict(data)


def _with_levels(config: RunConfig, **update: Any) -> RunConfig:
    """Every level with these fields replaced."""
    levels = [{**level.model_dump(), **update} for level in config.model.levels]
    return changed(config, {"model.levels": levels})


# --- (a) the baselines ---------------------------------------------------------------------------

COMPARED = ("mdm", "joint", "levels-1", "finest", "cascade", "latent", "codes")
"""Variants that are measured along their training, and with all seeds."""


def finest_only(pictures: PictureSet) -> RunConfig:
    """The joint training without the low-resolution losses."""
    joint = base(pictures, coarse=0.0)
    weights = [*[0.0] * (len(joint.model.levels) - 1), 1.0]
    return changed(joint, {"process.level_weights": weights})


def cascade(pictures: PictureSet) -> tuple[RunConfig, RunConfig]:
    """A base on half of the compute, and an upsampler on the other half."""
    small, large = (preset(pictures.preset, part) for part in ("base", "upsampler"))
    return _half(small, pictures), _half(large, pictures)


def _half(config: RunConfig, pictures: PictureSet) -> RunConfig:
    return _staged(config, pictures, config.train.stages, (0.5,))


def on_codes(pictures: PictureSet, kind: str) -> RunConfig:
    """Latent DM (one level), or MDM on codes: half of the compute on the coarser level first."""
    config = preset(pictures.preset, kind)
    stages = [stage.model_copy(update={"mix": ()}) for stage in config.train.stages]
    return _staged(config, pictures, stages, (1.0 / len(stages),) * len(stages))


# --- (b) length of the coarse stage, (c) number of levels ---------------------------------------


def coarse_shares(pictures: PictureSet) -> dict[str, RunConfig]:
    """Fig. 8a: all compute on all levels, and more and more of it on the coarsest first."""
    return {
        ("joint" if share == 0.0 else f"coarse-{share:g}"): base(pictures, coarse=share)
        for share in (0.0, 0.25, 0.75)
    }


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


def nests(pictures: PictureSet) -> dict[str, RunConfig]:
    """Fig. 8b: other numbers of levels, all trained from the start as `joint` is.

    One level is simple DM. No stage of the coarsest level alone, since which that is differs.
    """
    simple = preset(pictures.preset, "simple")
    others = {name: _nest(pictures, levels) for name, levels in NESTS[pictures.name].items()}
    return {"levels-1": _staged(simple, pictures, simple.train.stages, (1.0,)), **others}


def _nest(pictures: PictureSet, levels: dict[int, dict[str, Any]]) -> RunConfig:
    config = preset(pictures.preset)
    finest = config.model.levels[-1].model_dump()
    # A side has the shift that it has in the base.
    ratio = finest["shift_ratio"] / finest["side"]
    built = [
        {**finest, "side": side, **parts, "shift_ratio": ratio * side}
        for side, parts in levels.items()
    ]
    stage = config.train.stages[-1].model_copy(update={"mix": (), "levels": len(levels)})
    nest = {"model.levels": built, "train.stages": [stage.model_dump()]}
    return _staged(changed(config, nest), pictures, (stage,), (1.0,))


# --- (f) the open choices ------------------------------------------------------------------------


def _process(prediction: str, weighting: str) -> Change:
    return lambda config: changed(
        config,
        {"process.prediction": prediction, "process.weighting": [{"name": weighting}]},
    )


def _unsquared(config: RunConfig) -> RunConfig:
    """Shifts that grow with the side, not with its square, from the same one at the coarsest."""
    first = config.model.levels[0]
    squared = first.shift_ratio**first.shift_power
    levels = [
        {
            **level.model_dump(),
            "shift_power": 1.0,
            "shift_ratio": squared * level.side / first.side,
        }
        for level in config.model.levels
    ]
    return changed(config, {"model.levels": levels})


def _mixed(config: RunConfig, pictures: PictureSet) -> RunConfig:
    """Mixed resolutions in the last stage, at its compute; half of the rows have all levels."""
    first, last = config.train.stages
    count = len(config.model.levels)
    mixed = last.model_copy(update={"mix": (*[0.5 / (count - 1)] * (count - 1), 0.5)})
    return _staged(config, pictures, (first, mixed), (0.5, 0.5))


DATA_RMS = 0.87
"""Root mean square of the pixels of both sets at all levels, 0.84 to 0.91."""

CHOICES: dict[str, Change] = {
    "x0-v": _process("x0", "v"),
    "x0-min_snr": _process("x0", "min_snr"),
    "x0-sigmoid": _process("x0", "sigmoid"),
    "v-v": _process("v", "v"),
    "v-v_clipped": _process("v", "v_clipped"),
    "v-sigmoid": _process("v", "sigmoid"),
    "eps-eps": _process("eps", "eps"),
    "shift-power-1": lambda config: _unsquared(config),
    "scaling-std": lambda config: _with_levels(config, input_scaling="std"),
    "scaling-analytic": lambda config: changed(
        _with_levels(config, input_scaling="analytic"), {"model.data_std": DATA_RMS}
    ),
    "dropout-0.1": lambda config: _with_levels(config, dropout=0.1),
    "time-log-snr": lambda config: changed(config, {"model.time_input": "log-snr"}),
}


def choices(pictures: PictureSet) -> dict[str, RunConfig]:
    """What the paper leaves open, one choice at a time."""
    plain = base(pictures)
    changed = {name: change(plain) for name, change in CHOICES.items()}
    return {**changed, "mixed": _mixed(plain, pictures)}


# --- the list ------------------------------------------------------------------------------------

CURVE = (0.25, 0.7, 1.0)


def all_trials(scale: float = 1.0, samples: int = SAMPLES) -> list[Trial]:
    """Every trial, with a share of its compute; first one seed of everything, then the others."""
    sets = [replace(each, flops=scale * each.flops, scale=scale) for each in SETS.values()]
    rounds = range(max(pictures.seeds for pictures in sets))
    found = [trial for seed in rounds for each in sets for trial in _round(each, seed)]
    return [replace(trial, samples=samples) for trial in found]


def _round(pictures: PictureSet, seed: int) -> list[Trial]:
    small, large = cascade(pictures)
    configs = {
        "mdm": base(pictures),
        **coarse_shares(pictures),
        **nests(pictures),
        "finest": finest_only(pictures),
        "cascade": large,
        "latent": on_codes(pictures, "latent"),
        **({"codes": on_codes(pictures, "codes")} if pictures.name == "emoji" else {}),
        **choices(pictures),
    }
    wanted = configs if seed < pictures.ablation_seeds else COMPARED
    order = sorted(wanted, key=lambda name: name not in COMPARED)  # the comparison first
    seeded = {"train.seed": seed}
    return [
        Trial(
            f"{pictures.name}/{name}/{seed}",
            changed(configs[name], {**seeded, "name": f"{pictures.name}-{name}"}),
            CURVE if name in COMPARED else (1.0,),
            base=changed(small, seeded) if name == "cascade" else None,
            codec=pictures.codec if configs[name].codec is not None else None,
        )
        for name in order
        if name in configs and seed < pictures.seeds
    ]
