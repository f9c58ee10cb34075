"""Number format, memory layout, threads and compiled form of a network.

Weights, losses, moments and averages are float32 whatever is chosen here.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from matryoshka_diffusion.config import ConfigError, TrainConfig
from matryoshka_diffusion.files import memory_bytes
from matryoshka_diffusion.nn.conditioner import Context
from matryoshka_diffusion.nn.level import Block, Level
from matryoshka_diffusion.nn.norms import RECOMPILE_LIMIT, library
from matryoshka_diffusion.pyramid import rows_of_mix

Net = TypeVar("Net", bound=nn.Module)
Precision = Literal["bf16", "fp16", "fp32"]
PrecisionSetting = Literal["auto", Precision]
Layout = Literal["nchw", "channels_last"]
LayoutSetting = Literal["auto", Layout]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GROWTH_INTERVAL = 2_000
"""Steps without an overflow after which the loss scale is doubled."""

# By default cuDNN rounds the inputs of float32 convolutions to 10 bits (TF32) where the GPU can,
# while torch's matrix products do not. Here fp32 means float32 on every device.
torch.backends.cudnn.allow_tf32 = False
# Products repeat their bits only in a workspace of this kind, which cuBLAS reads at its first one.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def algorithms(train: TrainConfig) -> Iterator[None]:
    """Choose how a GPU computes, and put everything back after.

    With `train.deterministic` it takes algorithms that repeat their results, bit for bit. Otherwise
    cuDNN tries its algorithms on every new shape of a convolution, which pays if shapes come
    again: micro-batches of no more than two kinds.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not train.deterministic and shapes_repeat(train)
    if train.deterministic:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def shapes_repeat(train: TrainConfig) -> bool:
    """Test if at most two kinds of batches occur in each stage, counted by the rows of levels."""
    for stage in train.stages:
        if train.wake and stage.levels > 1:
            return False
        size = stage.batch_size
        firsts = range(0, min(stage.images, 32 * size), size)
        if stage.mix and len({rows_of_mix(stage.mix, first, size) for first in firsts}) > 2:
            return False
    return True


@contextmanager
def one_core(wanted: bool = True) -> Iterator[None]:
    """Let torch compute on the calling thread alone, if `wanted`.

    The threads of one operation wait for each other by spinning. If another program keeps one core
    busy, that makes a step four to seven times as long, and so does every other thread of a step.
    """
    threads = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def best_device() -> str:
    """The device that `auto` stands for: a GPU that torch can use, else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_memory(device: str) -> int:
    """Bytes of a device's memory; those of the machine where the device has none of its own."""
    if device == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return memory_bytes()


def resolve_precision(setting: PrecisionSetting, device: torch.device) -> Precision:
    """Replace `auto` by bf16 where the hardware multiplies bf16 faster, else by fp32.

    `auto` is never fp16, which needs a `LossScale`.
    """
    if setting != "auto":
        return setting
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # newer than torch 2.6
    there = any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return "bf16" if device.type == "cpu" and there and speed_of_bf16() > 1.2 else "fp32"


@lru_cache(maxsize=1)
def speed_of_bf16() -> float:
    """How many times as fast as in float32 this CPU convolves in bfloat16. Takes some milliseconds.

    Its instructions do not tell: those of AVX512-BF16 have twice the rate of float32 on AMD's
    processors and half of it on Intel's, whose AMX has several times that rate. The fastest of some
    rounds is hardly changed by other programs, so that the answer is the same at every start.
    """
    shapes, dtypes = ((4, 64, 16, 16), (64, 64, 3, 3)), (torch.float32, torch.bfloat16)
    inputs = {dtype: [torch.ones(shape, dtype=dtype) for shape in shapes] for dtype in dtypes}
    seconds: dict[torch.dtype, float] = dict.fromkeys(dtypes, math.inf)
    with torch.inference_mode(), one_core():
        for _ in range(8):
            for dtype, (x, weight) in inputs.items():
                began = time.perf_counter()
                F.conv2d(x, weight, padding=1)
                seconds[dtype] = min(seconds[dtype], time.perf_counter() - began)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def autocast(precision: PrecisionSetting, device: torch.device) -> torch.autocast:
    """Return the context to call a network in. `precision` must be resolved."""
    assert precision != "auto", "the config of a run is resolved when its folder is opened"
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


@dataclass(frozen=True)
class LossScale:
    """Factor of the loss in fp16 (Micikevicius et al., 2018), a power of two, which rounds nothing.

    An overflow divides it by `growth`, `GROWTH_INTERVAL` good steps in a row multiply it. torch's
    GradScaler would judge each FSDP2 rank's shards alone, and has no floor of 1, by which an
    overflow differs from a broken network.
    """

    factor: float = 1.0
    growth: float = 1.0
    good_steps: int = 0

    @classmethod
    def initial(cls, precision: PrecisionSetting) -> LossScale:
        """Scale at the start of a run; 1 forever in bf16 and fp32, which need none."""
        return cls(2.0**16, growth=2.0) if precision == "fp16" else cls()

    @property
    def can_fall(self) -> bool:
        """True if a smaller factor is left to try after an overflow."""
        return self.factor > 1.0

    def after(self, finite: bool) -> LossScale:
        """Scale after a step whose gradient was finite or not."""
        if not finite:
            return LossScale(max(self.factor / self.growth, 1.0), self.growth)
        if self.good_steps + 1 < GROWTH_INTERVAL:
            return LossScale(self.factor, self.growth, self.good_steps + 1)
        return LossScale(self.factor * self.growth, self.growth)


def resolve_layout(
    setting: LayoutSetting, device: torch.device, precision: PrecisionSetting
) -> Layout:
    """Replace `auto` by channels last where convolutions work on it, else by NCHW.

    These are all GPUs, and CPUs if norms can be compiled for that layout (`nn/norms.py`).
    Layouts differ in rounding and speed only.
    """
    if setting != "auto":
        return setting
    there = device.type == "cpu" and precision in ("bf16", "fp32")
    fast = there and library(DTYPES[precision]) is not None
    return "channels_last" if fast or device.type == "cuda" else "nchw"


def placed(net: Net, device: torch.device, layout: LayoutSetting) -> Net:
    """Move a network to a device; with channels last, its stems bring features into that layout.

    All operations keep it from there on. A CPU brings weights into an order of its own each time.
    """

    def bring(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0].contiguous(memory_format=torch.channels_last),)

    net = net.to(device)
    if layout == "channels_last":
        if device.type != "cpu":
            net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        for level in net.modules():
            if isinstance(level, Level):
                level.stem.register_forward_pre_hook(bring)
    return net


def compile_network(
    net: nn.Module, device: torch.device, backend: str | Callable[..., Any] = "inductor"
) -> None:
    """Run the blocks of `net` as compiled code from now on, one graph for any number of rows.

    Parameters and their names stay as they are. A graph of the whole network would be another one
    for every mix of rows. Blocks of equal shapes share graphs.

    Raises ConfigError if a compiler that torch would call at the first step is missing.
    """
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    missing = None
    if shutil.which(compiler) is None:
        missing = f"a C++ compiler, and there is no {compiler}: install it, name another in CXX"
    elif device.type == "cuda" and find_spec("triton") is None:
        missing = "the package triton on a GPU: install it"
    if missing and backend == "inductor":
        raise ConfigError(f"train.compile needs {missing}, or set train.compile=false")
    for block in net.modules():
        if isinstance(block, Block):
            block.forward = _with_any_rows(block.forward, backend)


def _with_any_rows(
    forward: Callable[..., Tensor], backend: str | Callable[..., Any]
) -> Callable[..., Tensor]:
    """A block's forward pass, compiled for any number of rows and for one shape of everything else.

    Hooks of FSDP2 stay outside.
    """
    compiled = torch.compile(forward, dynamic=False, backend=backend)

    def run(h: Tensor, embedding: Tensor, context: Context, *skip: Tensor) -> Tensor:
        for x in (h, embedding, context.tokens, context.mask, *skip):
            if x is not None and len(x) > 1:
                torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT  # of this thread
        return compiled(h, embedding, context, *skip)

    return run
