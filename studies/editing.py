"""`python -m studies.editing RUN`: edits of a model's own images, measured, and a sheet of them.

A coarse level of real images is kept: do samples agree with it, and is the real image the nearest
one? A quarter of each image is drawn anew: how far is it from the real one, and how far is a sample
that sees nothing of the image?
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8

from matryoshka_diffusion.data.source import open_data, read_all
from matryoshka_diffusion.draw.grid import grid, save_png
from matryoshka_diffusion.metrics.nearest import nearest_images
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.pyramid import Resolution, shrink
from matryoshka_diffusion.rng import choose

COMPARED = 64
"""Side at which nearest images are searched, at most."""
SHOWN = 8
"""Images on the sheet."""
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"correct": 1}, {"resample": 2})

Pictures = UInt8[np.ndarray, "n s s c"]


class Subjects(NamedTuple):
    """Real images of the data that a model was trained on, and places of some that are edited."""

    every: Pictures
    captions: tuple[str, ...]
    chosen: np.ndarray

    @property
    def edited(self) -> Pictures:
        """The images that are edited."""
        return self.every[self.chosen]

    @property
    def texts(self) -> list[str]:
        """Their captions."""
        return [self.captions[place] for place in self.chosen]


def subjects(model: Matryoshka, count: int) -> Subjects:
    """All images of a model's data, `count` of them chosen."""
    source = open_data(model.config)
    examples = list(read_all(source, range(len(source.samples))))
    captions = tuple(example.captions[0] for example in examples)
    chosen = choose(len(examples), count, "images to edit")
    return Subjects(np.stack([example.picture for example in examples]), captions, chosen)


def averaged(pictures: Pictures, side: int) -> Float[np.ndarray, "n t t c"]:
    """D^r of images as numbers from -1 to 1, not rounded."""
    n, fine, _, channels = pictures.shape
    block = fine // side
    parts = pictures.reshape(n, side, block, side, block, channels)
    return parts.mean(axis=(2, 4), dtype=np.float64) / 127.5 - 1.0


def keep_level(
    model: Matryoshka, real: Subjects, side: int, settings: dict[str, Any]
) -> tuple[str, Pictures]:
    """Redraw all that is finer than the level of `side` pixels; a line of figures, and samples."""
    drawn = model.edit(real.texts, keep={side: [*real.edited]}, **settings).pictures
    gaps = np.abs(averaged(drawn, side) - averaged(real.edited, side)).mean(axis=(1, 2, 3))
    small = min(COMPARED, model.picture_side)
    flat = [averaged(part, small).reshape(len(part), -1) for part in (drawn, real.every)]
    found = nearest_images(flat[0], real.chosen, flat[1]).nearer == 0
    line = (
        f"{side} pixels kept: |D(x) - x{side}| {gaps.mean():.4f}, at most {gaps.max():.4f}; "
        f"nearest image right for {found.sum()} of {len(found)}"
    )
    return line, drawn


def quarter(side: int) -> Bool[np.ndarray, "s s"]:
    """The lower right quarter of an image."""
    hole = np.zeros((side, side), bool)
    hole[side // 2 :, side // 2 :] = True
    return hole


def error_in(hole: Bool[np.ndarray, "s s"], drawn: Pictures, real: Pictures) -> float:
    """Root mean square error inside of a hole, in numbers from -1 to 1."""
    return float(np.sqrt(np.square(drawn[:, hole] / 127.5 - real[:, hole] / 127.5).mean()))


def measure(model: Matryoshka, count: int, side: int, out: Path, settings: dict[str, Any]) -> None:
    """Print the figures of all edits, and write a sheet of the first images."""
    real = subjects(model, count)
    line, redrawn = keep_level(model, real, side, {**settings, "guidance": 1.0})
    print(line, flush=True)
    hole = quarter(model.picture_side)
    kept = {model.model.levels[-1].size: [*real.edited]}
    free = model.sample(real.texts, **settings, guidance=0.0).pictures
    chance = error_in(hole, free, real.edited)
    print(f"a quarter of an unconditional sample: error {chance:.3f}", flush=True)
    coarse = np.stack([shrink(picture, Resolution(side, side)) for picture in real.edited])
    columns = {"real": real.edited, f"its {side} pixels": coarse, f"{side} kept": redrawn}
    for name, guidance in (("own caption", 1.0), ("no caption", 0.0)):
        for options in OPTIONS:
            title = ", ".join([name, *(f"{key} {value}" for key, value in options.items())])
            how = {**settings, **options, "guidance": guidance}
            drawn = model.edit(real.texts, keep=kept, mask=hole, **how).pictures
            error = error_in(hole, drawn, real.edited)
            print(f"drawn anew, {title}: error {error:.3f}, {error / chance:.2f} of that")
            columns[title] = drawn
    columns["unconditional"] = free
    rows = [[part[n] for part in columns.values()] for n in range(min(SHOWN, count))]
    captions = real.texts[: len(rows)]
    save_png(grid(rows, captions=captions, columns_titles=[*columns]), out, None)
    print(f"the first {len(rows)} images: {out}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m studies.editing", description=__doc__)
    parser.add_argument("model", metavar="RUN", help="run folder, model folder or shipped model")
    parser.add_argument("-n", type=int, default=64, help="images to edit (64)")
    parser.add_argument("--level", type=int, default=16, metavar="SIDE", help="kept level (16)")
    parser.add_argument("--steps", type=int, help="(the model's own)")
    parser.add_argument("-o", "--out", type=Path, default=Path("editing.png"), help="the sheet")
    options = parser.parse_args(arguments)
    settings = {} if options.steps is None else {"steps": options.steps}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Matryoshka.load(options.model, device=device)
    measure(model, options.n, options.level, options.out, settings)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
