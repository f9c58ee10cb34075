from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import tiny_run
from matryoshka_diffusion.config import TrainConfig
from matryoshka_diffusion.train.precision import autocast, resolve_precision
from matryoshka_diffusion.train.step import (
    build_optimizer,
    load_moments,
    moment_shapes,
    moments,
    set_learning_rate,
)

CPU = torch.device("cpu")


def settings(**changes) -> TrainConfig:
    return tiny_run.tiny_config(**changes).train


def net(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, lr: float = 0.01) -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(x).square().sum().backward()
    set_learning_rate(optimizer, lr)
    optimizer.step()


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_is_the_optimizer_it_is_called(kind):
    train = settings(optimizer=kind, weight_decay=0.0)
    model = net(3, 4)
    plain = copy.deepcopy(model)
    optimizer = build_optimizer(model, train)
    reference = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind](
        plain.parameters(), lr=0.01, betas=train.betas, eps=train.eps, weight_decay=0.0
    )
    assert type(optimizer) is type(reference)
    for seed in range(5):
        step(model, optimizer, seed)
        step(plain, reference, seed)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_decays_matrices_and_spares_vectors():
    model = net(3, 4)
    optimizer = build_optimizer(model, settings(weight_decay=0.1))
    for value in model.parameters():
        value.grad = torch.zeros_like(value)
    before = copy.deepcopy(model)
    set_learning_rate(optimizer, 0.5)
    optimizer.step()
    torch.testing.assert_close(
        model.get_parameter("0.weight"), before.get_parameter("0.weight") * (1 - 0.5 * 0.1)
    )
    assert torch.equal(model.get_parameter("0.bias"), before.get_parameter("0.bias"))


def test_six_steps_are_three_and_three_with_memory_passed_by_name():
    whole = net(3, 4, 2)
    halves = copy.deepcopy(whole)
    optimizer = build_optimizer(whole, settings())
    for seed in range(6):
        step(whole, optimizer, seed)
    first = build_optimizer(halves, settings())
    for seed in range(3):
        step(halves, first, seed)
    memory = moments(first, halves)
    second = build_optimizer(halves, settings())
    load_moments(second, halves, memory)
    for seed in range(3, 6):
        step(halves, second, seed)
    for mine, theirs in zip(halves.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for name, value in moments(optimizer, whole).items():
        assert torch.equal(moments(second, halves)[name], value)
    assert memory["0.weight.step"] == 3, "loading copies: what was saved does not move on"


def test_new_parameters_begin_with_a_whole_first_step():
    small = net(3, 3)
    optimizer = build_optimizer(small, settings(weight_decay=0.0))
    for seed in range(10):
        step(small, optimizer, seed)
    large = net(3, 3, 3)
    large.load_state_dict(small.state_dict(), strict=False)
    grown = build_optimizer(large, settings(weight_decay=0.0))
    load_moments(grown, large, moments(optimizer, small))
    before = large.get_parameter("1.weight").detach().clone()
    step(large, grown, seed=10)
    # Adam's first step of a parameter is its learning rate; without memory of its own step count
    # the bias correction would make it sqrt(1 - beta2) / (1 - beta1) times that.
    change = (large.get_parameter("1.weight") - before).abs()
    torch.testing.assert_close(change, torch.full_like(change, 0.01), rtol=1e-3, atol=0)
    assert moments(grown, large)["0.weight.step"] == 11
    assert moments(grown, large)["1.weight.step"] == 1


def test_moment_shapes_ask_for_all_of_a_parameter_or_nothing():
    model = net(3, 4, 2)
    optimizer = build_optimizer(model, settings())
    assert moment_shapes(model, moments(optimizer, model)) == {}
    step(model, optimizer, 0)
    memory = moments(optimizer, model)
    assert {k: v.shape for k, v in memory.items()} == {
        k: v.shape for k, v in moment_shapes(model, memory).items()
    }
    del memory["0.bias.exp_avg"]
    assert "0.bias.exp_avg" in moment_shapes(model, memory)


def test_precision_asked_for_is_precision_got():
    assert resolve_precision("fp32", CPU) == "fp32"
    assert resolve_precision("bf16", CPU) == "bf16"


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx2": True}, "fp32")],
)
def test_auto_precision_is_bf16_where_the_cpu_multiplies_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert resolve_precision("auto", CPU) == expected


def test_auto_precision_without_knowledge_of_the_hardware_is_fp32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert resolve_precision("auto", CPU) == "fp32"


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_autocast_runs_matrix_products_in_the_precision(precision, dtype):
    with autocast(precision, CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
