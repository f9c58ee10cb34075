"""Text in any script on sheets: each letter in a font that has it, or as an escape.

Pillow's own font has Western letters. Others are looked for among the fonts of the system, and in
matplotlib if that is installed. A letter that no font has is written as its escape, never as a box,
and a warning names a font to install.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import unicodedata
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONTS = (
    "DejaVuSans.ttf",  # Greek, Cyrillic, Hebrew, Arabic and many signs
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",  # Chinese, Japanese, Korean
    "NotoSansDevanagari-Regular.ttf",
    "wqy-zenhei.ttc",
    "Arial Unicode.ttf",  # these of macOS
    "Hiragino Sans GB.ttc",
    "AppleSDGothicNeo.ttc",
    "arial.ttf",  # these of Windows
    "msyh.ttc",
    "malgun.ttf",
    "msgothic.ttc",
    "seguisym.ttf",
)
"""Names of fonts, by which Pillow finds them where systems keep fonts."""
NOWHERE = "\U0010ffff"
"""A code point that no font has, drawn as the box of a missing letter."""
EAST_ASIAN = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "FULLWIDTH", "IDEOGRAPHIC")
"""How Unicode's names of letters begin that a Chinese, Japanese or Korean font has."""
SELECTORS = range(0xFE00, 0xFE10)
"""Code points that choose a style of the one before, such as an emoji's."""

_MISSING: set[str] = set()  # packages that a warning has named


def width_of(text: str, size: int) -> float:
    """Width of text in pixels."""
    return sum(_font(name, size).getlength(part) for name, part in _parts(text))


def draw_text(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int | float],
    text: str,
    colour: tuple[int, int, int],
    size: int,
) -> None:
    """Draw one line of text, from its upper left corner on; all fonts stand on one line."""
    left, top = corner
    ascent = _font("", size).getmetrics()[0]
    for name, part in _parts(text):
        font = _font(name, size)
        draw.text((left, top + ascent - font.getmetrics()[0]), part, colour, font)
        left += font.getlength(part)


def _parts(text: str) -> list[tuple[str, str]]:
    """Text in parts that one font draws, with the font's name; "" is Pillow's own."""
    if text.isascii():
        return [("", text)]
    composed = unicodedata.normalize("NFC", text)
    known = [letter for letter in composed if not _is_invisible(letter)]
    for name in ("", *_installed()):
        if all(_has(name, letter) for letter in known):
            return [(name, "".join(known))]
    groups = itertools.groupby(map(_letter, known), key=lambda pair: pair[0])
    return [(name, "".join(letter for _, letter in pairs)) for name, pairs in groups]


def _is_invisible(letter: str) -> bool:
    return unicodedata.category(letter) == "Cf" or ord(letter) in SELECTORS


def _letter(letter: str) -> tuple[str, str]:
    """The first font that has a letter, and the letter; an escape if none has it."""
    for name in itertools.chain(("", *_installed()), _known_to_fontconfig(letter)):
        if _has(name, letter):
            return name, letter
    escape = letter.encode("unicode_escape").decode()
    if unicodedata.category(letter) not in ("Cs", "Cn", "Co"):  # else it is no letter
        _warn(_package_with(letter), letter, escape)
    return "", escape


def _package_with(letter: str) -> str:
    """Debian's package of a font that has a letter."""
    if unicodedata.name(letter, "").startswith(EAST_ASIAN):
        return "fonts-noto-cjk"
    return "fonts-symbola" if unicodedata.category(letter) == "So" else "fonts-noto-core"


def _warn(package: str, letter: str, escape: str) -> None:
    """Name a font to install, once for each in a process."""
    if package in _MISSING:
        return
    _MISSING.add(package)
    warnings.warn(
        f"no font here has {letter}, so sheets show {escape}: install one, for instance by "
        f"`apt install {package}` on Debian and Ubuntu",
        stacklevel=2,
    )


@cache
def _has(name: str, letter: str) -> bool:
    """Tell if a font draws another picture of a letter than of one that does not exist."""
    if letter.isspace() or unicodedata.category(letter) == "Cs":  # half of a pair, so no letter
        return letter.isspace()
    pictures = [Image.new("L", (48, 48)) for _ in range(2)]
    for picture, each in zip(pictures, (letter, NOWHERE), strict=True):
        ImageDraw.Draw(picture).text((8, 8), each, 255, _font(name, 16))
    return pictures[0].tobytes() != pictures[1].tobytes()


@cache
def _installed() -> tuple[str, ...]:
    """The fonts of `FONTS` that the system has, and matplotlib's."""
    spec = find_spec("matplotlib")
    inside = [] if spec is None or spec.origin is None else [Path(spec.origin).parent]
    found = [str(folder / "mpl-data" / "fonts" / "ttf" / FONTS[0]) for folder in inside]
    return tuple(name for name in (*FONTS, *found) if _opens(name))


@cache
def _known_to_fontconfig(letter: str) -> tuple[str, ...]:
    """Files of fonts that have a letter as fontconfig says, where it is installed."""
    program = shutil.which("fc-list")
    if program is None:
        return ()
    command = [program, "-f", "%{file}\\n", f":charset={ord(letter):x}"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(name for name in sorted(listing.stdout.splitlines()) if _opens(name))


def _opens(name: str) -> bool:
    try:
        _font(name, 16)
    except OSError:
        return False
    return True


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    if not name:
        return ImageFont.load_default(size=size)  # pyright: ignore[reportReturnType]
    return ImageFont.truetype(name, size)
