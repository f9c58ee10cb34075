"""Costs counted on shapes equal those of real tensors; recomputing keeps less and the same bits."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.cli.info import describe
from matryoshka_diffusion.cli.plan import describe_plan
from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import ConfigError, LoraConfig, StageConfig
from matryoshka_diffusion.configfile import override
from matryoshka_diffusion.nn.costs import (
    TEXT_TOKENS,
    activation_bytes,
    forward_flops,
    training_bytes,
)
from matryoshka_diffusion.nn.lora import attach
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.presets import preset
from matryoshka_diffusion.pyramid import resolutions_of
from matryoshka_diffusion.training.inputs import Feed
from matryoshka_diffusion.training.stages import Step, steps
from matryoshka_diffusion.training.step import diffusion
from matryoshka_diffusion.training.trainer import Trainer
from nests import wake
from tiny_run import TinyPictures, encode, tiny_config

# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 2])
def test_activations_are_those_of_real_tensors(levels):
    model = tiny_config(dropout=0.0).model.first(levels)
    net = NestedUNet(model)
    tensors = []
    with saved_tensors_hooks(lambda x: tensors.append(x) or x, lambda x: x):
        outputs = net(
            tuple(torch.zeros(1, *each.shape(3)) for each in resolutions_of(model)),
            torch.ones(1),
            Conditioning(tokens=torch.zeros(1, TEXT_TOKENS, 8), micro={"scale": torch.ones(1)}),
        )
    assert outputs
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    real = sum(size for address, size in storages.items() if address not in weights)
    # Attention keeps other helpers on a CPU than where there are only shapes.
    assert activation_bytes(model, levels) == pytest.approx(real, rel=0.05)


def test_recomputing_keeps_the_features_between_blocks_and_little_else():
    """By hand for the finer level: what its stem, halving, blocks and joints hand on."""
    model = tiny_config(dropout=0.0).model
    none, outer, both = (activation_bytes(model, 2, levels) for levels in ((), (1,), (0, 1)))
    assert both < outer < none
    assert both < none / 3
    side, width = 16, 32
    image, full, half = 3 * side**2, width * side**2, width * (side // 2) ** 2
    # stem and first block; halving and second block; decoder at half the side, then at the full one
    features = image + 2 * full + 2 * half + half + full + 2 * full
    alone = both - activation_bytes(model, 1, (0,))
    # Embeddings and the coarser level's features for `outward` are small beside.
    assert alone / 4 == pytest.approx(features, rel=0.1)


def test_a_network_in_training_takes_five_times_its_weights_and_adapters_less():
    net = NestedUNet(tiny_config().model)
    size = 4 * sum(p.numel() for p in net.parameters())
    assert training_bytes(net) == 5 * size
    assert training_bytes(net, tracks=2) == 7 * size
    attach(net, LoraConfig(rank=2))
    adapters = 4 * sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert training_bytes(net) == size + 5 * adapters


# --- recomputing ---------------------------------------------------------------------------------


def one_step(recompute, rows=(4, 2), precision="fp32", **changes):
    """Outcome and gradients of a step with dropout, of a network that does not predict zero."""
    stages = (StageConfig(levels=2, images=24, batch_size=4, lr=1e-2),)
    config = tiny_config(stages=stages, precision=precision, recompute=recompute, **changes)
    trainer = Trainer(diffusion(config), torch.device("cpu"))
    wake(trainer.net).train()
    step = Step(0, 0, rows, (0.1,) * len(rows), False)
    outcome = trainer.step(Feed(config, TinyPictures(), encode)(step))
    gradients = {name: p.grad for name, p in trainer.net.named_parameters() if p.grad is not None}
    return outcome, gradients


@pytest.mark.parametrize(
    ("rows", "precision", "changes"),
    [((4, 1), "bf16", {}), ((4, 0), "fp32", {}), ((4, 2), "fp32", {"accumulate": 2})],
)
def test_recomputing_leaves_loss_and_gradients_the_same_bits(rows, precision, changes):
    plain, expected = one_step((), rows, precision, **changes)
    for levels in ((0,), (1,), (0, 1)):
        outcome, gradients = one_step(levels, rows, precision, **changes)
        assert outcome == plain
        assert gradients.keys() == expected.keys() != set()
        assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_a_level_that_is_grown_is_recomputed_if_the_config_says_so():
    trainer = Trainer(diffusion(tiny_config(recompute=(1,))))
    assert [level.recomputed for level in trainer.net.levels] == [False]
    trainer.grow(2)
    assert [level.recomputed for level in trainer.net.levels] == [False, True]
    with pytest.raises(ConfigError, match=r"train\.recompute.* 2"):
        override(tiny_config(), ["train.recompute=[1, 2]"])


# --- dry runs ------------------------------------------------------------------------------------

PAPER = {
    "imagenet-256": [(300_000, 512), (500_000, 256)],
    "webvid-16x256": [(500_000, 2048), (500_000, 512), (300_000, 128)],
    "cc12m-256": [(500_000, 2048), (500_000, 1024)],
    "cc12m-1024": [(500_000, 2048), (500_000, 1024), (100_000, 768)],
}


def test_the_papers_presets_have_its_stages():
    for name, expected in PAPER.items():
        stages = preset(name).train.stages
        assert [(s.images // s.batch_size, s.batch_size) for s in stages] == expected, name


def test_a_dry_run_prints_the_stages_looks_at_the_data_and_begins_nothing(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "openmoji", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "stage 1: " in printed
    assert "84 times each of 1,904" in printed
    assert "minutes on 2 CPU cores, by arithmetic; a preview every 12,000 images" in printed
    assert "openmoji: 1,904 pictures of 64 px, captions" in printed
    assert os.listdir() == []


def test_a_dry_run_counts_for_gpus_precision_and_recomputing():
    run = preset("fashion-mnist")

    def memory(*settings: str, **machine: Any) -> float:
        """GB on each of several devices in the second stage."""
        text = describe_plan(override(run, list(settings)), gpus=4, **machine)
        return float(re.findall(r"([\d.]+) GB on each of 4", text)[-1])

    whole = memory()
    assert memory("train.recompute=[1]") < whole < memory("train.precision=fp32")
    assert memory(shards=True) < whole


def test_a_dry_run_counts_the_arithmetic_of_awake_levels():
    """As many rows as a feed really gives to each level, over a stage of 640 images."""
    stage = StageConfig(levels=2, images=640, batch_size=64, lr=1e-3, mix=(0.2, 0.8))
    run = tiny_config(dropout=0.0, wake=(0.0,), stages=(stage,))
    feed = Feed(run, TinyPictures(), encode)
    rows = [feed(step)[0].step.rows for step in steps(run.train)]
    shares = [sum(level) / stage.images for level in zip(*rows, strict=True)]
    first, both = (forward_flops(run.model, levels) for levels in (1, 2))
    flops = first + shares[1] * (both - first)
    match = re.search(r"([\d.]+) TFLOP a step on average with train.wake", describe_plan(run))
    assert match
    assert float(match[1]) == pytest.approx(3 * 64 * flops / 1e12, rel=0.03)


@pytest.mark.parametrize(("settings", "cost"), [((), "13"), (("sampling.wake=[-3]",), "10.1")])
def test_a_sample_costs_what_its_awake_levels_cost(settings, cost):
    """25 steps of 0.52 GFLOP; in some of them fine levels sleep."""
    line = describe(override(preset("openmoji"), list(settings))).splitlines()[-1]
    assert f"{cost} GFLOP" in line
    assert ("saves 23%" in line) == bool(settings)
