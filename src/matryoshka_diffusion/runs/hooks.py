"""Hooks of a training: previews, the loss on held-out images, and the quality of a few samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from matryoshka_diffusion.codec import Codec
from matryoshka_diffusion.config import RunConfig
from matryoshka_diffusion.data.loader import Loader
from matryoshka_diffusion.data.source import Source
from matryoshka_diffusion.diffusion import Process, matryoshka_loss
from matryoshka_diffusion.draw import clips, grid
from matryoshka_diffusion.metrics.formulas import (
    SIDE,
    Moments,
    averages,
    frechet_distance,
    prompt_retrieval,
)
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.pyramid import Resolution, shrink
from matryoshka_diffusion.rng import choose
from matryoshka_diffusion.text.encoder import TextEncoder
from matryoshka_diffusion.training.inputs import Batches, Encode, Feed
from matryoshka_diffusion.training.precision import autocast
from matryoshka_diffusion.training.stages import Step
from matryoshka_diffusion.training.trainer import View

PREVIEW_IMAGES = 8
HELD_OUT_IMAGES = 512
MEASURED_SAMPLES, REAL_IMAGES, BATCH = 256, 2_048, 64
"""Samples that `Quality` draws, the training images that they are compared with, and a batch."""
MEASURED_SEED = 2_000_000
"""Seed of the first measured sample, which neither people nor `mdm eval` draw with."""
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


def unguided(config: RunConfig) -> dict[str, Any]:
    """Sampling settings without a guide, which is chosen for a trained model."""
    return {"guide": None, "guidance": 1.0} if config.sampling.guide else {}


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
    shape: Resolution | None = None  # that of a training image; None: squares

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
        if self.shape is not None:
            side, whole = model.picture_side, view.config.data_side
            model = model.sized(*(pixels * side // whole for pixels in self.shape[:2]))
        samples = model.sample(**self.arguments, **unguided(view.config))
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
        # The side of the images is that of the finest level, also before it has joined.
        data = config.data.model_copy(update={"side": config.data_side})
        plain = config.model_copy(update={"train": train, "model": net.config, "data": data})
        loader = self.frozen(Loader(source, config.train.seed, pixels=config.data.pixels))
        device = torch.device(self.device)
        feed = Feed(plain, loader, self.encode, device)
        process = Process.from_config(config.process, net.config)
        count = min(HELD_OUT_IMAGES, len(source))
        batch = max(FRAMES_PER_BATCH // (plain.data_frames or 1), 1)
        sums, counts = torch.zeros(2, len(net.levels), dtype=torch.float64)
        for first in range(0, count, batch):
            rows = (min(batch, count - first),) * len(net.levels)
            for inputs in feed(Step(stage=0, first=first, rows=rows, lr=(), ends_stage=False)):
                x, cond, t, noise = inputs.x, inputs.cond, inputs.t, inputs.noise
                with autocast(config.train.precision, device):
                    loss = matryoshka_loss(net, x, cond, t, noise, process=process)
                awake = torch.tensor([len(level) for level in x])  # by train.wake not all rows
                sums += loss.per_level.double().cpu() * awake
                counts += awake
        return (sums / counts.clamp(min=1)).tolist()


@dataclass(frozen=True)
class Quality:
    """Hook that compares a few samples with training images: Fréchet distance, prompt retrieval.

    Captions or classes, seeds and real images are the same at every call, so two numbers of one run
    differ by its weights alone. So few samples make the distance too large, and among so few images
    a prompt's own is found too easily: the names carry the number of samples (`fd_256`), and models
    are measured by `mdm eval`. While only coarse levels are trained, real images are made as small.
    """

    source: Source
    encoder: TextEncoder | None
    device: torch.device | str
    network: Callable[[np.ndarray], np.ndarray]  # features of images, as those of an `Extractor`
    codec: Codec | None = None
    known: dict[int, tuple[Moments, np.ndarray]] = field(default_factory=dict)  # by side

    def __call__(self, view: View) -> dict[str, float]:
        """`fd_256`, and for captions `retrieval_256`, for the run's metrics."""
        net, config = view.averaged(), view.config
        if len(net.levels) == net.config.hidden:
            return {}
        model = Matryoshka(
            net,
            config,
            encoder=self.encoder,
            codec=self.codec,
            device=self.device,
            precision=config.train.precision,
        )
        real = choose(len(self.source), min(REAL_IMAGES, len(self.source)), "measured")
        prompted = choose(len(real), min(MEASURED_SAMPLES, len(real)), "measured prompts")
        made = model.sample(**self._arguments(real[prompted].tolist(), config)).pictures
        side, count = made.shape[1], len(made)
        if side not in self.known:
            self.known[side] = self._look_at(self._real(real.tolist(), side))
        moments, training = self.known[side]
        of_samples, small = self._look_at(np.split(made, range(BATCH, count, BATCH)))
        numbers = {f"fd_{count}": frechet_distance(moments, of_samples)}
        if config.model.text is not None and side % SIDE == 0:
            found = prompt_retrieval(small, prompted, training)
            numbers[f"retrieval_{count}"] = found.first
        return numbers

    def _look_at(
        self, batches: Iterable[UInt8[np.ndarray, "b s s c"]]
    ) -> tuple[Moments, np.ndarray]:
        """Moments of the network's features of images, and the images at 16 pixels."""
        features, small = [], []
        for images in batches:
            features.append(self.network(images))
            fits = images.shape[1] % SIDE == 0
            small.append(averages(images) if fits else np.empty((len(images), 0)))
        return Moments.stream(features), np.concatenate(small)

    def _real(self, indices: list[int], side: int) -> Iterator[UInt8[np.ndarray, "b s s c"]]:
        """Training images as `side` pixels, in batches."""
        for first in range(0, len(indices), BATCH):
            examples = self.source.many(indices[first : first + BATCH])
            yield np.stack([shrink(each.picture, Resolution(side, side)) for each in examples])

    def _arguments(self, chosen: list[int], config: RunConfig) -> dict[str, Any]:
        """Arguments of `Matryoshka.sample` for one sample of each of these training images."""
        model, arguments = config.model, dict[str, Any](seed=MEASURED_SEED)
        if model.text is not None:
            arguments["prompts"] = [(self.source.captions or ())[index][0] for index in chosen]
        elif model.classes:
            arguments["classes"] = [self.source.samples[index].label for index in chosen]
        else:
            arguments["n"] = len(chosen)
        if model.coarse is not None:
            arguments["coarse"] = np.concatenate([*self._real(chosen, model.coarse.side)])
        return arguments | unguided(config)
