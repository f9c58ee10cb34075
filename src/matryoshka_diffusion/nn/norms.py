"""Group normalisation with what follows it: modulation by the embedding, and SiLU.

torch normalises features with channels innermost in memory ten times as slowly on a CPU as others,
although its bfloat16 convolutions want that order and convert every other input. There `norms.c`
does all in two passes, if the machine has a C compiler. Elsewhere torch's operations do.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from matryoshka_diffusion.files import cache_folder

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = (
    *("-std=c11", "-O3", "-march=native", "-mprefer-vector-width=512", "-shared", "-fPIC"),
    # What vectorising needs of -ffast-math, which as a whole would change rounding everywhere.
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffinite-math-only"),
    *("-fassociative-math", "-freciprocal-math"),
)


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """Compile `norms.c` for this processor, once; None if no C compiler can.

    The result is cached by the source, the compiler's flags and the processor.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    processor = Path("/proc/cpuinfo")
    about = processor.read_text("utf-8").split("\n\n")[0] if processor.exists() else ""
    features = [line for line in about.splitlines() if line.startswith(("flags", "Features"))]
    key = repr((SOURCE.read_text("utf-8"), FLAGS, platform.platform(), features))
    try:
        path = cache_folder("kernels") / f"norms-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
        if not path.exists():
            made = path.with_suffix(f".{os.getpid()}.tmp")
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(made), "-lm"]
            subprocess.run(command, check=True, capture_output=True)
            made.replace(path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError):
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
    if is_fused(h) and norm.weight.dtype == torch.float32:
        return _Fused.apply(
            h, norm.weight, norm.bias, scale, shift, norm.num_groups, norm.eps, silu
        )
    out = norm(h.contiguous() if h.device.type == "cpu" else h)
    if scale is not None and shift is not None:
        out = torch.addcmul(shift[:, :, None, None], out, 1 + scale[:, :, None, None])
    return F.silu(out) if silu else out


def is_fused(h: Float[Tensor, "b c y x"]) -> bool:
    """True for features that `norms.c` takes."""
    return (
        h.dtype == torch.bfloat16
        and h.device.type == "cpu"
        and h.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_compiling()
        and library() is not None
    )


class _Fused(torch.autograd.Function):
    """`normalise` by `norms.c`. It keeps its input and small statistics for the backward pass."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, *settings: Any) -> Tensor:
        weight, bias, scale, shift, groups, eps, silu = settings
        scale, shift = (None if x is None else x.float().contiguous() for x in (scale, shift))
        rows, channels, height, width = h.shape
        means, deviations = h.new_empty(2, rows, groups, dtype=torch.float32)
        factors, offsets = h.new_empty(2, rows, channels, dtype=torch.float32)
        out = torch.empty_like(h)
        shape = (rows, height * width, channels, groups, ctypes.c_float(eps), int(silu))
        kept = (means, deviations, factors, offsets)
        _call("norm_forward", (h, weight, bias, scale, shift, *kept, out), shape)
        ctx.save_for_backward(h, weight, bias, scale, *kept)
        ctx.shape = shape
        ctx.dtype = None if scale is None else settings[2].dtype
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        h, weight, bias, scale, *kept = ctx.saved_tensors
        dy = gradients[0].contiguous(memory_format=torch.channels_last)
        dh, dweight, dbias = torch.empty_like(h), torch.zeros_like(weight), torch.zeros_like(bias)
        dscale, dshift = (None if scale is None else torch.empty_like(scale) for _ in range(2))
        work = weight.new_empty(4, len(weight))
        made = (dh, dweight, dbias, dscale, dshift)
        _call("norm_backward", (h, weight, bias, scale, *kept, dy, work, *made), ctx.shape)
        modulations = (None if x is None else x.to(ctx.dtype) for x in (dscale, dshift))
        return dh, dweight, dbias, *modulations, None, None, None


def _call(name: str, tensors: tuple[Tensor | None, ...], shape: tuple[Any, ...]) -> None:
    """Call a function of `norms.c` with the addresses of contiguous tensors. It frees the GIL."""
    compiled = library()
    assert compiled is not None, "is_fused has compiled it"
    addresses = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors]
    sizes = [ctypes.c_long(x) if isinstance(x, int) else x for x in shape[:-1]]
    getattr(compiled, name)(*addresses, *sizes, ctypes.c_int(shape[-1]))
