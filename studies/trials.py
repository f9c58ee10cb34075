"""The trials: for each data set one base, and variants that differ from it in one thing.

The bases are the presets' networks and rates with the plainest progressive training: half of the
compute on the coarsest level, half on all levels, every row with all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.utils.flop_counter import FlopCounterMode

from matryoshka_diffusion import configfile
from matryoshka_diffusion.codecconfig import CodecRunConfig
from matryoshka_diffusion.config import RunConfig, StageConfig, WeightingConfig
from matryoshka_diffusion.nn.costs import forward_flops
from matryoshka_diffusion.presets import CODECS, preset
from matryoshka_diffusion.runs.train_autoencoder import build

SAMPLES = 1024  # of a distance
DECAY = 0.3  # share of the last stage in which the rate decays (see presets.small.DECAY)
CURVE = (0.25, 0.7, 1.0)  # shares of the compute at which a compared trial is measured
NEW = 0.1  # share of its last stage that a network has behind it before it is measured
PASSES = 3  # of a training image: one forward, two for its gradients
TOKENS = 8  # of text: the longest of a batch of 32 of OpenMoji's names has 8.3 on average
COMMON_WEIGHT = (WeightingConfig(name="v_clipped"),)
"""The weighting that held-out losses are compared under, whatever the training had."""


def agrees(stored: Any, today: Any) -> bool:
    """True if a stored form is that of today; a field that is new since then may be missing."""
    if isinstance(stored, dict) and isinstance(today, dict):
        return all(key in today and agrees(value, today[key]) for key, value in stored.items())
    if isinstance(stored, list) and isinstance(today, list):
        return len(stored) == len(today) and all(map(agrees, stored, today))
    return stored == today


class PictureSet(NamedTuple):
    """A data set, and the compute of each of its trials."""

    name: str
    preset: str
    flops: float
    held_out: float  # share of the images without training
    ablation_seeds: int
    seeds: int = 3  # of the comparison with the baselines
    batch_size: int = 32


SETS = {
    "fashion": PictureSet("fashion", "fashion-mnist", 2.4e13, 0.02, 3),
    "emoji": PictureSet("emoji", "openmoji", 5.0e13, 0.05, 1),
}


def earlier(name: str, kind: str | None = None) -> RunConfig:
    """A preset, or a baseline of it, as it was when (a) to (f) were run.

    The shift ratios of `openmoji` were half of today's, captions were not whitened, one rate held
    for all levels, and samples were guided.
    """
    config = preset(name, kind)
    train: dict[str, Any] = {"train__whiten_captions": False, "train__lr_per_level": False}
    if config.encoder is None:
        return changed(config, **train)
    levels = [level.model_dump() for level in config.model.levels]
    halved = [{**level, "shift_ratio": level["shift_ratio"] / 2} for level in levels]
    last = config.train.stages[-1].images / config.train.images
    train |= {"train__decay_share": round(DECAY * last, 4), "sampling__guidance": [3.0]}
    if config.sampling.coarse_noise is not None:
        train["sampling__coarse_noise"] = 0.3
    return changed(config, model__levels=halved, **train)


@dataclass(frozen=True)
class Trial:
    """A run of the product, or samples of one under other settings.

    The name of a run is set/variant/seed; samples add /setting. An upsampler has a `base` that is
    trained first. A model of latents has a `codec`, which all trials of a set share; its training
    is not part of their compute.
    """

    name: str
    config: RunConfig
    points: tuple[float, ...] = (1.0,)  # shares of the compute at which it is measured
    base: RunConfig | None = None
    codec: CodecRunConfig | None = None
    samples: int = SAMPLES
    settings: dict[str, Any] | None = field(default=None, hash=False)

    @property
    def parts(self) -> tuple[RunConfig, ...]:
        """The runs that its compute goes into, in their order."""
        return (self.config,) if self.base is None else (self.base, self.config)

    @property
    def trained(self) -> dict[str, Any]:
        """All that its networks depend on, and when they are measured."""
        runs = [part.model_dump(mode="json") for part in self.parts]
        codec = None if self.codec is None else self.codec.model_dump(mode="json")
        return {"runs": runs, "codec": codec, "points": list(self.points)}

    @property
    def form(self) -> dict[str, Any]:
        """All that its result depends on; stored with the result, to know an outdated one."""
        weights = [weight.model_dump(mode="json") for weight in COMMON_WEIGHT]
        precision = self.config.train.precision  # of the network that draws, too
        measured = {"samples": self.samples, "precision": precision, "new": NEW}
        measured["held_out_loss"] = weights
        form = {"trained": self.trained, "measured": measured}
        if self.settings is None:
            return form
        return {"trial": form, "settings": self.settings, "measured": measured}


def changed(config: RunConfig, **changes: Any) -> RunConfig:
    """The config with other values at these paths, written with `__` in place of the dot."""
    named = [(path.replace("__", "."), value) for path, value in changes.items()]
    return configfile.changed(config, named)


_forward = cache(forward_flops)


def image_flops(run: RunConfig, stage: StageConfig) -> float:
    """FLOPs of training on one image of a stage, on average over its mix of finest levels."""
    shares = dict(enumerate(stage.mix, 1)) or {stage.levels: 1.0}
    counted = [share * _forward(run.model, n, TOKENS) for n, share in shares.items() if share]  # pyright: ignore[reportArgumentType]
    return PASSES * sum(counted)


def codec_flops(codec: CodecRunConfig) -> float:
    """FLOPs of training an autoencoder."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build(codec, colours=3)(torch.empty(1, 3, codec.side, codec.side))
    return PASSES * codec.images * counter.get_total_flops()


def total_flops(run: RunConfig) -> float:
    """FLOPs of a whole training."""
    return sum(stage.images * image_flops(run, stage) for stage in run.train.stages)


def images_at(run: RunConfig, flops: float) -> int:
    """The number of images after which the training has spent so many FLOPs."""
    images = 0
    for stage in run.train.stages:
        here = min(stage.images, round(flops / image_flops(run, stage)))
        images, flops = images + here, flops - here * image_flops(run, stage)
    return images


def sized(
    config: RunConfig, pictures: PictureSet, shares: Sequence[float], mix: tuple[float, ...] = ()
) -> RunConfig:
    """The run with shares of the compute for its stages, and with what all trials have in common.

    `mix` is that of the last stage; there is none in the others. Stages are whole batches; empty
    ones go.
    """
    sized = []
    for stage, share in zip(config.train.stages, shares, strict=True):
        rows = mix if stage is config.train.stages[-1] else ()
        stage = stage.model_copy(update={"batch_size": pictures.batch_size, "mix": rows})
        flops = pictures.batch_size * image_flops(config, stage)
        images = pictures.batch_size * round(share * pictures.flops / flops)
        sized += [stage.model_copy(update={"images": images})] * (images > 0)
    return changed(
        config,
        data__held_out=pictures.held_out,
        train__stages=[stage.model_dump() for stage in sized],
        train__decay_share=DECAY * sized[-1].images / sum(stage.images for stage in sized),
        train__precision="bf16",
        # A third of the presets' length needs shorter memories and smaller batches.
        train__ema_decay=0.99,
        train__warmup_images=1_600,
        train__preview_every_images=0,
        train__checkpoint_every_images=20_000,
        train__keep_checkpoints=1,
        train__log_every_images=1_000,
    )


def base_run(pictures: PictureSet, coarse: float = 0.5) -> RunConfig:
    """The run that every variant is compared with; `coarse` is the coarsest level's compute."""
    config = earlier(pictures.preset)
    between = [0.0] * (len(config.train.stages) - 2)
    return sized(config, pictures, (coarse, *between, 1.0 - coarse))


def _baseline(pictures: PictureSet, kind: str, compute: float = 1.0) -> RunConfig:
    """A baseline of the paper with a share of the compute, the same for each of its stages."""
    config = earlier(pictures.preset, kind)
    count = len(config.train.stages)
    return sized(config, pictures, (compute / count,) * count)


# Levels as (side, widths, blocks, attention), coarse to fine, under another number of them. A level
# that takes the place of two has their halvings; one below the coarsest takes its deep half.
Nest: TypeAlias = tuple[tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...]], ...]
NESTS: dict[str, dict[str, Nest]] = {
    "fashion": {
        "levels-3": (
            (8, (128,), (1,), (1,)),
            (16, (64, 64), (1, 0), (0, 0)),
            (32, (64, 64), (1, 0), (0, 0)),
        ),
    },
    "emoji": {
        "levels-2": (
            (16, (96, 192), (1, 1), (0, 1)),
            (64, (32, 32, 32), (0, 0, 0), (0, 0, 0)),
        ),
        "levels-4": (
            (8, (192,), (1,), (1,)),
            (16, (96, 96), (1, 0), (0, 0)),
            (32, (64, 32), (0, 0), (0, 0)),
            (64, (32, 32), (0, 0), (0, 0)),
        ),
    },
}


def _nest(pictures: PictureSet, nest: Nest) -> RunConfig:
    """Fig. 8b: another number of levels, all trained from the start as in `joint`."""
    config = earlier(pictures.preset)
    finest = config.model.levels[-1].model_dump()
    ratio = finest["shift_ratio"] / finest["side"]  # a side has the shift that it has in the base
    keys = ("side", "widths", "blocks", "attention")
    levels = [
        {**finest, **dict(zip(keys, level, strict=True)), "shift_ratio": ratio * level[0]}
        for level in nest
    ]
    stage = config.train.stages[-1].model_copy(update={"levels": len(levels), "mix": ()})
    nested = changed(config, model__levels=levels, train__stages=[stage.model_dump()])
    return sized(nested, pictures, (1.0,))


PAIRS = ("x0-v", "x0-min_snr", "x0-sigmoid", "v-v", "v-v_clipped", "v-sigmoid", "eps-eps")
"""Predictions and weightings that are tried in place of x0-v_clipped."""
SCALINGS = ("shift-power-1", "scaling-std", "scaling-analytic")
CHOICES = (*PAIRS, *SCALINGS, "dropout-0.1", "time-log-snr", "mixed")


def _choices(pictures: PictureSet) -> dict[str, RunConfig]:
    """The base with other choices where the paper leaves one open."""
    base = base_run(pictures)
    levels, coarser = base.model.levels, len(base.model.levels) - 1

    def each(**update: Any) -> list[dict[str, Any]]:
        return [{**level.model_dump(), **update} for level in levels]

    # Shifts that grow with the side, not with its square, from the same one at the coarsest level.
    slope = levels[0].shift_ratio ** levels[0].shift_power / levels[0].side
    unsquared = [{**x, "shift_ratio": slope * x["side"]} for x in each(shift_power=1.0)]
    parts = {name: name.split("-") for name in PAIRS}
    # The root mean square of the pixels of both sets at all levels is 0.84 to 0.91.
    analytic = {"model__levels": each(input_scaling="analytic"), "model__data_std": 0.87}
    return {
        **{
            name: changed(base, process={"prediction": x, "weighting": [{"name": weighting}]})
            for name, (x, weighting) in parts.items()
        },
        "shift-power-1": changed(base, model__levels=unsquared),
        "scaling-std": changed(base, model__levels=each(input_scaling="std")),
        "scaling-analytic": changed(base, **analytic),
        "dropout-0.1": changed(base, model__levels=each(dropout=0.1)),
        "time-log-snr": changed(base, model__time_input="log-snr"),
        # Half of the rows of the last stage have all levels, at its compute.
        "mixed": sized(base, pictures, (0.5, 0.5), (*[0.5 / coarser] * coarser, 0.5)),
    }


COMPARED = ("mdm", "joint", "levels-1", "finest", "cascade", "latent", "codes")
"""Variants that are measured along their training, and with all seeds."""


def _variants(pictures: PictureSet) -> dict[str, RunConfig]:
    """Every variant by its name; that of the cascade is its upsampler."""
    latents = ("latent", "codes") if pictures.name == "emoji" else ("latent",)
    return {
        "mdm": base_run(pictures),
        "joint": base_run(pictures, 0.0),
        "levels-1": _baseline(pictures, "simple"),
        "finest": _baseline(pictures, "finest"),
        "cascade": _baseline(pictures, "upsampler", 0.5),
        **{kind: _baseline(pictures, kind) for kind in latents},
        **{f"coarse-{share}": base_run(pictures, share) for share in (0.25, 0.75)},
        **{name: _nest(pictures, levels) for name, levels in NESTS[pictures.name].items()},
        **_choices(pictures),
    }


def short_trials(scale: float, samples: int) -> Iterator[Trial]:
    """Every run; first one seed of everything, then the others."""
    sets = [each._replace(flops=scale * each.flops) for each in SETS.values()]
    variants = {each: _variants(each) for each in sets}
    small = {each: _baseline(each, "base", 0.5) for each in sets}  # the cascades' first networks
    for seed in range(max(each.seeds for each in sets)):
        for each in sets:
            codec = CODECS[f"{each.preset}-codec"]
            codec = codec.model_copy(update={"images": round(scale * codec.images)})
            for name, config in variants[each].items():
                if seed < (each.seeds if name in COMPARED else each.ablation_seeds):
                    yield Trial(
                        f"{each.name}/{name}/{seed}",
                        changed(config, train__seed=seed, name=f"{each.name}-{name}"),
                        CURVE if name in COMPARED else (1.0,),
                        changed(small[each], train__seed=seed) if name == "cascade" else None,
                        codec if config.codec is not None else None,
                        samples,
                    )
