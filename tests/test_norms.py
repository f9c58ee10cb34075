"""Normalisation in one go equals its definition, and so do its gradients."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from matryoshka_diffusion.nn import norms
from matryoshka_diffusion.nn.norms import is_fused, library, normalise
from ranks import start

needs_compiler = pytest.mark.skipif(library(torch.bfloat16) is None, reason="needs a C compiler")


def features(shape: tuple[int, ...], seed: int = 0, kind: torch.dtype = torch.bfloat16) -> Tensor:
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 1
    return draw.to(kind).contiguous(memory_format=torch.channels_last)


def norm_of(channels: int, groups: int) -> nn.GroupNorm:
    norm = nn.GroupNorm(groups, channels)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, channels))
        norm.bias.copy_(torch.linspace(-1, 1, channels))
    return norm


def defined(norm: nn.GroupNorm, h: Any, scale: Tensor | None, shift: Tensor | None, silu: bool):
    out = norm(h)
    if scale is not None and shift is not None:
        out = out * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return F.silu(out) if silu else out


@pytest.fixture(params=["c", "gpu"])
def way(request, monkeypatch) -> str:
    """Norms in C, and as a GPU computes them."""
    if request.param == "gpu":
        monkeypatch.setattr(norms, "kernels", lambda h: norms.gpu_kernels(compiled=False))
        monkeypatch.setattr(norms, "library", lambda dtype: object())
    elif library(torch.bfloat16) is None:
        pytest.skip("needs a C compiler")
    return request.param


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("shape", [(3, 96, 5, 7), (2, 32, 1, 2), (1, 64, 8, 8)])
@pytest.mark.parametrize(("given", "digits"), [(torch.bfloat16, 2**-8), (torch.float32, 2**-16)])
def test_one_pass_equals_the_definition_in_float64(given, digits, shape, modulated, silu, way):
    rows, channels = shape[:2]
    h, weights = features(shape, kind=given), features(shape, 1)
    pair = torch.randn(2, rows, channels, generator=torch.Generator().manual_seed(2)).to(given)
    scale, shift = (*pair,) if modulated else (None, None)
    assert is_fused(h)

    def gradients(apply: Callable[..., Tensor], kind: torch.dtype) -> list[Tensor]:
        exact = norm_of(channels, 32).to(kind)
        inputs = [None if x is None else x.to(kind).requires_grad_() for x in (h, scale, shift)]
        if kind == given:
            exact, inputs[0] = norm_of(channels, 32), h.detach().requires_grad_()
        out = apply(exact, *inputs)
        leaves = [x for x in (*inputs, *exact.parameters()) if x is not None]
        return [out, *torch.autograd.grad(out, leaves, weights.to(out.dtype))]

    made = gradients(partial(normalise, silu=silu), given)
    expected = gradients(partial(defined, silu=silu), torch.float64)
    assert made[0].is_contiguous(memory_format=torch.channels_last)
    for value, truth in zip(made, expected, strict=True):
        assert value.shape == truth.shape
        error = (value.detach().double() - truth.detach()).abs().max()
        assert error < digits * max(float(truth.detach().abs().max()), float(weights.max()))


@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("modulated", [True, False])
def test_a_gpu_computes_in_float32_and_keeps_the_order_in_memory(order, modulated, monkeypatch):
    monkeypatch.setattr(norms, "kernels", lambda h: norms.gpu_kernels(compiled=False))
    draw = torch.Generator().manual_seed(0)
    h, weights = (
        torch.randn(3, 96, 5, 7, generator=draw).contiguous(memory_format=order) for _ in "ab"
    )
    pair = [*torch.randn(2, 3, 96, generator=draw)] if modulated else [None, None]
    results = []
    for kind in (torch.float32, torch.float64):
        norm = norm_of(96, 32).to(kind)
        inputs = [None if x is None else x.to(kind).requires_grad_() for x in (300 + 2 * h, *pair)]
        if kind == torch.float32:
            settings = (norm.weight, norm.bias, *inputs[1:], 32, norm.eps, True)
            out = norms._Normalised.apply(inputs[0], *settings)
        else:
            out = defined(norm, *inputs, silu=True)
        leaves = [x for x in (*inputs, *norm.parameters()) if x is not None]
        results.append([out, *torch.autograd.grad(out, leaves, weights.to(kind))])
    for value, truth in zip(*results, strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=1e-3, atol=1e-3)
    for features in results[0][:2]:
        assert features.is_contiguous(memory_format=order)


def test_a_gpu_keeps_half_precision_and_small_statistics(monkeypatch):
    monkeypatch.setattr(norms, "kernels", lambda h: norms.gpu_kernels(compiled=False))
    monkeypatch.setattr(norms, "library", lambda dtype: object())
    norm, h = norm_of(32, 32), features((2, 32, 16, 16)).requires_grad_()
    kept = []
    with saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        normalise(norm, h, torch.zeros(2, 32), torch.zeros(2, 32))
    assert sum(x.nbytes for x in kept) < 1.1 * h.nbytes


def test_the_kernels_of_a_gpu_are_compiled_for_few_kinds_of_layers(tmp_path):
    """In a process of its own: the tests' checks of shapes cannot be traced."""
    status, errors = start(compile_norms, str(tmp_path / "results")).end()
    assert status == 0, errors
    counts = json.loads((tmp_path / "results").read_text())
    assert counts == [6, 6], "three kinds of norms, for one row and for more"


def compile_norms(path: str) -> None:
    """Count the forms in which torch compiles the kernels, for layers of all sizes and rows."""
    forward, backward = (CompileCounterWithBackend("eager") for _ in range(2))
    compiled = (
        norms.compiled_often(norms.forward_on_gpu, fullgraph=True, backend=forward),
        norms.compiled_often(norms.backward_on_gpu, fullgraph=True, backend=backward),
    )
    norms.kernels = lambda h: compiled
    for rows, (channels, side) in itertools.product((8, 1, 7), ((96, 4), (128, 2))):
        norm, pair = norm_of(channels, 32), torch.zeros(rows, 2 * channels).requires_grad_()
        h = features((rows, channels, side, side)).requires_grad_()
        for silu, modulated in ((True, False), (True, True), (False, False)):
            scale, shift = pair.chunk(2, dim=1) if modulated else (None, None)
            out = norms._Normalised.apply(
                h, norm.weight, norm.bias, scale, shift, 32, norm.eps, silu
            )
            out.sum().backward()
    Path(path).write_text(json.dumps([forward.frame_count, backward.frame_count]))


@needs_compiler
def test_large_means_extremes_and_no_rows():
    norm = norm_of(32, 32).requires_grad_(False)
    far = (features((2, 32, 4, 4)).float() * 0.25 + 10).bfloat16()
    far = far.contiguous(memory_format=torch.channels_last)
    expected = norm.double()(far.double())
    norm.float()
    assert float((normalise(norm, far, silu=False).double() - expected).abs().max()) < 0.02
    exact = (far.float() * 1e3).contiguous(memory_format=torch.channels_last)
    expected = norm.double()(exact.double())
    assert float((normalise(norm.float(), exact, silu=False) - expected).abs().max()) < 1e-3
    assert normalise(norm, features((0, 32, 4, 4))).shape == (0, 32, 4, 4)
    flat = torch.zeros_like(far)
    assert torch.equal(normalise(norm, flat, silu=False)[0, :, 0, 0], norm.bias.bfloat16())
    for extreme in (200.0, -200.0):  # far beyond the range of exp
        shift = torch.full((2, 32), extreme)
        silu = normalise(norm, flat, torch.zeros(2, 32), shift)
        assert float(silu.min()) == pytest.approx(max(extreme, 0.0), abs=2.0)
    far[0, 3, 1, 1] = math.nan
    assert normalise(norm, far)[0, 3].isnan().all(), "a broken step is noticed"
    assert normalise(norm, far)[1].isfinite().all()


@needs_compiler
def test_weights_of_another_type_are_not_read_as_float32():
    norm, h = norm_of(32, 32), features((2, 32, 4, 4))
    expected = defined(norm.bfloat16(), h, None, None, silu=True)
    torch.testing.assert_close(normalise(norm, h), expected, rtol=0.02, atol=0.02)


@needs_compiler
def test_threads_that_compile_at_once_all_have_norms(monkeypatch, tmp_path):
    monkeypatch.setenv("MDM_CACHE", str(tmp_path))
    with ThreadPoolExecutor(4) as pool:
        made = [*pool.map(lambda _: library.__wrapped__(torch.float32), range(4))]
    assert all(made)


@needs_compiler
def test_sums_over_many_positions_keep_their_digits():
    """A flat image rounds to the same side everywhere, which a running sum would add up."""
    norm, h = norm_of(32, 32), torch.full((1, 32, 256, 256), 0.1)
    h[:, :, ::2] += features((1, 32, 1, 1), kind=torch.float32) * 0.3
    h = h.contiguous(memory_format=torch.channels_last)
    expected = norm_of(32, 32).double()(h.double())
    assert float((normalise(norm, h, silu=False) - expected).detach().abs().max()) < 1e-5


def test_without_a_compiler_torch_does_it(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert library.__wrapped__(torch.bfloat16) is None
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("MDM_CACHE", str(tmp_path))
    with pytest.warns(UserWarning, match="false compiles no norms"):
        assert library.__wrapped__(torch.bfloat16) is None
    monkeypatch.setattr(norms, "library", lambda dtype: None)
    norm, h, scale = norm_of(32, 32).bfloat16(), features((2, 32, 4, 4)), features((2, 32, 1, 1))
    pair = scale.flatten(1), scale.flatten(1)
    out = normalise(norm, h, *pair)
    torch.testing.assert_close(out, defined(norm, h, *pair, silu=True), rtol=0.02, atol=0.02)
