"""Hooks of a training: previews of fixed prompts, and the loss on held-out images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from matryoshka_diffusion.codec import Codec
from matryoshka_diffusion.config import RunConfig
from matryoshka_diffusion.data.loader import Loader
from matryoshka_diffusion.data.source import Source
from matryoshka_diffusion.diffusion import Process, matryoshka_loss
from matryoshka_diffusion.draw import clips, grid
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.pyramid import Resolution, shrink
from matryoshka_diffusion.rng import choose
from matryoshka_diffusion.text.encoder import TextEncoder
from matryoshka_diffusion.train.inputs import Batches, Encode, Feed
from matryoshka_diffusion.train.precision import autocast
from matryoshka_diffusion.train.stages import Step
from matryoshka_diffusion.train.trainer import View

PREVIEW_IMAGES = 8
HELD_OUT_IMAGES = 512
FRAMES_PER_BATCH = 32
"""Images, or frames of clips, in a batch of the held-out loss: more might not fit the device."""


def preview_arguments(source: Source, config: RunConfig) -> dict[str, Any]:
    """Arguments of `Matryoshka.sample` for previews: a fixed choice of captions, or classes.

    An upsampler gets real images, made small, with their own captions or classes.
    """
    model, count = config.model, min(PREVIEW_IMAGES, len(source))
    chosen = [int(index) for index in choose(len(source), count, "previews")]
    arguments: dict[str, Any] = {"n": PREVIEW_IMAGES}
    if model.text is not None:
        arguments = {"prompts": [(source.captions or ())[index][0] for index in chosen]}
    elif model.classes:
        arguments = {"classes": list(range(min(PREVIEW_IMAGES, model.classes)))}
    if model.coarse is not None:
        examples = [source[index] for index in chosen]
        resolution = Resolution(model.coarse.side, model.coarse.side)
        arguments["coarse"] = np.stack([shrink(each.picture, resolution) for each in examples])
        if model.classes:
            arguments["classes"] = [example.label for example in examples]
        arguments["n"] = 1 if model.text or model.classes else count
    return arguments


@dataclass(frozen=True)
class Preview:
    """Hook that draws samples of every level, with the averaged weights and fixed seeds.

    It computes in the precision of the training.

    Files are `previews/<images seen>.png` in the run's folder, or an animated `.webp` where a level
    has frames. Coarse images among `arguments` (of `Matryoshka.sample`) are drawn too. While only a
    level of features is trained, there is nothing to see.
    """

    arguments: Mapping[str, Any]
    encoder: TextEncoder | None
    device: torch.device | str
    codec: Codec | None = None

    def __call__(self, view: View) -> Path | None:
        net = view.averaged()
        if len(net.levels) == net.config.hidden:
            return None
        model = Matryoshka(
            net,
            view.config,
            encoder=self.encoder,
            codec=self.codec,
            device=self.device,
            precision=view.config.train.precision,
        )
        # A guide is chosen for a trained model.
        plain = {"guide": None, "guidance": 1.0} if view.config.sampling.guide else {}
        samples = model.sample(**self.arguments, **plain)
        coarse = (self.arguments["coarse"],) if "coarse" in self.arguments else ()
        pages = grid.pages(
            (*coarse, *samples.levels),
            captions=samples.captions,
            title=f"{view.config.name} after {view.images_seen:,} images",
            cell=grid.cell_of(samples.levels, 96),
            blocks=2,
        )
        path = view.folder / "previews" / f"{view.images_seen:010d}"
        settings = {**samples.settings, "images_seen": view.images_seen}
        return clips.save_pages(pages, path, samples.settings["fps"], settings)


@dataclass(frozen=True)
class HeldOutLoss:
    """Hook that computes the loss of each level on both sides of the split.

    It uses the averaged weights. Images, times, noise and captions are the same at every call, and
    nothing is dropped or mirrored, so two numbers of one run differ by its weights alone. A
    held-out loss that rises while the other falls shows that the run memorises its images.
    """

    seen: Source
    held_out: Source
    encode: Encode | None
    device: torch.device | str
    frozen: Callable[[Loader], Batches] = lambda loader: loader  # as that of `prepare.Job`

    def __call__(self, view: View) -> dict[str, list[float]]:
        """`seen_loss_per_level` and `held_out_loss_per_level`, for the run's metrics."""
        net = view.averaged().to(self.device)
        return {
            "seen_loss_per_level": self._losses(net, view.config, self.seen),
            "held_out_loss_per_level": self._losses(net, view.config, self.held_out),
        }

    @torch.no_grad()
    def _losses(self, net: NestedUNet, config: RunConfig, source: Source) -> list[float]:
        stages = tuple(stage.model_copy(update={"mix": ()}) for stage in config.train.stages)
        train = config.train.model_copy(update={"condition_dropout": 0.0, "stages": stages})
        plain = config.model_copy(update={"train": train, "model": net.config})
        loader = self.frozen(Loader(source, config.train.seed, pixels=config.data.pixels))
        device = torch.device(self.device)
        feed = Feed(plain, loader, self.encode, device)
        process = Process.from_config(config.process, net.config)
        count = min(HELD_OUT_IMAGES, len(source))
        batch = max(FRAMES_PER_BATCH // (plain.data_frames or 1), 1)
        sums, counts = torch.zeros(2, len(net.levels), dtype=torch.float64)
        for first in range(0, count, batch):
            rows = (min(batch, count - first),) * len(net.levels)
            inputs = feed(Step(stage=0, first=first, rows=rows, lr=(), ends_stage=False))
            x, cond, t, noise = inputs.x, inputs.cond, inputs.t, inputs.noise
            with autocast(config.train.precision, device):
                loss = matryoshka_loss(net, x, cond, t, noise, process=process)
            awake = torch.tensor([len(level) for level in x])  # by train.wake not all rows
            sums += loss.per_level.double().cpu() * awake
            counts += awake
        return (sums / counts.clamp(min=1)).tolist()
