"""Longer trials: the paper's recipe against the presets', and levels that wake late."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from matryoshka_diffusion.config import RunConfig, StageConfig
from matryoshka_diffusion.presets import preset
from studies.trials import PictureSet, Trial, base_run, changed, sized, total_flops

LONG = {
    "fashion-long": PictureSet("fashion-long", "fashion-mnist", 7.2e13, 0.02, 0, batch_size=16),
    "emoji-long": PictureSet("emoji-long", "openmoji", 1.0e14, 0.05, 0, batch_size=16),
}
"""Longer trials; the paper's recipe has its finest level in 3,300 and 3,500 steps of them."""
RATE = 1e-3
"""Of all longer trials: half of that of `openmoji`, whose batches are four times theirs."""
SHORT = {"train__warmup_images": 1_600, "train__ema_decay": 0.99}
"""Of trials that have a preset's stages, as `sized` has it."""


def _in_proportion(config: RunConfig, flops: float, batch_size: int) -> RunConfig:
    """The run with all stages as much shorter as leaves so many FLOPs, in batches of one size."""
    scale = flops / total_flops(config) / batch_size
    update = {"batch_size": batch_size, "lr": RATE}
    stages = [
        {**stage.model_dump(), **update, "images": round(scale * stage.images) * batch_size}
        for stage in config.train.stages
    ]
    return changed(config, train__stages=stages)


def _paper(pictures: PictureSet) -> RunConfig:
    """The paper's recipe: v and its own error, all rows with all levels, a constant rate."""
    config = base_run(pictures, 0.25)
    stages = [{**stage.model_dump(), "lr": RATE} for stage in config.train.stages]
    return changed(
        config,
        train__stages=stages,
        process={"prediction": "v", "weighting": [{"name": "v"}]},
        train__decay_share=0.0,
        train__ema_decay=0.998,
    )


def _plus(pictures: PictureSet) -> RunConfig:
    """The preset with a third of the paper's compute, and on Fashion-MNIST what `openmoji` has."""
    config = preset(pictures.preset)
    third = pictures._replace(flops=pictures.flops / 3)
    if config.encoder is not None:
        return changed(_in_proportion(config, third.flops, pictures.batch_size), **SHORT)
    own = {"train__lr_per_level": True, "train__decay_share": 1.0}
    return changed(sized(config, third, (0.25, 0.75), (0.5, 0.5)), **own)


def longer_trials(scale: float, samples: int) -> Iterator[Trial]:
    """The paper's recipe, and what this project makes of it in a third of the compute."""
    for seed in range(3):
        for each in LONG.values():
            each = each._replace(flops=scale * each.flops)
            plus = _plus(each)
            variants = {"plus": plus, "paper": _paper(each)}
            if plus.encoder is not None:
                variants["perceptual"] = changed(plus, train__perceptual={})
                semantic = changed(preset(each.preset, "semantic"), **SHORT)
                variants["semantic"] = _in_proportion(semantic, each.flops / 3, each.batch_size)
            for name, config in variants.items():
                own: dict[str, Any] = {"name": f"{each.name}-{name}", "train__seed": seed}
                own |= {"train__preview_every_images": 0, "train__precision": "fp32"}
                own |= {"train__keep_checkpoints": 1, "data__held_out": each.held_out}
                yield Trial(f"{each.name}/{name}/{seed}", changed(config, **own), samples=samples)


LATE = "late"
"""Trials of 256 pixels, around the coarsest level of the shipped model."""
SHIPPED = "openmoji"
AROUND = {2: 3_200, 3: 6_400}
"""Images of the stages with so many levels, all awake."""
BATCH = 16
PRESETS_MIX = tuple(stage.mix for stage in preset("openmoji-256").train.stages[1:])
WAKING: dict[str, tuple[tuple[tuple[float, ...], ...], bool]] = {
    "awake": (((), ()), False),  # all levels in all rows, as in the paper
    "awake-mixed": (PRESETS_MIX, False),
    "late": (PRESETS_MIX, True),
    "late-middle": (((0.1, 0.9), (0.05, 0.6, 0.35)), True),  # most rows end at 64 pixels
}
"""Shares of the rows of both stages that end at each level, and whether levels wake late."""
SAVED = 0.6
"""Share of the compute of levels that are always awake that the others are given."""


def _around_shipped(mixes: tuple[tuple[float, ...], ...], wakes: bool) -> RunConfig:
    """Levels around the shipped model's coarsest one, with less compute where rows are mixed."""
    config = preset("openmoji-256")
    stages = [
        StageConfig(levels=levels, images=images, batch_size=BATCH, lr=RATE)
        for levels, images in AROUND.items()
    ]
    awake = changed(
        config,
        train__init=SHIPPED,
        train__init_levels=1,
        train__stages=[stage.model_dump() for stage in stages],
        train__wake=None,
        train__warmup_images=800,
        train__ema_decay=0.99,
        sampling__wake=None,
        sampling__steps=12,
    )
    if not any(mixes):
        return awake
    mixed = [{**stage.model_dump(), "mix": mix} for stage, mix in zip(stages, mixes, strict=True)]
    floors = {"train__wake": config.train.wake, "sampling__wake": config.sampling.wake}
    less = changed(awake, train__stages=mixed, **(floors if wakes else {}))
    return _in_proportion(less, SAVED * total_flops(awake), BATCH)


def late_trials(samples: int) -> Iterator[Trial]:
    """Levels that are always awake, and levels that wake late with less compute."""
    for seed in range(3):
        for name, (mixes, wakes) in WAKING.items():
            config = changed(
                _around_shipped(mixes, wakes),
                name=f"{LATE}-{name}",
                data__held_out=0.05,
                train__seed=seed,
                train__precision="fp32",
                train__preview_every_images=0,
                train__keep_checkpoints=1,
                train__log_every_images=320,
            )
            yield Trial(f"{LATE}/{name}/{seed}", config, samples=min(samples, 512))
