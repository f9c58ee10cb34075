"""Matryoshka Diffusion in one file: the whole method, read from the top, with nothing but torch.

An image is a pyramid. Noise the pyramid level by level at one shared time. One network, a nest of
UNets, denoises all levels at once. Training grows the pyramid from its coarse end.

Running it draws a toy data set, trains for a minute or two on a CPU and writes samples at 8, 16
and 32 pixels. Equation numbers are the paper's (arXiv 2310.15111). Levels run from coarse to fine.
Times t have the shape (b,) and run from 0 (clean) to 1 (noise). The library loads these weights.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Pyramid = tuple[Tensor, ...]  # coarse to fine, level r of shape (b, 3, side_r, side_r)


class Doll(NamedTuple):
    """The shape of one level. The tuples run from its own resolution down, halving each time."""

    side: int
    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    attention: tuple[int, ...]


NEST = (  # most of the computation is in the smallest level (Section 3.2)
    Doll(side=8, widths=(96,), blocks=(2,), attention=(1,)),
    Doll(side=16, widths=(32, 64), blocks=(1, 0), attention=(0, 0)),
    Doll(side=32, widths=(32, 32), blocks=(1, 0), attention=(0, 0)),
)
PATCH, EMBEDDING, HEADS = 2, 128, 4
COLOURS = torch.tensor([[0.9, 0.1, 0.1], [0.95, 0.75, 0.1], [0.1, 0.6, 0.2], [0.1, 0.3, 0.9]])
CLASSES = HIDDEN = 3 * len(COLOURS)  # discs, squares, triangles; label HIDDEN means "unknown"


# --- 1. The extended space: an image at every resolution, noised at every resolution -----------
def build_pyramid(x: Tensor, depth: int) -> Pyramid:
    """[D^1(x), ..., D^depth(x)], Section 3.1: area averages of the image."""
    return tuple(F.avg_pool2d(x, x.shape[-1] // doll.side) for doll in NEST[:depth])


def alpha_sigma(t: Tensor, level: int) -> tuple[Tensor, Tensor]:
    """The shares of image and noise at time t: a cosine schedule, shifted by resolution.

    Averaging s x s pixels divides the variance of their noise by s^2. A level s times as wide as
    the coarsest has its SNR divided by s^2, so every level shows the coarse image equally well.
    """
    start, end = math.atan(math.exp(-7.5)), math.atan(math.exp(7.5))  # log-SNR from 15 to -15
    log_snr = -2 * torch.log(torch.tan(start + t * (end - start)))  # alpha is the angle's cosine
    log_snr = torch.where(t > 0, log_snr - 2 * math.log(NEST[level].side / NEST[0].side), math.inf)
    return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()


def diffuse(x: Pyramid, noise: Pyramid, t: Tensor) -> Pyramid:
    """A draw from q(z_t | x): independent noise on each level, one time for all of them."""
    z = []
    for level, (x_r, noise_r) in enumerate(zip(x, noise, strict=True)):
        alpha, sigma = (part.view(-1, 1, 1, 1) for part in alpha_sigma(t, level))
        z.append(alpha * x_r + sigma * noise_r)  # Eq. 1 and 2
    return tuple(z)


# --- 2. The nested network: a flat chain of UNets, each cut open where the next one sits -------
conv3 = partial(nn.Conv2d, kernel_size=3, padding=1)


def zero(layer: nn.Module) -> nn.Module:
    """Set weights to zero: what ends in such a layer changes nothing at first."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Residual(nn.Module):
    """Two convolutions; the embedding of time and class scales and shifts between them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, inputs), conv3(inputs, outputs)
        self.modulation = nn.Linear(EMBEDDING, 2 * outputs)
        self.norm2, self.conv2 = nn.GroupNorm(32, outputs), zero(conv3(outputs, outputs))
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        out = torch.addcmul(shift, self.norm2(self.conv1(F.silu(self.norm1(h)))), 1 + scale)
        return self.skip(h) + self.conv2(F.silu(out))


class Attention(nn.Module):
    """Self-attention over all positions of a feature map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(32, width), nn.Conv2d(width, 3 * width, 1)
        self.out = zero(nn.Conv2d(width, width, 1))

    def forward(self, h: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(h)).flatten(2).unflatten(1, (3, HEADS, -1)).transpose(3, 4)
        attended = F.scaled_dot_product_attention(*qkv.unbind(1))
        return h + self.out(attended.transpose(2, 3).flatten(1, 2).view_as(h))


class Block(nn.Module):
    """A residual block, its attention layers and, with `up`, the step to twice the side."""

    def __init__(self, inputs: int, outputs: int, attention: int, up: bool = False) -> None:
        super().__init__()
        self.residual = Residual(inputs, outputs)
        self.attention = nn.Sequential(*(Attention(outputs) for _ in range(attention)))
        self.up = conv3(outputs, outputs) if up else None

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        h = self.attention(self.residual(h, embedding))
        return h if self.up is None else self.up(F.interpolate(h, scale_factor=2.0))


class Level(nn.Module):
    """A UNet cut open in the middle, where the coarser levels go: `encode`, then `decode`."""

    def __init__(self, doll: Doll) -> None:
        super().__init__()
        width, skips = doll.widths[0], [doll.widths[0]]
        layers = nn.Linear(EMBEDDING // 4, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING)
        self.time, self.stem = nn.Sequential(*layers), conv3(3 * PATCH**2, width)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        for depth, wide in enumerate(doll.widths):
            if depth > 0:
                self.encoder.append(conv3(width, width, stride=2))
                skips.append(width)
            for _ in range(doll.blocks[depth]):
                self.encoder.append(Block(width, wide, doll.attention[depth]))
                width = wide
                skips.append(width)
        self.core = width  # the width in the middle
        for depth, wide in reversed(list(enumerate(doll.widths))):
            for left in reversed(range(doll.blocks[depth] + 1)):  # a block for every skip
                up = depth > 0 and left == 0
                self.decoder.append(Block(width + skips.pop(), wide, doll.attention[depth], up))
                width = wide
        self.norm, self.head = nn.GroupNorm(32, width), zero(conv3(width, 3 * PATCH**2))

    def encode(self, z: Tensor, finer: Tensor | float, t: Tensor, label: Tensor) -> tuple:
        """The features after each layer, and the embedding. `finer` is from the finer level."""
        waves = torch.exp(-math.log(10_000) * torch.arange(EMBEDDING // 8) / (EMBEDDING // 8))
        angles = (1000 * t - 1).float()[:, None] * waves
        embedding = F.silu(self.time(torch.cat([angles.sin(), angles.cos()], dim=1)) + label)
        skips = [self.stem(F.pixel_unshuffle(z, PATCH)) + finer]
        for layer in self.encoder:
            skips += [layer(skips[-1], embedding) if isinstance(layer, Block) else layer(skips[-1])]
        return skips, embedding

    def decode(self, trail: tuple, coarser: Tensor | float) -> tuple[Tensor, Tensor]:
        """The features before the head, and the prediction, from what `encode` returned."""
        skips, embedding = trail
        h = skips[-1] + coarser
        for block, skip in zip(self.decoder, reversed(skips), strict=True):
            h = block(torch.cat([h, skip], dim=1), embedding)
        return h, F.pixel_shuffle(self.head(F.silu(self.norm(h))), PATCH)


class NestedUNet(nn.Module):
    """The nest. One level alone is an ordinary UNet; growing puts another one around it."""

    def __init__(self) -> None:
        super().__init__()
        self.conditioner = nn.ModuleDict({"label": nn.Embedding(CLASSES + 1, EMBEDDING)})
        self.levels: Any = nn.ModuleList([Level(NEST[0])])
        self.adapters: Any = nn.ModuleDict()  # by the number of the finer level

    def grow(self) -> list[nn.Parameter]:
        """Append the next level; the others go on computing exactly the same (Section 3.3)."""
        level, coarse = Level(NEST[len(self.levels)]), NEST[len(self.levels) - 1].widths[0]
        ways = {"inward": conv3(level.core, coarse), "outward": conv3(coarse, level.core)}
        self.adapters[str(len(self.levels))] = adapter = zero(nn.ModuleDict(ways))
        self.levels.append(level)
        return [*adapter.parameters(), *level.parameters()]

    def forward(self, z: Pyramid, t: Tensor, labels: Tensor) -> Pyramid:
        """An estimate of the clean image on every level, each made from all of z."""
        label, adapters = self.conditioner["label"](labels), list(self.adapters.values())
        *coarser, finest = self.levels
        coarsest, *finer = self.levels
        trails = [finest.encode(z[-1], 0.0, t, label)]
        for level, adapter, z_r in reversed([*zip(coarser, adapters, z[:-1], strict=True)]):
            skips, _ = trails[-1]
            trails.append(level.encode(z_r, adapter["inward"](skips[-1]), t, label))
        h, x_r = coarsest.decode(trails.pop(), 0.0)  # and back out
        predictions = [x_r]
        for level, adapter in zip(finer, adapters, strict=True):
            h, x_r = level.decode(trails.pop(), adapter["outward"](h))
            predictions.append(x_r)
        return tuple(predictions)


# --- 3. Learning: one loss over all levels, and a nest that grows ------------------------------
def joint_loss(net: NestedUNet, x: Pyramid, labels: Tensor, t: Tensor, noise: Pyramid) -> Tensor:
    """The loss of each level. Training minimises their sum, Eq. 3.

    Eq. 3 sums over pixels with level weights N_R / N_r: that is a mean over pixels and equal
    weights. An x-error counts min(1 / sigma^2, 10): as in v-prediction, but capped at low noise.
    """
    losses = []
    for level, predicted in enumerate(net(diffuse(x, noise, t), t, labels)):
        weight = alpha_sigma(t, level)[1].pow(-2).clamp(max=10)
        error = (predicted - x[level]).square().mean((1, 2, 3))
        losses.append((weight * error).mean())  # Eq. 3
    return torch.stack(losses)


def train(steps: int, batch: int = 32, lr: float = 1e-3) -> tuple[NestedUNet, list[list[float]]]:
    """Train for `steps` at each depth; returns the network and the losses of every step."""
    net, history, total = NestedUNet(), [], steps * len(NEST)
    optimizer = torch.optim.AdamW(net.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(total):
        if step > 0 and step % steps == 0:
            optimizer.add_param_group({"params": net.grow()})
        for group in optimizer.param_groups:  # constant, then down to zero over the last fifth
            group["lr"] = lr * min(1.0, 5 * (1 - step / total))
        labels = torch.randint(CLASSES, (batch,))
        x = build_pyramid(draw(labels), len(net.levels))
        t = 1 - (torch.rand(()) + torch.arange(batch) / batch) % 1  # evenly spread over (0, 1]
        noise = tuple(torch.randn_like(x_r) for x_r in x)
        labels = torch.where(torch.rand(batch) < 0.1, HIDDEN, labels)
        losses = joint_loss(net, x, labels, t, noise)
        optimizer.zero_grad()
        losses.sum().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        history.append(losses.tolist())
        if step % 50 == 49:
            print(f"step {step + 1:4}, loss", *(f"{loss:.4f}" for loss in history[-1]), flush=True)
    return net.eval(), history


# --- 4. Sampling: from noise on every level to images on every level ---------------------------
@torch.no_grad()
def sample(net: NestedUNet, labels: Tensor, z: Pyramid, steps: int, guidance: float) -> Pyramid:
    """DDIM from z, pure noise on every level. Given the estimates, each level steps alone."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    for step in range(steps):
        t = times[step].expand(len(labels)).float()
        with_class, without = net(z, t, labels), net(z, t, torch.full_like(labels, HIDDEN))
        following = []
        for level, (z_r, c, u) in enumerate(zip(z, with_class, without, strict=True)):
            x_r = (u + guidance * (c - u)).clamp(-1, 1)  # exaggerate what the class adds
            (alpha_t, alpha_s), (sigma_t, sigma_s) = alpha_sigma(times[step : step + 2], level)
            noise_r = (z_r - alpha_t * x_r) / sigma_t  # Eq. 2 solved for the noise ...
            following.append(alpha_s * x_r + sigma_s * noise_r)  # ... and used again at s < t
        z = tuple(following)
    return z


# --- 5. A toy data set, a strip of images, and the run -----------------------------------------
def draw(labels: Tensor) -> Tensor:
    """Discs, squares and triangles in four colours, anywhere on white, in [-1, 1]."""
    side, b = NEST[-1].side, len(labels)
    axis = (2 * torch.arange(side) + 1) / side - 1
    place, size = torch.rand(2, b, 1, 1) - 0.5, 0.35 + 0.2 * torch.rand(b, 1, 1)
    x, y = axis[None, None, :] - place[0], axis[None, :, None] - place[1]
    disc = (x.square() + y.square()).sqrt() - size
    square = torch.maximum(x.abs(), y.abs()) - 0.85 * size
    triangle = torch.maximum(y, 0.866 * x.abs() - 0.5 * y) - 0.6 * size
    distance = torch.stack([disc, square, triangle])[labels % 3, torch.arange(b)]
    cover = (0.5 - distance * side / 2).clamp(0, 1)[:, None]  # smooth edges, one pixel wide
    return 1 - 2 * cover * (1 - COLOURS[labels // 3, :, None, None])


def write_ppm(path: Path, rows: Pyramid, zoom: int = 96) -> None:
    """Write rows of images of any resolution as one PPM, a format that needs no library."""
    wide = [torch.cat(list(F.interpolate(row, size=(zoom, zoom))), dim=2) for row in rows]
    pixels = ((torch.cat(wide, dim=1) + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0)
    path.write_bytes(b"P6 %d %d 255\n" % pixels.shape[1::-1] + bytes(pixels.flatten().tolist()))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Matryoshka diffusion on coloured shapes")
    parser.add_argument("--steps", type=int, default=400, help="training steps at each depth")
    parser.add_argument("--out", type=Path, default=Path("minimal_matryoshka.ppm"))
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    net, _ = train(options.steps)
    labels = torch.arange(CLASSES)
    noise = tuple(torch.randn(CLASSES, 3, doll.side, doll.side) for doll in NEST)
    write_ppm(options.out, (draw(labels), *sample(net, labels, noise, 25, 1.5)))
    print(f"{options.out}: an image of each class, then samples of it, from coarse to fine")


if __name__ == "__main__":
    main()
