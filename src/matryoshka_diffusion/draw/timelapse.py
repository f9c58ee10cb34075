"""The previews of a run as one clip, which shows how its samples change while it learns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.draw.clips import check_clip, save_clip
from matryoshka_diffusion.draw.grid import PAGE
from matryoshka_diffusion.files import FOREIGN_ERRORS

MOST_FRAMES = 300
"""Previews in a clip; of more, every second, third, ... one."""


def timelapse(run: Path, out: Path, fps: float) -> int:
    """Write the previews of a run to `out` as a clip; return their number.

    Sheets grow as levels join, and stand in the corner of a page of the largest size. The last one
    stays for a second. Of a moving sheet the first frame is shown.

    Raises:
        UsageError: the run has no previews, or a clip cannot have this name or rate.
        ValueError: a preview cannot be read.
        OSError: the clip cannot be written.
    """
    check_clip(out, fps)
    previews = sorted(path for path in (run / "previews").glob("*") if path.stem.isdigit())
    if not previews:
        raise UsageError(f"{run}: there are no previews in {run / 'previews'}")
    every = -(-len(previews) // MOST_FRAMES)
    shown = [*previews[:-1:every], previews[-1]]
    sizes = [_opened(path).size for path in shown]
    page = (max(width for width, _ in sizes), max(height for _, height in sizes))
    held = [shown[-1]] * max(round(fps) - 1, 0)
    save_clip(_frames([*shown, *held], page), out, fps, {"run": run.name, "previews": len(shown)})
    return len(shown)


def _frames(previews: list[Path], size: tuple[int, int]) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Each preview on a page of `size`."""
    for path in previews:
        page = Image.new("RGB", size, PAGE)
        page.paste(_opened(path).convert("RGB"))
        yield np.asarray(page)


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, *FOREIGN_ERRORS) as error:
        raise ValueError(f"{path} cannot be read ({error}): remove it") from error
