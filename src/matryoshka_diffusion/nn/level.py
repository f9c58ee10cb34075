"""One level of the nest: a UNet cut open in the middle, where the coarser levels go."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from matryoshka_diffusion.config import LevelConfig, ModelConfig
from matryoshka_diffusion.nn.conditioner import Context
from matryoshka_diffusion.nn.layers import (
    Attention,
    ResidualBlock,
    conv3,
    mlp,
    norm,
    per_frame,
    repeat_pixels,
    shuffle,
    sinusoid,
    unshuffle,
    without_autocast,
    zero,
)
from matryoshka_diffusion.nn.norms import normalise
from matryoshka_diffusion.nn.temporal import DownFrames, FrameAttention, UpFrames
from matryoshka_diffusion.pyramid import frames_as_rows, pad_rows, rows_as_frames
from matryoshka_diffusion.schedule import NoiseSchedule, alpha_sigma, expand


class Trail(NamedTuple):
    """Features and conditions that `encode` hands on; each frame of a clip is a row."""

    skips: tuple[Float[Tensor, "n _ _ _"], ...]
    embedding: Float[Tensor, "b e"]
    context: Context

    @property
    def core(self) -> Float[Tensor, "n c y x"]:
        """The features at the end of the encoder."""
        return self.skips[-1]


class Level(nn.Module):
    """A UNet in two halves: `encode` down to the core, `decode` from there to the prediction.

    Other features may join after the stem and at the core. Between blocks each frame of a clip is
    a row of its own; only the layers of `temporal` put the frames of a clip together.

    `inputs` is the number of channels of what `encode` takes, `model.channels_of(config)` that of
    what `decode` predicts.
    """

    def __init__(
        self, model: ModelConfig, config: LevelConfig, schedule: NoiseSchedule, inputs: int
    ) -> None:
        super().__init__()
        self.config = config
        self.schedule = schedule
        self.recomputed = False
        self.data_std = model.data_std
        self.time_input = model.time_input
        self.frequencies = model.embedding // 4
        self.time = mlp(self.frequencies, model.embedding)
        self.micro = nn.ModuleDict(
            {micro.name: mlp(self.frequencies, model.embedding) for micro in config.micro}
        )
        self.stem = conv3(inputs * config.patch**2, config.widths[0])
        self.encoder, self.skip_widths = build_encoder(model, config)
        self.core_width = self.skip_widths[-1]  # channels between `encode` and `decode`

    def add_decoder(self, model: ModelConfig) -> None:
        """Build the second half. The nest draws other weights between the two."""
        config = self.config
        core, deepest = self.core_width, len(config.widths) - 1
        layers = (1, 0) if config.middle else ()  # of attention, in two blocks
        self.middle = nn.ModuleList(Block(model, config, core, core, deepest, n) for n in layers)
        self.decoder = build_decoder(model, config, self.skip_widths)
        self.norm = norm(config.widths[0])
        self.head = zero(conv3(config.widths[0], model.channels_of(config) * config.patch**2))

    def encode(
        self,
        x: Float[Tensor, "b i *grid"],
        t: Float[Tensor, " a"],
        context: Context,
        incoming: Float[Tensor, "f k y x"] | None = None,
    ) -> Trail:
        """The features of the first half, from noisy images at unit scale (`scale`).

        `t` and `context` may have more rows than `x`, and `incoming`, which joins after the stem,
        may have fewer.
        """
        context = context.rows(x.shape[0])
        embedding = self.embed(t[: x.shape[0]], context)
        h = self.stem(unshuffle(frames_as_rows(x), self.config.patch))
        if incoming is not None:
            h = h + pad_rows(incoming, h.shape[0])
        skips = [h]
        for layer in self.encoder:
            conditions = (embedding, context) if isinstance(layer, Block) else ()
            h = self._run(layer, h, *conditions)
            skips.append(h)
        return Trail(tuple(skips), embedding, context)

    def decode(
        self, trail: Trail, incoming: Float[Tensor, "m k y x"] | None = None
    ) -> tuple[Float[Tensor, "n k2 y2 x2"], Float[Tensor, "b c *grid"]]:
        """The features before the head, and the prediction; `incoming` joins at the core."""
        skips, embedding, context = trail
        h = trail.core if incoming is None else trail.core + incoming
        for block in self.middle:
            h = self._run(block, h, embedding, context)
        for block, skip in zip(self.decoder, reversed(skips), strict=True):
            # Halving an odd side rounds up, so the way back has a row too many.
            h = h[..., : skip.shape[2], : skip.shape[3]]
            h = self._run(block, h, embedding, context, skip)
        # A GPU's half precision becomes float32 here, in more bytes than several blocks keep.
        widened = h.device.type != "cpu" and h.dtype != self.head.weight.dtype
        predicted = shuffle(self._run(self._predict, h, again=widened), self.config.patch)
        return h, rows_as_frames(predicted, self.config.frames)

    def _predict(self, h: Float[Tensor, "n c y x"]) -> Float[Tensor, "n p y x"]:
        """The output layer in the precision of its weights: also under autocast it is float32."""
        with without_autocast(h.device):
            return self.head(normalise(self.norm, h.to(self.norm.weight.dtype)))

    def _run(self, part: Callable[..., Tensor], *inputs: Any, again: bool = False) -> Tensor:
        """Compute `part(*inputs)`.

        Of a recomputed level, or with `again`, only the inputs are kept for the backward pass,
        which computes the part once more.
        """
        if not (self.recomputed or again):
            return part(*inputs)
        draws = self.config.dropout > 0  # only dropout needs the state of random numbers again
        return checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=draws)

    def embed(self, t: Float[Tensor, " b"], context: Context) -> Float[Tensor, "b e"]:
        """Time, micro-conditions, label and pooled text as one vector, after its SiLU."""
        embedding = self.time(sinusoid(self.time_steps(t), self.frequencies))
        for micro in self.config.micro:
            value = context.cond.micro[micro.name].float()
            value = value * 1000 if micro.ceiling is None else value.clamp(max=micro.ceiling)
            embedding = embedding + self.micro[micro.name](sinusoid(value, self.frequencies))
        if context.embedding is not None:
            embedding = embedding + context.embedding
        return F.silu(embedding)

    def time_steps(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Time on the scale -1..1000 that the sinusoids are made for."""
        if self.time_input == "step":
            return 1000.0 * t - 1.0
        # The level's own log-SNR from +20 (clean) to -20 (noise).
        return 500.0 - 25.0 * self.schedule.log_snr(t).clamp(-20.0, 20.0)

    def scale(self, z: Float[Tensor, "b c *grid"], t: Float[Tensor, " b"]) -> Tensor:
        """Noisy images brought to unit scale, in the way that `input_scaling` names."""
        if self.config.input_scaling == "none":
            return z
        if self.config.input_scaling == "std":
            axes = tuple(range(1, z.ndim))
            centred = z - z.mean(dim=axes, keepdim=True)
            degrees = math.prod(z.shape[1:]) - 1
            # The unbiased torch.std, which would warn about a level without rows.
            return z / (centred.square().sum(dim=axes, keepdim=True) / degrees).sqrt()
        alpha, sigma = alpha_sigma(self.schedule.log_snr(t))
        variance = (alpha * self.data_std).square() + sigma.square()
        return z * expand(variance.rsqrt(), z)


class Block(nn.Module):
    """A residual block, its attention layers and, with `up`, the step to the next width.

    `index` is the place of its width in `widths`. It sets the number of frames, of frame attention
    layers and, unless `attention` is given, of attention layers.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: LevelConfig,
        inputs: int,
        outputs: int,
        index: int,
        attention: int | None = None,
        up: bool = False,
    ) -> None:
        super().__init__()
        text = model.text.width if model.text else None
        attention = config.attention[index] if attention is None else attention
        over_frames = config.frame_attention[index] if config.frame_attention else 0
        self.frames = config.frames_at(index)
        self.residual = ResidualBlock(inputs, outputs, model.embedding, config.dropout)
        self.attention = nn.ModuleList(
            Attention(outputs, config.heads, text, config.attention_mlp) for _ in range(attention)
        )
        self.frame_attention = nn.ModuleList(
            FrameAttention(outputs, config.heads, self.frames) for _ in range(over_frames)
        )
        self.up = None
        if up and config.frame_stride(index - 1) > 1:
            self.up = UpFrames(outputs, self.frames)
        elif up:
            self.up = Up(outputs, config.stride(index - 1))

    def forward(
        self,
        h: Float[Tensor, "n c y x"],
        embedding: Float[Tensor, "b e"],
        context: Context,
        skip: Float[Tensor, "n c2 y x"] | None = None,
    ) -> Float[Tensor, "m c3 y2 x2"]:
        """The block's features; in a decoder it sees the encoder's `skip` beside `h`."""
        h = h if skip is None else torch.cat([h, skip], dim=1)
        h = self.residual(h, per_frame(embedding, self.frames))
        for layer in self.attention:
            h = layer(h, *(per_frame(x, self.frames) for x in (context.tokens, context.mask)))
        for layer in self.frame_attention:
            h = layer(h)
        return h if self.up is None else self.up(h)


class Up(nn.Conv2d):
    """Multiply the side by repeating pixels, then convolve; with scale 1 the side stays."""

    def __init__(self, width: int, scale: int) -> None:
        super().__init__(width, width, 3, padding=1)
        self.scale = (float(scale), float(scale))

    def forward(self, h: Float[Tensor, "n c y x"]) -> Float[Tensor, "n c y2 x2"]:
        return super().forward(repeat_pixels(h, self.scale))


def build_encoder(model: ModelConfig, config: LevelConfig) -> tuple[nn.ModuleList, list[int]]:
    """The way down, and the width of every skip: the stem's, each block's, each halving's."""
    layers: list[nn.Module] = []
    width = config.widths[0]
    skips = [width]
    for index, wide in enumerate(config.widths):
        if index > 0:
            if config.frame_stride(index - 1) > 1:
                layers.append(DownFrames(width, config.frames_at(index - 1)))
            else:
                # With stride 1 the side stays and the weights have the same shapes, so a level that
                # halves less often is the same network at other resolutions (Appendix D.2).
                layers.append(conv3(width, width, config.stride(index - 1)))
            skips.append(width)
        for _ in range(config.blocks[index]):
            layers.append(Block(model, config, width, wide, index))
            width = wide
            skips.append(width)
    return nn.ModuleList(layers), skips


def build_decoder(model: ModelConfig, config: LevelConfig, skips: list[int]) -> nn.ModuleList:
    """The way up: one block for every skip, in reverse; the last one of a width leads up."""
    blocks: list[nn.Module] = []
    remaining = list(skips)
    width = skips[-1]
    for index in reversed(range(len(config.widths))):
        wide = config.widths[index]
        for number in range(config.blocks[index] + 1):
            leads_up = index > 0 and number == config.blocks[index]
            inputs = width + remaining.pop()
            blocks.append(Block(model, config, inputs, wide, index, up=leads_up))
            width = wide
    assert not remaining, "every skip has its block"
    return nn.ModuleList(blocks)
