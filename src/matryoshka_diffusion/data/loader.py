"""The loader: what sample n of a run is (picture, crop, caption, flip, augmentation), no more.

A batch is a pure function of (seed, ids), so resuming, another batch size or another number of
processes cannot change what the model is shown.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from matryoshka_diffusion.config import Crop, Pixels
from matryoshka_diffusion.data.augment import augmented, draw_augmentation
from matryoshka_diffusion.data.batch import Batch, Source, to_float
from matryoshka_diffusion.data.crop import CENTRE
from matryoshka_diffusion.rng import stream


class Loader:
    """Samples of `source` in an order fixed by `seed`: every epoch is a new permutation.

    With the crop "random", a picture that is longer than the square is cut somewhere else each
    time. With `flip`, every other picture on average is mirrored left to right. `augment` is the
    share of pictures that each geometric transformation happens to; the batch tells of them.
    `pixels` is how bytes become numbers.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        *,
        crop: Crop = "centre",
        flip: bool = False,
        augment: float = 0.0,
        pixels: Pixels = "symmetric",
    ) -> None:
        assert len(source) > 0, "sources refuse to be empty"
        self.source = source
        self.seed = seed
        self.crop: Crop = crop
        self.flip = flip
        self.augment = augment
        self.pixels: Pixels = pixels

    def batch(self, ids: range) -> Batch:
        """The samples with these global numbers n."""
        examples = self.source.many([self._index(n) for n in ids], [self._place(n) for n in ids])
        done = [draw_augmentation(self.seed, n, self.augment) for n in ids]
        pictures = np.stack(
            [
                augmented(self._turned(x.picture, n), how)
                for x, n, how in zip(examples, ids, done, strict=True)
            ]
        )
        told = torch.from_numpy(np.stack([how.numbers() for how in done]))
        return Batch(
            picture=to_float(pictures, self.pixels).permute(0, 3, 1, 2).contiguous(),
            captions=tuple(self._one(x.captions, n) for x, n in zip(examples, ids, strict=True)),
            labels=torch.tensor([x.label for x in examples]) if self.source.classes else None,
            original_side=torch.tensor([float(x.original_side) for x in examples]),
            ids=torch.tensor(ids),
            keys=tuple(x.key for x in examples),
            augment=told if self.augment else None,
        )

    def _index(self, n: int) -> int:
        epoch, position = divmod(n, len(self.source))
        return int(_permutation(self.seed, epoch, len(self.source))[position])

    def _place(self, n: int) -> float:
        return CENTRE if self.crop == "centre" else stream(self.seed, "crop", n).random()

    def _one(self, captions: tuple[str, ...], n: int) -> str:
        if len(captions) < 2:
            return captions[0] if captions else ""
        return captions[stream(self.seed, "caption", n).integers(len(captions))]

    def _turned(self, picture: np.ndarray, n: int) -> np.ndarray:
        mirrored = self.flip and stream(self.seed, "flip", n).random() < 0.5
        return picture[:, ::-1] if mirrored else picture


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return stream(seed, "order", epoch).permutation(size)
