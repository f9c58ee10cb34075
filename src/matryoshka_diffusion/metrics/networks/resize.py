"""How pictures come to the side that a network looks at, as the protocols have it."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F


def as_rgb(
    pictures: UInt8[np.ndarray, "b h w c"], network: str, device: torch.device | str = "cpu"
) -> UInt8[Tensor, "b 3 h w"]:
    """Pictures as a network takes them; grey ones count as three equal channels.

    Raises:
        ValueError: a number of channels other than 1 and 3.
    """
    channels = pictures.shape[3]
    if channels not in (1, 3):
        raise ValueError(f"{network} looks at pictures with 1 or 3 channels, not {channels}")
    x = torch.tensor(pictures, device=device).permute(0, 3, 1, 2)
    return x.expand(-1, 3, -1, -1).contiguous()


def tf1_bilinear(x: Float[Tensor, "b c H W"], side: int) -> Float[Tensor, "b c side side"]:
    """`tf.image.resize_bilinear` of TensorFlow 1, which the Inception of FID was run with.

    Pixel i of n looks at position i * (old / new), without the half pixels that would keep the
    picture in its place, and mixes the two pixels around it, however much it shrinks: no
    antialiasing. Every other rule gives another FID (Parmar et al. 2022).
    """
    return _along(_along(x, 3, side), 2, side)


def _along(x: Tensor, dim: int, side: int) -> Tensor:
    old = x.shape[dim]
    position = torch.arange(side, device=x.device, dtype=x.dtype) * (old / side)
    lower = position.long().clamp(max=old - 1)
    upper = (lower + 1).clamp(max=old - 1)
    share = (position - lower).view([-1 if d == dim else 1 for d in range(4)])
    return torch.lerp(x.index_select(dim, lower), x.index_select(dim, upper), share)


def pil_bicubic(x: UInt8[Tensor, "b c H W"], side: int) -> Float[Tensor, "b c side side"]:
    """Bicubic with antialiasing, as Pillow does it with bytes; then the middle square.

    The shorter side becomes `side` pixels. This is how CLIP's pictures were prepared. Like Pillow,
    it goes along the rows first and makes bytes of what it has before it goes along the columns:
    where bicubic weights overshoot, that cuts off what would come back. Pillow's weights are
    whole numbers, so here and there a byte differs by one. (Of pictures higher than wide, recent
    versions of Pillow do the columns first. CLIP's did not.)

    Returns:
        Whole numbers in [0, 255].
    """
    height, width = x.shape[-2:]
    tall, wide = (max(side, int(side * edge / min(height, width))) for edge in (height, width))
    y = _bytes(_bicubic(_bytes(_bicubic(x.float(), height, wide)), tall, wide))
    top, left = (tall - side) // 2, (wide - side) // 2
    return y[:, :, top : top + side, left : left + side]


def _bicubic(x: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(x, size=(height, width), mode="bicubic", antialias=True)


def _bytes(x: Tensor) -> Tensor:
    return x.round().clamp(0.0, 255.0)
