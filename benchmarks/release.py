"""The paper's released arithmetic, operation by operation, on the weights of a `NestedUNet`.

    python -m benchmarks.against_release

measures it. Features are NCHW, attention is two explicit products around a softmax, and GroupNorm,
modulation and SiLU are operations of their own. `tests/test_reference.py` compares network, loss
and sampler with recordings of the released code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import ModelConfig, TrainConfig
from matryoshka_diffusion.nn.conditioner import Context
from matryoshka_diffusion.nn.level import Block
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.pyramid import Pyramid, pad_rows
from matryoshka_diffusion.schedule import STEPS, build_schedules
from matryoshka_diffusion.training.precision import PrecisionSetting, autocast

CPU = torch.device("cpu")
Tables = Sequence[Float[Tensor, " n"]]
"""alpha^2 of every level, coarse to fine, at the steps 0 (clean) to 1000."""


# --- the network ---------------------------------------------------------------------------------


class PlainNest:
    """A nest that computes what its `NestedUNet` does, with plain operations."""

    def __init__(self, net: NestedUNet) -> None:
        self.net = net

    def __call__(self, z: Pyramid, t: Float[Tensor, " b"], cond: Conditioning) -> Pyramid:
        """One prediction for each level, as of `NestedUNet.forward`."""
        return tuple(self._level(len(z) - 1, z, t, self.net.conditioner(cond), None)[1])

    def _level(
        self, place: int, z: Pyramid, t: Tensor, context: Context, incoming: Tensor | None
    ) -> tuple[Float[Tensor, "n c y x"], list[Tensor]]:
        """The features of a level before its head, and the predictions up to this level."""
        level, x = self.net.levels[place], z[place]
        own = context.rows(len(x))
        embedding = level.embed(t[: len(x)], own)
        h = level.stem(level.scale(x, t[: len(x)]))
        if incoming is not None:
            h = h + pad_rows(incoming, len(h))
        skips = [h]
        for layer in level.encoder:
            h = block(layer, h, embedding, own) if isinstance(layer, Block) else layer(h)
            skips.append(h)
        predictions: list[Tensor] = []
        if place > 0:
            adapter = self.net.adapters[str(place)]
            inner, predictions = self._level(place - 1, z, t, context, adapter.inward(h))
            h = h + adapter.outward(inner[: len(h)])
        for layer in level.middle:
            h = block(layer, h, embedding, own)
        for layer in level.decoder:
            h = block(layer, torch.cat([h, skips.pop()], dim=1), embedding, own)
        return h, [*predictions, level.head(F.silu(level.norm(h)))]


def block(layer: Any, h: Float[Tensor, "n c y x"], embedding: Tensor, context: Context) -> Tensor:
    """A residual block, its attention layers, and the step up if the block has one."""
    h = residual(layer.residual, h, embedding)
    for part in layer.attention:
        h = attention(part, h, context.tokens, context.mask)
    return h if layer.up is None else layer.up(h)


def residual(layer: Any, h: Float[Tensor, "n c y x"], embedding: Tensor) -> Tensor:
    """Two convolutions; norm, modulation and SiLU are operations of their own."""
    scale, shift = layer.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
    out = layer.conv1(F.silu(layer.norm1(h)))
    out = F.silu(layer.norm2(out) * (1 + scale) + shift)
    return layer.skip(h) + layer.conv2(layer.dropout(out))


def attention(
    layer: Any, h: Float[Tensor, "n c y x"], tokens: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Attention to positions and to text with the same queries, then the perceptron, if any."""
    q, k, v = layer.qkv(layer.norm(h)).flatten(2).chunk(3, dim=1)
    attended = attend(q, k, v, layer.heads)
    if tokens is not None and layer.text_kv is not None:
        k, v = layer.text_kv(layer.text_norm(tokens)).transpose(1, 2).chunk(2, dim=1)
        attended = attended + attend(q, k, v, layer.heads, mask)
    h = h + layer.out(attended.unflatten(2, h.shape[2:]))
    if isinstance(mlp := layer.feed_forward, nn.Identity):
        return h
    return h + mlp.down(F.gelu(mlp.up(mlp.norm(h))))


def attend(
    q: Float[Tensor, "b c m"],
    k: Float[Tensor, "b c n"],
    v: Float[Tensor, "b c n"],
    heads: int,
    mask: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b c m"]:
    """Softmax attention as two products, with all logits in memory."""
    q, k, v = (x.unflatten(1, (heads, -1)).flatten(0, 1) for x in (q, k, v))
    scale = q.shape[1] ** -0.25
    logits = torch.einsum("bct,bcs->bts", q * scale, k * scale).float()
    if mask is not None:
        logits = logits.masked_fill(~mask.repeat_interleave(heads, 0)[:, None], -torch.inf)
    weights = logits.softmax(dim=-1).to(v.dtype)
    return torch.einsum("bts,bcs->bct", weights, v).unflatten(0, (-1, heads)).flatten(1, 2)


# --- training ------------------------------------------------------------------------------------


def tables(model: ModelConfig) -> Tables:
    """alpha^2 of every level of a model."""
    t = torch.arange(STEPS + 1) / STEPS
    return [torch.sigmoid(schedule.log_snr(t)) for schedule in build_schedules(model)]


def losses(
    nest: PlainNest,
    x: Pyramid,
    noise: Pyramid,
    steps: Int[Tensor, " b"],
    cond: Conditioning,
    alphas: Tables,
    precision: PrecisionSetting = "fp32",
) -> Float[Tensor, " b"]:
    """Loss of each image: squared error of the noise that v implies, a mean for each level."""
    squares = [table[steps].view(-1, 1, 1, 1) for table in alphas]
    z = [a.sqrt() * x_r + (1 - a).sqrt() * e for a, x_r, e in zip(squares, x, noise, strict=True)]
    with autocast(precision, CPU):
        predictions = nest(tuple(z), steps / STEPS, cond)
    total = torch.zeros(len(steps))
    for a, z_r, noise_r, v in zip(squares, z, noise, predictions, strict=True):
        error = a.sqrt() * v.float() + (1 - a).sqrt() * z_r - noise_r
        total = total + error.square().flatten(1).mean(1)
    return total


def training(
    net: NestedUNet,
    pictures: Float[Tensor, "n c h w"],
    cond: Conditioning,
    train: TrainConfig,
    precision: PrecisionSetting,
) -> Callable[[], float]:
    """Training steps on these images: draw noise, forward, backward, clip, AdamW, average."""
    nest, alphas, weights = PlainNest(net), tables(net.config), [*net.parameters()]
    averages = [weight.detach().clone() for weight in weights]
    decay = train.weight_decay
    optimizer = torch.optim.AdamW(weights, train.stages[-1].lr, weight_decay=decay, foreach=False)

    def step() -> float:
        x = tuple(F.avg_pool2d(pictures, pictures.shape[3] // o.side) for o in net.config.levels)
        noise = tuple(torch.randn_like(x_r) for x_r in x)
        steps = torch.randint(1, STEPS + 1, (len(pictures),))
        loss = losses(nest, x, noise, steps, cond, alphas, precision).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, train.clip_norm)
        optimizer.step()
        with torch.no_grad():
            for average, weight in zip(averages, weights, strict=True):
                average.mul_(train.ema_decay).add_(weight, alpha=1 - train.ema_decay)
        return loss.item()

    return step


# --- sampling ------------------------------------------------------------------------------------


@torch.no_grad()
def sample(
    net: NestedUNet,
    z: Pyramid,
    given: Conditioning,
    without: Conditioning,
    *,
    steps: int,
    guidance: float,
    precision: PrecisionSetting = "fp32",
    joined: bool = False,
) -> Pyramid:
    """Images by DDIM from the noise `z`, clipped, with guidance on v.

    A step is two calls of the network, each in an autocast of its own. With `joined` it is one call
    of both halves, and one autocast spans all steps, so each weight is cast once.
    """
    nest, alphas, both = PlainNest(net), tables(net.config), given.followed_by(without)

    def call(z: Pyramid, now: int, cond: Conditioning) -> list[Tensor]:
        with autocast(precision, CPU):
            predictions = nest(z, torch.full((len(z[0]),), now / STEPS), cond)
        return [v.float() for v in predictions]

    times = [round(k * (STEPS + 1) / (steps + 1)) for k in range(steps, -1, -1)]
    with autocast(precision, CPU) if joined else nullcontext():
        for now, then in pairwise(times):
            if joined:
                halves = call(tuple(torch.cat([z_r, z_r]) for z_r in z), now, both)
                pairs = [v.chunk(2) for v in halves]
            else:
                pairs = [*zip(call(z, now, given), call(z, now, without), strict=True)]
            following = []
            for z_r, (c, u), table in zip(z, pairs, alphas, strict=True):
                v, a, b = u + guidance * (c - u), table[now], table[then]
                x = (a.sqrt() * z_r - (1 - a).sqrt() * v).clamp(-1.0, 1.0)
                noise = (z_r - a.sqrt() * x) / (1 - a).sqrt()
                following.append(b.sqrt() * x + (1 - b).sqrt() * noise)
            z = tuple(following)
    return z
