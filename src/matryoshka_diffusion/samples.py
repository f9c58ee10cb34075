"""Images or clips that a model has drawn: bytes of every level, and how to draw them again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.samplers import Seed


@dataclass(frozen=True)
class Samples:
    """Images or clips that were sampled together.

    Attributes:
        levels: bytes of every level, coarse to fine; the last is the full resolution. A level with
            frames holds clips. Where levels are latents of a codec, each is decoded. A level of
            features is left out.
        captions: the prompt or class of each sample.
        seeds: the seed of each sample, which gives the same image alone and in any batch, in bf16
            up to its rounding.
        settings: all that is needed to draw the samples again.
    """

    levels: tuple[UInt8[np.ndarray, "n ... c"], ...]
    captions: tuple[str, ...]
    seeds: tuple[Seed, ...]
    settings: dict[str, Any]

    @property
    def pictures(self) -> UInt8[np.ndarray, "n h w c"]:
        """The finest level of images. For a model of clips: the image that each begins with.

        Raises:
            UsageError: all levels are clips.
        """
        for level in reversed(self.levels):
            if level.ndim == 4:
                return level
        raise UsageError("there are clips only: take `videos`")

    @property
    def videos(self) -> UInt8[np.ndarray, "n f h w c"]:
        """The clips of the finest level.

        Raises:
            UsageError: the model draws images.
        """
        if self.levels[-1].ndim == 5:
            return self.levels[-1]
        raise UsageError("the model draws images, no clips: take `pictures`")
