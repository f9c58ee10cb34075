"""Batches of codes in place of images, and the cache of codes on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from matryoshka_diffusion.codec.autoencoder import Autoencoder, Codec
from matryoshka_diffusion.config import VIDEO_SOURCES, DataConfig
from matryoshka_diffusion.data.loader import Batch, Loader, look_ahead, to_float
from matryoshka_diffusion.data.source import Source
from matryoshka_diffusion.files import cache_folder
from matryoshka_diffusion.text.feature_cache import RaggedStore

IMAGES_PER_FILE = 1024


@dataclass(frozen=True)
class LatentLoader:
    """The batches of a loader, with codes for images."""

    loader: Loader
    codec: Codec

    def batch(self, ids: range) -> Batch:
        """The samples with these global numbers n."""
        batch = self.loader.batch(ids)
        return replace(batch, picture=self.codec.encode(batch.picture))


class CodeCache:
    """A codec with a memory on disk; only `add` stores.

    Codes are found by the image's own numbers after cropping and mirroring, so those of another
    image cannot be returned. Each type of device has a folder, because it rounds in its own way.
    """

    def __init__(self, codec: Autoencoder, folder: Path | None = None) -> None:
        self.codec = codec
        own = f"{codec.key[:32]}-{codec.device.type}"
        self.folder = cache_folder("codes", own) if folder is None else folder
        self.store = RaggedStore(self.folder, codec.channels, torch.float32)

    def encode(self, pictures: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k y x"]:
        """Codes, with the same bits whether they are stored or computed."""
        places = self.store.find([content_digest(picture) for picture in pictures]).tolist()
        codes = [
            self.codec.encode(picture) if place < 0 else self._read(place, picture.shape[-2])
            for picture, place in zip(pictures.split(1), places, strict=True)
        ]
        return torch.cat(codes)

    def decode(self, codes: Float[Tensor, "b k y x"]) -> Float[Tensor, "b c h w"]:
        return self.codec.decode(codes)

    def bytes_of(self, count: int, side: int) -> int:
        """Size of the codes of `count` images."""
        return count * self.codec.channels * (side // self.codec.factor) ** 2 * 4

    def add(self, pictures: Sequence[Float[Tensor, "c h w"]]) -> None:
        """Store the codes of images that are not stored yet, in one file.

        Raises:
            OSError: the file cannot be written.
        """
        unique = {content_digest(picture): picture for picture in pictures}
        places = self.store.find(list(unique)).tolist()
        missing = [name for name, place in zip(unique, places, strict=True) if place < 0]
        if missing:
            threads = os.cpu_count() or 1
            images = [unique[name] for name in missing]
            codes = look_ahead(self._encode_alone, images, workers=threads, depth=2 * threads)
            self.store.write(missing, list(codes))

    def _encode_alone(self, picture: Float[Tensor, "c h w"]) -> Float[Tensor, "n k"]:
        """Codes of one image as rows, computed by one thread as the training's inputs are.

        Sums of floats depend on how many threads share them.
        """
        torch.set_num_threads(1)
        return self.codec.encode(picture[None])[0].flatten(1).T.contiguous()

    def _read(self, place: int, height: int) -> Float[Tensor, "1 k y x"]:
        rows = self.store.read(place)
        return rows.T.contiguous().unflatten(1, (height // self.codec.factor, -1))[None]


def content_digest(picture: Float[Tensor, "..."]) -> str:
    """Digest of an image's shape and numbers."""
    digest = hashlib.blake2b(str(tuple(picture.shape)).encode(), digest_size=16)
    digest.update(picture.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def can_store(data: DataConfig) -> bool:
    """True if an image is seen in one or two forms only: no random crop, clip or augmentation."""
    same_frame = data.source not in VIDEO_SOURCES or data.clip != "random"
    return data.crop == "centre" and data.augment == 0.0 and same_frame


def store_codes(
    cache: CodeCache,
    source: Source,
    data: DataConfig,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Store the codes of all images of `source`, and of the mirrored ones with `data.flip`.

    An interruption costs the file in the making. Raises OSError if a file cannot be written.
    """
    cache.store.tidy()
    for first in range(0, len(source), IMAGES_PER_FILE):
        indices = range(first, min(first + IMAGES_PER_FILE, len(source)))
        images = [example.picture for example in source.many(indices)]
        if data.flip:
            images += [image[:, ::-1] for image in images]
        pictures = to_float(np.stack(images), data.pixels).permute(0, 3, 1, 2).contiguous()
        cache.add(list(pictures))
        if progress is not None:
            progress(indices.stop, len(source))
