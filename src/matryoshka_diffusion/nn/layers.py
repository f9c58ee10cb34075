"""Building blocks: norms, residual block, attention, embeddings. None of them knows of levels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from matryoshka_diffusion.nn.norms import normalise

GROUPS = 32
"""Groups of every group normalisation. Widths are multiples of it."""
FILLS = frozenset(("fill_", "zero_", "normal_", "uniform_", "kaiming_uniform_"))
"""Names of the functions of torch that give weights their first values."""


@contextmanager
def shapes_only() -> Iterator[None]:
    """Build modules whose weights have shapes and no numbers: on `meta`, and never filled.

    torch would run its initialisers on `meta`, too. They change nothing there, but they import
    torch's compiler, which takes more than a second.
    """
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    """Leave tensors as they are where torch would fill them."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def zero(module: nn.Module) -> nn.Module:
    """Set all parameters to zero, so that a branch that ends here starts as a no-op."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def conv3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A 3 x 3 convolution that keeps (stride 1) or halves (stride 2) the side."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)


def norm(width: int) -> nn.GroupNorm:
    """Group normalisation with 32 groups."""
    return nn.GroupNorm(GROUPS, width)


def mlp(inputs: int, width: int) -> nn.Sequential:
    """Linear - SiLU - Linear, for embeddings."""
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))


def unshuffle(x: Float[Tensor, "n c h w"], patch: int) -> Float[Tensor, "n c2 h2 w2"]:
    """Fold squares of pixels into channels. `F.pixel_unshuffle` leaves an empty batch as it is."""
    height, width = x.shape[2] // patch, x.shape[3] // patch
    squares = x.unflatten(3, (width, patch)).unflatten(2, (height, patch))
    return squares.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


def shuffle(x: Float[Tensor, "n c h w"], patch: int) -> Float[Tensor, "n c2 h2 w2"]:
    """The reverse of `unshuffle`."""
    squares = x.unflatten(1, (x.shape[1] // patch**2, patch, patch)).permute(0, 1, 4, 2, 5, 3)
    return squares.flatten(4, 5).flatten(2, 3)


def sinusoid(x: Float[Tensor, " b"], width: int) -> Float[Tensor, "b width"]:
    """Sines, then cosines, of x times width / 2 frequencies from 1 down to 1/10000."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(half, device=x.device) / half)
    angles = x.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which operations keep the precision of their arguments."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def layer_norm(norm: nn.LayerNorm, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
    """Normalise in the type of `x`, which autocast of a GPU would make float32.

    Statistics are float32 everywhere.
    """
    if x.device.type == "cpu":
        return norm(x)
    with without_autocast(x.device):
        weights = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
        return F.layer_norm(x, norm.normalized_shape, *weights, norm.eps)


def repeat_pixels(h: Float[Tensor, "n c y x"], scale: tuple[float, float]) -> Tensor:
    """Multiply both sides by repeating pixels, in the type of `h` also under autocast."""
    with without_autocast(h.device):
        return F.interpolate(h, scale_factor=scale)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions. The embedding scales and shifts the features between them."""

    def __init__(self, inputs: int, outputs: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = norm(inputs)
        self.conv1 = conv3(inputs, outputs)
        self.modulation = nn.Linear(embedding, 2 * outputs)
        self.norm2 = norm(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(conv3(outputs, outputs))
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(
        self, h: Float[Tensor, "b inputs y x"], embedding: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b outputs y x"]:
        """`embedding` is after its SiLU, which acts once for the whole level."""
        scale, shift = self.modulation(embedding).chunk(2, dim=1)
        out = self.conv1(normalise(self.norm1, h))
        out = normalise(self.norm2, out, scale, shift)
        return self.skip(h) + self.conv2(self.dropout(out))


class Attention(nn.Module):
    """Self-attention over positions, plus cross-attention to text with the same queries.

    The two results are added. `text` is the width of the text tokens, None without text. With
    `feed_forward` a two-layer perceptron follows.
    """

    def __init__(self, width: int, heads: int, text: int | None, feed_forward: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm = norm(width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.text_norm = nn.LayerNorm(text) if text else None
        self.text_kv = nn.Linear(text, 2 * width) if text else None
        self.out = zero(nn.Conv2d(width, width, 1))
        self.feed_forward = _PixelMLP(width) if feed_forward else nn.Identity()

    def forward(
        self,
        h: Float[Tensor, "b c y x"],
        tokens: Float[Tensor, "b n d"] | None,
        mask: Bool[Tensor, "b n"] | None,
    ) -> Float[Tensor, "b c y x"]:
        """`mask` is True for the tokens to attend to; without it these are all."""
        qkv = self.qkv(normalise(self.norm, h, silu=False))
        positions = innermost(qkv.flatten(2).transpose(1, 2))
        q, k, v = (split_heads(part, self.heads) for part in positions.chunk(3, dim=2))
        attended = attend(q, k, v, None)
        if tokens is not None and self.text_kv is not None and self.text_norm is not None:
            text = self.text_kv(layer_norm(self.text_norm, tokens))
            k, v = (split_heads(part, self.heads) for part in text.chunk(2, dim=2))
            attended = attended + attend(q, k, v, mask)
        attended = attended.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, h.shape[2:])
        attended = attended.contiguous() if h.is_contiguous() else attended  # the layout of h
        return self.feed_forward(h + self.out(attended))


class _PixelMLP(nn.Module):
    """Norm - 1 x 1 to four times the width - GELU - 1 x 1, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = norm(width)
        self.up = nn.Conv2d(width, 4 * width, 1)
        self.down = nn.Conv2d(4 * width, width, 1)

    def forward(self, h: Float[Tensor, "b c y x"]) -> Float[Tensor, "b c y x"]:
        return h + self.down(F.gelu(self.up(normalise(self.norm, h, silu=False))))


class TextLayer(nn.Module):
    """A pre-norm transformer layer over text tokens (Appendix A's num_lm_attn_layers)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(
        self, tokens: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None
    ) -> Float[Tensor, "b n d"]:
        parts = self.qkv(layer_norm(self.norm1, tokens)).chunk(3, dim=2)
        q, k, v = (split_heads(part, self.heads) for part in parts)
        attended = attend(q, k, v, mask).transpose(1, 2).flatten(2)
        tokens = tokens + self.out(attended)
        return tokens + self.down(F.gelu(self.up(layer_norm(self.norm2, tokens))))


def innermost(x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
    """The same numbers with channels innermost in memory, except on a CPU.

    Fused attention of GPUs needs that: without it torch computes and keeps all logits in float32.
    On a CPU another order selects another kernel, and then trained runs would not resume to the
    same bits.
    """
    return x if x.device.type == "cpu" else x.contiguous()


def split_heads(x: Float[Tensor, "b n c"], heads: int) -> Float[Tensor, "b heads n w"]:
    """Split channels into heads of equal width."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def attend(
    q: Float[Tensor, "b heads m w"],
    k: Float[Tensor, "b heads n w"],
    v: Float[Tensor, "b heads n w"],
    mask: Bool[Tensor, "b n"] | None,
) -> Float[Tensor, "b heads m w"]:
    """Softmax attention of each query over the keys at which `mask` is True."""
    allowed = None if mask is None else mask[:, None, None, :]
    if q.device.type == "cpu":  # where plain products are several times as fast as fused attention
        if allowed is not None:  # the function below takes numbers to add, no truth values
            allowed = q.new_zeros(allowed.shape).masked_fill(~allowed, -math.inf)
        with without_autocast(q.device):  # logits stay float32
            return torch.ops.aten._scaled_dot_product_attention_math(q, k, v, allowed)[0]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


def per_frame(x: Tensor | None, frames: int) -> Tensor | None:
    """Repeat each row of a clip for every one of its frames."""
    return x if x is None or frames == 1 else x.repeat_interleave(frames, dim=0)
