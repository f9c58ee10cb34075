"""English names of emoji: the captions of their drawings, and prompts that are an emoji."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from matryoshka_diffusion.config import DataConfig
from matryoshka_diffusion.files import MissingExtra, require

SOURCES = ("openmoji", "emoji-styles", "fluent-emoji")
"""Sources whose captions are the names of emoji."""

_STYLE_SELECTOR = 0xFE0F  # which names and files use differently
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
_BLACK_FLAG, _END_OF_TAG = 0x1F3F4, 0xE007F


def named(prompt: str, data: DataConfig) -> str:
    """The prompt, or the name of the emoji that it is, for a model whose captions are such names.

    Text encoders do not know emoji. A skin tone is left out, as it is in the captions. Without the
    package `emoji` only those of one character have a name, which is Unicode's.

    Examples:
        >>> named("\N{RED APPLE}", DataConfig(source="openmoji"))
        'red apple'
    """
    points = tuple(c for c in _points(map(ord, prompt.strip())) if c not in _SKIN_TONES)
    if data.source not in SOURCES or not points or unicodedata.category(chr(points[0])) != "So":
        return prompt
    try:
        captions = captions_of_emoji("the name of an emoji").get(points)
    except MissingExtra:
        name = unicodedata.name(chr(points[0]), "").lower()
        return name if name and len(points) == 1 else prompt
    return captions[0] if captions else prompt


def captions_of_emoji(purpose: str) -> dict[tuple[int, ...], tuple[str, ...]]:
    """Captions of each emoji by its code points. Raises `MissingExtra`."""
    package = require("emoji", "openmoji", purpose)
    names = {_points(map(ord, text)): data["en"] for text, data in package.EMOJI_DATA.items()}
    return {
        points: _captions(name, points)
        for points, name in names.items()
        if points[0] > 0xFF and not any(c in _SKIN_TONES for c in points)
    }


def code_points(name: str) -> tuple[int, ...]:
    """Code points in the name of a file such as 1F3F3-FE0F-200D-1F308, without style selectors."""
    return _points(int(part, 16) for part in re.split("[-_]", name))


def _points(characters: Iterable[int]) -> tuple[int, ...]:
    return tuple(c for c in characters if c != _STYLE_SELECTOR)


def _captions(name: str, points: tuple[int, ...]) -> tuple[str, ...]:
    """`:red_apple:` is "red apple"; the flag of a place has two captions."""
    words = name.strip(":").replace("_", " ").replace("’", "'")
    regional = points[0] in _REGIONAL_INDICATORS
    subdivision = points[0] == _BLACK_FLAG and points[-1] == _END_OF_TAG
    return (f"flag: {words}", f"flag of {words}") if regional or subdivision else (words,)
