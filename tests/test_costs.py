"""Costs are counted on shapes: they equal what real tensors cost."""

from __future__ import annotations

import os

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import LoraConfig
from matryoshka_diffusion.nn.costs import TEXT_TOKENS, activation_bytes, training_bytes
from matryoshka_diffusion.nn.lora import attach
from matryoshka_diffusion.nn.nested import NestedUNet
from tiny_run import tiny_config


@pytest.mark.parametrize("levels", [1, 2])
def test_activations_are_those_of_real_tensors(levels):
    model = tiny_config(dropout=0.0).model
    net = NestedUNet(model.first(levels))
    kept = []
    with saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        outputs = net(
            tuple(torch.zeros(1, 3, level.side, level.side) for level in model.levels[:levels]),
            torch.ones(1),
            Conditioning(tokens=torch.zeros(1, TEXT_TOKENS, 8), micro={"scale": torch.ones(1)}),
        )
    assert outputs
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    real = sum(size for address, size in storages.items() if address not in weights)
    # Attention keeps other helpers on a CPU than where there are only shapes.
    assert activation_bytes(model, levels) == pytest.approx(real, rel=0.05)


def test_a_network_in_training_takes_five_times_its_weights_and_adapters_less():
    net = NestedUNet(tiny_config().model)
    size = 4 * sum(p.numel() for p in net.parameters())
    assert training_bytes(net) == 5 * size
    assert training_bytes(net, tracks=2) == 7 * size
    attach(net, LoraConfig(rank=2))
    adapters = 4 * sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert training_bytes(net) == size + 5 * adapters


PAPER = {
    "imagenet-64": ["300,000 steps of 512"],
    "imagenet-256": ["300,000 steps of 512", "500,000 steps of 256"],
    "webvid-16x256": [
        "500,000 steps of 2,048",
        "500,000 steps of 512",
        "300,000 steps of 128",
    ],
    "cc12m-256": ["500,000 steps of 2,048", "500,000 steps of 1,024"],
    "cc12m-1024": ["500,000 steps of 2,048", "500,000 steps of 1,024", "100,000 steps of 768"],
}


@pytest.mark.parametrize("name", PAPER)
def test_a_dry_run_prints_the_papers_stages_and_begins_nothing(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", name, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for place, stage in enumerate(PAPER[name], start=1):
        assert f"stage {place}: {stage}, " in shown
    assert "batch 512, lr 0.0001" in shown or "batch 2048, lr 0.0001" in shown
    assert os.listdir() == []


def test_a_dry_run_looks_at_the_data(capsys):
    assert cli.main(["train", "openmoji", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "84 times each of 1,904" in shown
    assert "openmoji: 1,904 pictures of 64 px, captions" in shown
