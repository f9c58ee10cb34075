"""The product's own training step on made-up data, in the forms that benchmarks compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from matryoshka_diffusion.config import RunConfig
from matryoshka_diffusion.data.loader import Batch
from matryoshka_diffusion.nn.costs import kept_bytes
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.presets import preset
from matryoshka_diffusion.pyramid import resolutions_of
from matryoshka_diffusion.training.gradient import resolve_threads
from matryoshka_diffusion.training.inputs import Batches, Feed, Inputs
from matryoshka_diffusion.training.precision import Precision, autocast, one_core, resolve_layout
from matryoshka_diffusion.training.stages import Step
from matryoshka_diffusion.training.step import Stepped, diffusion
from matryoshka_diffusion.training.trainer import Trainer

WORDS = 8


class Noise(Batches):
    """A loader of pictures or clips of noise, for any model."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def batch(self, ids: Sequence[int]) -> Batch:
        model, count = self.config.model, len(ids)
        draw = torch.Generator().manual_seed(ids[0])
        finest = resolutions_of(model)[-1]
        shape = finest.shape(model.channels)
        return Batch(
            picture=torch.randint(256, (count, *shape), generator=draw, dtype=torch.uint8),
            captions=("",) * count,
            labels=torch.zeros(count, dtype=torch.long) if model.classes else None,
            original_side=torch.full((count,), float(finest.height)),
            ids=torch.tensor(ids),
            keys=tuple(str(n) for n in ids),
        )


class Repeated(NamedTuple):
    """A trainer and the one batch that it takes again and again."""

    trainer: Trainer[NestedUNet]
    inputs: Inputs

    def step(self) -> None:
        """One whole step: forward, loss, backward, clipping, optimizer, average."""
        with one_core(self.trainer.gradient.threads > 1):  # as `Trainer.fit` does
            outcome = self.trainer.step([self.inputs])
        assert isinstance(outcome, Stepped), "a skipped step is no measure"

    def activation_bytes(self) -> int:
        """Bytes that the forward pass keeps for the backward pass, each storage once."""
        trainer, inputs = self.trainer, self.inputs

        def forward() -> object:
            with autocast(trainer.train.precision, trainer.device):
                return trainer.net(inputs.x, inputs.t, inputs.cond)

        return kept_bytes(trainer.net, forward)


def trainer(
    run: str | RunConfig,
    batch: int,
    device: torch.device,
    base: Mapping[str, Tensor] | None = None,
    **train: Any,
) -> Repeated:
    """The trainer of a run, or of a preset by name, with all its levels; every row has them all.

    `train` changes its training: precision, layout, recompute, compile. `base` are the weights
    under adapters.
    """
    config = preset(run) if isinstance(run, str) else run
    settings = {"precision": "fp32", "layout": "nchw", "threads": 1} | train
    config = config.model_copy(update={"train": config.train.model_copy(update=settings)})
    trainer = Trainer(diffusion(config, base), device, images_seen=config.train.images)
    rows, lr = (batch,) * trainer.levels, (1e-4,) * trainer.levels
    step = Step(len(config.train.stages) - 1, 0, rows, lr, False)
    return Repeated(trainer, Feed(config, Noise(config), features(config), device)(step)[0])


def resolved(
    run: RunConfig, batch: int, device: torch.device, precision: Precision
) -> dict[str, Any]:
    """Resolve `auto` as `mdm train` does for batches of this size; settings for `trainer`."""
    stages = tuple(stage.model_copy(update={"batch_size": batch}) for stage in run.train.stages)
    train = run.train.model_copy(update={"stages": stages})
    return {
        "precision": precision,
        "layout": resolve_layout("auto", device, precision),
        "threads": resolve_threads("auto", train, run.model, device),
    }


def features(
    config: RunConfig, tokens: int = WORDS
) -> Callable[[Sequence[str]], list[Tensor]] | None:
    """Features of noise for a model with text."""
    text = config.model.text
    if text is None:
        return None
    width = text.features
    return lambda captions: [torch.randn(tokens, width) for _ in captions]


def outer_levels(name: str) -> tuple[int, ...]:
    """All levels of a preset but the coarsest."""
    return tuple(range(1, len(preset(name).model.levels)))
