"""The one-file example is the library: same weights, same loss, same images, and it learns."""

from __future__ import annotations

import importlib.util
import re
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from matryoshka_diffusion import rng
from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import LevelConfig, ModelConfig, ProcessConfig
from matryoshka_diffusion.denoiser import ConditionPair, Guided, NetworkDenoiser, Thresholded
from matryoshka_diffusion.diffusion import Process, matryoshka_loss
from matryoshka_diffusion.nn.nested import NestedUNet, grow
from matryoshka_diffusion.pyramid import Resolution, build_pyramid
from matryoshka_diffusion.samplers import SeededNoise, ddim, last, trailing_grid

FILE = Path(__file__).parent.parent / "examples" / "minimal_matryoshka.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minimal_matryoshka", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(example: ModuleType) -> ModelConfig:
    """The example's nest as a config of the library."""
    levels = tuple(
        LevelConfig(
            **doll._asdict(),
            heads=example.HEADS,
            patch=example.PATCH,
            shift_ratio=doll.side / example.NEST[0].side,
            shift_power=2.0,
        )
        for doll in example.NEST
    )
    return ModelConfig(levels=levels, embedding=example.EMBEDDING, classes=example.CLASSES)


@pytest.fixture(scope="module")
def library_net(model: ModelConfig) -> NestedUNet:
    """A network whose weights are not zero and whose labels matter."""
    net = NestedUNet(model)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(net.named_parameters()):
            draw = rng.normal("test weights", [(0, number)], tuple(parameter.shape))[0]
            if name == "conditioner.label.weight":
                parameter.copy_(draw)
            elif not parameter.any():
                parameter.copy_(0.02 * draw)
    return net.eval()


def nest(example: ModuleType, depth: int) -> Any:
    """The example's network, grown to a depth."""
    with torch.random.fork_rng(devices=[]):
        net = example.NestedUNet()
        for _ in range(depth - 1):
            net.grow()
    return net


def batch(example: ModuleType, depth: int):
    """A pyramid, noise for it, labels (one hidden) and times, the same for both sides."""
    side = example.NEST[-1].side
    images = rng.normal("test images", [(0, n) for n in range(5)], (3, side, side)).clamp(-1, 1)
    x = build_pyramid(images, [Resolution(d.side, d.side) for d in example.NEST[:depth]])
    noise = tuple(rng.normal("test", [(0, r)], tuple(x_r.shape))[0] for r, x_r in enumerate(x))
    labels = torch.tensor([0, 3, example.HIDDEN, 7, 11])
    return x, noise, labels, torch.tensor([0.001, 0.2, 0.5, 0.8, 1.0])


def test_the_file_is_short_and_needs_only_torch():
    source = FILE.read_text()
    assert source.count("\n") <= 300
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", source, re.MULTILINE))
    assert imported - sys.stdlib_module_names == {"torch"}


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_same_weights_and_noise_give_the_library_s_loss_and_gradients(
    example, model, library_net, depth
):
    ours = NestedUNet(model.first(depth))
    ours.load_state_dict({key: library_net.state_dict()[key] for key in ours.state_dict()})
    theirs = nest(example, depth)
    theirs.load_state_dict(ours.state_dict(), strict=True)

    x, noise, labels, t = batch(example, depth)
    process = Process.from_config(ProcessConfig(), ours.config)
    loss = matryoshka_loss(ours, x, Conditioning(labels=labels), t, noise, process=process)
    per_level = example.joint_loss(theirs, x, labels, t, noise)
    assert loss.per_level.min() > 0.1  # there is something to compare
    torch.testing.assert_close(loss.per_level, per_level, rtol=1e-6, atol=1e-6)

    names = [name for name, _ in ours.named_parameters()]
    gradients = (
        torch.autograd.grad(total, [dict(net.named_parameters())[name] for name in names])
        for total, net in ((loss.total, ours), (per_level.sum(), theirs))
    )
    a, b = (torch.cat([gradient.flatten() for gradient in side]) for side in gradients)
    assert (a - b).norm() <= 1e-6 * a.norm()


@pytest.mark.parametrize("guidance", [1.5, 3.0])
def test_the_same_weights_and_noise_give_the_library_s_images(example, library_net, guidance):
    process = Process.from_config(ProcessConfig(), library_net.config)
    example_net = nest(example, len(example.NEST)).eval()
    example_net.load_state_dict(library_net.state_dict(), strict=True)
    labels = torch.tensor([0, 4, 11])
    cond = Conditioning(labels=labels)
    noise = SeededNoise([1, 2, 3], [(3, d.side, d.side) for d in example.NEST])
    pair = ConditionPair(
        NetworkDenoiser(library_net, process, cond),
        NetworkDenoiser(library_net, process, cond.followed_by(cond.null())),
    )
    denoise = Thresholded(Guided(pair, (guidance,) * 3), ("clip",) * 3)
    times = trailing_grid(8, process.schedules[0])
    with torch.no_grad():
        ours = last(ddim(denoise, noise.start(), process.schedules, times, noise=noise)).z
    theirs = example.sample(example_net, labels, noise.start(), 8, guidance)
    for a, b in zip(ours, theirs, strict=True):
        assert a.std() > 0.1
        assert (a - b).abs().max() <= 2e-5  # the library guides with one call, the example with two


def test_growing_changes_nothing_inside_and_fits_the_library(example, model):
    x, _, labels, t = batch(example, 3)
    net = nest(example, 2)
    nn.init.normal_(net.levels[0].head.weight, generator=torch.Generator().manual_seed(0))
    ours = NestedUNet(model.first(2))
    ours.load_state_dict(net.state_dict(), strict=True)
    before = net(x[:2], t, labels)
    with torch.random.fork_rng(devices=[]):
        new = net.grow()
    for a, b in zip(before, net(x, t, labels), strict=False):
        assert torch.equal(a, b)
    names = net.state_dict().keys() - ours.state_dict().keys()
    assert {".".join(name.split(".")[:2]) for name in names} == {"adapters.2", "levels.2"}
    assert len(names) == len(new)
    net.load_state_dict(grow(ours, model).state_dict(), strict=True)


def test_it_learns(example):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net, history = example.train(steps=15, batch=8)
    assert [len(losses) for losses in history] == [1] * 15 + [2] * 15 + [3] * 15
    coarse, fine = [losses[0] for losses in history], [losses[-1] for losses in history[30:]]
    assert statistics.mean(coarse[-10:]) < 0.6 * statistics.mean(coarse[:5])
    assert statistics.mean(fine[-5:]) < statistics.mean(fine[:5])
    assert not net.training


def test_it_runs_and_writes_a_strip_of_images(example, tmp_path, capsys):
    out = tmp_path / "strip.ppm"
    with torch.random.fork_rng(devices=[]):
        example.main(["--steps", "1", "--out", str(out)])
    header, _, pixels = out.read_bytes().partition(b"\n")
    assert header == b"P6 1152 384 255"
    assert len(pixels) == 1152 * 384 * 3
    assert len(set(pixels)) > 20
    assert str(out) in capsys.readouterr().out
