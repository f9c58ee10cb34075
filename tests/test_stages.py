"""Progressive training as data: the steps of a run."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryoshka_diffusion.config import StageConfig, TrainConfig
from matryoshka_diffusion.training.stages import active_model, joined_after, step_at, steps
from tiny_run import tiny_config


def stage(levels: int, images: int, batch_size: int = 4, lr: float = 1.0, mix=()) -> StageConfig:
    return StageConfig(levels=levels, images=images, batch_size=batch_size, lr=lr, mix=mix)


@st.composite
def trainings(draw: st.DrawFn) -> TrainConfig:
    """Up to four stages of up to three levels, some of them with mixed resolutions."""
    levels = sorted(draw(st.lists(st.integers(1, 3), min_size=1, max_size=4)))
    stages = []
    for count in levels:
        weights = draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))
        mix = tuple(weight / sum(weights) for weight in weights) if sum(weights) else ()
        stages.append(stage(count, draw(st.integers(1, 60)), draw(st.integers(1, 17)), mix=mix))
    return TrainConfig(
        stages=tuple(stages),
        warmup_images=draw(st.integers(0, 40)),
        decay_share=draw(st.floats(0, 1)),
        lr_per_level=draw(st.booleans()),
    )


@given(trainings(), st.data())
def test_steps_tile_the_run_from_any_place_and_stages_end_exactly(train, data):
    plan = list(steps(train))
    assert (plan[0].first, plan[-1].end) == (0, train.images)
    assert all(a.end == b.first for a, b in itertools.pairwise(plan))
    for index, config in enumerate(train.stages):
        inside = [step for step in plan if step.stage == index]
        assert sum(step.count for step in inside) == config.images
        assert [step.ends_stage for step in inside] == [False] * (len(inside) - 1) + [True]
        assert all(step.count == config.batch_size for step in inside[:-1])
    for step in plan:  # finer levels hold a prefix
        assert len(step.rows) == train.stages[step.stage].levels
        assert all(a >= b >= 0 for a, b in itertools.pairwise(step.rows))
    joined = joined_after(train)
    assert len(joined) == train.stages[-1].levels
    for level, count in enumerate(joined):
        assert next(n for n, step in enumerate(plan) if len(step.rows) > level) == count
    done = data.draw(st.integers(0, len(plan)))
    place = plan[done].first if done < len(plan) else train.images
    assert list(steps(train, place)) == plan[done:]


def test_mixed_resolution_shares_are_exact_over_a_stage():
    train = TrainConfig(stages=(stage(3, 4800, batch_size=48, mix=(0.5, 0.3, 0.2)),))
    rows = [step.rows for step in steps(train)]
    assert [sum(level) for level in zip(*rows, strict=True)] == [4800, 2400, 960]
    plain = TrainConfig(stages=(stage(3, 10, batch_size=4),))
    assert [step.rows for step in steps(plain)] == [(4, 4, 4), (4, 4, 4), (2, 2, 2)]


def test_learning_rate_warms_up_at_every_growth_and_decays_at_the_end():
    train = TrainConfig(
        stages=(stage(1, 100, 10, lr=1.0), stage(2, 100, 10, lr=0.5), stage(2, 200, 10, lr=0.25)),
        warmup_images=40,
        decay_share=0.25,
    )
    rates = {step.first: step.lr[0] for step in steps(train)}
    assert all(len({*step.lr}) == 1 for step in steps(train)), "one rate for all levels"
    assert [rates[n] for n in (0, 10, 20, 30, 40, 90)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [rates[n] for n in (100, 110, 130, 190)] == [0.125, 0.25, 0.5, 0.5]
    assert rates[200] == rates[290] == 0.25, "a stage without new levels has no warm-up"
    # 400 images in all, so the last 100 decay; the last step still moves.
    late = [rates[n] for n in (300, 310, 350, 390)]
    assert late == pytest.approx([0.25, 0.225, 0.125, 0.025], rel=1e-12)
    plain = TrainConfig(stages=(stage(1, 12, lr=0.3), stage(2, 12, lr=0.1)))
    assert [step.lr for step in steps(plain)] == [(0.3,)] * 3 + [(0.1, 0.1)] * 3
    linear = [step.lr for step in steps(plain.model_copy(update={"decay_share": 1.0}))]
    assert [rate for rate, *_ in linear] == pytest.approx(
        [0.3, 0.3 * 5 / 6, 0.3 * 4 / 6, 0.1 * 3 / 6, 0.1 * 2 / 6, 0.1 / 6], rel=1e-12
    )


@given(trainings(), st.floats(1e-3, 1))
def test_each_level_has_a_learning_rate_over_its_own_life(train, share):
    train = train.model_copy(update={"lr_per_level": True, "decay_share": share})
    end, plan = train.images, list(steps(train))
    for level in range(train.stages[-1].levels):
        own = [step for step in plan if len(step.rows) > level]
        start = own[0].first
        for step in own:
            warm = 1.0 if start + train.warmup_images <= step.end else None
            warm = warm or (step.end - start) / train.warmup_images
            fall = min(1.0, (end - step.first) / max(share * (end - start), 1.0))
            rate = train.stages[step.stage].lr
            assert step.lr[level] == pytest.approx(rate * warm * fall, rel=1e-12)


def test_a_new_level_warms_up_alone_while_the_older_ones_go_on_falling():
    train = TrainConfig(
        stages=(stage(1, 100, 10), stage(2, 100, 10), stage(3, 200, 10)),
        warmup_images=40,
        decay_share=1.0,
        lr_per_level=True,
    )
    rates = {step.first: step.lr for step in steps(train)}
    for n, expected in {
        0: (10 / 40,),
        50: (350 / 400,),
        100: (300 / 400, 10 / 40),
        150: (250 / 400, 250 / 300),
        200: (200 / 400, 200 / 300, 10 / 40),
        300: (100 / 400, 100 / 300, 100 / 200),
        390: (10 / 400, 10 / 300, 10 / 200),
    }.items():
        assert rates[n] == pytest.approx(expected, rel=1e-12)


def test_a_step_passes_the_multiples_that_it_reaches():
    step = step_at(TrainConfig(stages=(stage(1, 64, batch_size=8),)), 16)
    assert (step.first, step.end) == (16, 24)
    passed = [every for every in range(1, 30) if step.passes(every)]
    assert passed == [n for n in range(1, 30) if any(m % n == 0 for m in range(17, 25))]


def gentle(**changes: Any) -> TrainConfig:
    """Four images of one level, then twelve of three, in steps of four."""
    return TrainConfig(stages=(stage(1, 4), stage(3, 12).model_copy(update=changes)))


def test_coarse_levels_rest_at_first_while_the_weights_of_new_levels_rise_to_one():
    for images, frozen in (
        (0, [0, 0, 0, 0]),
        (1, [0, 1, 0, 0]),
        (4, [0, 1, 0, 0]),
        (5, [0, 1, 1, 0]),
    ):
        assert [step.frozen for step in steps(gentle(freeze_coarse_images=images))] == frozen
    ramps = [step.ramp for step in steps(gentle(ramp_images=10))]
    assert ramps == [(), (1.0, 0.4, 0.4), (1.0, 0.8, 0.8), ()]
    assert [step.ramp for step in steps(gentle())] == [()] * 4


def test_a_grown_runs_first_stage_is_gentle_with_the_levels_it_came_with():
    late = stage(3, 12).model_copy(update={"freeze_coarse_images": 4, "ramp_images": 8})
    first, *rest = steps(TrainConfig(stages=(late,), init_levels=2))
    assert (first.frozen, first.ramp) == (2, (1.0, 1.0, 0.5))
    assert [(step.frozen, step.ramp) for step in rest] == [(0, ())] * 2


def test_the_active_nest_is_that_of_the_last_image():
    config = tiny_config()
    levels = {n: len(active_model(config, n).levels) for n in (0, 4, 24, 28, 48)}
    assert levels == {0: 1, 4: 1, 24: 1, 28: 2, 48: 2}
    assert active_model(config, 48) == config.model
