"""How pictures lie in memory: channel by channel (NCHW) or pixel by pixel (channels last).

The numbers are the same up to rounding; which is faster depends on the device and its kernels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import ModelConfig, RunConfig
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.pyramid import Pyramid, resolutions_of
from matryoshka_diffusion.train.precision import Asked, autocast

Layout = Literal["nchw", "channels_last"]

FORMATS: dict[Layout, torch.memory_format] = {
    "nchw": torch.contiguous_format,
    "channels_last": torch.channels_last,
}
OF_CLIPS = {**FORMATS, "channels_last": torch.channels_last_3d}
ROWS, REPEATS, TOKENS = 16, 5, 32
MARGIN = 1.05
"""Channels last is chosen if it is faster by more than this: a tie must not be decided by noise."""


def resolve_layout(config: RunConfig, device: torch.device, ranks: int = 1) -> Layout:
    """`auto` is what `seconds_per_pass` finds faster; on a CPU it is NCHW without looking.

    There NCHW is much faster in bf16 and about even in fp32 (docs/performance.md), and numbers that
    depend on how busy a machine was at the start of a run would be a bad bargain.
    """
    asked = config.train.layout
    if asked != "auto":
        return asked
    if device.type == "cpu":
        return "nchw"
    try:
        seconds = seconds_per_pass(config, device, ranks)
    except torch.OutOfMemoryError:
        return "nchw"
    finally:
        if torch.cuda.is_available():  # the peak that is logged is to be the run's own
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
    return "channels_last" if MARGIN * seconds["channels_last"] < seconds["nchw"] else "nchw"


def placed(net: NestedUNet, device: torch.device, layout: Layout) -> NestedUNet:
    """The same network, its weights on a device and in a layout."""
    return net.to(device).to(memory_format=FORMATS[layout])  # pyright: ignore[reportCallIssue]


def arranged(x: Pyramid, layout: Layout) -> Pyramid:
    """The same pictures in a layout; those that are in it already are not copied."""
    return tuple(
        level.contiguous(memory_format=(FORMATS if level.ndim == 4 else OF_CLIPS)[layout])
        for level in x
    )


def seconds_per_pass(
    config: RunConfig, device: torch.device, ranks: int = 1
) -> dict[Layout, float]:
    """Time of a forward and backward pass of the whole nest in each layout.

    The layouts take turns, so that what else the machine does falls on both; medians of a few. It
    is one network that is laid out in turn, with the run's recomputation and no more rows than a
    micro-batch of one of the `ranks` has: what fits for training fits here.
    """
    train = config.train
    rows = min(ROWS, -(-train.stages[-1].batch_size // (ranks * train.accumulate)))
    net = NestedUNet(config.model)
    net.recompute(train.recompute)
    given = random_inputs(config.model, rows, device)
    times: dict[Layout, list[float]] = {layout: [] for layout in FORMATS}
    for _ in range(REPEATS):
        for layout in FORMATS:
            one_pass = _one_pass(placed(net, device, layout), given, layout, train.precision)
            one_pass()  # kernels are chosen and memory is taken
            began = time.perf_counter()
            one_pass()
            times[layout].append(time.perf_counter() - began)
    return {layout: statistics.median(seconds) for layout, seconds in times.items()}


def _one_pass(
    net: NestedUNet,
    given: tuple[Pyramid, Tensor, Conditioning],
    layout: Layout,
    precision: Asked,
) -> Callable[[], float]:
    """A function that runs the network once forward and once backward, and waits for the end."""
    z, t, cond = given
    z = arranged(z, layout)

    def one_pass() -> float:
        net.zero_grad(set_to_none=True)
        with autocast(precision, t.device):
            outputs = net(z, t, cond)
        torch.stack([output.float().square().mean() for output in outputs]).sum().backward()
        # The stem of the finest level is the last to get its gradient.
        gradient = net.levels[-1].stem.weight.grad
        assert gradient is not None
        return gradient.sum().item()

    return one_pass


def random_inputs(
    model: ModelConfig, rows: int, device: torch.device
) -> tuple[Pyramid, Tensor, Conditioning]:
    """Arguments for a network, of the right shapes and no meaning."""
    draw = torch.Generator().manual_seed(0)
    z = tuple(
        torch.randn(rows, *resolution.shape(model.channels), generator=draw).to(device)
        for resolution in resolutions_of(model)
    )
    text = model.text
    cond = Conditioning(
        labels=torch.zeros(rows, dtype=torch.long) if model.classes else None,
        tokens=torch.randn(rows, TOKENS, text.features, generator=draw) if text else None,
        micro={name: torch.ones(rows) for name in model.micro_names},
        image=z[0] if model.coarse else None,
        image_t=torch.ones(rows) if model.coarse else None,
    )
    return z, torch.rand(rows, generator=draw).to(device), cond.to(device)
