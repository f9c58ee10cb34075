"""Emoji in three styles: the same things as drawn for OpenMoji, Noto and Microsoft's Fluent Emoji.

Captions end in the style: "red apple, outline style". Styles are the classes, and each sample knows
its emoji as `Sample.concept`, so a share of the pairs of emoji and style can be held out.

OpenMoji is CC BY-SA 4.0. Noto Emoji: the font is under the SIL Open Font License 1.1, the drawings
under Apache-2.0. Fluent Emoji is MIT, by Microsoft.
"""

from __future__ import annotations

import struct
from functools import partial
from pathlib import Path
from typing import Any

from matryoshka_diffusion.data.decoded import Catalogue
from matryoshka_diffusion.data.emoji import assets, find, openmoji
from matryoshka_diffusion.data.emoji_names import captions_of_emoji, code_points
from matryoshka_diffusion.data.folder import state_of
from matryoshka_diffusion.data.source import Sample
from matryoshka_diffusion.files import require

FLUENT_3D = "@lobehub/fluent-emoji-3d"
"""npm package of 256-pixel WEBP images, which the user unpacks."""
NOTO = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
"""Font of Debian's package fonts-noto-color-emoji, with one PNG of 136 x 128 pixels an emoji."""

_NAME = "emoji-styles"
_REMEDY = f"give the folder of the unpacked npm package {FLUENT_3D} with --data (data.path)"
_LIGATURE = 4  # type of a lookup


def emoji_styles(path: Path, side: int) -> Catalogue:
    """All emoji in "outline style" (OpenMoji), "flat style" (Noto) and "3d style" (Fluent).

    `path` is the folder of the unpacked package `FLUENT_3D`. A font NotoColorEmoji.ttf in it goes
    before the system's. OpenMoji is drawn at `side` pixels.
    """
    own = path / NOTO.name
    three_d = _fluent_3d(path)
    sets = {"outline": openmoji(side), "flat": noto(own if own.is_file() else NOTO), "3d": three_d}
    samples, loads = [], []
    for style, one in sets.items():
        for n, sample in enumerate(one.samples):
            concept = "-".join(f"{point:X}" for point in code_points(sample.key))
            texts = tuple(f"{text}, {style} style" for text in sample.captions)
            words = {"captions": texts, "label": style, "concept": concept}
            samples.append(sample._replace(key=f"{concept} {style}", **words))
            loads.append(partial(one.load, n))
    state = "\n".join(one.state for one in sets.values())
    return Catalogue(f"{_NAME} {path}", state, samples, lambda n: loads[n]())


def _fluent_3d(path: Path) -> Catalogue:
    folder = assets(path, _REMEDY)
    # Two emoji have a second file, whose name differs in style selectors.
    found = {code_points(file.stem): (file, texts) for file, texts in find(folder, "*.webp", _NAME)}
    images = [*found.values()]
    if not images:
        raise ValueError(f"{path} holds no emoji such as 1f34e.webp: {_REMEDY}")
    state = state_of(folder, [file.name for file, _ in images])
    samples = [Sample(file.stem, texts) for file, texts in images]
    return Catalogue(f"fluent-emoji-3d {path}", state, samples, lambda n: images[n][0])


def noto(font: Path) -> Catalogue:
    """The emoji in a font of colour bitmaps (table CBDT), in the order of code points."""
    captions = captions_of_emoji(_NAME)
    tools = require("fontTools.ttLib", "openmoji", "Noto's emoji")
    remedy = f"apt-get install fonts-noto-color-emoji, or put {NOTO.name} into the folder of --data"
    if not font.is_file():
        raise FileNotFoundError(f"{font} is missing: {remedy}")
    emoji: list[tuple[tuple[int, ...], bytes]] = []
    try:
        with tools.TTFont(font) as tables:
            letters, bitmaps = tables.getBestCmap(), tables["CBDT"].strikeData[0]
            glyphs = {(glyph,): glyph for glyph in letters.values()}
            glyphs |= _ligatures(tables["GSUB"].table) if "GSUB" in tables else {}
            for points in sorted(captions):
                glyph = glyphs.get(tuple(map(letters.get, points)))
                if glyph in bitmaps:
                    emoji.append((points, bitmaps[glyph].imageData))
    except (tools.TTLibError, AssertionError, AttributeError, LookupError, struct.error) as error:
        raise ValueError(f"{font} is no font of colour bitmaps ({error!r}): {remedy}") from error
    samples = [Sample("-".join(f"{c:X}" for c in points), captions[points]) for points, _ in emoji]
    state = state_of(font.parent, [font.name])
    return Catalogue(f"noto {font}", state, samples, lambda n: emoji[n][1])


def _ligatures(substitutions: Any) -> dict[tuple[Any, ...], str]:
    """Glyphs that are drawn in place of several others, such as the two letters of a flag."""
    lookups = substitutions.LookupList.Lookup
    tables = (x for lookup in lookups if lookup.LookupType == _LIGATURE for x in lookup.SubTable)
    return {
        (first, *ligature.Component): ligature.LigGlyph
        for table in tables
        for first, ligatures in table.ligatures.items()
        for ligature in ligatures
    }
