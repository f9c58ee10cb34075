"""What a result is of, as JSON: a result of something else is known by it, and done anew."""

from __future__ import annotations

from typing import Any

from matryoshka_diffusion.config import WeightingConfig

Asked = dict[str, Any]

SAMPLES = 1024
"""Samples of a distance."""

PRECISION = "bf16"
"""Of the network that draws them."""

NEW = 0.1
"""The share of its last stage that a network has behind it before it is measured."""

COMMON_WEIGHT = (WeightingConfig(name="v_clipped"),)
"""The weighting that held-out losses are compared under, whatever was trained with."""


def measuring(samples: int) -> Asked:
    """How networks are measured."""
    weights = [weight.model_dump(mode="json") for weight in COMMON_WEIGHT]
    return {"samples": samples, "precision": PRECISION, "new": NEW, "held_out_loss": weights}


def agrees(then: Any, today: Any) -> bool:
    """Whether what was asked then is what is asked today.

    A field that there was not then is one whose default is what the code did.

    >>> agrees({"lr": 0.1}, {"lr": 0.1, "warmup": 0}), agrees({"lr": 0.1}, {"lr": 0.2})
    (True, False)
    """
    if isinstance(then, dict) and isinstance(today, dict):
        return all(key in today and agrees(value, today[key]) for key, value in then.items())
    if isinstance(then, list) and isinstance(today, list):
        return len(then) == len(today) and all(map(agrees, then, today))
    return then == today
