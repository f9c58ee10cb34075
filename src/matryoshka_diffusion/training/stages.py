"""Progressive training (Section 3.3) as data: every optimizer step of a run, before it is taken.

Time is the number of images seen. A step is a pure function of where it starts, so a resumed run
goes through the same steps as one that never stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

from matryoshka_diffusion.config import ModelConfig, RunConfig, TrainConfig
from matryoshka_diffusion.pyramid import rows_of_mix


class Step(NamedTuple):
    """One optimizer step: the samples `first .. end - 1` of the run.

    Attributes:
        stage: index into `train.stages`.
        first: images seen before the step; also the global number of its first sample.
        rows: samples that hold each active level, coarse to fine; finer ones are a prefix.
        lr: learning rate of each active level.
        ends_stage: True for the last step of its stage.
        frozen: the first so many levels, and what all levels share, are not changed.
        ramp: a factor on the loss weight of each active level; empty means 1 for all.
    """

    stage: int
    first: int
    rows: tuple[int, ...]
    lr: tuple[float, ...]
    ends_stage: bool
    frozen: int = 0
    ramp: tuple[float, ...] = ()

    @property
    def count(self) -> int:
        """Images in the step: every one has the coarsest level."""
        return self.rows[0]

    @property
    def end(self) -> int:
        """Images seen after the step."""
        return self.first + self.count

    def passes(self, every: int) -> bool:
        """True if the step reaches or passes a multiple of `every` images."""
        return self.end // every > self.first // every


def steps(train: TrainConfig, images_seen: int = 0) -> Iterator[Step]:
    """Yield the steps from `images_seen` to the end of the run."""
    while images_seen < train.images:
        step = step_at(train, images_seen)
        yield step
        images_seen = step.end


def step_at(train: TrainConfig, images_seen: int) -> Step:
    """Return the step that starts after `images_seen`, cut so that its stage ends exactly."""
    index = stage_at(train, images_seen)
    stage, old = train.stages[index], train.levels_before(index)
    left = sum(s.images for s in train.stages[: index + 1]) - images_seen
    count, into_stage = min(stage.batch_size, left), stage.images - left
    mix = stage.mix or (*[0.0] * (stage.levels - 1), 1.0)
    # The loss of new levels rises evenly to 1, a smooth transition that the paper names as future
    # work. The step's images count, so no step has weight zero.
    ramped, ramp = into_stage + count, ()
    if ramped < stage.ramp_images:
        ramp = (1.0,) * old + (ramped / stage.ramp_images,) * (stage.levels - old)
    return Step(
        stage=index,
        first=images_seen,
        rows=rows_of_mix(mix, images_seen, count),
        lr=learning_rates(train, images_seen, count),
        ends_stage=count == left,
        frozen=old if into_stage < stage.freeze_coarse_images else 0,
        ramp=ramp,
    )


def _joined_in(train: TrainConfig) -> Iterator[int]:
    """Index of the stage in which each level of the run joins, coarse to fine."""
    before = 0
    for index, stage in enumerate(train.stages):
        yield from [index] * (stage.levels - before)
        before = stage.levels


def joined_after(train: TrainConfig) -> tuple[int, ...]:
    """Count the steps that the run takes before each of its levels joins, coarse to fine."""
    taken = [-(-stage.images // stage.batch_size) for stage in train.stages]
    return tuple(sum(taken[:index]) for index in _joined_in(train))


def stage_at(train: TrainConfig, number: int) -> int:
    """Index of the stage that image `number` (counted from 0) of the run is in."""
    ends = accumulate(stage.images for stage in train.stages)
    return next(index for index, end in enumerate(ends) if number < end)


def learning_rates(train: TrainConfig, images_seen: int, count: int) -> tuple[float, ...]:
    """The stage's rate, times a linear warm-up, times the final linear decay, for each level.

    With `lr_per_level` both are of a level's life, from where it joins to the end of the run. Else
    the decay is of the run, and the warm-up of all levels restarts where new ones join.
    The warm-up includes the step's images and the decay does not, so no step has rate zero.
    """
    stage = train.stages[stage_at(train, images_seen)]
    joined = [sum(s.images for s in train.stages[:index]) for index in _joined_in(train)]
    own = joined[: stage.levels]
    # For each level, the images seen where its warm-up and its life begin.
    begins = [(n, n) for n in own] if train.lr_per_level else [(own[-1], 0)] * stage.levels
    rates = []
    for warm_from, life_from in begins:
        warm = min(1.0, (images_seen + count - warm_from) / max(train.warmup_images, 1))
        decay_images = train.decay_share * (train.images - life_from)
        left = (train.images - images_seen) / max(decay_images, 1.0)
        rates.append(stage.lr * warm * min(1.0, left))
    return tuple(rates)


def active_levels(train: TrainConfig, images_seen: int) -> int:
    """Number of levels that the last of `images_seen` images was shown to.

    A finished run has the levels of its last stage, which may be fewer than `model.levels`.
    """
    return train.stages[stage_at(train, max(images_seen - 1, 0))].levels


def active_model(config: RunConfig, images_seen: int) -> ModelConfig:
    """Config of the network at that place of the run: the model's `active_levels`."""
    return config.model.first(active_levels(config.train, images_seen))
