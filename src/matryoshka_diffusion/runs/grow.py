"""Start a run from a trained model: with one finer level around it, or as its own beginning."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from matryoshka_diffusion.config import (
    GENTLE,
    PER_LEVEL,
    VIDEO_SOURCES,
    ConfigError,
    LevelConfig,
    RunConfig,
    StageConfig,
)
from matryoshka_diffusion.configfile import assignment, changed, to_yaml
from matryoshka_diffusion.data.source import absolute, with_source
from matryoshka_diffusion.files import refuse_full, write_atomically
from matryoshka_diffusion.models.find import count_levels, find_model
from matryoshka_diffusion.nn.nested import NestedUNet, grow
from matryoshka_diffusion.training import checkpoint
from matryoshka_diffusion.training.averages import PowerEma
from matryoshka_diffusion.training.stages import active_model
from matryoshka_diffusion.training.weights import load_network


def grow_run(
    run: str,
    finer: Callable[[LevelConfig], LevelConfig],
    out: Path,
    assignments: Iterable[str] = (),
    *,
    data: str | None = None,
    freeze_coarse: int = 0,
    ramp: int = 0,
) -> RunConfig:
    """Start a run in `out` whose network is that of `run` with one finer level around it.

    The coarse predictions of the new network are bit-equal to the old ones.

    Args:
        finer: makes the new level from the finest one (`next_level` or `next_frames`).
        assignments: `path.to.key=value` changes of the new run's config.
        data: images or videos in place of those of `run`.
        freeze_coarse: the new stage's `freeze_coarse_images`.
        ramp: its `ramp_images`.

    Raises:
        ConfigError: the new level does not nest on the finest one, or needs videos where `run` had
            images; `out` is not empty; the new stage is shorter than `freeze_coarse` or `ramp`.
        FileNotFoundError, ValueError: `run` is no trained model.
    """
    refuse_full(out)
    weights, config = find_model(run)
    if (reached := count_levels(weights)) < (levels := len(config.model.levels)):
        raise ConfigError(f"{run} has reached {reached} of its {levels} levels: finish it first")
    level = finer(config.model.levels[-1])
    changes = _added_level(config, level)
    for name, images in zip(GENTLE, (freeze_coarse, ramp), strict=True):
        changes.append((f"train.stages[0].{name}", images))
    if data is not None:
        if config.data.source != "fluent-emoji":  # else a copy of the same set
            changes.append(("data.source", "folder"))  # `with_source` finds what it is
        changes += [("data.mix", []), ("data.path", absolute(data)), ("data.identity", None)]
    changes += map(assignment, assignments)
    grown = changed(config, changes, where=f"{run} with a level of {level.size}")
    if grown.data_frames and grown.data.source not in VIDEO_SOURCES and data is None:
        raise ConfigError(
            f"the new level has {grown.data_frames} frames, but the run was trained on images "
            f"(data.source={grown.data.source}): give videos with --data"
        )
    grown = with_source(grown)
    small = load_network(config.model, weights, where=run)
    _begin(grown, grow(small, grown.model, seed=grown.train.seed), out)
    return grown


def _added_level(config: RunConfig, level: LevelConfig) -> list[tuple[str, Any]]:
    """The changes that add a level, and put one stage of all levels in place of the old ones."""
    last, levels = config.train.stages[-1], (*config.model.levels, level)
    lengths = last.model_dump(include={"images", "batch_size", "lr"})
    stage = StageConfig(levels=len(levels), **lengths)
    changes: list[tuple[str, Any]] = [
        ("name", f"{config.name}-{level.size}"),
        ("model.levels", [one.model_dump(mode="json") for one in levels]),
        ("train.stages", [stage.model_dump(mode="json")]),
        ("train.init", None),
        ("train.init_levels", len(levels) - 1),
        ("train.averaged", None),
    ]
    if (config.data.side or 0) % (level.side * config.pixels_per_side):
        changes.append(("data.side", None))  # images of the finest level's side, as by default
    if level.frames is not None:
        changes.append(("data.augment", 0.0))  # clips are not transformed
    for part, name in PER_LEVEL:
        values = getattr(getattr(config, part), name)
        if len(values or ()) > 1:  # one for each level: the new one takes the finest one's
            changes.append((f"{part}.{name}", (*values, values[-1])))
    return changes


def warm_start(config: RunConfig, out: Path) -> None:
    """Put the weights of `train.init` into a run that has no checkpoint yet.

    All of them are used, and the levels they belong to compute what they did, bit for bit. Further
    levels of the first stage are new.

    Raises:
        ConfigError: the model is another one than this run's first levels.
        FileNotFoundError, ValueError: there is no such model.
    """
    init = config.train.init
    assert init is not None
    begun = checkpoint.newest(out / "checkpoints") is not None
    if begun or config.train.lora is not None:  # adapters leave a model beside
        return
    weights, old = find_model(init)
    levels = count_levels(weights)
    if (hashes := [one.features and one.features.weights for one in (old, config)])[0] != hashes[1]:
        raise ConfigError(
            f"train.init: {init} has features of another network or projection: take its own "
            f"(--set features.path={init})"
        )
    if config.train.init_levels not in (0, levels):
        raise ConfigError(
            f"train.init_levels is {config.train.init_levels}, but {init} has {levels}; omit it"
        )
    small = load_network(old.model.first(levels), weights, where=init)
    try:
        net = grow(small, active_model(config, 0), seed=config.train.seed)
    except ValueError as error:
        raise ConfigError(
            f"train.init: {init} is not the beginning of this run's first stage ({error})"
        ) from error
    _begin(config, net, out)


def _begin(config: RunConfig, net: NestedUNet, out: Path) -> None:
    """A run in `out` that starts from `net` and has seen no image."""
    counters = dict.fromkeys(("images_seen", "steps", "skipped", "skipped_in_a_row"), 0)
    snapshot = checkpoint.Snapshot(
        {**counters, "seconds": 0.0, "config": config.model_dump(mode="json")},
        weights=net.state_dict(),
        ema=dict(net.named_parameters()),
        optimizer={},
        tracks=PowerEma(net, config.train.ema_power).state(),
    )
    # The config makes the folder a run, so it comes last: no run without its weights.
    checkpoint.save(out / "checkpoints", snapshot, keep=1)
    write_atomically(out / "config.yaml", lambda file: file.write(to_yaml(config).encode()))


# --- the paper's patterns for a finer level ----------------------------------------------------


def next_level(finest: LevelConfig, side: int) -> LevelConfig:
    """The paper's pattern for a finer level: widths double inwards, the last block is saved.

    Around S64 this gives exactly the levels of Appendix A. Where half of a width is no multiple of
    32, the next larger one is taken.

    Raises:
        ConfigError: `side` is not the finest side times a power of two.
    """
    halvings = _halvings("--to", side, finest.side)
    inner = finest.widths[0]
    micro = [
        one if one.ceiling is None else one.model_copy(update={"ceiling": float(side)})
        for one in finest.micro  # a released condition is clamped to its level's side
    ]
    return _around(
        finest,
        halvings,
        side=side,
        widths=tuple(32 * -(-inner // (32 * 2 ** (halvings - i))) for i in range(halvings + 1)),
        micro=tuple(micro),
        shift_ratio=finest.shift_ratio * side / finest.side,
    )


def next_frames(finest: LevelConfig, frames: int) -> LevelConfig:
    """The paper's pattern for a level with more frames: one width, attention over frames at each.

    Around S64, for 16 frames, it is MDM-S64T16 (Appendix A). The schedule's shift there is 4 at
    the same side: the root of the factor in numbers, as that of a level finer in space is. So 16
    frames have a quarter of the signal to noise, whatever the power of the finest level's shift.

    Raises:
        ConfigError: `frames` is no power of two times those of the finest level (1 of an image).
    """
    halvings, power = _halvings("--frames", frames, finest.frames or 1), finest.shift_power
    root = 2 ** (halvings / 2 / power) if power else 1.0  # a power of 0 shifts nothing
    return _around(
        finest,
        halvings,
        frames=frames,
        widths=(finest.widths[0],) * (halvings + 1),
        halve_frames=(True,) * halvings,
        frame_attention=(*[1] * halvings, 0),
        shift_ratio=finest.shift_ratio * root,
    )


def _around(finest: LevelConfig, halvings: int, **update: Any) -> LevelConfig:
    """A level that halves so many times before the finest one begins."""
    kept = ("side", "frames", "heads", "patch", "micro", "shift_power")
    parts = {name: getattr(finest, name) for name in kept} | update
    blocks = (*finest.blocks[:1] * halvings, max(finest.blocks[0] - 1, 0))
    return LevelConfig(blocks=blocks, attention=(0,) * (halvings + 1), **parts)


def _halvings(option: str, size: int, finest: int) -> int:
    """The number of halvings from `size` to the finest one."""
    count = (size // finest).bit_length() - 1
    if size <= finest or finest * 2**count != size:
        examples = ", ".join(str(finest * 2**n) for n in (1, 2, 3))
        raise ConfigError(f"{option} {size}: give {finest} times a power of two ({examples}, ...)")
    return count
