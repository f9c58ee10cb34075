"""Samples as files: one PNG a picture, a captioned grid, and every level side by side."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matryoshka_diffusion import sheet
from matryoshka_diffusion.pipeline import Samples

if TYPE_CHECKING:
    from PIL.Image import Image
else:
    Image = Any


def default_folder(run: str, samples: Samples) -> Path:
    """`samples/<first caption>-seed<n>` inside the run's folder, or here for a shipped model.

    Where that is taken, `-2`, `-3`, ... is appended: older samples stay.
    """
    root = Path(run) if Path(run).is_dir() else Path()
    name = f"{_slug(samples.captions[0]) or 'samples'}-seed{samples.seeds[0]}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(path for path in (root / "samples" / one for one in names) if not path.exists())


def save(samples: Samples, folder: Path) -> None:
    """Write `000-red-apple.png`, ..., `grid.png` and `levels.png`; settings are in the metadata.

    Raises:
        OSError: a file cannot be written; names it.
    """
    for i, (picture, caption) in enumerate(zip(samples.pictures, samples.captions, strict=True)):
        settings = _of_one(samples.settings, i)
        name = "-".join(part for part in (f"{i:03d}", _slug(caption)) if part)
        sheet.save_png(picture, folder / f"{name}.png", settings)
    sheet.save_png(grid(samples), folder / sheet.GRID, samples.settings)
    sheet.save_png(levels(samples), folder / sheet.LEVELS, samples.settings)


def _of_one(settings: Mapping[str, Any], place: int) -> dict[str, Any]:
    """The settings with the caption and the seed of one picture alone, its base's too."""
    own = {name: [settings[name][place]] for name in ("captions", "seeds") if name in settings}
    base = settings.get("base")
    return {**settings, **own, **({"base": _of_one(base, place)} if base else {})}


def grid(samples: Samples) -> Image:
    """The finest level of all samples: a row for each caption, in lines of at most eight."""
    rows: list[list[Any]] = []
    captions: list[str] = []
    for picture, caption in zip(samples.pictures, samples.captions, strict=True):
        if not rows or caption != captions[-1] or len(rows[-1]) == 8:
            rows.append([])
            captions.append(caption)
        rows[-1].append(picture)
    return sheet.grid(rows, captions=captions if any(captions) else None)


def levels(samples: Samples) -> Image:
    """Every level of every sample, coarse to fine."""
    return sheet.grid(
        sheet.rows_of_levels(samples.levels),
        captions=samples.captions if any(samples.captions) else None,
        columns_titles=sheet.titles_of_levels(samples.levels),
        blocks=2,
    )


def save_page(page: Image, path: Path, model: str) -> Path:
    """Write a sheet that was drawn with `model`; returns its path."""
    sheet.save_png(page, path, {"model": model})
    return path


def _slug(text: str, longest: int = 40) -> str:
    """A caption as part of a file name on any system."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:longest].strip("-")
