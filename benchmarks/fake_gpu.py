"""CUDA as torch sees it, on a machine without a GPU: tensors with shapes, devices and no numbers.

Import this module before torch. It compiles such a device for torch's build for CPUs
(`fake_gpu.cpp`, once, into the user's cache), and replaces what asks a real driver. Tensors on
"cuda" then go through autograd, CUDA's autocast and fused optimizers; an operation on tensors of
several devices raises; whatever reaches the host is 1. It needs Linux and g++.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matryoshka_diffusion.files import cache_folder

assert "torch" not in sys.modules, "torch must not have looked for CUDA before"


def _library() -> ctypes.CDLL:
    """Compile and load the device."""
    source = Path(__file__).with_suffix(".cpp")
    digest = hashlib.sha256(source.read_bytes() + version("torch").encode()).hexdigest()
    path = cache_folder("fake-gpu") / f"{digest[:16]}.so"
    if not path.exists():
        spec = importlib.util.find_spec("torch")
        assert spec is not None
        assert spec.origin is not None
        place = Path(spec.origin).parent
        include = [f"-I{place}/include", f"-I{place}/include/torch/csrc/api/include"]
        link = [f"-L{place}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{place}/lib"]
        new = path.with_suffix(f".{os.getpid()}")
        command = ["g++", "-std=c++20", "-shared", "-fPIC", str(source), "-o", str(new)]
        subprocess.run([*command, *include, *link], check=True)
        new.replace(path)
    return ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)


_device = _library()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from matryoshka_diffusion.nn import norms  # noqa: E402

_device.install()
aten = torch.ops.aten

torch.cuda._lazy_init = lambda: None
torch.cuda.amp.common.amp_definitely_not_available = lambda: False
torch.cuda.is_bf16_supported = lambda including_emulation=True: True
torch.cuda.max_memory_allocated = lambda device=None: 0
torch.cuda.get_rng_state = lambda device=None: torch.zeros(16, dtype=torch.uint8)
torch.cuda.set_rng_state = lambda state, device=None: None

# --- streams -------------------------------------------------------------------------------------

STREAMS: list[str] = ["main"]
"""Names of the streams in use, the current one last."""
ORDER: list[str] = []
"""Calls to streams, in order: to record an event, to wait for one, to use memory."""


class _Stream:
    """A stream in which nothing happens."""

    def __init__(self, name: str) -> None:
        self.name = name

    def wait_event(self, event: _Event) -> None:
        ORDER.append(f"{self.name} waits for {event.stream}")


class _Event:
    """The place in a stream at which it was recorded."""

    stream = ""

    def record(self, stream: _Stream) -> None:
        ORDER.append(f"{stream.name} records")
        self.stream = stream.name


@contextmanager
def _using(stream: _Stream) -> Iterator[None]:
    STREAMS.append(stream.name)
    yield
    STREAMS.pop()


torch.cuda.Stream = lambda device=None: _Stream("side")
torch.cuda.current_stream = lambda device=None: _Stream(STREAMS[-1])
torch.cuda.Event = _Event
torch.cuda.stream = _using
setattr(Tensor, "record_stream", lambda self, s: ORDER.append(f"{s.name} uses {self.shape}"))  # noqa: B010  of another type

# --- attention -----------------------------------------------------------------------------------

ATTENDING: list[Callable[[str], None]] = []
"""Functions to call with the name of every attention kernel."""


def attention_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    """The kernel that torch selects on an H100 or H200: cudnn, flash, efficient or math.

    These are the rules of torch 2.13 (`sdp_utils.cpp`) for inputs without dropout.
    """
    half, width = q.dtype in (torch.float16, torch.bfloat16), q.shape[-1]
    if 0 in (q.shape[-2], k.shape[-2]) or any(x.stride(-1) != 1 for x in (q, k, v)):
        return "math"
    deterministic = torch.are_deterministic_algorithms_enabled()
    if half and width <= 128 and width % 8 == 0 and k.shape[-2] != 1 and not deterministic:
        return "cudnn"
    if half and width <= 256 and mask is None:
        return "flash"
    aligned = 8 if half else 4
    offsets = (x.storage_offset() % aligned for x in (q, k, v))
    return "efficient" if width % aligned == 0 and not any(offsets) else "math"


def _attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """The operators that `F.scaled_dot_product_attention` calls on a GPU."""
    if q.device.type != "cuda":
        return _on_cpu(q, k, v, attn_mask=attn_mask)
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    kernel = attention_kernel(q, k, v, attn_mask)
    for note in ATTENDING:
        note(kernel)
    bias = None
    if attn_mask is not None:
        bias = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
        shape = (*q.shape[:3], k.shape[2])
        missing = -k.shape[2] % 16  # rows of the mask lie at multiples of 16
        bias = F.pad(bias, (0, missing))[..., : k.shape[2]].expand(shape)
    with torch.autocast("cuda", enabled=False):
        if kernel == "math":
            return _plain(q, k, v, bias)
        if kernel == "flash" or (kernel == "cudnn" and bias is None):
            return aten._scaled_dot_product_flash_attention(q, k, v)[0]
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        return aten._scaled_dot_product_efficient_attention(q, k, v, bias, learns)[0]


def _plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention by matrix products, which torch computes in float32 and which keeps its logits."""
    scale = q.shape[-1] ** -0.25
    logits = (q.float() * scale) @ (k.float() * scale).transpose(-2, -1)
    logits = logits if bias is None else logits + bias
    return (logits.softmax(-1) @ v.float()).to(q.dtype)


_on_cpu = F.scaled_dot_product_attention
F.scaled_dot_product_attention = _attend

# --- norms ---------------------------------------------------------------------------------------


@torch.library.custom_op("fake_gpu::norm", mutates_args=())
def _norm(
    h: Tensor,
    gain: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`norms.forward_on_gpu` compiled: a pass for the moments and one for the result."""
    return norms.forward_on_gpu(h, gain, bias, scale, shift, groups, eps, silu)  # pyright: ignore[reportReturnType]


@torch.library.custom_op("fake_gpu::norm_backward", mutates_args=())
def _norm_backward(
    dy: Tensor,
    h: Tensor,
    gain: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    mean: Tensor,
    r: Tensor,
    a: Tensor,
    b: Tensor,
    silu: bool,
) -> list[Tensor]:
    """`norms.backward_on_gpu` compiled: a pass for the sums and one for the features' gradient."""
    made = norms.backward_on_gpu(dy, h, gain, bias, scale, mean, r, a, b, silu)
    return [x for x in made if x is not None]


def _backward(*inputs: Any) -> tuple[Tensor | None, ...]:
    made = torch.ops.fake_gpu.norm_backward(*inputs)
    return (*made, None, None)[:5]


EAGER = norms.gpu_kernels
norms.gpu_kernels = lambda *, compiled: (
    (torch.ops.fake_gpu.norm, _backward) if compiled else EAGER(compiled=False)
)
