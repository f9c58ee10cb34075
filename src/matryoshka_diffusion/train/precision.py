"""Which arithmetic the network runs in. Weights, losses, moments and averages stay float32."""

from __future__ import annotations

from typing import Literal

import torch

Asked = Literal["auto", "bf16", "fp32"]
Precision = Literal["bf16", "fp32"]


def resolve_precision(asked: Asked, device: torch.device) -> Precision:
    """`auto` is bf16 where the hardware multiplies bf16, which is where it is faster.

    On a CPU with AVX512-BF16 a training step takes 1.5 times as long in fp32; on one without, bf16
    is emulated and slower than fp32.
    """
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and _cpu_has_bf16() else "fp32"


def autocast(precision: Asked, device: torch.device) -> torch.autocast:
    """The context to call a network in, for a precision that is resolved."""
    assert precision != "auto", "the config of a run is resolved when its folder is opened"
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def _cpu_has_bf16() -> bool:
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # newer than torch 2.6
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
