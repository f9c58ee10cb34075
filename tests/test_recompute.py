"""Recomputing levels in the backward pass: the same bits, less kept."""

from __future__ import annotations

import re

import pytest
import torch

from matryoshka_diffusion.cli.info import describe_plan
from matryoshka_diffusion.config import ConfigError, StageConfig
from matryoshka_diffusion.configfile import override
from matryoshka_diffusion.nn.costs import activation_bytes
from matryoshka_diffusion.presets import preset
from matryoshka_diffusion.train.inputs import Feed
from matryoshka_diffusion.train.stages import Step
from matryoshka_diffusion.train.step import diffusion
from matryoshka_diffusion.train.trainer import Trainer
from tiny_run import TinyPictures, encode, tiny_config

CPU = torch.device("cpu")
STAGES = (StageConfig(levels=2, images=24, batch_size=4, lr=1e-2),)


def one_step(recompute, rows=(4, 2), precision="fp32", **changes):
    """Outcome and gradients of a step; there is dropout, and the network says something."""
    config = tiny_config(stages=STAGES, precision=precision, recompute=recompute, **changes)
    trainer = Trainer(diffusion(config), CPU)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for parameter in trainer.net.parameters():  # adapters and outputs begin at zero
            parameter.add_(0.05 * torch.randn_like(parameter))
    step = Step(0, 0, rows, 0.1, False)
    outcome = trainer.step(Feed(config, TinyPictures(), encode)(step))
    return outcome, {name: p.grad for name, p in trainer.net.named_parameters()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rows", [(4, 4), (4, 1), (4, 0)])
@pytest.mark.parametrize("levels", [(0,), (1,), (0, 1)])
def test_loss_and_gradients_are_the_same_bits(levels, rows, precision):
    outcome, gradients = one_step(levels, rows, precision)
    plain, expected = one_step((), rows, precision)
    assert outcome == plain
    for name, gradient in expected.items():
        found = gradients[name]
        assert gradient is not None
        assert found is not None
        assert torch.equal(found, gradient), name


def test_parts_of_a_batch_are_recomputed_with_their_own_dropout():
    assert one_step((0, 1), accumulate=2)[0] == one_step((), accumulate=2)[0]


def test_a_level_that_is_grown_is_recomputed_if_asked():
    trainer = Trainer(diffusion(tiny_config(recompute=(1,))))
    assert [level.recomputed for level in trainer.net.levels] == [False]
    trainer.grow(2)
    assert [level.recomputed for level in trainer.net.levels] == [False, True]


def test_what_is_kept_shrinks_level_by_level():
    model = tiny_config().model
    none, outer, both = (activation_bytes(model, 2, levels) for levels in ((), (1,), (0, 1)))
    assert both < outer < none
    assert both < none / 3


def test_features_between_the_blocks_are_kept_and_little_else():
    """The finer level's, by hand: what its stem, halving, two blocks and three joints hand on."""
    model = tiny_config(dropout=0.0).model
    side, width = 16, 32
    handed_on = {
        "noisy picture, for the stem": 3 * side**2,
        "stem, first block": 2 * width * side**2,
        "halving, second block": 2 * width * (side // 2) ** 2,
        "decoder at half the side": width * (side // 2) ** 2,
        "decoder, twice as large again": width * side**2,
        "decoder at the full side": 2 * width * side**2,
    }
    alone = activation_bytes(model, 2, (0, 1)) - activation_bytes(model, 1, (0,))
    # Embeddings and the coarser level's features for `outward` are small beside.
    assert alone / 4 == pytest.approx(sum(handed_on.values()), rel=0.1)


def test_a_dry_run_counts_with_it():
    plain = preset("fashion-mnist")
    asked = override(plain, ["train.recompute=[1]"])
    before, after = (describe_plan(config).splitlines() for config in (plain, asked))
    changed = [place for place, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    assert changed == [len(before) - 2]  # the memory of the second stage


def test_a_dry_run_counts_for_the_gpus_and_the_precision_that_are_asked_for():
    plain = preset("fashion-mnist")
    whole = describe_plan(plain, gpus=4).splitlines()[-2]
    shares = describe_plan(plain, gpus=4, shards=True).splitlines()[-2]
    assert "on each of 4" in whole
    assert whole.split(";")[0] == shares.split(";")[0]
    assert memory(shares) < memory(whole)
    full = describe_plan(override(plain, ["train.precision=fp32"]), gpus=4).splitlines()[-2]
    assert "memory in fp32" in full
    assert memory(full) > memory(whole)


def memory(line: str) -> float:
    """GB on each of several devices."""
    found = re.search(r"([\d.]+) GB on each", line)
    assert found
    return float(found[1])


def test_a_level_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"train\.recompute names level 2, .* 1$"):
        override(tiny_config(), ["train.recompute=[1, 2]"])
