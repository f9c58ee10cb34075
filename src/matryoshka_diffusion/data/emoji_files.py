"""Files that are named after an emoji's code points, such as 1F34E.svg, and what those are called.

Left out are skin-tone variants (the same drawing again under a longer name) and the 14 emoji that
begin with a Latin-1 character: keycaps, copyright and registered, which are text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from matryoshka_diffusion.files import require

_STYLE_SELECTOR = 0xFE0F
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
_BLACK_FLAG, _END_OF_TAG = 0x1F3F4, 0xE007F
_NAME = re.compile(r"[0-9a-fA-F]+([-_][0-9a-fA-F]+)*")


class Emoji(NamedTuple):
    """One emoji; the order is that of the code points."""

    code_points: tuple[int, ...]
    path: Path
    captions: tuple[str, ...]


def find_emoji(folder: Path, pattern: str, purpose: str) -> list[Emoji]:
    """The emoji whose files lie in the folder, in order.

    Raises:
        MissingExtra: the package with their names is not installed; `purpose` is what needs it.
    """
    names = {
        _code_points(map(ord, text)): data["en"]
        for text, data in require("emoji", "openmoji", purpose).EMOJI_DATA.items()
    }
    found = []
    for path in folder.glob(pattern):
        if not _NAME.fullmatch(path.stem):
            continue
        code_points = _code_points(int(part, 16) for part in re.split("[-_]", path.stem))
        if code_points in names and _is_wanted(code_points):
            found.append(Emoji(code_points, path, _captions(names[code_points], code_points)))
    return sorted(found)


def _code_points(characters: Iterable[int]) -> tuple[int, ...]:
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
