"""Batches of codes: what training is given in the place of pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from matryoshka_diffusion.codec.autoencoder import Codec
from matryoshka_diffusion.codec.cache import CodeCache
from matryoshka_diffusion.config import VIDEO_SOURCES, DataConfig
from matryoshka_diffusion.data.loader import Batch, Loader, to_float
from matryoshka_diffusion.data.source import Source

WINDOW = 1024
"""Pictures whose codes are stored together."""


@dataclass(frozen=True)
class Coded:
    """The batches of a loader, with codes for pictures. Whoever is given them need not know."""

    loader: Loader
    codec: Codec

    def batch(self, ids: range) -> Batch:
        """The samples with these global numbers n."""
        batch = self.loader.batch(ids)
        return replace(batch, picture=self.codec.encode(batch.picture))


def can_store(data: DataConfig) -> bool:
    """Whether a picture is shown in one or two forms, not in ever new ones."""
    same_frame = data.source not in VIDEO_SOURCES or data.clip != "random"
    return data.crop == "centre" and data.augment == 0.0 and same_frame


def store_codes(
    cache: CodeCache,
    source: Source,
    data: DataConfig,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Store the codes of all pictures of `source`, mirrored ones too where they are mirrored.

    What interrupts this costs the window that it was at.

    Raises:
        OSError: they cannot be written.
    """
    cache.store.tidy()
    for first in range(0, len(source), WINDOW):
        indices = range(first, min(first + WINDOW, len(source)))
        shown = [example.picture for example in source.many(indices)]
        if data.flip:
            shown += [picture[:, ::-1] for picture in shown]
        pictures = to_float(np.stack(shown), data.pixels).permute(0, 3, 1, 2).contiguous()
        cache.add(list(pictures))
        if progress is not None:
            progress(indices.stop, len(source))
