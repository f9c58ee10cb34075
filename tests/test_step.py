"""One optimizer step: its gradient, its outcome, the optimizer, numbers, layout and compiling."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import ConfigError, RunConfig, StageConfig
from matryoshka_diffusion.nn.layers import attend, norm
from matryoshka_diffusion.nn.level import Block, Up
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.training import precision as precision_module
from matryoshka_diffusion.training import trainer as trainer_module
from matryoshka_diffusion.training.checkpoint import read, save
from matryoshka_diffusion.training.gradient import resolve_threads
from matryoshka_diffusion.training.inputs import Feed, Inputs
from matryoshka_diffusion.training.precision import (
    DTYPES,
    GROWTH_INTERVAL,
    LossScale,
    algorithms,
    autocast,
    compile_network,
    resolve_layout,
    resolve_precision,
)
from matryoshka_diffusion.training.stages import Step, step_at, steps
from matryoshka_diffusion.training.step import (
    PATIENCE,
    NotFinite,
    Outcome,
    Skipped,
    Stepped,
    build_optimizer,
    diffusion,
    load_moments,
    moment_shapes,
    moments,
    set_learning_rates,
)
from matryoshka_diffusion.training.trainer import Trainer
from ranks import start
from tiny_run import (
    TinyClips,
    TinyPictures,
    assert_same,
    encode,
    state,
    there,
    tiny_config,
    tiny_video,
    trainer_after,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")
HALVES = ("bf16", "fp16")
HALF = tiny_config(precision="fp16", dropout=0.0)


def inputs(first: int = 0, config: RunConfig | None = None) -> tuple[Inputs, ...]:
    """Inputs of the step of a run that begins after so many images."""
    config = config or tiny_config()
    return Feed(config, TinyPictures(), encode)(step_at(config.train, first))


# --- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("wake", [None, (-1.0,)])
@pytest.mark.parametrize(("accumulate", "threads"), [(2, 1), (5, 1), (1, 2), (2, 3)])
def test_gradients_of_parts_add_up_to_those_of_the_whole_batch(accumulate, threads, wake):
    stages = (StageConfig(levels=2, images=20, batch_size=5, lr=0.1, mix=(0.4, 0.6)),)
    gradients, outcomes = [], []
    for parts in ({}, {"accumulate": accumulate, "threads": threads}):
        config = tiny_config(dropout=0.0, stages=stages, clip_norm=1e9, wake=wake, **parts)
        trainer = Trainer(diffusion(config))
        assert trainer.gradient.threads == parts.get("threads", 1)
        outcomes.append(trainer.step(inputs(0, config)))
        gradients.append({n: there(p.grad).clone() for n, p in trainer.net.named_parameters()})
    for name, whole in gradients[0].items():
        scale = whole.abs().max().item()
        torch.testing.assert_close(gradients[1][name], whole, rtol=1e-5, atol=2e-6 * scale + 1e-9)
    torch.testing.assert_close(outcomes[1].per_level, outcomes[0].per_level, rtol=1e-6, atol=0)
    assert outcomes[1].loss == pytest.approx(outcomes[0].loss, rel=1e-6)
    assert outcomes[1].grad_norm == pytest.approx(outcomes[0].grad_norm, rel=1e-5)


def test_threads_see_every_change_of_the_weights_and_repeat_their_bits():
    """Three steps and a growth in between: a copy of the network with old weights would show."""
    config = tiny_config(dropout=0.0, threads=2)
    one, again = Trainer(diffusion(config)), Trainer(diffusion(config))
    alone = Trainer(diffusion(tiny_config(dropout=0.0)))
    for first in (12, 16, 20, 24):
        (batch,) = inputs(first, config)
        for trainer in (one, again, alone):
            trainer.grow(len(batch.step.rows))
        losses = [trainer.step([batch]).loss for trainer in (one, again, alone)]
        assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-3)
    for name, weight in one.net.state_dict().items():
        assert torch.equal(weight, again.net.state_dict()[name])


def test_threads_are_those_of_torch_on_a_cpu_with_rows_enough_for_each(monkeypatch):
    def threads(device: torch.device = CPU, batch: int = 48, dropout: float = 0.0, **train: Any):
        stages = (StageConfig(levels=1, images=96, batch_size=batch, lr=0.1),)
        config = tiny_config(dropout=dropout, stages=stages, **{"threads": "auto", **train})
        return resolve_threads(config.train.threads, config.train, config.model, device)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert threads() == 4
    assert threads(batch=16) == 2
    assert threads(accumulate=3) == 2
    assert threads(batch=4) == 1
    assert threads(threads=3) == 3
    assert threads(GPU) == threads(dropout=0.1, threads=3) == threads(compile=True) == 1
    assert threads(GPU, threads=2) == 2, "a run keeps what it began with"


def test_gradients_are_clipped_to_the_norm():
    config = tiny_config(clip_norm=1e-3)
    trainer = Trainer(diffusion(config))
    outcome = trainer.step(inputs(0, config))
    norms = [there(p.grad).norm() for p in trainer.net.parameters()]
    assert torch.stack(norms).norm().item() == pytest.approx(1e-3, rel=1e-3)
    assert outcome.grad_norm > 0.1


def test_dropout_inside_the_network_depends_on_the_step_and_not_on_torchs_generator():
    first, second = trainer_after(8), trainer_after(8)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = first.step(inputs(8))
    assert torch.equal(torch.get_rng_state(), before), "nor does training touch it"
    torch.manual_seed(2)
    assert second.step(inputs(8)) == one
    assert_same(state(first), state(second))
    assert trainer_after(8, tiny_config(dropout=0.0)).step(inputs(8)).loss != one.loss


# --- growing -----------------------------------------------------------------------------------


def test_growing_in_training_keeps_coarse_outputs_bit_equal():
    trainer = trainer_after(24)
    (batch,) = Feed(tiny_config(), TinyPictures(), encode)(Step(1, 24, (4, 4), (), False))

    def coarse(net: NestedUNet) -> Tensor:
        with torch.no_grad():
            return net(batch.x[: len(net.levels)], batch.t, batch.cond)[0]

    def outputs() -> list[Tensor]:
        return [*map(coarse, (trainer.net.eval(), trainer.network(trainer.averaged())))]

    before, expected = state(trainer), outputs()
    trainer.grow(2)
    for mine, theirs in zip(outputs(), expected, strict=True):
        assert torch.equal(mine, theirs)
    after = state(trainer)
    assert_same({name: after[name] for name in before}, before)
    new = {name.split(".", 1)[1] for name in after.keys() - before.keys()}
    assert new
    assert all(name.split(".")[1] == "1" for name in new)
    for name in new:
        assert torch.equal(after[f"ema.{name}"], after[f"weights.{name}"])
    fresh = dict(NestedUNet(tiny_config().model, tiny_config().train.seed).named_parameters())
    assert all(torch.equal(after[f"weights.{name}"], fresh[name]) for name in new)


def test_averages_of_a_new_level_begin_with_it():
    config = tiny_config(ema_decay=0.9999, ema_power=(0.05, 0.1))
    trainer = trainer_after(28, config)
    initial = dict(NestedUNet(config.model, config.train.seed).named_parameters())
    fine = {n: p for n, p in trainer.net.named_parameters() if n.startswith("levels.1.")}
    for name, value in fine.items():  # (1 + 0) / (10 + 0) of what it was, and one step of tracks
        expected = 0.1 * initial[name] + 0.9 * value
        torch.testing.assert_close(trainer.ema.weights[name], expected)
        for average in trainer.tracks.averages.values():
            assert torch.equal(average[name], value)
    ages = {name.split(".")[1]: age for name, age in trainer.tracks.ages.items() if "stem" in name}
    assert ages == {"0": 28, "1": 4}


def gentle_config(**changes: Any) -> RunConfig:
    """The tiny run with a track, its second stage with a gentle start."""
    first, second = tiny_config().train.stages
    return tiny_config(stages=(first, second.model_copy(update=changes)), ema_power=(0.1,))


def test_a_frozen_nest_keeps_every_bit_while_the_new_level_learns():
    config = gentle_config(freeze_coarse_images=10)  # the steps from 24, 28 and 32
    trainer = trainer_after(24, config)
    before = state(trainer)
    trainer.grow(2)
    grown = state(trainer)
    for first in (24, 28, 32):
        outcome = trainer.step(inputs(first, config))
        gradients = [p.grad.norm() for p in trainer.net.parameters() if p.grad is not None]
        clipped = min(outcome.grad_norm, config.train.clip_norm)
        assert torch.stack(gradients).norm().item() == pytest.approx(clipped, rel=1e-3)
    after = state(trainer)
    assert_same({name: after[name] for name in before}, before)
    new = [name for name in grown if name not in before]
    assert [name for name in new if torch.equal(after[name], grown[name])] == []
    trainer.step(inputs(36, config))
    thawed = state(trainer)
    assert [name for name in before if torch.equal(thawed[name], before[name])] == []


def test_a_ramp_lessens_the_new_level_in_the_loss():
    config = gentle_config(ramp_images=16)
    trainer = trainer_after(24, config)
    trainer.grow(2)
    loss, (coarse, fine), *_ = trainer.step(inputs(24, config))
    assert fine > 0
    assert loss == pytest.approx(coarse + 0.25 * fine, rel=1e-6)


# --- steps that are not finite -----------------------------------------------------------------


def test_a_step_that_is_not_finite_is_skipped_and_its_sample_named():
    trainer = trainer_after(8, tiny_config(ema_power=(0.1,)))
    before, (batch,) = state(trainer), inputs(8)
    broken = [level.clone() for level in batch.x]
    broken[0][2] = float("nan")
    outcome = trainer.step([replace(batch, x=tuple(broken))])
    assert_same(state(trainer), before)
    assert isinstance(outcome, Skipped)
    assert [sample[:2] for sample in outcome.culprits] == [(10, "picture-10")]
    progress = trainer.progress
    assert (progress.images_seen, progress.steps, progress.skipped) == (12, 2, 1)
    assert isinstance(trainer.step([batch]), Stepped)
    assert trainer.progress.skipped_in_a_row == 0


def test_an_infinite_gradient_is_skipped_although_the_loss_is_finite():
    trainer = trainer_after(8)
    before = state(trainer)
    next(trainer.net.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    outcome = trainer.step(inputs(8))
    assert isinstance(outcome, Skipped)
    assert np.isfinite(outcome.loss)
    assert [sample.number for sample in outcome.culprits] == [8, 9, 10, 11]
    assert_same(state(trainer), before)


# --- the optimizer -----------------------------------------------------------------------------


def linear(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))


def one_level(name: str) -> int:
    return 0


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(x).square().sum().backward()
    set_learning_rates(optimizer, (0.01,))
    optimizer.step()


def test_decays_matrices_and_spares_vectors():
    model = linear(3, 4)
    plain = build_optimizer(model, tiny_config(optimizer="adam").train, one_level)
    assert type(plain) is torch.optim.Adam
    optimizer = build_optimizer(model, tiny_config(weight_decay=0.1).train, one_level)
    assert type(optimizer) is torch.optim.AdamW
    for value in model.parameters():
        value.grad = torch.zeros_like(value)
    before = copy.deepcopy(model.state_dict())
    set_learning_rates(optimizer, (0.5,))
    optimizer.step()
    after = model.state_dict()
    torch.testing.assert_close(after["0.weight"], before["0.weight"] * (1 - 0.5 * 0.1))
    assert torch.equal(after["0.bias"], before["0.bias"])


def test_each_level_moves_at_its_own_rate():
    """Adam's first step of a parameter is as long as its rate, whatever its gradient."""
    config = tiny_config(lr_per_level=True, weight_decay=0.0, dropout=0.0)
    step = step_at(config.train, 24)
    assert step.lr[0] != step.lr[1]
    trainer = trainer_after(24, config)
    trainer.grow(2)
    trainer.optimizer.state.clear()
    before = {name: p.detach().clone() for name, p in trainer.net.named_parameters()}
    trainer.step(inputs(24, config))
    longest = {"conditioner": 0.0, "levels.0": 0.0, "levels.1": 0.0, "adapters.1": 0.0}
    for part in longest:
        own = [name for name in before if name.startswith(part)]
        changes = [trainer.net.get_parameter(name).detach() - before[name] for name in own]
        longest[part] = max(float(change.abs().max()) for change in changes)
    coarse, fine = step.lr
    rates = {"conditioner": coarse, "levels.0": coarse, "levels.1": fine, "adapters.1": fine}
    assert longest == pytest.approx(rates, rel=1e-3)


def test_memory_passes_by_name_and_new_parameters_begin_with_a_whole_first_step():
    small = linear(3, 3)
    optimizer = build_optimizer(small, tiny_config(weight_decay=0.0).train, one_level)
    assert moment_shapes(small, moments(optimizer, small), 0) == {}
    for seed in range(10):
        one_step(small, optimizer, seed)
    memory = moments(optimizer, small)
    shapes = {name: value.shape for name, value in memory.items()}
    assert {k: v.shape for k, v in moment_shapes(small, memory, 10).items()} == shapes
    assert moment_shapes(small, {}, 10).keys() == shapes.keys(), "it was emptied"
    large = linear(3, 3, 3)
    large.load_state_dict(small.state_dict(), strict=False)
    grown = build_optimizer(large, tiny_config(weight_decay=0.0).train, one_level)
    load_moments(grown, large, memory)
    before = large.get_parameter("1.weight").detach().clone()
    one_step(large, grown, seed=10)
    # Adam's first step of a parameter is its learning rate; without memory of its own step count
    # the bias correction would make it sqrt(1 - beta2) / (1 - beta1) times that.
    change = (large.get_parameter("1.weight") - before).abs()
    torch.testing.assert_close(change, torch.full_like(change, 0.01), rtol=1e-3, atol=0)
    assert moments(grown, large)["0.weight.step"] == 11
    assert moments(grown, large)["1.weight.step"] == 1
    assert memory["0.weight.step"] == 10, "loading copies: what was saved does not move on"
    del memory["0.bias.exp_avg"]
    assert "0.bias.exp_avg" in moment_shapes(small, memory, 10), "all of a parameter or nothing"


# --- precision ---------------------------------------------------------------------------------


def test_automatic_precision_and_layout_follow_the_device(monkeypatch):
    for feature, speed, expected in (
        ("avx512_bf16", 1.6, "bf16"),
        ("avx512_bf16", 0.5, "fp32"),
        ("amx_bf16", 5.0, "bf16"),
        ("avx2", 1.6, "fp32"),
    ):
        monkeypatch.setattr(precision_module, "speed_of_bf16", lambda speed=speed: speed)
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda feature=feature: {feature: True}, raising=False
        )
        assert resolve_precision("auto", CPU) == expected
        assert resolve_precision("fp32", CPU) == "fp32"
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert resolve_precision("auto", CPU) == "fp32"
    for compiled, layout in ((None, "nchw"), (object(), "channels_last")):
        monkeypatch.setattr(precision_module, "library", lambda dtype, compiled=compiled: compiled)
        assert resolve_layout("auto", CPU, "bf16") == layout
        assert resolve_layout("auto", CPU, "fp32") == layout
        assert resolve_layout("auto", CPU, "fp16") == "nchw"
        assert resolve_layout("auto", GPU, "fp32") == "channels_last"
        assert resolve_layout("nchw", GPU, "bf16") == "nchw"


def test_float32_convolutions_are_float32_on_a_gpu():
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_deterministic_algorithms_last_as_long_as_a_run(monkeypatch):
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8"), "else torch refuses"
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    torch.use_deterministic_algorithms(False)
    try:
        with algorithms(tiny_config(deterministic=True).train):
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.backends.cudnn.benchmark
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(True)  # as in all tests


@pytest.mark.parametrize(
    ("batch", "mix", "tried"), [(8, (), True), (8, (0.5, 0.5), True), (8, (0.62, 0.2, 0.18), False)]
)
def test_cudnn_tries_its_algorithms_where_batches_have_few_shapes(batch, mix, tried):
    stage = StageConfig(levels=len(mix) or 1, images=400, batch_size=batch, lr=0.1, mix=mix)
    with algorithms(tiny_config().train.model_copy(update={"stages": (stage,)})):
        assert torch.backends.cudnn.benchmark == tried
    late = {"stages": (stage,), "wake": (-1.0,)}
    with algorithms(tiny_config().train.model_copy(update=late)):
        assert torch.backends.cudnn.benchmark == (stage.levels == 1)


@pytest.mark.parametrize("precision", HALVES)
def test_norms_compute_in_float32(precision):
    """In half precision the mean of values around 300 would be off by about their spread of 2."""
    x = (300 + 2 * torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(0))).to(
        DTYPES[precision]
    )
    for module, shape in ((norm(32), (2, 32, 8, 8)), (nn.LayerNorm(64), (2, 32, 64))):
        with autocast(precision, CPU):
            half = module(x.view(shape))
        exact = module.double()(x.view(shape).double())
        torch.testing.assert_close(half.double(), exact, rtol=8e-3, atol=1e-3)


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_logits_are_float32(precision, masked):
    """Logits of 4096 and 4097, which half precision cannot tell apart, weigh 1 to e."""
    q = torch.ones(1, 1, 1, 4)
    k = torch.tensor([[8192.0, 0, 0, 0], [8192, 2, 0, 0]]).view(1, 1, 2, 4)
    v = torch.tensor([[0.0] * 4, [1.0] * 4]).view(1, 1, 2, 4)
    assert (torch.tensor([4097.0]).to(DTYPES[precision]) == 4096).all()
    mask = torch.ones(1, 2, dtype=torch.bool) if masked else None
    with autocast(precision, CPU):
        half = [part.to(DTYPES[precision]) for part in (q, k, v)]
        attended = attend(half[0], half[1], half[2], mask)
    assert attended[0, 0, 0, 0].item() == pytest.approx(1 / (1 + math.exp(-1)), rel=8e-3)


@pytest.mark.parametrize("precision", HALVES)
def test_the_output_layer_is_float32(precision):
    net = NestedUNet(tiny_config(dropout=0.0).model)
    seen = []
    for level in net.levels:
        level.head.register_forward_hook(lambda _, x, y: seen.append((x[0].dtype, y.dtype)))
    with torch.no_grad(), autocast(precision, CPU):
        outputs = net(
            tuple(torch.zeros(2, 3, side, side) for side in (8, 16)),
            torch.ones(2),
            Conditioning(tokens=torch.zeros(2, 3, 8), micro={"scale": torch.ones(2)}),
        )
    assert seen == [(torch.float32, torch.float32)] * 2
    assert [y.dtype for y in outputs] == [torch.float32] * 2


# --- the loss scale of fp16 --------------------------------------------------------------------


def test_a_scale_halves_on_overflow_doubles_after_many_good_steps_and_ends_at_one():
    scale = LossScale.initial("fp16")
    assert scale.factor == 2.0**16
    fallen = scale.after(False).after(False)
    for _ in range(GROWTH_INTERVAL - 1):
        fallen = fallen.after(True)
    assert [fallen.after(finite).factor for finite in (True, False)] == [2.0**15, 2.0**13]
    for _ in range(16):
        assert scale.can_fall
        scale = scale.after(False)
    assert not scale.can_fall
    assert scale.after(False).factor == 1.0
    other = LossScale.initial("bf16")
    for finite in (False, *[True] * (2 * GROWTH_INTERVAL)):
        other = other.after(finite)
    assert other.factor == 1.0


def stepped(
    count: int, precision: str, factor: float | None = None
) -> tuple[Trainer[NestedUNet], list[Outcome]]:
    """A trainer after the first steps of a run, and their outcomes."""
    config = HALF if precision == "fp16" else tiny_config(dropout=0.0)
    trainer = Trainer(diffusion(config))
    if factor is not None:
        scaled(trainer, factor)
    return trainer, [trainer.step(inputs(4 * n, config)) for n in range(count)]


def scaled(trainer: Trainer[NestedUNet], factor: float) -> None:
    trainer.progress = replace(trainer.progress, scale=LossScale(factor, growth=2.0))


def test_fp16_learns_what_fp32_learns_whose_bits_no_scale_changes():
    """A scale is a power of two, divided out before the norm is taken."""
    (plain, expected), (half, outcomes) = stepped(3, "fp32"), stepped(3, "fp16")
    scaled_up, same = stepped(3, "fp32", factor=2.0**16)
    assert same == expected
    assert_same(state(scaled_up), state(plain))
    for mine, theirs in zip(outcomes, expected, strict=True):
        assert isinstance(mine, Stepped)
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-2)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=2e-2)
    assert {value.dtype for value in state(half).values()} == {torch.float32}
    assert {there(p.grad).dtype for p in half.net.parameters()} == {torch.float32}


def test_an_overflow_halves_the_scale_and_changes_nothing_else():
    trainer, _ = stepped(1, "fp16")
    before = state(trainer)
    scaled(trainer, 2.0**120)
    outcome = trainer.step(inputs(4, HALF))
    assert isinstance(outcome, Skipped)
    assert math.isfinite(outcome.loss)
    assert outcome.scale == 2.0**119
    progress = trainer.progress
    assert progress.scale == LossScale(2.0**119, 2.0)
    assert (progress.steps, progress.skipped, progress.skipped_in_a_row) == (1, 1, 0)
    assert_same(state(trainer), before)


def test_patience_ends_only_where_the_scale_cannot_fall():
    trainer = Trainer(diffusion(HALF))
    scaled(trainer, 2.0**3)
    next(trainer.net.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    (batch,) = inputs(0, HALF)
    for _ in range(3):
        trainer.step([batch])
    assert trainer.progress.skipped_in_a_row == 0
    for _ in range(PATIENCE - 1):
        trainer.step([batch])
    with pytest.raises(NotFinite, match=r"train\.precision=fp32"):
        trainer.step([batch])
    assert trainer.progress.skipped == 3 + PATIENCE


def test_the_scale_is_in_the_checkpoint_and_an_older_one_loads_without(tmp_path):
    trainer, _ = stepped(2, "fp16", factor=2.0**12)
    snapshot = read(save(tmp_path, trainer.snapshot(), keep=1))
    assert snapshot.state["scale"] == asdict(LossScale(2.0**12, 2.0, good_steps=2))
    older = {key: value for key, value in snapshot.state.items() if key != "scale"}
    for values, scale in (
        (snapshot.state, trainer.progress.scale),
        (older, LossScale.initial("fp16")),
    ):
        restored = Trainer(diffusion(HALF), images_seen=8)
        restored.restore(replace(snapshot, state=values), where="here")
        assert restored.progress == replace(trainer.progress, scale=scale)


# --- layout ------------------------------------------------------------------------------------


def test_features_keep_their_layout_and_what_is_as_large_as_weights_has_theirs():
    """Else each block would copy features, and each step update averages one by one."""
    config = tiny_config(layout="channels_last")
    trainer = Trainer(diffusion(config))
    seen: list[Tensor] = []
    trainer.grow(2)
    for module in trainer.net.modules():
        if isinstance(module, Block | Up):
            module.register_forward_hook(lambda *values: seen.append(values[2]))
    trainer.step(inputs(24, config))
    assert len(seen) > 4
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    name = "levels.1.stem.weight"
    weight = trainer.net.get_parameter(name)
    memory = trainer.optimizer.state[weight]
    for value in (trainer.ema.weights[name], there(weight.grad), memory["exp_avg"]):
        assert value.stride() == weight.stride()


@pytest.mark.parametrize(("make", "loader"), [(tiny_config, TinyPictures), (tiny_video, TinyClips)])
def test_layouts_agree_up_to_rounding_and_are_saved_alike(make, loader, tmp_path):
    losses, saved = [], []
    for layout in ("nchw", "channels_last"):
        config = make(layout=layout, dropout=0.0)  # its masks follow memory's order
        trainer, feed = Trainer(diffusion(config)), Feed(config, loader(), encode)
        saved.append(read(save(tmp_path / layout, trainer.snapshot(), keep=1)).weights)
        losses += [[trainer.step(feed(step_at(config.train, 4 * n))).loss for n in range(2)]]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, value in saved[0].items():
        assert torch.equal(saved[1][name], value)


# --- torch.compile: traced, without generating code, which takes minutes ------------------------


def test_a_compiled_run_has_the_losses_of_a_plain_one(tmp_path):
    """In a process of its own: the tests' checks of shapes cannot be traced."""
    status, errors = start(compare_compiled, str(tmp_path / "results")).end()
    assert status == 0, errors
    result = json.loads((tmp_path / "results").read_text())
    assert max(result["traced"]) > 40, "nodes of a block"
    assert result["losses"][0] == pytest.approx(result["losses"][1], rel=1e-6)
    assert result["names"][0] == result["names"][1]


def compare_compiled(path: str) -> None:
    """Train compiled and plain, recomputing a level; write losses and names of weights."""
    stages = (
        StageConfig(levels=1, images=4, batch_size=4, lr=1e-2),
        StageConfig(levels=2, images=8, batch_size=4, lr=1e-2, mix=(0.5, 0.5)),  # ragged
    )
    result: dict[str, list[Any]] = {"traced": [], "losses": [], "names": []}

    def backend(graph: Any, example: object) -> Callable[..., Any]:
        result["traced"].append(len(graph.graph.nodes))
        return graph.forward

    trainer_module.compile_network = lambda net, device: compile_network(net, device, backend)
    for compiled in (True, False):
        config = tiny_config(dropout=0.0, stages=stages, recompute=(1,), compile=compiled)
        trainer, losses = Trainer(diffusion(config)), []
        for step in steps(config.train):
            trainer.grow(len(step.rows))
            losses.append(trainer.step(inputs(step.first, config)).loss)
        result["losses"].append(losses)
        result["names"].append(list(trainer.net.state_dict()))
    Path(path).write_text(json.dumps(result))


def test_blocks_are_compiled_whole_and_once_for_any_number_of_rows(tmp_path):
    status, errors = start(count_graphs, str(tmp_path / "results")).end()
    assert status == 0, errors
    for family, (blocks, graphs, breaks) in json.loads((tmp_path / "results").read_text()).items():
        assert breaks == {}, family
        assert 0 < graphs <= 2 * blocks, family


def count_graphs(path: str) -> None:
    """Train compiled blocks on ten numbers of rows; write blocks, graphs and reasons for breaks."""
    results = {}
    for make, loader in ((tiny_config, TinyPictures), (tiny_video, TinyClips)):
        torch._dynamo.reset()
        config = make(dropout=0.0, precision="bf16")
        recipe, counter = diffusion(config), CompileCounterWithBackend("eager")
        net, feed = recipe.build(2), Feed(config, loader(), encode)
        compile_network(net, CPU, counter)
        for rows in range(2, 12):
            (inputs,) = feed(Step(0, 0, (rows, max(rows // 2, 2)), (), False))
            recipe.loss(net, inputs).total.backward()
        blocks = sum(isinstance(module, Block) for module in net.modules())
        breaks = torch._dynamo.utils.counters["graph_break"]
        results[make.__name__] = blocks, counter.frame_count, dict(breaks)
    Path(path).write_text(json.dumps(results))


def test_without_a_compiler_the_error_comes_at_the_start(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"no-such-compiler: install it.*train\.compile=false"):
        Trainer(diffusion(tiny_config(compile=True)))
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr("matryoshka_diffusion.training.precision.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"triton.*train\.compile=false"):
        compile_network(nn.Linear(1, 1), GPU)
