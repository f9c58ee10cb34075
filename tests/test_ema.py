from __future__ import annotations

import pytest
import torch
from torch import nn

from matryoshka_diffusion.train.averages import Ema


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9999])
def test_follows_its_formula(decay):
    model = net()
    ema = Ema(model, decay)
    expected = {name: value.detach().double() for name, value in model.named_parameters()}
    for step in range(20):
        with torch.no_grad():
            for value in model.parameters():
                value += torch.randn_like(value)
        ema.update(model, step)
        keep = min(decay, (1 + step) / (10 + step))
        for name, value in model.named_parameters():
            expected[name] = keep * expected[name] + (1 - keep) * value.detach().double()
    for name, value in expected.items():
        torch.testing.assert_close(ema.weights[name].double(), value, rtol=1e-5, atol=1e-6)


def test_warms_up_so_that_initial_weights_are_soon_forgotten():
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    ema = Ema(model, 0.9999)
    nn.init.zeros_(model.weight)
    for step in range(1000):
        ema.update(model, step)
    assert ema.weights["weight"].item() < 1e-3  # a constant decay would leave 0.9


def test_averages_stay_float32_beside_a_half_precision_network():
    model = net().bfloat16()
    ema = Ema(model, 0.9)
    ema.update(model, 100)
    assert all(value.dtype == torch.float32 for value in ema.weights.values())


def test_new_parameters_start_as_they_are_and_old_averages_stay():
    small, large = net(), net(seed=1)
    large.append(nn.Linear(2, 2))
    ema = Ema(small, 0.9)
    with torch.no_grad():
        small.get_parameter("0.weight").zero_()
    ema.update(small, 100)
    before = {name: value.clone() for name, value in ema.weights.items()}
    ema.extend(large)
    assert list(ema.weights) == [name for name, _ in large.named_parameters()]
    for name, value in large.named_parameters():
        assert torch.equal(ema.weights[name], before.get(name, value))


def test_what_joins_late_forgets_its_initial_weights_as_soon():
    model = nn.Linear(1, 1)
    nn.init.ones_(model.weight)
    nn.init.ones_(model.bias)
    ema = Ema(model, 0.9999)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    for step in range(5000, 6000):
        ema.update(model, step, joined={"weight": 5000, "bias": 0}.__getitem__)
    assert ema.weights["weight"].item() < 1e-3
    assert 0.1 < ema.weights["bias"].item() < 0.3  # of age 5000 from the beginning


def test_load_takes_values_not_storage():
    model = net()
    ema, other = Ema(model, 0.9), Ema(net(seed=1), 0.9)
    ema.load(other.weights)
    assert all(torch.equal(ema.weights[name], value) for name, value in other.weights.items())
    ema.update(model, 0)
    assert not torch.equal(ema.weights["0.weight"], other.weights["0.weight"])


def test_frozen_averages_do_not_drift_towards_their_parameters():
    model = net()
    ema = Ema(model, 0.5)
    before = {name: value.clone() for name, value in ema.weights.items()}
    with torch.no_grad():
        for value in model.parameters():
            value += 1
    ema.update(model, 100, frozen={"0.weight", "2.bias"})
    still = {name for name, value in before.items() if torch.equal(value, ema.weights[name])}
    assert still == {"0.weight", "2.bias"}
