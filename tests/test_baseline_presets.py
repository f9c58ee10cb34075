"""The baselines' presets: as much arithmetic as the nest, and its own parts where they can be."""

from __future__ import annotations

import pytest
import torch

from matryoshka_diffusion.nn.costs import count_parameters, forward_flops
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.presets import preset
from matryoshka_diffusion.schedule import build_schedules


def arithmetic(name: str) -> float:
    """FLOPs of all forward passes of a run: a row costs what the levels do that it has."""
    run = preset(name)
    costs = [forward_flops(run.model, n + 1) for n in range(len(run.model.levels))]
    total = 0.0
    for stage in run.train.stages:
        mix = stage.mix or (*[0.0] * (stage.levels - 1), 1.0)
        total += stage.images * sum(m * cost for m, cost in zip(mix, costs, strict=False))
    return total


@pytest.mark.parametrize("name", ["openmoji", "fashion-mnist"])
def test_a_baseline_takes_as_much_arithmetic_as_the_nest(name: str):
    nest = arithmetic(name)
    assert arithmetic(f"{name}-simple") == pytest.approx(nest, rel=0.01)
    assert arithmetic(f"{name}-finest") == pytest.approx(nest, rel=0.01)
    cascade = arithmetic(f"{name}-base") + arithmetic(f"{name}-upsampler")
    assert cascade == pytest.approx(nest, rel=0.01)


@pytest.mark.parametrize(
    ("name", "millions", "gigaflops"),
    [
        ("openmoji-simple", 6.2, 0.56),
        ("openmoji-upsampler", 6.5, 0.57),
        ("fashion-mnist-simple", 2.7, 0.29),
        ("fashion-mnist-base", 2.2, 0.11),
    ],
)
def test_baselines_have_the_sizes_that_are_stated(name: str, millions: float, gigaflops: float):
    model = preset(name).model
    with torch.device("meta"):
        count = count_parameters(NestedUNet(model))
    assert count / 1e6 == pytest.approx(millions, rel=0.02)
    assert forward_flops(model, 1) / 1e9 == pytest.approx(gigaflops, rel=0.02)


@pytest.mark.parametrize(
    ("name", "t", "ratio"),
    [
        ("imagenet-256-upsampler", 0.5, 4.0),
        ("imagenet-256-upsampler", 0.7, 1.0),
        ("fashion-mnist-upsampler", 0.3, 4.0),
        ("openmoji-upsampler", 0.3, 1.0),
    ],
)
def test_times_of_augmentation_in_the_signal_that_is_left(name: str, t: float, ratio: float):
    """Signal over noise of a coarse pixel, which averages over many of the enlarged picture."""
    model = preset(name).model
    assert model.coarse is not None
    times = torch.tensor([t], dtype=torch.float64)
    averaged = (model.levels[0].side / model.coarse.side) ** 2
    found = averaged * build_schedules(model)[0].log_snr(times).exp().item()
    assert found == pytest.approx(ratio, rel=0.05)


def test_the_parts_of_a_nest_are_not_changed_by_being_a_baseline():
    nest, base = preset("imagenet-256"), preset("imagenet-64")
    assert nest.model.levels[:1] == base.model.levels
    simple = preset("imagenet-256-simple").model.levels[0]
    assert (simple.side, simple.widths) == (256, (64, 128, 256, 512, 768))
    assert (simple.blocks, simple.attention) == ((2, 2, 3, 2, 2), (0, 0, 0, 1, 5))
    assert simple.shift_ratio == nest.model.levels[1].shift_ratio
    upsampler = preset("imagenet-256-upsampler")
    assert upsampler.model.levels == (simple,)
    assert upsampler.train.images == nest.train.stages[-1].images
