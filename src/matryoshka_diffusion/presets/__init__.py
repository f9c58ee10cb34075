"""Named runs: complete configs, and the paper's baselines as changes of a nest's config.

`mdm info NAME` prints a run as a table. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from functools import reduce
from typing import Any

from matryoshka_diffusion.config import (
    CoarseConfig,
    CodecConfig,
    ConfigError,
    FeaturesConfig,
    LevelConfig,
    RunConfig,
    StageConfig,
)
from matryoshka_diffusion.presets.one_gpu import ONE_GPU
from matryoshka_diffusion.presets.paper import PAPER
from matryoshka_diffusion.presets.small import CODECS as CODECS
from matryoshka_diffusion.presets.small import SMALL, in_stages

PRESETS: dict[str, Callable[[str], RunConfig]] = {**SMALL, **ONE_GPU, **PAPER}
"""Functions from a preset's name to its config."""

WORK = {
    "openmoji": 0.1686,
    "openmoji-256": 0.737,
    "emoji-styles": 0.5059,
    "fashion-mnist": 0.08661,
    "folder-64": 0.1432,
    "folder-256-cpu": 0.6878,
    "emoji-still": 0.07522,
    "emoji-video": 0.1515,
    "folder-128": 2612,
    "folder-256": 3158,
    "cc12m-64": 1.131e6,
    "cc12m-256": 1.87e6,
    "cc12m-256-nest3": 1.961e6,
    "cc12m-1024": 2.043e6,
    "cc12m-1024-nest5": 2.157e6,
    "webvid-64": 1.131e6,
    "webvid-16x64": 2.349e6,
    "webvid-16x256": 2.809e6,
    "imagenet-64": 1.644e5,
    "imagenet-256": 3.446e5,
    "imagenet-256-nest3": 3.676e5,
    "imagenet-1024": 3.873e5,
    "imagenet-1024-nest5": 4.159e5,
    "released-64": 1.14e6,
    "released-256": 1.883e6,
    "released-1024": 2.057e6,
}
"""Arithmetic of a whole training in 10^15 FLOP, as `mdm train --dry-run` counts it."""


# --- baselines (Section 4.1, Appendix D); parameters and GFLOP are in docs/baselines.md ----------

IMAGES = {
    "openmoji": {"simple": 100_000, "finest": 108_000, "upsampler": 55_000},
    "openmoji-256": {"simple": 92_500, "finest": 79_200, "upsampler": 67_100},
    "emoji-styles": {"simple": 200_000, "finest": 216_000, "upsampler": 110_000},
    "fashion-mnist": {"simple": 98_000, "finest": 90_000, "upsampler": 65_000},
    "imagenet-256": {"latent": 512 * 300_000},
    "cc12m-256": {"latent": 2048 * 500_000},
}
"""Images of trainings that take as much arithmetic as the nest's, to 1 %, or as the paper says.

A base and its upsampler share the arithmetic. Other baselines see as many images as the nest.
"""
KL = {"imagenet-256": (4, 3), "cc12m-256": (8, 4)}
"""Pixels along a side for each latent, and channels, of KL-F4 and KL-F8 (Appendix D.2)."""


def simple(run: RunConfig) -> RunConfig:
    """Simple DM: one UNet at the finest side, with the finest level's schedule."""
    return _one_stage(run, (reduce(_merged, run.model.levels),), "simple")


def finest(run: RunConfig) -> RunConfig:
    """The nest without the losses of its coarser levels."""
    weights = (*[0.0] * (len(run.model.levels) - 1), 1.0)
    process = run.process.model_copy(update={"level_weights": weights})
    return _one_stage(run, run.model.levels, "finest", process=process)


def base(run: RunConfig) -> RunConfig:
    """The base of a cascade: the coarsest level with the first stage, on D^r of the same images."""
    data = run.data.model_copy(update={"side": run.data_side})
    return _one_stage(run, run.model.levels[:1], "base", run.train.stages[0], data=data)


def upsampler(run: RunConfig) -> RunConfig:
    """The upsampler of a cascade: the UNet of `simple`, which enlarges images of the coarsest side.

    Samples have noise of time 0.3, or of the nearest time at which the SNR of a coarse pixel is 1
    to 4, as the paper found it to be needed. Such a pixel averages over many of the enlarged image.
    """
    inner, outer = run.model.levels[0], run.model.levels[-1]
    # By the cosine schedule the SNR of a coarse pixel at time t is (signal / tan(pi t / 2))^2.
    signal = outer.side / inner.side * math.exp(-outer.shift / 2)
    least, most = (2 / math.pi * math.atan(signal / root) for root in (2, 1))
    noise = round(20 * min(max(0.3, least), most)) / 20
    up = _one_stage(run, (reduce(_merged, run.model.levels),), "upsampler", run.train.stages[-1])
    model = up.model.model_copy(update={"coarse": CoarseConfig(side=inner.side)})
    sampling = up.sampling.model_copy(update={"coarse_noise": noise})
    return up.model_copy(update={"model": model, "sampling": sampling})


def latent(run: RunConfig) -> RunConfig:
    """Latent diffusion: the coarsest level, with its own trunk, on the latents of an autoencoder.

    On KL-F8's 32 x 32 the level does not halve after its first width, so attention is at 16 x 16 as
    in S64. Micro-conditions are about images. The schedule's shift was not tuned for latents.
    """
    coarsest, finest = run.model.levels[0], run.model.levels[-1]
    side = run.data_side // KL.get(run.name, (4, 4))[0]
    if side > coarsest.side:
        raise ConfigError(
            f"--as latent: {run.name} has latents of {side}, above its coarsest level"
        )
    new: dict[str, Any] = {"side": side, "patch": max(side // coarsest.stem_side, 1)}
    new |= {"micro": finest.micro, "halve": (False, True) if side < coarsest.stem_side else ()}
    level, first = coarsest.model_copy(update=new), run.train.stages[0]
    whole = first.model_copy(update={"images": run.train.images})
    return _on_latents(_one_stage(run, (level,), "latent", whole))


def codes(run: RunConfig) -> RunConfig:
    """A nest on latents: the 16 x 16 of `openmoji` with a coarser level of 8 x 8."""
    if run.name not in ("openmoji", "folder-64"):
        raise ConfigError(f"--as codes: {run.name} has no such baseline; openmoji has")
    coarse = run.model.levels[0].model_copy(update={"side": 8, "patch": 1})
    fine: dict[str, Any] = {"side": 16, "widths": (64, 64), "blocks": (1, 0), "attention": (0, 0)}
    fine["shift_ratio"] = 2.0 * coarse.shift_ratio
    levels = (coarse, coarse.model_copy(update=fine))
    stages = (
        StageConfig(levels=1, images=84_000, batch_size=64, lr=2e-3),
        StageConfig(levels=2, images=76_000, batch_size=48, lr=2e-3, mix=(0.4, 0.6)),
    )
    return _on_latents(_trained(run, levels, stages))


def thumbnail(run: RunConfig) -> RunConfig:
    """The nest with a smaller coarsest image: of the side of its features, so without a patch."""
    coarsest, *finer = run.model.levels
    if coarsest.stem_side > 8:
        raise ConfigError(f"--as: {run.name} has no level of 8 x 8 inside; openmoji has")
    ratio = coarsest.shift_ratio / coarsest.patch
    small = {"side": coarsest.stem_side, "patch": 1, "shift_ratio": ratio}
    levels = (coarsest.model_copy(update=small), *finer)
    return run.model_copy(update={"model": run.model.model_copy(update={"levels": levels})})


def semantic(run: RunConfig) -> RunConfig:
    """The nest of `thumbnail` with features of EfficientNet-Lite0 in place of its coarsest image.

    Their 12 channels take the arithmetic of `openmoji` itself, whose stem has as many. To run ahead
    of the pixels, they have four times the SNR of the image. Neither was tuned.
    """
    nest = thumbnail(run).model
    coarsest, *finer = nest.levels
    ahead = {"features": 12, "shift_ratio": coarsest.shift_ratio / 2}
    levels = (coarsest.model_copy(update=ahead), *finer)
    update = {"model": nest.model_copy(update={"levels": levels}), "features": FeaturesConfig()}
    return run.model_copy(update=update)


def _merged(inner: LevelConfig, outer: LevelConfig) -> LevelConfig:
    """Two levels as one UNet: at the side where they meet, their blocks add up."""
    meeting = outer.blocks[-1] + inner.blocks[0]
    update = {
        "side": outer.side,
        "widths": (*outer.widths[:-1], *inner.widths),
        "blocks": (*outer.blocks[:-1], meeting, *inner.blocks[1:]),
        "attention": (*outer.attention[:-1], *inner.attention),
        "patch": outer.patch,
        "micro": outer.micro,
        "shift_ratio": outer.shift_ratio,
        "shift_power": outer.shift_power,
    }
    return inner.model_copy(update=update)


def _one_stage(
    run: RunConfig,
    levels: tuple[LevelConfig, ...],
    kind: str,
    like: StageConfig | None = None,
    **update: Any,
) -> RunConfig:
    """The run with these levels and one stage of all, like a stage of the run or all of them."""
    like = like or run.train.stages[-1].model_copy(update={"images": run.train.images})
    images = IMAGES.get(run.name, {}).get(kind, like.images)
    stage = like.model_copy(update={"levels": len(levels), "images": images, "mix": ()})
    return _trained(run, levels, (stage,)).model_copy(update=update)


def _trained(
    run: RunConfig, levels: tuple[LevelConfig, ...], stages: tuple[StageConfig, ...]
) -> RunConfig:
    """The run with these levels, all of them in every row of the last stage and in every step."""
    update = {
        "model": run.model.model_copy(update={"levels": levels}),
        "train": in_stages(run.train.model_copy(update={"wake": None}), *stages),
        "sampling": run.sampling.model_copy(update={"wake": None}),
    }
    return run.model_copy(update=update)


def _on_latents(run: RunConfig) -> RunConfig:
    """The run with levels of latents, which have unit variance and no bounds for estimates."""
    factor, channels = KL.get(run.name, (4, 4))
    update = {
        "model": run.model.model_copy(update={"channels": channels, "data_std": 1.0}),
        "codec": CodecConfig(factor=factor),
        "sampling": run.sampling.model_copy(update={"threshold": ("none",)}),
    }
    return run.model_copy(update=update)


BASELINES = {
    kind.__name__: kind
    for kind in (simple, finest, base, upsampler, latent, codes, thumbnail, semantic)
}
"""Functions from a run to its baseline, by the word after `--as`."""


# --- a run by its name ---------------------------------------------------------------------------


def preset(name: str, as_: str | None = None) -> RunConfig:
    """The run of this name, or what the paper compares it with.

    Args:
        as_: a baseline in place of the nest, one of `BASELINES`.

    Raises:
        ConfigError: there is no such preset (the message has the nearest name), or the baseline is
            not for this one.
    """
    if name in CODECS:
        raise ConfigError(f"{name} is an autoencoder; only mdm train {name} takes it")
    if name not in PRESETS:
        plain, _, last = name.rpartition("-")
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        near = f"{plain} --as {last}" if plain in PRESETS and last in BASELINES else near
        known = ", ".join([*PRESETS, *CODECS])
        raise ConfigError(f"unknown preset {name!r} (did you mean {near}?); there are: {known}")
    run = PRESETS[name](name)
    if as_ is None:
        return run
    if as_ not in BASELINES:
        raise ConfigError(f"--as {as_}: unknown; there are {', '.join(BASELINES)}")
    if len(run.model.levels) == 1 or run.data_frames:
        raise ConfigError(f"--as {as_}: {name} is no nest of images; omit --as")
    return BASELINES[as_](run).model_copy(update={"name": f"{name}-{as_}"})
