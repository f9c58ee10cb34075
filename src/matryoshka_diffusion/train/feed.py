"""All that a step is given besides the weights: pictures, times, noise, conditions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from matryoshka_diffusion.conditioning import AUGMENT_NUMBERS, Conditioning
from matryoshka_diffusion.config import CoarseConfig, RunConfig
from matryoshka_diffusion.data.loader import Batch
from matryoshka_diffusion.diffusion import augment_coarse
from matryoshka_diffusion.pyramid import (
    Pyramid,
    Resolution,
    build_pyramid,
    down_sample,
    ragged,
    resolutions_of,
)
from matryoshka_diffusion.rng import normal, stratified, uniform
from matryoshka_diffusion.schedule import build_schedules
from matryoshka_diffusion.text.feature_cache import pad
from matryoshka_diffusion.train.curriculum import Step
from matryoshka_diffusion.train.world import World

Encode = Callable[[Sequence[str]], list[Tensor]]
"""Captions -> the features of each one's tokens, (n, d)."""


@runtime_checkable
class Batches(Protocol):
    """Where pictures come from: the samples of the run that have these numbers n."""

    def batch(self, ids: range) -> Batch: ...


@dataclass(frozen=True)
class Inputs:
    """The arguments of the loss for a rank's part of one step, and what its samples are called.

    `x` and `noise` may be ragged; everything else has a row for each sample. `ids` are global
    sample numbers and `keys` the source's names, for reports of trouble.
    """

    step: Step
    x: Pyramid
    noise: Pyramid
    t: Float[Tensor, " b"]
    cond: Conditioning
    ids: tuple[int, ...]
    keys: tuple[str, ...]

    def every(self, stride: int, offset: int) -> Inputs:
        """Rows offset, offset + stride, ...: a micro-batch with its share of the finer rows."""
        return self.rows(slice(offset, None, stride))

    def rows(self, rows: slice) -> Inputs:
        """Some of the rows, with what they have of the finer levels."""
        return Inputs(
            step=self.step,
            x=tuple(level[rows] for level in self.x),
            noise=tuple(level[rows] for level in self.noise),
            t=self.t[rows],
            cond=self.cond.rows(rows),
            ids=self.ids[rows],
            keys=self.keys[rows],
        )


class Feed:
    """Makes a rank's inputs of any step, a pure function of the run's seed, the step and the rank.

    It does nothing that needs the network, so it runs in the loader's thread while the network is
    busy; on an accelerator that includes the copy to the device.

    Raises:
        ValueError: a level asks for a micro-condition that the data does not have, or for text
            without an encoder.
    """

    def __init__(
        self,
        config: RunConfig,
        loader: Batches,
        encode: Encode | None = None,
        device: torch.device | str = "cpu",
        world: World | None = None,
    ) -> None:
        self._config, self._loader, self._encode, self._device = config, loader, encode, device
        self._world = world or World()
        self._micro = config.model.micro_names
        self._schedule = build_schedules(config.model)[0]
        if unknown := self._micro - {"scale"}:
            raise ValueError(
                f"model.levels[].micro: the data has no {min(unknown)!r}, only 'scale', the side "
                "of the original picture"
            )
        if config.model.text is not None and encode is None:
            raise ValueError("model.text is set, but training was given no text encoder")

    def __call__(self, step: Step) -> Inputs:
        """The inputs of `step` for this rank.

        A rank may have no row of the finer levels, or none at all. It still walks through the
        network with its zero rows, so that every rank is at the same collective.
        """
        if mine := self._world.mine(range(step.first, step.end)):
            return self._inputs(step, mine)
        return self._inputs(step, range(step.first, step.first + 1)).rows(slice(0))

    def _inputs(self, step: Step, ids: range) -> Inputs:
        batch = self._loader.batch(ids)
        seed = self._config.train.seed
        resolutions = resolutions_of(self._config.model.first(len(step.rows)))
        # Finer levels hold the first rows of the step, hence the first of each rank's.
        rows = [sum(n < step.first + count for n in ids) for count in step.rows]
        x = ragged(build_pyramid(batch.picture, resolutions), rows)
        noise = tuple(
            torch.stack(
                [normal(seed, "noise", n, r, shape=level.shape[1:]) for n in ids[: len(level)]]
            )
            if len(level)
            else torch.zeros_like(level)
            for r, level in enumerate(x)
        )
        return Inputs(
            step=step,
            x=self._placed(x),
            noise=self._placed(noise),
            t=stratified(seed, "t", batch.ids).float().to(self._device),
            cond=self._conditions(batch).to(self._device),
            ids=tuple(batch.ids.tolist()),
            keys=batch.keys,
        )

    def _conditions(self, batch: Batch) -> Conditioning:
        """Labels, text and micro-conditions; some rows are hidden, because guidance needs a null.

        A network without a learned null gets the empty caption in its place.
        """
        train, model = self._config.train, self._config.model
        dropped = uniform(train.seed, "condition-dropout", batch.ids.tolist())
        dropped = dropped < train.condition_dropout
        has_null = model.text is None or model.text.learned_null
        tokens = mask = None
        if self._encode is not None and model.text is not None:
            captions = [
                caption if has_null or not drop else ""
                for caption, drop in zip(batch.captions, dropped.tolist(), strict=True)
            ]
            tokens, mask = pad(self._encode(captions))
        image, image_t = self._coarse(batch, model.coarse) if model.coarse else (None, None)
        return Conditioning(
            labels=self._labels(batch) if model.classes else None,
            tokens=tokens,
            mask=mask,
            micro=dict.fromkeys(self._micro, batch.original_side),
            augment=self._augment(batch) if model.augment else None,
            image=image,
            image_t=image_t,
            dropped=dropped if has_null else None,
        )

    def _coarse(
        self, batch: Batch, coarse: CoarseConfig
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, " b"]]:
        """What an upsampler sees of the picture: D^r of it enlarged, under noise of a random time.

        Time and noise belong to the sample, as those of the levels do.
        """
        seed, model, ids = self._config.train.seed, self._config.model, batch.ids.tolist()
        side = model.levels[0].side
        noise = [normal(seed, "coarse-noise", n, shape=(model.channels, side, side)) for n in ids]
        t = coarse.max_noise * uniform(seed, "coarse-t", ids)
        small = down_sample(batch.picture, Resolution(coarse.side, coarse.side))
        return augment_coarse(small, t, torch.stack(noise), self._schedule), t.float()

    def _augment(self, batch: Batch) -> Float[Tensor, "b 7"]:
        """Zeros where nothing is augmented: the weights for it are in use in every step."""
        if batch.augment is not None:
            return batch.augment
        return torch.zeros(len(batch.keys), AUGMENT_NUMBERS)

    def _labels(self, batch: Batch) -> Int[Tensor, " b"]:
        known = 0 if batch.labels is None else int(batch.labels.max()) + 1
        if batch.labels is None or known > self._config.model.classes:
            raise ValueError(
                f"model.classes is {self._config.model.classes}, but the data has "
                f"{f'at least {known}' if known else 'none'}"
            )
        return batch.labels

    def _placed(self, pyramid: Pyramid) -> Pyramid:
        return tuple(level.to(self._device) for level in pyramid)
