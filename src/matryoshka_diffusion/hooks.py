"""What a run does besides learning: previews of fixed prompts or classes while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from matryoshka_diffusion import sheet
from matryoshka_diffusion.codec.autoencoder import Codec
from matryoshka_diffusion.data.batch import Source
from matryoshka_diffusion.eval.report import choose
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.text.encoder import TextEncoder
from matryoshka_diffusion.train.trainer import View

PREVIEWS = 8


def preview_prompts(source: Source, count: int = PREVIEWS) -> list[str]:
    """The same few captions of a source every time."""
    chosen = choose(len(source), min(count, len(source)), "previews")
    captions = source.captions or ()
    return [captions[int(index)][0] for index in chosen]


class Preview:
    """Samples of every level side by side, drawn with the averaged weights and fixed seeds.

    Files are `previews/<images seen>.png` in the run's folder. `prompts` are for models with text;
    others show their first classes, or whatever they draw.
    """

    def __init__(
        self,
        prompts: Sequence[str] | None,
        encoder: TextEncoder | None,
        device: torch.device | str,
        codec: Codec | None = None,
    ) -> None:
        self.prompts, self.encoder, self.device, self.codec = prompts, encoder, device, codec

    def __call__(self, view: View) -> Path:
        model = Matryoshka(
            view.averaged(),
            view.config,
            encoder=self.encoder,
            codec=self.codec,
            device=self.device,
        )
        if self.prompts is not None:
            samples = model.sample(self.prompts)
        elif view.config.model.classes:
            classes = range(min(PREVIEWS, view.config.model.classes))
            samples = model.sample(classes=list(classes))
        else:
            samples = model.sample(n=PREVIEWS)
        image = sheet.grid(
            sheet.rows_of_levels(samples.levels),
            captions=samples.captions,
            columns_titles=sheet.titles_of_levels(samples.levels),
            title=f"{view.config.name} after {view.images_seen:,} images",
            cell=96,
            blocks=2,
        )
        path = view.folder / "previews" / f"{view.images_seen:010d}.png"
        sheet.save_png(image, path, {**samples.settings, "images_seen": view.images_seen})
        return path
