"""Layers for clips: attention over frames, and convolutions that halve or double frames.

Features have each frame of a clip as a row (`pyramid.frames_as_rows`), so layers that work in space
alone see images. The layers here put the rows of a clip together.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matryoshka_diffusion.nn.layers import (
    attend,
    innermost,
    norm,
    repeat_pixels,
    sinusoid,
    split_heads,
    without_autocast,
    zero,
)
from matryoshka_diffusion.nn.norms import normalise

SEQUENCES = 32_768
"""Sequences that attend at a time. GPU kernels count them with 16 bits."""


class FrameAttention(nn.Module):
    """Self-attention over the frames of a clip, at each position alone (Fig. 10).

    The input has sines of the frame number added, which the paper does not mention. Attention
    could not tell before from after without them.
    """

    def __init__(self, width: int, heads: int, frames: int) -> None:
        super().__init__()
        self.heads, self.frames = heads, frames
        self.norm = norm(width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = zero(nn.Conv2d(width, width, 1))

    def forward(self, h: Float[Tensor, "n c y x"]) -> Float[Tensor, "n c y x"]:
        """`h` has the frames of each clip as rows."""
        clips = len(h) // self.frames
        numbers = sinusoid(torch.arange(self.frames, device=h.device).float(), h.shape[1])
        numbered = (
            normalise(self.norm, h, silu=False) + numbers.to(h).repeat(clips, 1)[:, :, None, None]
        )
        qkv = self.qkv(numbered).unflatten(0, (clips, self.frames)).flatten(3)
        sequences = qkv.permute(0, 3, 1, 2).flatten(0, 1)  # one for each position of each clip
        attended = torch.cat([self._attend(part) for part in sequences.split(SEQUENCES)])
        attended = attended.unflatten(0, (clips, -1 if clips else 0)).permute(0, 2, 3, 1)
        return h + self.out(attended.reshape(h.shape))

    def _attend(self, qkv: Float[Tensor, "s f k"]) -> Float[Tensor, "s f c"]:
        """Attend, on a CPU in float32: short sequences take 2 to 8 times as long in bfloat16."""
        if qkv.device.type != "cpu":
            return self._mix(innermost(qkv))
        with without_autocast(qkv.device):
            return self._mix(qkv.to(torch.promote_types(qkv.dtype, torch.float32)))

    def _mix(self, qkv: Float[Tensor, "s f k"]) -> Float[Tensor, "s f c"]:
        q, k, v = (split_heads(part, self.heads) for part in qkv.chunk(3, dim=2))
        return attend(q, k, v, None).transpose(1, 2).flatten(2)


class DownFrames(nn.Conv2d):
    """Halve the frames by a strided convolution over three frames, at each position alone.

    Output n is centred on frame 2 n. After several halvings the first output is still centred on
    the first frame, which D^r keeps.
    """

    def __init__(self, width: int, frames: int) -> None:
        super().__init__(width, width, (3, 1), stride=(2, 1), padding=(1, 0))
        self.frames = frames

    def forward(self, h: Float[Tensor, "n c y x"]) -> Float[Tensor, "m c y x"]:
        return _as_rows(super().forward(_over_time(h, self.frames)), h)


class UpFrames(nn.Conv2d):
    """Double the frames: repeat each, then convolve over three, at each position alone."""

    def __init__(self, width: int, frames: int) -> None:
        super().__init__(width, width, (3, 1), padding=(1, 0))
        self.frames = frames

    def forward(self, h: Float[Tensor, "n c y x"]) -> Float[Tensor, "m c y x"]:
        doubled = repeat_pixels(_over_time(h, self.frames), (2.0, 1.0))
        return _as_rows(super().forward(doubled), h)


def _over_time(h: Float[Tensor, "n c y x"], frames: int) -> Float[Tensor, "b c f p"]:
    """Clips as images whose height is time and whose width is all positions."""
    return h.unflatten(0, (len(h) // frames, frames)).flatten(3).transpose(1, 2)


def _as_rows(clips: Float[Tensor, "b c f p"], like: Float[Tensor, "n c y x"]) -> Tensor:
    """The reverse of `_over_time`, with positions as in `like`."""
    return clips.transpose(1, 2).flatten(0, 1).unflatten(2, like.shape[2:])
