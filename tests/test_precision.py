"""What runs in half precision and what never does; the scale of an fp16 loss."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from itertools import islice

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.nn.layers import attend, norm
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.train.checkpoint import newest, read, save
from matryoshka_diffusion.train.inputs import Feed, Inputs
from matryoshka_diffusion.train.precision import DTYPES, GROWTH_INTERVAL, LossScale, autocast
from matryoshka_diffusion.train.stages import steps
from matryoshka_diffusion.train.step import PATIENCE, NotFinite, Outcome, Skipped, diffusion
from matryoshka_diffusion.train.trainer import Trainer
from tiny_run import TinyPictures, encode, tiny_config

CPU = torch.device("cpu")
HALVES = ("bf16", "fp16")


# --- what stays in float32 -----------------------------------------------------------------------


@pytest.mark.parametrize("precision", HALVES)
def test_norms_compute_in_float32(precision):
    """In half precision the mean of values around 300 would be off by about their spread of 2."""
    x = (300 + 2 * torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(0))).to(
        DTYPES[precision]
    )
    for module, shape in ((norm(32), (2, 32, 8, 8)), (nn.LayerNorm(64), (2, 32, 64))):
        with autocast(precision, CPU):
            found = module(x.view(shape))
        exact = module.double()(x.view(shape).double())
        torch.testing.assert_close(found.double(), exact, rtol=8e-3, atol=1e-3)


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
        found = attend(half[0], half[1], half[2], mask)
    assert found[0, 0, 0, 0].item() == pytest.approx(1 / (1 + math.exp(-1)), rel=8e-3)


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


@pytest.mark.parametrize("precision", HALVES)
def test_weights_gradients_and_averages_are_float32(precision):
    trainer, _ = learnt(2, precision)
    snapshot = trainer.snapshot()
    for part in (snapshot.weights, snapshot.ema, snapshot.optimizer):
        assert {value.dtype for value in part.values()} == {torch.float32}
    assert {p.grad.dtype for p in trainer.net.parameters() if p.grad is not None} == {torch.float32}


# --- the scale -----------------------------------------------------------------------------------


def test_a_scale_halves_on_overflow_and_doubles_after_many_good_steps():
    scale = LossScale.initial("fp16")
    assert scale.factor == 2.0**16
    fallen = scale.after(False).after(False)
    assert fallen.factor == 2.0**14
    for _ in range(GROWTH_INTERVAL - 1):
        fallen = fallen.after(True)
    assert fallen.factor == 2.0**14
    assert fallen.after(True) == LossScale(2.0**15, 2.0)
    assert fallen.after(False) == LossScale(2.0**13, 2.0)


def test_a_scale_ends_at_one():
    scale = LossScale.initial("fp16")
    for _ in range(16):
        assert scale.can_fall
        scale = scale.after(False)
    assert not scale.can_fall
    assert scale.after(False).factor == 1.0


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_other_precisions_have_a_scale_of_one_that_stays(precision):
    scale = LossScale.initial(precision)
    for finite in (False, *[True] * (2 * GROWTH_INTERVAL)):
        scale = scale.after(finite)
        assert scale.factor == 1.0
    assert not scale.can_fall


# --- training with it ----------------------------------------------------------------------------


def config_of(precision: str, **changes):
    return tiny_config(precision=precision, dropout=0.0, **changes)


def learnt(count: int, precision: str, factor: float | None = None):
    """A trainer after the first steps of a run, and what they came to."""
    config = config_of(precision)
    trainer, feed = Trainer(diffusion(config), CPU), Feed(config, TinyPictures(), encode)
    if factor is not None:
        scaled(trainer, factor)
    outcomes = [trainer.step(feed(step)) for step in islice(steps(config.train), count)]
    return trainer, outcomes


def scaled(trainer: Trainer, factor: float) -> None:
    trainer.progress = replace(trainer.progress, scale=LossScale(factor, growth=2.0))


def given(first: int = 0) -> Inputs:
    config = config_of("fp16")
    (step,) = (step for step in steps(config.train) if step.first == first)
    return Feed(config, TinyPictures(), encode)(step)


def test_a_scale_changes_no_bit_of_float32_gradients():
    """It is a power of two, divided out before the norm is taken."""
    plain, outcomes = learnt(3, "fp32")
    scaled_up, same = learnt(3, "fp32", factor=2.0**16)
    assert same == outcomes
    for mine, theirs in zip(scaled_up.net.parameters(), plain.net.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_fp16_learns_what_fp32_learns():
    _, half = learnt(4, "fp16")
    _, whole = learnt(4, "fp32")
    assert not any(isinstance(outcome, Skipped) for outcome in half)
    for mine, theirs in zip(half, whole, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-2)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=2e-2)


def test_without_a_scale_small_gradients_would_vanish():
    """The gradient of a loss of 1e-8 in fp16: zero as it is, right when scaled."""
    weight = torch.ones(4, 4, requires_grad=True)
    norms = []
    for factor in (1.0, 2.0**16):
        weight.grad = None
        with autocast("fp16", CPU):
            y = F.linear(torch.ones(1, 4), weight)
        (factor * 1e-8 * y.float().sum()).backward()
        assert weight.grad is not None
        norms.append((weight.grad / factor).norm().item())
    assert norms[0] == 0.0
    assert norms[1] == pytest.approx(4e-8, rel=1e-3)


def overflow(trainer: Trainer, inputs: Inputs) -> Outcome:
    """A step under a scale so large that the gradient overflows."""
    scaled(trainer, 2.0**120)
    return trainer.step(inputs)


def test_an_overflow_halves_the_scale_and_changes_nothing_else():
    trainer, _ = learnt(1, "fp16")
    before = {name: value.clone() for name, value in trainer.net.state_dict().items()}
    outcome = overflow(trainer, given(4))
    assert math.isfinite(outcome.loss)
    assert isinstance(outcome, Skipped)
    progress = trainer.progress
    assert progress.scale == LossScale(2.0**119, 2.0)
    assert (progress.steps, progress.skipped, progress.skipped_in_a_row) == (1, 1, 0)
    assert progress.images_seen == 8
    for name, value in trainer.net.state_dict().items():
        assert torch.equal(value, before[name])


def test_patience_ends_only_where_the_scale_cannot_fall():
    trainer, inputs = Trainer(diffusion(config_of("fp16")), CPU), given()
    next(trainer.net.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    for _ in range(16):
        trainer.step(inputs)
    assert trainer.progress.skipped_in_a_row == 0
    for _ in range(PATIENCE - 1):
        trainer.step(inputs)
    with pytest.raises(NotFinite, match=r"train\.precision=fp32"):
        trainer.step(inputs)
    assert trainer.progress.skipped == 16 + PATIENCE


def restored_from(config, snapshot):
    trainer = Trainer(diffusion(config), CPU, snapshot.state["images_seen"])
    trainer.restore(snapshot, where="here")
    return trainer


def test_the_scale_is_in_the_checkpoint_and_an_older_one_loads_without(tmp_path):
    trainer, _ = learnt(2, "fp16", factor=2.0**12)
    path = save(tmp_path, trainer.snapshot(), keep=1)
    assert path == newest(tmp_path)
    snapshot = read(path)
    assert snapshot.state["scale"] == asdict(LossScale(2.0**12, 2.0, good_steps=2))
    config = config_of("fp16")
    assert restored_from(config, snapshot).progress == trainer.progress
    old = json.loads(json.dumps(dict(snapshot.state)))
    del old["scale"]
    restored = restored_from(config, replace(snapshot, state=old))
    assert restored.progress == replace(trainer.progress, scale=LossScale.initial("fp16"))
