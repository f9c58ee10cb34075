"""Pictures for people: captioned grids, and PNG files that remember how they were made.

Pillow is imported by the functions that draw, so that importing the package stays light.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from matryoshka_diffusion.files import write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont
else:  # what checks types while running must not need Pillow either
    Image = ImageDraw = FreeTypeFont = Any

SETTINGS_KEY = "matryoshka-diffusion"
GRID, LEVELS, STRIP = "grid", "levels", "strip"
SHEETS = tuple(f"{name}{suffix}" for name in (GRID, LEVELS, STRIP) for suffix in (".png", ".webp"))
"""What may stand in a folder of samples, beside the pictures or clips themselves."""

GAP = 6
MARGIN = 14
TITLE_SIZE = 20
TEXT_SIZE = 13
LINE = 1.3  # line height in font sizes

PAGE = (238, 239, 241)  # not white, so that pictures on white have an edge
MARKED = (250, 228, 205)
INK = (28, 30, 34)
ACCENT = (168, 62, 12)


# --- grids -----------------------------------------------------------------------------------


def grid(
    rows: Sequence[Sequence[UInt8[np.ndarray, "..."] | None]],
    *,
    captions: Sequence[str] | None = None,
    marks: Sequence[str | None] | None = None,
    columns_titles: Sequence[str] | None = None,
    title: str | None = None,
    cell: int = 128,
    blocks: int = 1,
) -> Image:
    """Lay out rows of pictures, each shown at `cell` pixels whatever its own resolution.

    Pixels are repeated, never interpolated: a 16-pixel level beside a 64-pixel one shows what the
    model made, and at the same size.

    Args:
        rows: uint8 pictures (h, w, 3), (h, w, 1) or (h, w); None leaves a cell empty.
        captions: one text beside each row, wrapped.
        marks: a short note for each row that is set off, such as "unseen combination".
        columns_titles: one text above each column.
        title: one line above everything.
        cell: pixels of a cell's side; larger pictures are averaged down.
        blocks: the rows are cut into this many blocks, which stand side by side.

    Raises:
        ValueError: no pictures, or lists whose lengths do not agree.
    """
    from PIL import Image as images
    from PIL import ImageDraw as drawing

    columns = max((len(row) for row in rows), default=0)
    _check_lengths(len(rows), columns, captions, marks, columns_titles)
    layout = _Layout(
        rows=len(rows),
        columns=columns,
        cell=cell,
        blocks=min(blocks, len(rows)),
        caption_width=_caption_width(cell) if captions or marks else 0,
        titled=title is not None,
        headed=columns_titles is not None,
    )
    page = images.new("RGB", layout.size, PAGE)
    draw = drawing.Draw(page)
    if title is not None:
        text = _wrap(title, _font(TITLE_SIZE), layout.size[0] - 2 * MARGIN, 1)[0]
        draw.text((MARGIN, MARGIN), text, INK, _font(TITLE_SIZE))
    for block in range(layout.blocks):
        _draw_heads(draw, layout, block, columns_titles or ())
    for index, row in enumerate(rows):
        mark = marks[index] if marks else None
        if mark:
            draw.rectangle(layout.row_box(index), MARKED)
        if captions or mark:
            _draw_caption(draw, layout, index, captions[index] if captions else "", mark)
        for column, picture in enumerate(row):
            if picture is not None:
                _paste(page, picture, layout.cell_at(index, column), cell)
    return page


def grid_size(rows: int, columns: int, *, cell: int, captioned: bool) -> tuple[int, int]:
    """Width and height in pixels of a `grid` of one block without titles."""
    width = _caption_width(cell) if captioned else 0
    return _Layout(rows, columns, cell, 1, width, titled=False, headed=False).size


def rows_of_levels(
    levels: Sequence[UInt8[np.ndarray, "b _ _ c"]],
) -> list[list[UInt8[np.ndarray, "_ _ c"]]]:
    """Batches of every level, coarse to fine, as one row for each picture: its levels in order."""
    return [list(row) for row in zip(*levels, strict=True)]


def titles_of_levels(levels: Sequence[UInt8[np.ndarray, "b ... _ _ c"]]) -> list[str]:
    """Column titles for levels, such as "64 px" of pictures and "16x64 px" of 16 frames."""
    counts = [f"{level.shape[1]}x" if level.ndim == 5 else "" for level in levels]
    return [f"{count}{level.shape[-2]} px" for count, level in zip(counts, levels, strict=True)]


@dataclass(frozen=True)
class _Layout:
    """Where things stand on the page, in pixels."""

    rows: int
    columns: int
    cell: int
    blocks: int
    caption_width: int
    titled: bool
    headed: bool

    @property
    def rows_per_block(self) -> int:
        return -(-self.rows // self.blocks)

    @property
    def block_width(self) -> int:
        caption = self.caption_width + GAP if self.caption_width else 0
        return caption + self.columns * (self.cell + GAP) - GAP

    @property
    def heads_top(self) -> int:
        return MARGIN + (int(TITLE_SIZE * LINE) + GAP if self.titled else 0)

    @property
    def top(self) -> int:
        return self.heads_top + (int(TEXT_SIZE * LINE) + GAP if self.headed else 0)

    @property
    def size(self) -> tuple[int, int]:
        width = self.blocks * (self.block_width + 2 * MARGIN)
        height = self.top + self.rows_per_block * (self.cell + GAP) - GAP + MARGIN
        return width, height

    def block_left(self, block: int) -> int:
        return MARGIN + block * (self.block_width + 2 * MARGIN)

    def cells_left(self, block: int) -> int:
        return self.block_left(block) + (self.caption_width + GAP if self.caption_width else 0)

    def row_at(self, row: int) -> tuple[int, int]:
        block, place = divmod(row, self.rows_per_block)
        return self.block_left(block), self.top + place * (self.cell + GAP)

    def row_box(self, row: int) -> tuple[int, int, int, int]:
        """The row with a border of half a gap."""
        left, top = self.row_at(row)
        half = GAP // 2
        return left - half, top - half, left + self.block_width + half, top + self.cell + half

    def cell_at(self, row: int, column: int) -> tuple[int, int]:
        block = row // self.rows_per_block
        return self.cells_left(block) + column * (self.cell + GAP), self.row_at(row)[1]


def _check_lengths(
    rows: int,
    columns: int,
    captions: Sequence[str] | None,
    marks: Sequence[str | None] | None,
    columns_titles: Sequence[str] | None,
) -> None:
    if columns == 0:
        raise ValueError("a grid needs at least one picture")
    for name, values, expected in (
        ("captions", captions, rows),
        ("marks", marks, rows),
        ("columns_titles", columns_titles, columns),
    ):
        if values is not None and len(values) != expected:
            raise ValueError(f"{name} has {len(values)} entries for {expected} rows or columns")


def _caption_width(cell: int) -> int:
    """Wide enough for a word of ten letters, however small the cells are."""
    return max(cell, 8 * TEXT_SIZE)


def _draw_heads(draw: ImageDraw, layout: _Layout, block: int, titles: Sequence[str]) -> None:
    font = _font(TEXT_SIZE)
    for column, text in enumerate(titles):
        left = layout.cells_left(block) + column * (layout.cell + GAP)
        draw.text((left, layout.heads_top), _wrap(text, font, layout.cell, 1)[0], INK, font)


def _draw_caption(
    draw: ImageDraw, layout: _Layout, row: int, caption: str, mark: str | None
) -> None:
    font, height = _font(TEXT_SIZE), TEXT_SIZE * LINE
    left, top = layout.row_at(row)
    room = max(1, int(layout.cell / height))
    noted = _wrap(mark, font, layout.caption_width, max(1, room // 2)) if mark else []
    lines = _wrap(caption, font, layout.caption_width, max(1, room - len(noted)))
    for place, line in enumerate(lines + noted):
        colour = INK if place < len(lines) else ACCENT
        draw.text((left, top + place * height), line, colour, font)


def _font(size: int) -> FreeTypeFont:
    from PIL import ImageFont

    return ImageFont.load_default(size=size)  # pyright: ignore[reportReturnType]


def _wrap(text: str, font: FreeTypeFont, width: int, most: int) -> list[str]:
    """`text` in lines of at most `width` pixels; what passes `most` lines ends in dots."""
    lines: list[str] = []
    for word in text[: width * most].split():  # no letter is narrower than a pixel
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines += _pieces(word, font, width)
    if len(lines) > most:
        lines = [*lines[: most - 1], _with_dots(lines[most - 1], font, width)]
    return lines or [""]


def _with_dots(line: str, font: FreeTypeFont, width: int) -> str:
    while line and font.getlength(f"{line}...") > width:
        line = line[:-1]
    return f"{line}..."


def _pieces(word: str, font: FreeTypeFont, width: int) -> list[str]:
    """A word that is wider than a line, cut where a line ends."""
    pieces = [""]
    for letter in word:
        if pieces[-1] and font.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def _paste(
    page: Image, picture: UInt8[np.ndarray, "..."], corner: tuple[int, int], cell: int
) -> None:
    """Put a picture into a cell: enlarged by repeating pixels, or averaged down; centred."""
    from PIL.Image import Resampling

    image = to_image(picture)
    scale = cell / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Resampling.NEAREST if scale >= 1 else Resampling.BOX)
    left, top = ((cell - side) // 2 for side in size)
    page.paste(image, (corner[0] + left, corner[1] + top))


# --- files -----------------------------------------------------------------------------------


def to_image(picture: UInt8[np.ndarray, "..."]) -> Image:
    """A uint8 array (h, w, 3), (h, w, 1) or (h, w) as a Pillow image, grey if it has one channel.

    Raises:
        ValueError: another shape, or no pixels.
    """
    from PIL import Image as images

    channels = picture.shape[2:]
    if picture.ndim < 2 or channels not in ((), (1,), (3,)) or not picture.size:
        raise ValueError(f"a picture is (h, w), (h, w, 1) or (h, w, 3), not {picture.shape}")
    return images.fromarray(np.ascontiguousarray(picture[..., 0] if channels == (1,) else picture))


def save_png(
    image: Image | UInt8[np.ndarray, "..."], path: Path, settings: Mapping[str, Any] | None
) -> None:
    """Write a PNG whose text chunk "matryoshka-diffusion" holds `settings` as JSON.

    The file appears whole or not at all.

    Raises:
        OSError: with the path, if it cannot be written.
    """
    from PIL.PngImagePlugin import PngInfo

    picture = to_image(image) if isinstance(image, np.ndarray) else image
    chunks = PngInfo()
    if settings is not None:
        chunks.add_text(SETTINGS_KEY, json.dumps(dict(settings), sort_keys=True))
    write_atomically(path, lambda file: picture.save(file, format="PNG", pnginfo=chunks))
