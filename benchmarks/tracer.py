"""Kernels, bytes, FLOPs, copies and waits of what runs on tensors of a (fake) GPU."""

from __future__ import annotations

import linecache
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks import fake_gpu

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
PEAK = {"half": 0.75 * 790e12, "float": 0.75 * 60e12}
"""FLOPs a second that products reach on an H200: of tensor cores, and in float32 without TF32."""
BANDWIDTH = 0.85 * 4.3e12
"""Bytes a second that kernels reach there."""

CONVOLUTIONS = (aten.convolution, aten.convolution_backward)
KINDS = {
    "convolutions": ("convolution", "convolution_backward"),
    "attention": ("_scaled_dot_product",),
    "matrix products": ("mm", "bmm", "addmm", "baddbmm"),
    "norms": ("native_group_norm", "native_layer_norm", "norm"),
    "casts and copies": ("_to_copy", "clone", "copy_", "cat", "constant_pad_nd"),
    "optimizer and averages": ("_foreach", "_fused"),
}
"""Beginnings of the names of operators; others are pointwise."""
WITHOUT_KERNEL = ("empty", "new_empty", "_unsafe_view", "is_same_size", "set_", "resize_")
OVERWRITING = ("copy_", "fill_", "zero_")


class Kernel(NamedTuple):
    """One kernel of an operator, called at a place in the package."""

    operator: str
    kind: str
    place: str
    bytes: int
    flops: int = 0
    half: bool = True

    @property
    def seconds(self) -> float:
        """Modelled time on an H200."""
        peak = PEAK["half" if self.half else "float"]
        return max(self.flops / peak, self.bytes / BANDWIDTH)


class Tracer(TorchDispatchMode):
    """Record what operators on GPU tensors do, in the order of their calls.

    Attributes:
        kernels: everything that would be launched.
        copies: bytes between host and device, by direction ("H2D", "H2D blocking", "D2H").
        waits: places at which the host would wait for the device, with their lines.
        attention: attention kernels, with the place of their call.
        doubles: places that make float64 tensors on the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.copies: Counter[str] = Counter()
        self.waits: list[str] = []
        self.attention: Counter[str] = Counter()
        self.doubles: Counter[str] = Counter()
        self._forward: dict[int, str] = {}  # number of a node for the backward pass -> its place

    def __enter__(self) -> Tracer:
        fake_gpu.ATTENDING.append(self._attend)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        fake_gpu.ATTENDING.remove(self._attend)

    def _wait(self) -> None:
        self.waits.append(line())

    def _attend(self, kernel: str) -> None:
        self.attention[f"{kernel} {place()}"] += 1

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        outputs = function(*args, **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]
        places = {x.device.type for x in (*inputs, *made)}
        if "cuda" not in places:
            return outputs
        if function is aten._local_scalar_dense.default:
            self.copies["D2H blocking"] += inputs[0].nbytes
            self._wait()
            return outputs
        if function.overloadpacket in (aten._to_copy, aten.copy_) and len(places) > 1:
            self._copy(inputs[-1], args[0] if function is aten.copy_.default else made[0], kwargs)
        else:
            self.kernels += _kernels(function, args, kwargs, outputs, self._place())
        if any(x.dtype == torch.float64 for x in made):
            self.doubles[line()] += 1
        return outputs

    def _place(self) -> str:
        """File and line of the call, or of the forward call whose gradient is computed."""
        if (node := torch._C._current_autograd_node()) is not None:
            return f"{self._forward.get(node._sequence_nr(), '?')} backward"
        here, number = place(), torch.autograd._get_sequence_nr()  # pyright: ignore[reportPrivateImportUsage]
        self._forward[number - 1] = here
        return here

    def _copy(self, source: Tensor, target: Tensor, options: dict[str, Any]) -> None:
        """Note a copy between host and device. Those that block the host are waits."""
        to_gpu = target.device.type == "cuda"
        direction, host = ("H2D", source) if to_gpu else ("D2H", target)
        blocking = not (options.get("non_blocking", False) and host.is_pinned())
        self.copies[direction + (" blocking" if blocking else "")] += source.nbytes
        if blocking:
            self._wait()


# --- the kernels of an operator ------------------------------------------------------------------


def _kernels(function: Any, args: Any, kwargs: Any, outputs: Any, here: str) -> Iterator[Kernel]:
    """The kernels that an operator launches, with what surrounds them inside of its call."""
    made = [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]
    name, returns = function.overloadpacket.__name__, function._schema.returns
    is_view = any(each.alias_info and not each.alias_info.is_write for each in returns)
    if is_view or name.startswith(WITHOUT_KERNEL) or name in ("device", "detach"):
        return
    if not any(x.numel() for x in made) and returns:
        return
    kind = next((kind for kind, names in KINDS.items() if name.startswith(names)), "pointwise")
    half = any(x.dtype in HALF for x in tree_leaves(args) if isinstance(x, Tensor))
    moved, flops = _moved(function, args, kwargs, made), 0
    if (count := flop_registry.get(function.overloadpacket)) is not None:
        flops = count(*args, **kwargs, out_val=outputs)
    if function.overloadpacket in CONVOLUTIONS:
        yield from _around_convolution(name, args, made, here, half)
        moved -= args[2].nbytes if name == "convolution" and args[2] is not None else 0
        if name == "convolution_backward" and len(made) > 1:  # two products read the gradient
            moved += args[0].nbytes
    if name.startswith(("native_group_norm", "norm")):  # sums first: inputs are read twice
        features = [x for x in args[: 2 if "backward" in name else 1] if x.ndim > 2]
        moved += sum(x.nbytes for x in features)
        for x in features:
            if name.startswith("native") and not x.is_contiguous():
                yield Kernel("contiguous", "layout copies", here, 2 * x.nbytes)
    yield Kernel(name, kind, here, moved, flops, half)


def _around_convolution(
    name: str, args: Any, made: list[Tensor], here: str, half: bool
) -> Iterator[Kernel]:
    """Bias and layout copies of a convolution: cuDNN's kernels have neither.

    Half-precision kernels work on channels last; others are transposed before and after, except
    for 1 x 1 kernels, which are matrix products in either order.
    """
    features = args[:1] if name == "convolution" else args[:2]
    weight = args[1] if name == "convolution" else args[2]
    last = any(is_last(x) for x in (*features, weight))
    if last:
        copied = [x for x in features if not x.is_contiguous(memory_format=torch.channels_last)]
    else:
        transposed = half and weight.shape[2] * weight.shape[3] > 1
        copied = [*features, *(x for x in made[:1] if x.ndim == 4)] if transposed else []
    for x in copied:
        if x.numel():
            yield Kernel("transpose", "layout copies", here, 2 * x.nbytes)
    if name == "convolution" and args[2] is not None:
        yield Kernel("add bias", "pointwise", here, 2 * made[0].nbytes)
    if name == "convolution_backward" and args[-1][2]:
        yield Kernel("gradient of bias", "pointwise", here, args[0].nbytes)


def is_last(x: Tensor) -> bool:
    """Test if the channels of images are innermost in memory, and nothing else is."""
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return last and not x.is_contiguous()


def _moved(function: Any, args: Any, kwargs: Any, made: list[Tensor]) -> int:
    """Bytes that a kernel reads and writes, each once."""
    schema, name = function._schema, function.overloadpacket.__name__
    total = 0
    if name.endswith("_like"):  # only the shape of its argument matters
        return sum(map(_bytes, made))
    for n, argument in enumerate(schema.arguments):
        value = args[n] if n < len(args) else kwargs.get(argument.name)
        size = sum(_bytes(x) for x in tree_leaves(value) if isinstance(x, Tensor))
        written = argument.alias_info is not None and argument.alias_info.is_write
        overwritten = written and name in OVERWRITING
        total += size * (2 if written and not overwritten else 1)
    fresh = not any(each.alias_info for each in schema.returns)
    return total + (sum(map(_bytes, made)) if fresh else 0)


def _bytes(x: Tensor) -> int:
    """Bytes of a tensor of the GPU in memory: axes that repeat the same numbers count once."""
    if x.device.type != "cuda":
        return 0
    size = x.element_size()
    for length, stride in zip(x.shape, x.stride(), strict=True):
        size *= 1 if stride == 0 and length else length
    return size


# --- places --------------------------------------------------------------------------------------


def _frame() -> Any:
    """The innermost frame of what is traced in the package, if there is one."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/matryoshka_diffusion/" in name and not name.endswith("/nn/costs.py"):
            return frame
        frame = frame.f_back
    return None


def place() -> str:
    """File and line in the package."""
    frame = _frame()
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "?"


def line() -> str:
    """File and text of the line in the package, which stay when lines above change."""
    frame = _frame()
    if frame is None:
        return "?"
    text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    return f"{Path(frame.f_code.co_filename).name}: {text}"
