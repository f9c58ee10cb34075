"""Grids of images with captions, and PNG files that store how they were made."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from matryoshka_diffusion.draw.fonts import draw_text, width_of
from matryoshka_diffusion.files import write_atomically

SETTINGS_KEY = "matryoshka-diffusion"
GRID, LEVELS, STRIP = "grid", "levels", "strip"
SHEETS = tuple(f"{name}{suffix}" for name in (GRID, LEVELS, STRIP) for suffix in (".png", ".webp"))
"""Files in a folder of samples that are not samples themselves."""

GAP, MARGIN = 6, 14  # pixels
TITLE_SIZE, TEXT_SIZE = 20, 13  # pixels
LINE = 1.3  # line height in font sizes
STRIP_FRAMES = 8
LARGEST_CELL = 256
"""Largest side in pixels of a cell that fits its image: a page has many of them."""

PAGE = (238, 239, 241)  # not white, so that images on white have an edge
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
) -> Image.Image:
    """Draw rows of images, each image at `cell` pixels whatever its own resolution.

    Enlarging repeats pixels and never interpolates, so a 16-pixel level beside a 64-pixel level
    shows exactly the model's output.

    Args:
        rows: uint8 images (h, w, 3), (h, w, 1) or (h, w); None leaves a cell empty.
        captions: one text beside each row, wrapped.
        marks: a short note that highlights a row, such as "unseen combination".
        columns_titles: one text above each column.
        title: one line above everything.
        cell: side of a cell in pixels; larger images are averaged down.
        blocks: number of blocks of rows that stand side by side.

    Raises:
        ValueError: there are no images, or the lists differ in length.
    """
    columns = max(map(len, rows), default=0)
    if columns == 0:
        raise ValueError("a grid needs at least one image")
    _check_lengths(len(rows), captions=captions, marks=marks)
    _check_lengths(columns, columns_titles=columns_titles)
    heads_top = MARGIN + (int(TITLE_SIZE * LINE) + GAP if title is not None else 0)
    size = _text_size(cell)
    top = heads_top + (int(size * LINE) + GAP if columns_titles is not None else 0)
    indent = _caption_width(cell) + GAP if captions or marks else 0
    block_width = indent + columns * (cell + GAP) - GAP
    height = -(-len(rows) // min(blocks, len(rows)))  # in rows
    block_count = min(blocks, len(rows))
    page = Image.new("RGB", _page_size(block_count, block_width, height, cell, top), PAGE)
    draw = ImageDraw.Draw(page)
    if title is not None:
        text = _wrap(title, TITLE_SIZE, page.width - 2 * MARGIN, 1)[0]
        draw_text(draw, (MARGIN, MARGIN), text, INK, TITLE_SIZE)
    for block in range(block_count):
        for column, text in enumerate(columns_titles or ()):
            left = MARGIN + block * (block_width + 2 * MARGIN) + indent + column * (cell + GAP)
            line = _wrap(text, size, cell, 1)[0]
            draw_text(draw, (left, heads_top), line, INK, size)
    for index, row in enumerate(rows):
        block, place = divmod(index, height)
        left, upper = MARGIN + block * (block_width + 2 * MARGIN), top + place * (cell + GAP)
        mark = marks[index] if marks else None
        if mark:
            half = GAP // 2
            low = (left + block_width + half, upper + cell + half)
            draw.rectangle((left - half, upper - half, *low), MARKED)
        if indent:
            caption = captions[index] if captions else ""
            _draw_caption(draw, (left, upper), caption, mark, cell, indent - GAP)
        for column, picture in enumerate(row):
            if picture is not None:
                _paste(page, picture, (left + indent + column * (cell + GAP), upper), cell)
    return page


def cell_of(levels: Sequence[UInt8[np.ndarray, "b ... _ _ c"]], smallest: int = 128) -> int:
    """Side of cells in which no pixel of the finest level is averaged away, within limits."""
    return max(smallest, min(max(levels[-1].shape[-3:-1]), LARGEST_CELL))


def grid_size(rows: int, columns: int, *, cell: int, captioned: bool) -> tuple[int, int]:
    """Width and height in pixels of a `grid` of one block without titles."""
    indent = _caption_width(cell) + GAP if captioned else 0
    return _page_size(1, indent + columns * (cell + GAP) - GAP, rows, cell, MARGIN)


def _page_size(blocks: int, block_width: int, rows: int, cell: int, top: int) -> tuple[int, int]:
    return blocks * (block_width + 2 * MARGIN), top + rows * (cell + GAP) - GAP + MARGIN


def _check_lengths(expected: int, **lists: Sequence[Any] | None) -> None:
    for name, values in lists.items():
        if values is not None and len(values) != expected:
            raise ValueError(f"{name} has {len(values)} entries for {expected} rows or columns")


def _caption_width(cell: int) -> int:
    """Width in pixels that fits a word of ten letters, however small the cells are."""
    return max(cell, 8 * _text_size(cell))


def _text_size(cell: int) -> int:
    """Height in pixels of captions; it grows with the cells, as a large sheet is shown smaller."""
    return max(TEXT_SIZE, cell // 10)


def _draw_caption(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    caption: str,
    mark: str | None,
    cell: int,
    width: int,
) -> None:
    size = _text_size(cell)
    room = max(1, int(cell / (size * LINE)))
    notes = _wrap(mark, size, width, max(1, room // 2)) if mark else []
    lines = _wrap(caption, size, width, max(1, room - len(notes)))
    for place, line in enumerate(lines + notes):
        colour = INK if place < len(lines) else ACCENT
        place_of_line = (corner[0], corner[1] + place * size * LINE)
        draw_text(draw, place_of_line, line, colour, size)


def _wrap(text: str, size: int, width: int, most: int) -> list[str]:
    """Break text into lines of `width` pixels; text beyond `most` lines ends in dots."""
    lines = [""]
    for word in text[: width * most].split():  # no letter is narrower than a pixel
        joined = f"{lines[-1]} {word}".strip()
        if width_of(joined, size) <= width:
            lines[-1] = joined
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            if lines[-1] and width_of(lines[-1] + letter, size) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > most:
        last = lines[most - 1]
        while last and width_of(f"{last}...", size) > width:
            last = last[:-1]
        lines = [*lines[: most - 1], f"{last}..."]
    return lines


def _paste(
    page: Image.Image, picture: UInt8[np.ndarray, "..."], corner: tuple[int, int], cell: int
) -> None:
    """Paste an image into the centre of a cell, enlarged by repetition or averaged down."""
    image = to_image(picture)
    scale = cell / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
    left, top = ((cell - side) // 2 for side in size)
    small, place = image.resize(size, resample), (corner[0] + left, corner[1] + top)
    if small.mode in ("LA", "RGBA"):
        page.paste("white", (*place, place[0] + size[0], place[1] + size[1]))
    page.paste(small, place, small if small.mode in ("LA", "RGBA") else None)


# --- grids of levels and of clips --------------------------------------------------------------


def moments(
    levels: Sequence[UInt8[np.ndarray, "b ... _ _ c"]],
) -> Iterator[list[UInt8[np.ndarray, "b _ _ c"]]]:
    """Yield all levels as images, once for each frame of the level with most frames.

    A level without frames stands still. A level with fewer frames shows each frame for as long as
    the group of finer frames that D^r made it from. Levels that are all images have one moment.
    """
    counts = [level.shape[1] if level.ndim == 5 else 1 for level in levels]
    for moment in range(max(counts)):
        yield [
            level[:, moment * count // max(counts)] if level.ndim == 5 else level
            for level, count in zip(levels, counts, strict=True)
        ]


def pages(levels: Sequence[UInt8[np.ndarray, "b ... _ _ c"]], **options: Any) -> list[Image.Image]:
    """Every level of every sample side by side: one page for each of `moments`.

    `options` are those of `grid` except rows and columns' titles.
    """
    titles = titles_of_levels(levels)
    return [
        grid([list(row) for row in zip(*moment, strict=True)], columns_titles=titles, **options)
        for moment in moments(levels)
    ]


def titles_of_levels(levels: Sequence[UInt8[np.ndarray, "b ... _ _ c"]]) -> list[str]:
    """Titles of columns for levels: "64 px" for images, "16x64 px" for clips of 16 frames.

    Images that are no squares have width and height: "80 x 48 px".
    """
    counts = [f"{level.shape[1]}x" if level.ndim == 5 else "" for level in levels]
    sizes = [size_of(level) for level in levels]
    return [f"{count}{size} px" for count, size in zip(counts, sizes, strict=True)]


def size_of(level: UInt8[np.ndarray, "b ... _ _ c"]) -> str:
    """The side of square images in pixels as text, or the width and height of others."""
    height, width = level.shape[-3:-1]
    return f"{width}" if width == height else f"{width} x {height}"


def strip(
    clips: UInt8[np.ndarray, "n f h w c"],
    captions: Sequence[str] | None = None,
    most: int = STRIP_FRAMES,
) -> Image.Image:
    """The frames of each clip side by side, every k-th frame if there are more than `most`."""
    frames = range(0, clips.shape[1], -(-clips.shape[1] // most))
    rows = [[clip[frame] for frame in frames] for clip in clips]
    return grid(rows, captions=captions, columns_titles=[f"frame {frame}" for frame in frames])


# --- files -----------------------------------------------------------------------------------


def to_image(picture: UInt8[np.ndarray, "..."]) -> Image.Image:
    """Convert a uint8 array (h, w) or (h, w, c) to a Pillow image in grey (c = 1) or colour (3).

    With another channel (c = 2 or 4), which is opacity, the image has it.

    Raises:
        ValueError: another shape, or no pixels.
    """
    channels = picture.shape[2:]
    if picture.ndim < 2 or channels not in ((), (1,), (2,), (3,), (4,)) or not picture.size:
        raise ValueError(f"an image is (h, w) or (h, w, 1 to 4), not {picture.shape}")
    return Image.fromarray(np.ascontiguousarray(picture[..., 0] if channels == (1,) else picture))


def save_png(
    image: Image.Image | UInt8[np.ndarray, "..."], path: Path, settings: Mapping[str, Any] | None
) -> None:
    """Write a PNG file as `png` encodes it.

    Raises:
        OSError: the file cannot be written; the message has the path, and no part of it stays.
    """
    content = png(image, settings)
    write_atomically(path, lambda file: file.write(content), needed=len(content))


def png(image: Image.Image | UInt8[np.ndarray, "..."], settings: Mapping[str, Any] | None) -> bytes:
    """Encode a PNG whose text chunk "matryoshka-diffusion" holds `settings` as JSON."""
    picture = to_image(image) if isinstance(image, np.ndarray) else image
    chunks, file = PngInfo(), io.BytesIO()
    if settings is not None:
        chunks.add_text(SETTINGS_KEY, json.dumps(dict(settings), sort_keys=True))
    picture.save(file, format="PNG", pnginfo=chunks)
    return file.getvalue()
