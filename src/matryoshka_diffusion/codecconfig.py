"""The training of an autoencoder as data, as `config.py` has that of a model."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from matryoshka_diffusion.config import DataConfig, Weight
from matryoshka_diffusion.modelconfig import Count, Natural, Positive, Share, Strict


class CodecRunConfig(Strict):
    """The training of a small autoencoder (an `AutoencoderKL` of diffusers) on images of `side`."""

    name: str
    data: DataConfig
    side: Count
    channels: Count = 4  # numbers at each position of the latents
    widths: tuple[Count, ...] = Field(default=(16, 32, 64), min_length=1)  # a step halves the side
    blocks: Count = 1  # the encoder's at each width; the decoder has one more
    norm_groups: Count = 2  # few, because the first widths are small
    square_weight: Weight = 1.0  # of the squared error of a pixel, beside the absolute one
    kl_weight: Weight = 1e-6  # of an image's divergence from N(0, 1), beside its summed error
    images: Count
    batch_size: Count = 8
    lr: Positive = 2e-3
    seed: Natural = 0
    warmup_images: Natural = 1_000
    decay_share: Share = 0.5
    clip_norm: Positive = 1.0
    log_every_images: Count = 1_000
    checkpoint_every_images: Count = 5_000

    @property
    def factor(self) -> int:
        """Pixels along a side for each position of the latents."""
        return 2 ** (len(self.widths) - 1)

    def problems(self) -> Iterator[str]:
        if self.side % self.factor:
            yield f"side {self.side} cannot be halved {len(self.widths) - 1} times"
        if odd := [width for width in self.widths if width % self.norm_groups]:
            yield f"widths: {odd[0]} is not a multiple of norm_groups {self.norm_groups}"
        for name in ("side", "classes", "shapes"):
            if getattr(self.data, name) != DataConfig.model_fields[name].default:
                yield f"data.{name}: a codec has its own side, squares and no classes; omit it"
