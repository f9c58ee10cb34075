"""The loss on pictures that training does not see, beside that on as many that it does."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from matryoshka_diffusion.codec.autoencoder import Codec, Identity
from matryoshka_diffusion.codec.latent_loader import LatentLoader
from matryoshka_diffusion.config import RunConfig
from matryoshka_diffusion.data.loader import Loader
from matryoshka_diffusion.data.source import Source
from matryoshka_diffusion.diffusion import Process, matryoshka_loss
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.train.inputs import Encode, Feed
from matryoshka_diffusion.train.precision import autocast
from matryoshka_diffusion.train.stages import Step
from matryoshka_diffusion.train.trainer import View

PICTURES = 512
BATCH = 32
"""Pictures, or frames: so many clips at once might not fit where training does."""


class HeldOutLoss:
    """The loss of each level on both sides of the split, with the averaged weights.

    Pictures, times, noise and captions are the same at every call, and nothing is dropped or
    mirrored, so two numbers of one run differ by its weights alone. Where the held-out loss rises
    while the other falls, the run learns its pictures by heart.
    """

    def __init__(
        self,
        seen: Source,
        held_out: Source,
        encode: Encode | None,
        device: torch.device | str,
        codec: Codec | None = None,
    ) -> None:
        self.sources = {"seen": seen, "held_out": held_out}
        self.encode, self.device = encode, torch.device(device)
        self.codec = codec or Identity()

    def __call__(self, view: View) -> dict[str, list[float]]:
        """`seen_loss_per_level` and `held_out_loss_per_level`, for the run's metrics."""
        net = view.averaged().to(self.device)
        return {
            f"{name}_loss_per_level": self._losses(net, view.config, source)
            for name, source in self.sources.items()
        }

    @torch.no_grad()
    def _losses(self, net: NestedUNet, config: RunConfig, source: Source) -> list[float]:
        whole = config.train.model_copy(update={"condition_dropout": 0.0})
        plain = config.model_copy(update={"train": whole, "model": net.config})
        loader = Loader(source, config.train.seed, pixels=config.data.pixels)
        feed = Feed(plain, LatentLoader(loader, self.codec), self.encode, self.device)
        process = Process.from_config(config.process, net.config)
        count = min(PICTURES, len(source))
        totals = torch.zeros(len(net.levels), dtype=torch.float64)
        batch = max(BATCH // (plain.data_frames or 1), 1)
        for step in _steps(count, batch, len(net.levels)):
            given = feed(step)
            with autocast(config.train.precision, self.device):
                loss = matryoshka_loss(
                    net, given.x, given.cond, given.t, given.noise, process=process
                )
            totals += loss.per_level.double().cpu() * step.count
        return (totals / count).tolist()


def _steps(count: int, batch: int, levels: int) -> Iterator[Step]:
    """The samples 0 .. count - 1, every one with all levels."""
    for first in range(0, count, batch):
        rows = (min(batch, count - first),) * levels
        yield Step(stage=0, first=first, rows=rows, lr=0.0, ends_stage=False)
