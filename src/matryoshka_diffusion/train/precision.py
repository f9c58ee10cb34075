"""Which arithmetic the network runs in. Weights, losses, moments and averages stay float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Asked = Literal["auto", "bf16", "fp16", "fp32"]
Precision = Literal["bf16", "fp16", "fp32"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

GOOD_STEPS = 2_000
"""Steps without an overflow after which a loss scale is tried one size larger."""


def resolve_precision(asked: Asked, device: torch.device) -> Precision:
    """`auto` is bf16 where the hardware multiplies bf16, which is where it is faster.

    On a CPU with AVX512-BF16 a training step takes 1.5 times as long in fp32; on one without, bf16
    is emulated and slower than fp32. fp16 has to be asked for: it needs a `LossScale`.
    """
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and _cpu_has_bf16() else "fp32"


def autocast(precision: Asked, device: torch.device) -> torch.autocast:
    """The context to call a network in, for a precision that is resolved."""
    assert precision != "auto", "the config of a run is resolved when its folder is opened"
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def _cpu_has_bf16() -> bool:
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # newer than torch 2.6
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


@dataclass(frozen=True)
class LossScale:
    """What the loss is multiplied by before its gradient is taken, and the gradient divided by.

    fp16 has nothing between 0 and 6e-8, where many gradients lie. The factor is as large as the
    other end of the range allows (Micikevicius et al., 2018): a gradient that is not finite divides
    it by `growth`, `GOOD_STEPS` good steps in a row multiply it. It is a power of two, so scaling
    rounds nothing. With a growth of 1 it stays what it is.
    """

    factor: float = 1.0
    growth: float = 1.0
    good_steps: int = 0

    @classmethod
    def of(cls, precision: Asked) -> LossScale:
        """Where a run begins: bf16 and fp32 have the exponents of float32 and need no scale."""
        return cls(2.0**16, growth=2.0) if precision == "fp16" else cls()

    @property
    def can_fall(self) -> bool:
        """Whether a smaller factor is left to try after an overflow."""
        return self.factor > 1.0

    def after(self, finite: bool) -> LossScale:
        """The scale of the next step, by whether the gradient of this one was finite."""
        if not finite:
            return LossScale(max(self.factor / self.growth, 1.0), self.growth)
        if self.good_steps + 1 < GOOD_STEPS:
            return LossScale(self.factor, self.growth, self.good_steps + 1)
        return LossScale(self.factor * self.growth, self.growth)
