"""Attention and norms alone, forward and backward, in the forms that a step could have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.meter import Meter, Numbers, contiguous_heads
from matryoshka_diffusion.nn import layers
from matryoshka_diffusion.nn.norms import normalise

Shape = tuple[int, int, int]
"""Rows, width and side of features."""


def attention(meter: Meter, shapes: Sequence[Shape]) -> Numbers:
    """The kernels of one attention layer, forward and backward, and its time by strides."""
    found: Numbers = {}
    for rows, width, side in shapes:
        layer = layers.Attention(width, 8, 64, feed_forward=False).to(meter.device)
        tokens = torch.randn(rows, 32, 64, device=meter.device)
        mask = torch.ones(rows, 32, dtype=torch.bool, device=meter.device)
        for form in (torch.contiguous_format, torch.channels_last):
            layer.to(memory_format=form)  # pyright: ignore[reportCallIssue]
            h = _random(meter, rows, width, side).contiguous(memory_format=form).requires_grad_()

            def run(
                layer: Any = layer, h: Tensor = h, tokens: Tensor = tokens, mask: Any = mask
            ) -> None:
                with torch.autocast(h.device.type, torch.bfloat16):
                    layer(h, tokens, mask).float().sum().backward()

            row = meter.kernels(run)
            with contiguous_heads():
                row["contiguous"] = meter.kernels(run)
            found[f"{rows}x{width}x{side}x{side} {form}"] = row
    return found


def _random(meter: Meter, rows: int, width: int, side: int) -> Tensor:
    return torch.randn(rows, width, side, side, device=meter.device).bfloat16()


def norms(meter: Meter, shapes: Sequence[Shape]) -> Numbers:
    """GroupNorm and SiLU, there and back: under autocast, in bf16, and as the network has them.

    `wrong by` is the largest error of the gradient, as a share of the largest number in it.
    """
    found: Numbers = {}
    for rows, width, side in shapes:
        norm, half = (
            layers.norm(width).to(meter.device, dtype) for dtype in (None, torch.bfloat16)
        )

        def autocast(x: Tensor, norm: torch.nn.GroupNorm = norm) -> Tensor:
            with torch.autocast(x.device.type, torch.bfloat16):
                return F.silu(norm(x)).bfloat16()

        ways = {
            "autocast": autocast,
            "bf16": lambda x, half=half: F.silu(half(x)),
            "normalise": lambda x, norm=norm: normalise(norm, x),
        }
        for form in (torch.contiguous_format, torch.channels_last):
            x = (
                _random(meter, rows, width, 2 * side)
                .contiguous(memory_format=form)
                .requires_grad_()
            )
            dy = _random(meter, rows, width, 2 * side).contiguous(memory_format=form)
            exact = F.silu(F.group_norm(x.float(), layers.GROUPS))
            (truth,) = torch.autograd.grad(exact, x, dy.float())
            for name, way in ways.items():
                ms = 1e3 * meter.seconds(lambda way=way, x=x, dy=dy: way(x).backward(dy), 20)
                y = way(x)
                (dx,) = torch.autograd.grad(y, x, dy)
                error = float((dx - truth).abs().max() / truth.abs().max())
                kept = y.stride() == dx.stride() == x.stride()
                place = f"{rows}x{width}x{2 * side} {form} {name}"
                found[place] = {"ms": ms, "layout kept": kept, "wrong by": error}
    return found
