"""The loader: what sample n of a run is (picture, cut, caption, flip, augmentation), no more.

A batch is a pure function of (seed, ids), so resuming, another batch size or another number of
processes cannot change what the model is shown.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from matryoshka_diffusion.config import ClipStart, Crop, DataConfig, Pixels
from matryoshka_diffusion.data.augment import augmented, draw_augmentation
from matryoshka_diffusion.data.batch import Batch, Source, to_float
from matryoshka_diffusion.data.crop import CENTRE, Cut
from matryoshka_diffusion.rng import stream


class Loader:
    """Samples of `source` in an order fixed by `seed`: every epoch is a new permutation.

    With the crop "random", a picture that is longer than the square is cut somewhere else each
    time. With the clip "random", a video that is longer than the clip is begun somewhere else each
    time; else the source knows where. With `flip`, every other picture or clip on average is
    mirrored left to right. `augment` is the share of pictures that each geometric transformation
    happens to; the batch tells of them. `pixels` is how bytes become numbers.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        *,
        crop: Crop = "centre",
        clip: ClipStart = "start",
        flip: bool = False,
        augment: float = 0.0,
        pixels: Pixels = "symmetric",
    ) -> None:
        assert len(source) > 0, "sources refuse to be empty"
        assert not augment or source.frames is None, "the config refuses to augment clips"
        self.source = source
        self.seed = seed
        self.crop: Crop = crop
        self.clip: ClipStart = clip
        self.flip = flip
        self.augment = augment
        self.pixels: Pixels = pixels

    @classmethod
    def of(cls, source: Source, seed: int, data: DataConfig) -> Loader:
        """The loader of a training on this data."""
        return cls(
            source,
            seed,
            crop=data.crop,
            clip=data.clip,
            flip=data.flip,
            augment=data.augment,
            pixels=data.pixels,
        )

    def batch(self, ids: range) -> Batch:
        """The samples with these global numbers n."""
        examples = self.source.many([self._index(n) for n in ids], [self._cut(n) for n in ids])
        pictures = [self._turned(x.picture, n) for x, n in zip(examples, ids, strict=True)]
        told = None
        if self.augment:
            done = [draw_augmentation(self.seed, n, self.augment) for n in ids]
            pictures = [augmented(*pair) for pair in zip(pictures, done, strict=True)]
            told = torch.from_numpy(np.stack([how.numbers() for how in done]))
        return Batch(
            picture=to_float(np.stack(pictures), self.pixels).movedim(-1, 1).contiguous(),
            captions=tuple(self._one(x.captions, n) for x, n in zip(examples, ids, strict=True)),
            labels=torch.tensor([x.label for x in examples]) if self.source.classes else None,
            original_side=torch.tensor([float(x.original_side) for x in examples]),
            ids=torch.tensor(ids),
            keys=tuple(x.key for x in examples),
            augment=told,
        )

    def _index(self, n: int) -> int:
        epoch, position = divmod(n, len(self.source))
        return int(_permutation(self.seed, epoch, len(self.source))[position])

    def _cut(self, n: int) -> Cut:
        place = CENTRE if self.crop == "centre" else stream(self.seed, "crop", n).random()
        return Cut(place, stream(self.seed, "clip", n).random() if self.clip == "random" else None)

    def _one(self, captions: tuple[str, ...], n: int) -> str:
        if len(captions) < 2:
            return captions[0] if captions else ""
        return captions[stream(self.seed, "caption", n).integers(len(captions))]

    def _turned(self, picture: np.ndarray, n: int) -> np.ndarray:
        mirrored = self.flip and stream(self.seed, "flip", n).random() < 0.5
        return picture[..., ::-1, :] if mirrored else picture


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return stream(seed, "order", epoch).permutation(size)
