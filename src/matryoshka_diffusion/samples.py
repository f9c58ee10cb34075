"""Images or clips that a model has drawn: bytes of every level, and how to draw them again.

A notebook shows them, and they can be saved as `mdm sample` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.samplers import Seed

if TYPE_CHECKING:
    from PIL.Image import Image

    from matryoshka_diffusion.draw.gallery import Gallery
else:
    Image = Gallery = Any


@dataclass(frozen=True, repr=False)
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

    @property
    def images(self) -> list[Image]:
        """`pictures` as images of Pillow."""
        from matryoshka_diffusion.draw.grid import to_image

        return [to_image(picture) for picture in self.pictures]

    def save(self, out: str | Path, *, overwrite: bool = False) -> Path:
        """Write a file (`.png`; of clips also `.mp4`, `.webp`, `.gif`), or a folder; return it.

        Several samples in one file are a grid. A folder gets each sample and all levels.

        Raises:
            UsageError: `out` has files already, and `overwrite` is not set; or its suffix is none
                that can be written.
            OSError: it cannot be written.
        """
        from matryoshka_diffusion.draw import gallery

        gallery.refuse_taken(Path(out), overwrite=overwrite, remedy="overwrite=True")
        gallery.save(self._gallery(), Path(out))
        return Path(out)

    def __repr__(self) -> str:
        from matryoshka_diffusion.draw.grid import size_of

        sides = ", ".join(map(size_of, self.levels))
        kind = "clip" if self.levels[-1].ndim == 5 else "image"
        kind += "s" * (len(self.captions) != 1)
        captions = ", ".join(map(repr, dict.fromkeys(filter(None, self.captions[:100]))))
        of = f" of {captions if len(captions) <= 60 else captions[:60] + ' ...'}" * bool(captions)
        return f"Samples({len(self.captions)} {kind}{of}, levels of {sides} pixels)"

    def _repr_png_(self) -> bytes:
        """The picture that a notebook shows: a row for each caption; of clips, film strips."""
        from matryoshka_diffusion.draw import gallery, grid

        drawn = self._gallery()
        if drawn.moves:
            return grid.png(grid.strip(self.videos, drawn.texts), self.settings)
        return grid.png(gallery.grid_of(drawn)[0], self.settings)

    def _gallery(self) -> Gallery:
        from matryoshka_diffusion.draw.gallery import Gallery

        return Gallery(self.levels, self.captions, self.settings)
