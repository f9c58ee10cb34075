"""Lines of a drawing's stream: JSON objects with the states of all levels, and the result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from matryoshka_diffusion.draw.clips import FASTEST, webp
from matryoshka_diffusion.draw.grid import SETTINGS_KEY, png, to_image
from matryoshka_diffusion.studio.requests import Settings, encoded, error_of

LARGE_SIDE = 128
"""Pictures with a longer side are shown after every second step."""
FEWEST_STATES = 5


def line(**content: Any) -> bytes:
    """One line of a stream."""
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"


def error_line(message: str, field: str | None = None) -> bytes:
    """The last line of a stream that fails."""
    return line(**error_of(message, field))


def interval(steps: int, side: int) -> int:
    """The number of steps from one state that is shown to the next."""
    return 2 if side > LARGE_SIDE and steps >= 2 * FEWEST_STATES else 1


def state_line(
    step: int, steps: int, t: float, levels: Sequence[UInt8[np.ndarray, "n ... c"]]
) -> bytes:
    """The line of a state; `levels` are the estimates of all samples, coarse to fine."""
    return line(state={"step": step, "steps": steps, "t": t, "levels": list(map(_level, levels))})


def _level(images: UInt8[np.ndarray, "n ... c"]) -> Settings:
    frames = images.shape[1] if images.ndim == 5 else None
    return {"side": images.shape[-2], "frames": frames, "pixels": encoded(rgb(images).tobytes())}


def rgb(images: UInt8[np.ndarray, "*grid c"]) -> UInt8[np.ndarray, "*grid 3"]:
    """Images in colour: grey is repeated, and transparent ones lie on white."""
    channels = images.shape[-1]
    if channels in (2, 4):
        opacity = images[..., -1:].astype(np.float32) / 255.0
        white = 255.0 * (1.0 - opacity)
        images = (images[..., :-1] * opacity + white).round().astype(np.uint8)
    return images if images.shape[-1] == 3 else images.repeat(3, axis=-1)


def result(
    levels: Sequence[UInt8[np.ndarray, "... c"]], record: Settings, settings: Settings
) -> Settings:
    """One sample for the page: its files, and the settings that draw it again.

    Args:
        levels: the sample's levels, coarse to fine.
        record: what the metadata of the finest level's file holds.
        settings: those of the page.
    """
    *coarser, finest = levels
    return {
        "png": encoded(file_of(finest, record["fps"], record)),
        "levels": [encoded(file_of(level, record["fps"], None)) for level in coarser]
        + [encoded(file_of(finest, record["fps"], None))],
        "settings": settings,
    }


def file_of(sample: UInt8[np.ndarray, "... c"], fps: float, record: Settings | None) -> bytes:
    """A PNG of an image or an animated WebP of a clip, with `record` in its metadata."""
    if sample.ndim == 3:
        return png(sample, record)
    text = None if record is None else json.dumps({SETTINGS_KEY: record}, sort_keys=True)
    return webp(map(to_image, sample), min(fps, FASTEST[".webp"]), text)
