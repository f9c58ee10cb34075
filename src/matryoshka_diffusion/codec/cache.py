"""Codes of pictures: read where they were stored, made on the fly where they were not."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from matryoshka_diffusion.codec.autoencoder import Autoencoder
from matryoshka_diffusion.data.loader import look_ahead
from matryoshka_diffusion.files import cache_folder
from matryoshka_diffusion.text.feature_cache import RaggedStore


class CodeCache:
    """A `Codec` with a memory on disk. Nothing is stored unless `add` is called.

    Codes are found by the picture's own numbers, as it is after cropping, mirroring and turning,
    so there is no way to be given those of another one. The folder is the codec's own on one type
    of device: another one rounds differently.
    """

    def __init__(self, codec: Autoencoder, folder: Path | None = None) -> None:
        self.codec = codec
        own = f"{codec.key[:32]}-{codec.device.type}"
        self.folder = cache_folder("codes", own) if folder is None else folder
        self.store = RaggedStore(self.folder, codec.channels, torch.float32)

    def encode(self, pictures: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k y x"]:
        """Codes, the same bits whether they were stored by such a device or not."""
        rows = self.store.find([name_of(picture) for picture in pictures]).tolist()
        codes = [
            self.codec.encode(picture) if row < 0 else self._read(row, picture.shape[-2])
            for picture, row in zip(pictures.split(1), rows, strict=True)
        ]
        return torch.cat(codes)

    def decode(self, codes: Float[Tensor, "b k y x"]) -> Float[Tensor, "b c h w"]:
        return self.codec.decode(codes)

    def bytes_of(self, pictures: int, side: int) -> int:
        """The size of the codes of so many pictures."""
        return pictures * self.codec.channels * (side // self.codec.factor) ** 2 * 4

    def add(self, pictures: Sequence[Float[Tensor, "c h w"]]) -> None:
        """Store the codes of pictures in one chunk; those that are stored already cost a look.

        Raises:
            OSError: the chunk cannot be written.
        """
        named = {name_of(picture): picture for picture in pictures}
        rows = self.store.find(list(named)).tolist()
        missing = {
            name: picture
            for (name, picture), row in zip(named.items(), rows, strict=True)
            if row < 0
        }
        if missing:
            threads = os.cpu_count() or 1
            made = look_ahead(self._alone, missing.values(), workers=threads, depth=2 * threads)
            self.store.write(list(missing), list(made))

    def _alone(self, picture: Float[Tensor, "c h w"]) -> Float[Tensor, "n k"]:
        """Codes of one picture as the rows that a chunk holds, computed by one thread.

        As in the feed, which has one: sums of floats depend on how many share them.
        """
        torch.set_num_threads(1)
        return self.codec.encode(picture[None])[0].flatten(1).T.contiguous()

    def _read(self, row: int, height: int) -> Float[Tensor, "1 k y x"]:
        positions = self.store.read(row)
        return positions.T.contiguous().unflatten(1, (height // self.codec.factor, -1))[None]


def name_of(picture: Float[Tensor, "..."]) -> str:
    """A digest of a picture's shape and numbers."""
    digest = hashlib.blake2b(str(tuple(picture.shape)).encode(), digest_size=16)
    digest.update(picture.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()
