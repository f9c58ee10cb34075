"""The metric `unseen`: can a model draw a thing in a style that it was never shown it in?

Samples have the captions of the held-out images of a source that shows each thing in several
styles (`Sample.concept`, with the style as its class). Each one is compared with all images. It is
nearest to its held-out image, to the same thing in a style that was trained on (a copy), or to
something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL.Image import Image

from matryoshka_diffusion.draw.grid import grid, save_png
from matryoshka_diffusion.eval.comparison import Comparison
from matryoshka_diffusion.eval.feature_store import PictureSet
from matryoshka_diffusion.eval.result import Result
from matryoshka_diffusion.metrics.errors import share_error
from matryoshka_diffusion.metrics.formulas import NEAREST
from matryoshka_diffusion.metrics.nearest import Nearest, nearest_images

SHEET = 12  # samples on it


def unseen(pair: Comparison) -> list[Result]:
    """Shares of the samples by their nearest image, each with its error and the level of chance."""
    facts, own = pair.real.samples, np.array(pair.made.belong_to)
    real, made = pair.both()
    nearest = nearest_images(made, own, real)
    names, concepts = np.unique([one.concept for one in facts], return_inverse=True)
    styles = np.array([one.label for one in facts])
    seen = ~np.isin(np.arange(len(facts)), own)
    copied = (concepts[nearest.image] == concepts[own]) & seen[nearest.image]
    shares = {
        "among the five nearest": nearest.nearer < NEAREST,
        "copies of another style": copied,
        "in its style": styles[nearest.image] == styles[own],
    }
    # A random image is the sample's own, a copy or in its style with these probabilities.
    seen_styles = np.bincount(concepts[seen], minlength=len(names))
    chances = {
        "by chance": 1 / len(facts),
        "copies by chance": seen_styles[concepts[own]].mean() / len(facts),
        "in its style by chance": np.mean([(styles == style).mean() for style in styles[own]]),
    }
    found = float((nearest.nearer == 0).mean())
    others = {name: float(hits.mean()) for name, hits in shares.items()}
    fields: dict[str, Any] = {
        "error": share_error(found, len(made)),
        "others": others | {name: float(chance) for name, chance in chances.items()},
        "errors": {name: share_error(share, len(made)) for name, share in others.items()},
        "higher_is_better": True,
        "sheet": str(_write_sheet(pair, nearest, copied)),
    }
    network = f"-{pair.network.name}" if pair.metric.network else ""
    return [pair.number(f"unseen retrieval{network}", found, **fields)]


def _write_sheet(pair: Comparison, nearest: Nearest, copied: np.ndarray) -> Path:
    """Draw some of the samples, unless the sheet of these samples is there."""
    path = pair.made.folder / f"{pair.key}.png"
    if not path.is_file():
        marks = np.where(nearest.nearer == 0, "found", np.where(copied, "a copy", ""))
        settings = {"model": pair.about.of, "seed": pair.about.seed}
        save_png(_sheet(pair, marks.tolist()), path, settings)
    return path


def _sheet(pair: Comparison, marks: Sequence[str]) -> Image:
    """Samples, each beside its held-out image and the same thing in the styles that were seen.

    They are spread evenly, because a source may be sorted by style.
    """
    facts, own, count = pair.real.samples, pair.made.belong_to, pair.made.count
    numbers = [n * count // SHEET for n in range(SHEET)] if count > SHEET else [*range(count)]
    held_out, rows = {*own}, []
    for n in numbers:
        concept = facts[own[n]].concept
        same = [place for place, one in enumerate(facts) if one.concept == concept]
        places = [own[n], *(place for place in same if place not in held_out)]
        rows.append([_picture(pair.made, n), *(_picture(pair.real, place) for place in places)])
    seen = ["trained on"] * (max(map(len, rows)) - 2)
    return grid(
        rows,
        captions=[pair.made.captions[n] for n in numbers],
        marks=[marks[n] for n in numbers],
        columns_titles=["sample", "held out", *seen],
        title=f"{pair.about.of}: pairs that it has not seen",
        blocks=2,
    )


def _picture(pictures: PictureSet, number: int) -> UInt8[np.ndarray, "h w c"]:
    batch = pictures.make(range(number, number + 1), lambda done, total: None)
    return batch.pictures[0]
