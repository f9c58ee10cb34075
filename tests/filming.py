"""Tiny videos for tests: frame n of `steps` has a shade of its own, which tells its number."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CODECS = {
    "mp4": "libx264",
    "m4v": "mpeg4",
    "mov": "mpeg4",
    "webm": "libvpx",
    "mkv": "ffv1",
    "avi": "mpeg4",
}
STEP = 10
"""How much brighter each frame is than the one before it."""


def steps(count: int, size: tuple[int, int] = (32, 32)) -> list[np.ndarray]:
    """Frames (height, width, 3) that grow brighter."""
    return [np.full((*size, 3), STEP * n, np.uint8) for n in range(count)]


def numbers(clip: np.ndarray) -> list[int]:
    """Numbers of the frames of `steps` that a clip shows."""
    return [round(float(frame.mean()) / STEP) for frame in clip]


def noise(count: int, size: tuple[int, int] = (32, 48), seed: int = 0) -> list[np.ndarray]:
    """Frames that move, so that most of them are coded by their differences."""
    still = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return [np.roll(still, n, axis=1) for n in range(count)]


def film(
    path: Path,
    frames: Sequence[np.ndarray],
    *,
    codec: str = "",
    rate: int = 24,
    times: Sequence[int] | None = None,
    form: str | None = None,
    pixels: str | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Write a video; `times` are when the frames are shown, in 1/rate seconds."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    name = codec or CODECS[path.suffix[1:]]
    usual = {"libx264": "yuv420p", "ffv1": "bgr0", "png": "rgba"}.get(name, "yuv420p")
    with av.open(str(path), "w", format=form) as container:
        stream: Any = container.add_stream(name, rate=rate, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels or usual
        if times is not None:
            stream.codec_context.time_base = Fraction(1, rate)
        for number, pixels_of in enumerate(frames):
            kind = "rgba" if pixels_of.shape[2] == 4 else "rgb24"
            frame = av.VideoFrame.from_ndarray(pixels_of, format=kind)
            frame.pts = number if times is None else times[number]
            frame.time_base = Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def animate(
    path: Path, frames: Sequence[np.ndarray], durations: int | Sequence[int] = 40, **options: Any
) -> Path:
    """Write an animated WEBP (lossless) or GIF; durations are in milliseconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *others = [Image.fromarray(frame) for frame in frames]
    if path.suffix == ".webp":
        options = {"lossless": True, "exact": True, **options}
    shown = durations if isinstance(durations, int) else list(durations)
    first.save(path, save_all=True, append_images=others, duration=shown, loop=0, **options)
    return path


def shoot(path: Path, frames: Sequence[np.ndarray]) -> Path:
    """A video or an animation, as the suffix says."""
    return (animate if path.suffix in (".webp", ".gif") else film)(path, frames)
