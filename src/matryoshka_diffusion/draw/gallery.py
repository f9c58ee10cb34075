"""Samples as files: one for each image or clip, a grid with captions, and all levels together."""

from __future__ import annotations

import itertools
import mimetypes
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.draw import clips, grid
from matryoshka_diffusion.files import refuse_full

ClipForm = Literal["webp", "mp4", "gif", "png"]
CLIP_FORMS: dict[ClipForm, str] = {"webp": ".webp", "mp4": ".mp4", "gif": ".gif", "png": ""}
"""Suffix of each form of clip in a folder; PNGs have a folder for each clip."""

CELL = 128  # pixels
ROW = 8  # samples of one caption side by side, at most
ON_SHEETS = 64  # clips on the sheets of a folder, at most: a WebP is no higher than 16,383 pixels


class Subject(NamedTuple):
    """Properties of a model that decide how its samples can be written."""

    name: str
    frames: int | None  # None: it draws images
    width: int  # pixels
    captioned: bool
    fps: float


class Gallery(NamedTuple):
    """Samples to write: uint8 levels from coarse to fine, captions and settings."""

    levels: tuple[UInt8[np.ndarray, "n ... c"], ...]
    captions: tuple[str, ...]
    settings: Mapping[str, Any]

    @property
    def moves(self) -> bool:
        return self.levels[-1].ndim == 5

    @property
    def texts(self) -> tuple[str, ...] | None:
        """The captions, or None if all of them are empty."""
        return self.captions if any(self.captions) else None

    def part(self, places: slice) -> Gallery:
        """Some of the samples, with their own captions and seeds in the settings."""
        levels = tuple(level[places] for level in self.levels)
        return Gallery(levels, self.captions[places], _part_of(self.settings, places))


def _part_of(settings: Mapping[str, Any], places: slice) -> dict[str, Any]:
    own = {name: settings[name][places] for name in ("captions", "seeds") if name in settings}
    if base := settings.get("base"):  # of a cascade, with seeds of its own
        own["base"] = _part_of(base, places)
    return {**settings, **own}


# --- destinations ------------------------------------------------------------------------------


def default_place(run: str, caption: str, seed: int, suffix: str = "") -> Path:
    """`samples/<caption>-seed<n>` inside the run's folder, or here for a shipped model.

    It is a folder, or with a `suffix` a file. What exists stays: the new one gets `-2`, `-3`, ...
    """
    root = (Path(run) if Path(run).is_dir() else Path()) / "samples"
    name = f"{_slug(caption) or 'samples'}-seed{seed}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(root / (name + suffix) for name in names if not (root / (name + suffix)).exists())


def check(
    out: Path,
    form: ClipForm | None,
    model: Subject,
    count: int,
    n: int,
    *,
    overwrite: bool = False,
) -> None:
    """Refuse a destination that `save` cannot write, before anything is drawn.

    Args:
        out: a folder, or a file by its suffix.
        form: the form of clips in a folder, None for WebP.
        count: number of captions or classes.
        n: samples of each caption or class.
        overwrite: let files be there, which may be replaced.

    Raises:
        UsageError: the model has no such samples, the suffix is unknown, a clip of this form cannot
            be so fast or so large, nothing can be written there, or files are there already.
        ConfigError: `form` is "png", and the folder is not empty.
        MissingExtra: an MP4, and no package that writes it.
    """
    file = out if _is_file(out) else None
    moves = file is not None and file.suffix.lower() in clips.SUFFIXES
    _refuse_unwritable(out if file is None else out.parent)
    refuse_taken(out, overwrite=overwrite, remedy="--overwrite")
    if file is not None and form is not None:
        raise UsageError(f"--clips {form} is for a folder, and -o {out} is a file: omit one")
    if model.frames is None:
        if moves or form is not None:
            option = f"-o {file}" if moves else f"--clips {form}"
            raise UsageError(f"{option}: {model.name} draws images: give a folder or a .png")
        return
    if file is None:
        in_folder = out / f"clip{CLIP_FORMS[form or 'webp']}"
        clips.check_clip(in_folder, model.fps)
        if form == "png":
            refuse_full(out)
    elif moves:
        clips.check_clip(file, model.fps)
        size = grid.grid_size(
            count * -(-n // ROW),
            min(n, ROW),
            cell=max(CELL, model.width),
            captioned=model.captioned,
        )
        largest = clips.LARGEST[file.suffix.lower()]
        if count * n > 1 and max(size) > largest:
            raise UsageError(
                f"-o {file}: a grid of {count * n} clips has {size[0]} x {size[1]} pixels, but "
                f"this form can have {largest} a side: give a folder, or draw fewer (-n)"
            )


def refuse_taken(out: Path, *, overwrite: bool, remedy: str) -> None:
    """Raise `UsageError` for a file that exists or a folder with files, unless `overwrite`."""
    file = _is_file(out)
    if (out.exists() if file else out.is_dir() and any(out.iterdir())) and not overwrite:
        what = "exists" if file else "is not empty"
        raise UsageError(f"{out} {what}: name another place, or add {remedy}")


def _is_file(out: Path) -> bool:
    """Decide if `-o` names a file; the name of a folder may have a dot, too."""
    suffix = out.suffix.lower()
    if out.is_dir() or suffix in (".png", *clips.SUFFIXES):
        return not out.is_dir()
    if (mimetypes.guess_type(out.name)[0] or "").startswith(("image/", "video/")):
        known = ", ".join(clips.SUFFIXES)
        raise UsageError(f"-o {out}: give a folder, a .png or, for clips, one of {known}")
    return False


def _refuse_unwritable(folder: Path) -> None:
    """Raise `UsageError` unless files can be created in a folder, which may not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UsageError(f"-o: {existing} is a file, not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"-o: nothing can be written in {existing}: give another folder")


# --- files and sheets --------------------------------------------------------------------------


def save(samples: Gallery, out: Path, form: ClipForm | None = None) -> str:
    """Write samples into a folder, or together into one file if `out` has the suffix of a file.

    A folder gets `000-red-apple.png`, ..., `levels.png` and, for several, `grid.png`. A model of
    clips gets `.webp` that move, or clips of another `form`, and film strips in `strip.png`; its
    sheets show the first `ON_SHEETS` clips. A file that moves holds the only sample, or a grid of
    several; a PNG holds film strips of clips. Each file has the settings in its metadata.

    Returns:
        A line for the user: the number of samples and their place.

    Raises:
        OSError: a file cannot be written; the message has its path.
    """
    count, kind = len(samples.captions), "clip" if samples.moves else "image"
    line = f"{count} {kind}{'s' * (count > 1)} in {out}"
    if _is_file(out):
        save_file(samples, out)
        return line
    for i, caption in enumerate(samples.captions):
        name = file_name(i, caption, form, moves=samples.moves)
        save_file(samples.part(slice(i, i + 1)), out / name)
    sheets = samples.part(slice(ON_SHEETS)) if samples.moves else samples
    settings, fps = sheets.settings, sheets.settings["fps"]
    if samples.moves:
        save_file(sheets, out / f"{grid.STRIP}.png")
    clips.save_pages(levels(sheets), out / grid.LEVELS, fps, settings)
    if count == 1:
        return line
    together = clips.save_pages(grid_of(sheets), out / grid.GRID, fps, settings)
    first = "" if len(sheets.captions) == count else f"the first {ON_SHEETS} "
    return f"{line}, {first}together in {together}"


def file_name(
    number: int, caption: str, form: ClipForm | None, *, moves: bool, digits: int = 3
) -> str:
    """Name of the file of one sample, such as 000-red-apple.png; `moves` is for clips."""
    name = "-".join(filter(None, (f"{number:0{digits}d}", _slug(caption))))
    return name + suffix_of(form, moves=moves)


def suffix_of(form: ClipForm | None, *, moves: bool) -> str:
    """Suffix of the file of one sample; empty for a clip as a folder of frames."""
    return CLIP_FORMS[form or "webp"] if moves else ".png"


def save_file(samples: Gallery, out: Path) -> None:
    """Write samples into one file, whose suffix decides the form."""
    finest, only = samples.levels[-1], len(samples.captions) == 1
    if out.suffix.lower() in clips.FASTEST:
        cell = max(CELL, finest.shape[-2])  # no pixel is averaged away
        frames = finest[0] if only else map(np.asarray, grid_of(samples, cell))
        clips.save_clip(frames, out, samples.settings["fps"], samples.settings)
    elif samples.moves:
        grid.save_png(grid.strip(finest, samples.texts), out, samples.settings)
    else:
        grid.save_png(finest[0] if only else grid_of(samples)[0], out, samples.settings)


def grid_of(samples: Gallery, cell: int = CELL) -> list[Image.Image]:
    """The finest level of all samples, a row for each caption; one page for each frame."""
    rows: list[list[int]] = []
    for number, caption in enumerate(samples.captions):
        if not rows or caption != samples.captions[rows[-1][0]] or len(rows[-1]) == ROW:
            rows.append([])
        rows[-1].append(number)
    captions = [samples.captions[row[0]] for row in rows] if samples.texts else None
    return [
        grid.grid([list(images[row]) for row in rows], captions=captions, cell=cell)
        for (images,) in grid.moments([samples.levels[-1]])
    ]


def levels(samples: Gallery) -> list[Image.Image]:
    """Every level of every sample, coarse to fine; one page for each frame."""
    # A clip has a page for each frame, so its cells stay small.
    cell = CELL if samples.moves else grid.cell_of(samples.levels)
    return grid.pages(samples.levels, captions=samples.texts, cell=cell, blocks=2)


def _slug(text: str, longest: int = 40) -> str:
    """A caption as part of a file name: its letters and digits, of any script."""
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")[:longest].strip("-")
