"""A font of colour bitmaps, as small as one can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fontTools.feaLib.builder import addOpenTypeFeaturesFromString
from fontTools.fontBuilder import FontBuilder
from fontTools.ttLib import newTable
from fontTools.ttLib.tables import C_B_D_T_, E_B_L_C_, BitmapGlyphMetrics


def write_font(path: Path, letters: dict[int, bytes], flags: dict[tuple[int, int], bytes]) -> None:
    """Write a font with one PNG for each letter, and one for each pair of letters (a ligature)."""
    single = {f"u{point:X}": png for point, png in letters.items()}
    pairs = {f"u{a:X}_u{b:X}": png for (a, b), png in flags.items()}
    blank = sorted({f"u{point:X}" for pair in flags for point in pair} - single.keys())
    images = {**single, **pairs}
    builder = FontBuilder(1024, isTTF=True)
    builder.setupGlyphOrder([".notdef", *blank, *images])
    builder.setupCharacterMap({int(name[1:], 16): name for name in [*blank, *single]})
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", *blank, *images], (1024, 0)))
    builder.setupPost()
    rules = "".join(f"sub {name.replace('_', ' ')} by {name};" for name in pairs)
    addOpenTypeFeaturesFromString(builder.font, f"feature ccmp {{{rules}}} ccmp;")
    _add_bitmaps(builder.font, images)
    path.parent.mkdir(parents=True, exist_ok=True)
    builder.save(path)


def _add_bitmaps(font: Any, images: dict[str, bytes]) -> None:
    strike = {}
    for name, png in images.items():
        strike[name] = glyph = C_B_D_T_.cbdt_bitmap_format_17(None, font)
        glyph.metrics, glyph.imageData = BitmapGlyphMetrics.SmallGlyphMetrics(), png
        for field in ("height", "width", "BearingX", "BearingY", "Advance"):
            setattr(glyph.metrics, field, 16)
    bitmaps: Any = newTable("CBDT")
    places: Any = newTable("CBLC")
    font["CBDT"], font["CBLC"] = bitmaps, places
    bitmaps.version = places.version = 3.0
    bitmaps.strikeData = [strike]
    size = E_B_L_C_.Strike()
    table: Any = size.bitmapSizeTable
    for field in ("colorRef", "startGlyphIndex", "endGlyphIndex"):
        setattr(table, field, 0)
    table.ppemX, table.ppemY, table.bitDepth, table.flags = 16, 16, 32, 1
    for line in ("hori", "vert"):
        metrics = E_B_L_C_.SbitLineMetrics()
        for field in (
            *("ascender", "descender", "widthMax", "caretSlopeNumerator"),
            *("caretSlopeDenominator", "caretOffset", "minOriginSB", "minAdvanceSB"),
            *("maxBeforeBL", "minAfterBL", "pad1", "pad2"),
        ):
            setattr(metrics, field, 0)
        setattr(table, line, metrics)
    index: Any = E_B_L_C_.eblc_index_sub_table_1(None, font)
    index.indexFormat, index.imageFormat, index.names = 1, 17, [*images]
    index.firstGlyphIndex, index.lastGlyphIndex = map(
        font.getGlyphID, (index.names[0], index.names[-1])
    )
    size.indexSubTables, places.strikes = [index], [size]
