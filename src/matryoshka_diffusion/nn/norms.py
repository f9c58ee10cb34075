"""Group normalisation with what follows it: modulation by the embedding, and SiLU.

A CPU's convolutions want channels innermost in memory and convert every other input, but torch's
normalisation of bfloat16 is ten times as slow in that order. There `norms.c` does all in two
passes, if the machine has a C compiler. On a GPU autocast would compute and keep
all in float32, with channels outermost. There half precision has functions of its own, which torch
compiles to kernels if it can. Elsewhere torch's operations do.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import secrets
import shutil
import subprocess
import sysconfig
import warnings
from collections.abc import Callable
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from matryoshka_diffusion.files import cache_folder

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = (
    *("-std=c11", "-O3", "-march=native", "-shared", "-fPIC"),
    *(("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()),
    # What vectorising needs of -ffast-math, which as a whole would change rounding everywhere.
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffinite-math-only"),
    *("-fassociative-math", "-freciprocal-math"),
)

RECOMPILE_LIMIT = 256
"""Torch's own, 8, is less than the kinds of layers and rows of one run."""
Kernels: TypeAlias = tuple[Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Any, ...]]]
"""Functions for the forward and the backward pass."""


@cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Compile `norms.c` for this processor and type of features; None if no C compiler can.

    The result is cached by the source, the compiler's flags and the processor.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    processor = Path("/proc/cpuinfo")
    about = processor.read_text("utf-8").split("\n\n")[0] if processor.exists() else ""
    features = [line for line in about.splitlines() if line.startswith(("flags", "Features"))]
    flags = (*FLAGS, "-DFLOAT32") if dtype == torch.float32 else FLAGS
    key = repr((SOURCE.read_text("utf-8"), flags, platform.platform(), features))
    try:
        path = cache_folder("kernels") / f"norms-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
        if not path.exists():
            made = path.with_suffix(f".{secrets.token_hex(8)}.tmp")  # threads may compile at once
            command = [compiler, *flags, str(SOURCE), "-o", str(made), "-lm"]
            subprocess.run(command, check=True, capture_output=True)
            made.replace(path)
        return ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines()[:1]
        warnings.warn(
            f"{compiler} compiles no norms, which torch does instead: {said}", stacklevel=2
        )
    except OSError as error:
        message = f"norms are left to torch, because their library cannot be had: {error}"
        warnings.warn(message, stacklevel=2)
    return None


def normalise(
    norm: nn.GroupNorm,
    h: Float[Tensor, "b c y x"],
    scale: Float[Tensor, "b c"] | None = None,
    shift: Float[Tensor, "b c"] | None = None,
    *,
    silu: bool = True,
) -> Float[Tensor, "b c y x"]:
    """Normalise groups of channels; then scale by 1 + `scale`, add `shift`, and apply SiLU."""
    settings = norm.weight, norm.bias, scale, shift, norm.num_groups, norm.eps, silu
    if h.device.type != "cpu" and h.dtype != torch.float32:
        if torch.compiler.is_compiling():
            return forward_on_gpu(h.flatten(2), *settings)[0].view_as(h)
        return _Normalised.apply(h, *settings)
    if is_fused(h) and norm.weight.dtype == torch.float32:
        return _Normalised.apply(h, *settings)
    out = norm(h.contiguous() if h.device.type == "cpu" else h)
    if scale is not None and shift is not None:
        out = torch.addcmul(shift[:, :, None, None], out, 1 + scale[:, :, None, None])
    return F.silu(out) if silu else out


def is_fused(h: Float[Tensor, "b c y x"]) -> bool:
    """True for features that `norms.c` takes."""
    return (
        h.dtype in (torch.bfloat16, torch.float32)
        and h.device.type == "cpu"
        and h.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_compiling()
        and library(h.dtype) is not None
    )


class _Normalised(torch.autograd.Function):
    """`normalise`, which keeps its input and small statistics for the backward pass."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, *settings: Any) -> Tensor:
        *tensors, groups, eps, silu = (h.flatten(2), *settings)
        # Detached weights are no parameters, for each shape of which torch would compile again.
        x, gain, bias, scale, shift = (None if x is None else x.detach() for x in tensors)
        ctx.silu, ctx.kernels = silu, kernels(h)
        out, *statistics = ctx.kernels[0](x, gain, bias, scale, shift, groups, eps, silu)
        ctx.save_for_backward(h, gain, bias, scale, *statistics)
        return out.view_as(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        h, *kept = ctx.saved_tensors
        last = h.is_contiguous(memory_format=torch.channels_last)
        order = torch.channels_last if last else torch.contiguous_format
        dy = gradients[0].contiguous(memory_format=order)
        dh, *others = ctx.kernels[1](dy.flatten(2), h.flatten(2), *kept, ctx.silu)
        return dh.view_as(h), *others, None, None, None


def kernels(h: Float[Tensor, "b c y x"]) -> Kernels:
    """Functions that normalise such features."""
    if h.device.type == "cpu":
        return forward_in_c, backward_in_c
    return gpu_kernels(compiled=h.device.type == "cuda" and len(h) > 0)


# --- on a CPU ------------------------------------------------------------------------------------


def forward_in_c(
    h: Tensor,
    gain: Tensor,
    bias: Tensor,
    scale: Any,
    shift: Any,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, ...]:
    """Normalise features of shape (b, c, n) with channels innermost; return also the statistics."""
    scale, shift = (None if x is None else x.float().contiguous() for x in (scale, shift))
    rows, channels, positions = h.shape
    mean, r = h.new_empty(2, rows, groups, dtype=torch.float32)
    a, b = h.new_empty(2, rows, channels, dtype=torch.float32)
    out = torch.empty_like(h)
    work = h.new_empty(3, channels, dtype=torch.float64)
    shape = (rows, positions, channels, groups, eps, silu)
    _call("norm_forward", h, (gain, bias, scale, shift, work, mean, r, a, b, out), shape)
    return out, mean, r, a, b


def backward_in_c(
    dy: Tensor, h: Tensor, gain: Tensor, bias: Tensor, scale: Tensor | None, *statistics: Any
) -> tuple[Tensor | None, ...]:
    """Gradients of features, gain, bias, scale and shift; the last of `statistics` is `silu`."""
    *kept, silu = statistics
    rows, channels, positions = h.shape
    pair = (None, None)
    if scale is not None:
        pair = h.new_empty(2, rows, channels, dtype=torch.float32).unbind()
    made = (torch.empty_like(h), torch.zeros_like(gain), torch.zeros_like(bias), *pair)
    factors = None if scale is None else scale.float().contiguous()
    work = h.new_empty(5 + -(-positions // 2), channels, dtype=torch.float64)
    tensors = (gain, bias, factors, *kept, dy, work)
    shape = (rows, positions, channels, kept[0].shape[1], 0.0, silu)
    _call("norm_backward", h, (*tensors, *made), shape)
    return *made[:3], *(None if x is None or scale is None else x.to(scale.dtype) for x in pair)


def _call(name: str, h: Tensor, others: tuple[Tensor | None, ...], shape: tuple[Any, ...]) -> None:
    """Call a function of `norms.c` with the addresses of contiguous tensors. It frees the GIL."""
    compiled = library(h.dtype)
    assert compiled is not None, "is_fused has compiled it"
    addresses = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in (h, *others)]
    *sizes, eps, silu = shape
    sizes = map(ctypes.c_long, sizes)
    getattr(compiled, name)(*addresses, *sizes, ctypes.c_float(eps), ctypes.c_int(silu))


# --- on a GPU, in the notation of norms.c --------------------------------------------------------


@lru_cache
def gpu_kernels(*, compiled: bool) -> Kernels:
    """Functions for a GPU, each compiled to two passes over the features if torch can.

    Triton compiles a launcher of its kernels, for which it needs Python's headers.
    """
    compiler = any(map(shutil.which, (os.environ.get("CC", "gcc"), "clang")))
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    if not compiled or not compiler or not headers or find_spec("triton") is None:
        return forward_on_gpu, backward_on_gpu
    return compiled_often(forward_on_gpu), compiled_often(backward_on_gpu)


def compiled_often(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile a function for up to `RECOMPILE_LIMIT` kinds of layers and rows."""
    compiled = torch.compile(function, dynamic=True, **options)

    def run(*inputs: Any) -> Any:
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT  # of this thread
        return compiled(*inputs)

    return run


def forward_on_gpu(
    h: Float[Tensor, "b c n"],
    gain: Float[Tensor, " c"],
    bias: Float[Tensor, " c"],
    scale: Float[Tensor, "b c"] | None,
    shift: Float[Tensor, "b c"] | None,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, ...]:
    """Normalise features, and compute their statistics in float32.

    Moments of channels come first, so that a GPU reads channels that lie side by side together.
    """
    x = h.float()
    variance, mean = (v.unflatten(1, (groups, -1)) for v in torch.var_mean(x, 2, correction=0))
    centre = mean.mean(2, keepdim=True)
    r = ((variance + (mean - centre).square()).mean(2, keepdim=True) + eps).rsqrt()
    a = r * gain.float().unflatten(0, (groups, -1))
    a, b = a.flatten(1), bias.float() - (centre * a).flatten(1)
    if scale is not None and shift is not None:
        s = 1 + scale.float()
        a, b = a * s, b * s + shift.float()
    m = torch.addcmul(b[:, :, None], x, a[:, :, None])
    return (F.silu(m) if silu else m).to(h.dtype), centre.squeeze(2), r.squeeze(2), a, b


def backward_on_gpu(
    dy: Float[Tensor, "b c n"],
    h: Float[Tensor, "b c n"],
    gain: Float[Tensor, " c"],
    bias: Float[Tensor, " c"],
    scale: Float[Tensor, "b c"] | None,
    mean: Float[Tensor, "b g"],
    r: Float[Tensor, "b g"],
    a: Float[Tensor, "b c"],
    b: Float[Tensor, "b c"],
    silu: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of features, gain, bias, scale and shift."""
    width, positions = h.shape[1] // mean.shape[1], h.shape[2]
    mean, r = (v.repeat_interleave(width, 1)[:, :, None] for v in (mean, r))
    centred, dm = h.float() - mean, dy.float()
    if silu:
        m = torch.addcmul(b[:, :, None], h.float(), a[:, :, None])
        dm = dm * m.sigmoid() * (1 + m * (1 - m.sigmoid()))
    db, dr = dm.sum(2), (dm * centred).sum(2) * r.squeeze(2)  # sums of dm and of dm (x - mean) r
    s = torch.ones_like(db) if scale is None else 1 + scale.float()

    def over_group(sums: Tensor) -> Tensor:
        """The mean over a group of what `sums` adds up, times the gain, for each channel."""
        groups = (sums * s * gain).unflatten(1, (-1, width)).mean(2) / positions
        return groups.repeat_interleave(width, 1)[:, :, None]

    dh = a[:, :, None] * dm - r * (over_group(db) + centred * r * over_group(dr))
    pair = (None, None) if scale is None else (dr * gain + db * bias, db)
    dscale, dshift = (None if x is None or scale is None else x.to(scale.dtype) for x in pair)
    return dh.to(h.dtype), (dr * s).sum(0), (db * s).sum(0), dscale, dshift
