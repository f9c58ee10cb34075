"""Samples as files: one a picture or clip, a captioned grid, and every level side by side."""

from __future__ import annotations

import itertools
import mimetypes
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import UInt8

from matryoshka_diffusion.cascade import Model
from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.draw import animation, sheet, video
from matryoshka_diffusion.files import refuse_full
from matryoshka_diffusion.pipeline import Samples

if TYPE_CHECKING:
    from PIL.Image import Image
else:
    Image = Any

ClipForm = Literal["webp", "mp4", "gif", "png"]
CLIP_FORMS: dict[ClipForm, str] = {"webp": ".webp", "mp4": ".mp4", "gif": ".gif", "png": ""}
"""What clips in a folder are written as, and the suffix of each; PNGs have a folder for a clip."""

CELL = 128
ROW = 8
"""Samples of one caption side by side, at most."""
ON_SHEETS = 64
"""Clips that the sheets in a folder show, the first: a WebP is no higher than 16,383 pixels."""


# --- where samples go --------------------------------------------------------------------------


def default_folder(run: str, samples: Samples) -> Path:
    """`samples/<first caption>-seed<n>` inside the run's folder, or here for a shipped model.

    Where that is taken, `-2`, `-3`, ... is appended: older samples stay.
    """
    root = Path(run) if Path(run).is_dir() else Path()
    name = f"{_slug(samples.captions[0]) or 'samples'}-seed{samples.seeds[0]}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(path for path in (root / "samples" / one for one in names) if not path.exists())


def check(
    model: Model,
    out: Path | None,
    clips: ClipForm | None,
    settings: Mapping[str, Any],
    *,
    asked: int,
    n: int,
) -> None:
    """Refuse what `save` could not write, before anything is drawn.

    Args:
        out: a folder, or a file by its suffix; None is `default_folder`.
        clips: the form asked for, if one was.
        settings: those asked for, of sampling.
        asked: how many captions or classes samples are asked of.
        n: samples for each of these.

    Raises:
        UsageError: the model has no such samples, the suffix is none that is written, a form of
            clip cannot have so many frames per second or be so large, or nothing can be written
            there.
        ConfigError: `clips` are folders of PNGs, and there is something in the folder already.
        MissingExtra: MP4s, and no package that writes them.
    """
    file = out if out is not None and _is_file(out) else None
    if out is not None:
        _refuse_unwritable(out if file is None else out.parent)
    if file is not None and clips is not None:
        raise UsageError(f"--clips {clips} is for a folder, and -o {out} is a file")
    if model.resolutions[-1].frames is None:
        _refuse_clips(model.config.name, file, clips, settings)
        return
    in_folder = (out or Path("samples")) / f"clip{CLIP_FORMS[clips or 'webp']}"
    if file is None or _moves(file):
        video.check_clip(file or in_folder, model.sampling(dict(settings)).fps)
    if file is not None and _moves(file) and asked * n > 1:
        _refuse_large(model, file, asked, n)
    if clips == "png" and out is not None:
        refuse_full(out)


def _is_file(out: Path) -> bool:
    """Whether `-o` names a file; folders, too, may have dots in their names.

    Raises:
        UsageError: it names a picture or a film of a kind that is not written.
    """
    if out.is_dir():
        return False
    if out.suffix.lower() in (".png", *video.SUFFIXES):
        return True
    kind = mimetypes.guess_type(out.name)[0] or ""
    if kind.startswith(("image/", "video/")):
        raise UsageError(
            f"-o {out}: samples go into a folder or a .png file; of a model of videos also into "
            f"{', '.join(video.SUFFIXES)}"
        )
    return False


def _moves(file: Path) -> bool:
    return file.suffix.lower() in video.SUFFIXES


def _refuse_clips(
    name: str, file: Path | None, clips: ClipForm | None, settings: Mapping[str, Any]
) -> None:
    """Raise `UsageError` for what only a model of videos has."""
    if file is not None and _moves(file):
        raise UsageError(f"-o {file}: {name} draws pictures, no clips; give a folder or a .png")
    for option, given in (("--clips", clips), ("--fps", settings.get("fps"))):
        if given is not None:
            raise UsageError(f"{option} {given}: {name} draws pictures, no clips")


def _refuse_large(model: Model, file: Path, asked: int, n: int) -> None:
    """Raise `UsageError` if a grid of the samples is larger than the file can be."""
    captioned = model.config.model.text is not None or model.config.model.classes > 0
    cell = _unshrunk(model.resolutions[-1].width)
    size = sheet.grid_size(asked * -(-n // ROW), min(n, ROW), cell=cell, captioned=captioned)
    largest = video.LARGEST[file.suffix.lower()]
    if max(size) > largest:
        raise UsageError(
            f"-o {file}: a grid of {asked * n} clips has {size[0]} x {size[1]} pixels, but this "
            f"form can have {largest} a side: give a folder, or draw fewer (-n)"
        )


def _refuse_unwritable(folder: Path) -> None:
    """Raise `UsageError` unless files can be made in a folder, which is not there yet perhaps."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"-o: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"-o: nothing can be written in {there}")


# --- writing them ------------------------------------------------------------------------------


def save(samples: Samples, out: Path, clips: ClipForm | None = None) -> Path:
    """Write samples into a folder, or together into one file if `out` is named like one.

    A folder gets `000-red-apple.png`, ..., `grid.png` and `levels.png`. Of a model of videos these
    are `.webp` that move and lose nothing, or clips in another form, and there is a film strip,
    `strip.png`; sheets show the first `ON_SHEETS` clips. A file that moves shows the only sample
    itself, several as a grid; a PNG has the film strips of clips. Settings are in the metadata.

    Returns:
        The file with all samples together.

    Raises:
        OSError: a file cannot be written; names it.
    """
    return _save_file(samples, out) if _is_file(out) else _save_folder(samples, out, clips)


def told(samples: Samples, out: Path, together: Path) -> str:
    """What `save` wrote, for the reader of a command's output."""
    kind, count = "clip" if _has_clips(samples) else "picture", len(samples.captions)
    shown = "" if _on_sheets(samples) is samples else f"the first {ON_SHEETS} "
    where = out if together == out else f"{out}, {shown}together in {together}"
    return f"{count} {kind}{'s' * (count > 1)} in {where}"


def _save_file(samples: Samples, out: Path) -> Path:
    finest, settings, only = samples.levels[-1], samples.settings, len(samples.captions) == 1
    if _moves(out):
        cell = _unshrunk(finest.shape[-2])
        frames = finest[0] if only else map(np.asarray, grid(samples, cell))
        video.save_clip(frames, out, settings["fps"], settings)
    elif _has_clips(samples):
        sheet.save_png(_strip(samples), out, settings)
    else:
        sheet.save_png(finest[0] if only else grid(samples)[0], out, settings)
    return out


def _save_folder(samples: Samples, folder: Path, clips: ClipForm | None) -> Path:
    suffix = CLIP_FORMS[clips or "webp"] if _has_clips(samples) else ".png"
    for i, (picture, caption) in enumerate(zip(samples.levels[-1], samples.captions, strict=True)):
        settings = _of(samples.settings, slice(i, i + 1))
        name = "-".join(part for part in (f"{i:03d}", _slug(caption)) if part)
        _save_one(picture, folder / f"{name}{suffix}", settings)
    shown = _on_sheets(samples)
    settings, fps = shown.settings, shown.settings["fps"]
    if _has_clips(shown):
        sheet.save_png(_strip(shown), folder / f"{sheet.STRIP}.png", settings)
    animation.save_pages(levels(shown), folder / sheet.LEVELS, fps, settings)
    return animation.save_pages(grid(shown), folder / sheet.GRID, fps, settings)


def _save_one(
    picture: UInt8[np.ndarray, "... h w c"], path: Path, settings: Mapping[str, Any]
) -> None:
    if picture.ndim == 4:
        video.save_clip(picture, path, settings["fps"], settings)
    else:
        sheet.save_png(picture, path, settings)


def _of(settings: Mapping[str, Any], places: slice) -> dict[str, Any]:
    """The settings with the captions and the seeds of these samples alone, their base's too."""
    own = {name: settings[name][places] for name in ("captions", "seeds") if name in settings}
    base = settings.get("base")
    return {**settings, **own, **({"base": _of(base, places)} if base else {})}


def _on_sheets(samples: Samples) -> Samples:
    """The samples that sheets in a folder show: all pictures, the first `ON_SHEETS` clips."""
    if not _has_clips(samples) or len(samples.seeds) <= ON_SHEETS:
        return samples
    first = slice(ON_SHEETS)
    return Samples(
        tuple(level[first] for level in samples.levels),
        samples.captions[first],
        samples.seeds[first],
        _of(samples.settings, first),
    )


# --- drawing sheets ----------------------------------------------------------------------------


def grid(samples: Samples, cell: int = CELL) -> list[Image]:
    """The finest level of all samples: a row for each caption, in lines of at most `ROW`.

    One page for each frame; one in all of pictures.
    """
    moments = animation.moments([samples.levels[-1]])
    return [_grid(pictures, samples.captions, cell) for (pictures,) in moments]


def _grid(pictures: UInt8[np.ndarray, "n h w c"], captions_of: tuple[str, ...], cell: int) -> Image:
    rows: list[list[Any]] = []
    captions: list[str] = []
    for picture, caption in zip(pictures, captions_of, strict=True):
        if not rows or caption != captions[-1] or len(rows[-1]) == ROW:
            rows.append([])
            captions.append(caption)
        rows[-1].append(picture)
    return sheet.grid(rows, captions=captions if any(captions) else None, cell=cell)


def _unshrunk(width: int) -> int:
    """The cells in which no pixel of samples so wide is averaged away."""
    return max(CELL, width)


def levels(samples: Samples) -> list[Image]:
    """Every level of every sample, coarse to fine; one page for each frame."""
    return animation.pages(samples.levels, captions=_captions(samples), blocks=2)


def _strip(samples: Samples) -> Image:
    return animation.strip(samples.levels[-1], _captions(samples))


def _captions(samples: Samples) -> tuple[str, ...] | None:
    return samples.captions if any(samples.captions) else None


def _has_clips(samples: Samples) -> bool:
    return samples.levels[-1].ndim == 5


def save_page(page: Image, path: Path, model: str) -> Path:
    """Write a sheet that was drawn with `model`; returns its path."""
    sheet.save_png(page, path, {"model": model})
    return path


def _slug(text: str, longest: int = 40) -> str:
    """A caption as part of a file name on any system."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:longest].strip("-")
