"""What a run does besides learning: previews of fixed prompts or classes while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from matryoshka_diffusion.codec.autoencoder import Codec
from matryoshka_diffusion.config import RunConfig
from matryoshka_diffusion.data.source import Source
from matryoshka_diffusion.draw import clips, grid
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.pyramid import Resolution, shrink
from matryoshka_diffusion.rng import choose
from matryoshka_diffusion.text.encoder import TextEncoder
from matryoshka_diffusion.train.trainer import View

PREVIEWS = 8


def preview_of(source: Source, config: RunConfig, count: int = PREVIEWS) -> dict[str, Any]:
    """What previews ask `Matryoshka.sample` for: the same few captions every time, or classes.

    An upsampler is given real pictures, made small, with their own captions or classes: what it
    makes of those of a base is for `mdm sample` to show.
    """
    model, count = config.model, min(count, len(source))
    chosen = [int(index) for index in choose(len(source), count, "previews")]
    captions = source.captions or ()
    asked: dict[str, Any] = {"n": PREVIEWS}
    if model.text is not None:
        asked = {"prompts": [captions[index][0] for index in chosen]}
    elif model.classes:
        asked = {"classes": list(range(min(PREVIEWS, model.classes)))}
    if model.coarse is not None:
        examples = [source[index] for index in chosen]
        grid = Resolution(model.coarse.side, model.coarse.side)
        asked["coarse"] = np.stack([shrink(example.picture, grid) for example in examples])
        asked |= {"classes": [example.label for example in examples]} if model.classes else {}
        asked |= {"n": 1 if model.text or model.classes else count}
    return asked


class Preview:
    """Samples of every level side by side, drawn with the averaged weights and fixed seeds.

    Files are `previews/<images seen>.png` in the run's folder, or `.webp` that moves where a level
    has frames. `asked` are arguments of `Matryoshka.sample` (`preview_of`); coarse pictures among
    them are shown, too.
    """

    def __init__(
        self,
        asked: Mapping[str, Any],
        encoder: TextEncoder | None,
        device: torch.device | str,
        codec: Codec | None = None,
    ) -> None:
        self.asked, self.encoder, self.device, self.codec = asked, encoder, device, codec

    def __call__(self, view: View) -> Path:
        model = Matryoshka(
            view.averaged(),
            view.config,
            encoder=self.encoder,
            codec=self.codec,
            device=self.device,
        )
        samples = model.sample(**self.asked)
        given = (self.asked["coarse"],) if "coarse" in self.asked else ()
        levels = (*given, *samples.levels)
        pages = grid.pages(
            levels,
            captions=samples.captions,
            title=f"{view.config.name} after {view.images_seen:,} images",
            cell=96,
            blocks=2,
        )
        path = view.folder / "previews" / f"{view.images_seen:010d}"
        settings = {**samples.settings, "images_seen": view.images_seen}
        return clips.save_pages(pages, path, samples.settings["fps"], settings)
