"""A small classifier that is trained on a data set's own images, as a network of metrics.

The networks of FD and FID know photographs, and of small grey images they see the texture. This one
knows the classes of the set, so samples are judged by their shape.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from matryoshka_diffusion.files import BrokenFile, write_atomically
from matryoshka_diffusion.metrics.networks import as_rgb
from matryoshka_diffusion.rng import stream
from matryoshka_diffusion.tensorfile import read_weights

RECIPE = 1
"""Version of the training: raise it when the same images give another classifier."""

SIDE = 32
_WIDTHS = (32, 64, 64, 128)
_STRIDES = (2, 2, 1, 2)
_IMAGES, _PASSES = 200_000, 40
"""Images in all, and passes over a small set: 75 s of one core for Fashion-MNIST."""
_BATCH, _RATE, _WARM = 128, 6e-3, 0.2


def prepare(pictures: UInt8[np.ndarray, "b h w c"]) -> UInt8[Tensor, "b 3 32 32"]:
    """Bring images to 32 pixels a side (bilinear, antialiased) and three channels."""
    x = as_rgb(pictures, Classifier.name)
    if x.shape[-1] != SIDE:
        size = (SIDE, SIDE)
        x = F.interpolate(x.float(), size, mode="bilinear", antialias=True).round().byte()
    return x


class Classifier:
    """Images -> the 128 features before the classes, which `classes` finds from them.

    It is an `Extractor`. `accuracy` is the share of `tested` images, which it was not trained on,
    that it puts into their class: the most that samples can be expected to reach.
    """

    name = "Classifier"
    resize = f"bilinear with antialiasing to {SIDE}x{SIDE}"
    width = _WIDTHS[-1]

    def __init__(self, path: Path) -> None:
        """Load the file of `train`. Raises `BrokenFile` if it is damaged, `OSError` without it."""
        state, about = read_weights(path)
        try:
            self.accuracy, self.tested = float(about["accuracy"]), int(about["tested"])
            checksum = _checksum(state, self.accuracy, self.tested)
            if about["checksum"] != checksum:
                raise ValueError("its checksum is another one")
            self._net = _network(len(state["2.bias"]))
            self._net.load_state_dict(state)
        except (LookupError, ValueError, RuntimeError) as error:
            raise BrokenFile(f"{path}: no classifier, or damaged ({error})") from error
        self._net.eval().requires_grad_(False)
        self.weights = checksum[:16]

    @torch.inference_mode()
    def __call__(self, pictures: UInt8[np.ndarray, "b h w c"]) -> Float[np.ndarray, "b 128"]:
        """Features of one batch. Raises `ValueError` unless it has 1 or 3 channels."""
        return self._net[:2](_scaled(prepare(pictures))).numpy()

    @torch.inference_mode()
    def classes(self, features: Float[np.ndarray, "n 128"]) -> Int[np.ndarray, " n"]:
        """The class of each image by its features."""
        return self._net[2](torch.from_numpy(features)).argmax(dim=1).numpy()


def train(
    path: Path,
    x: UInt8[Tensor, "n 3 32 32"],
    labels: Int[np.ndarray, " n"],
    classes: int,
    tested: Int[np.ndarray, " m"],
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Train a classifier on all images but those at `tested`, and write its file.

    The initial weights and the order of the images are the same in every run. `progress` is called
    with (images done, images in all).
    """
    y = torch.from_numpy(labels).long()
    rows = np.setdiff1d(np.arange(len(x)), tested)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(stream(0, "classifier weights").integers(2**31)))
        net = _network(classes)
    steps = math.ceil(min(_IMAGES, _PASSES * len(rows)) / _BATCH)
    optimizer = torch.optim.AdamW(net.parameters())
    warm = _WARM * steps
    for step, batch in zip(range(steps), _batches(rows), strict=False):
        share = min((step + 1) / warm, (steps - step) / (steps - warm))
        optimizer.param_groups[0]["lr"] = _RATE * share
        loss = F.cross_entropy(net(_scaled(x[batch])), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if progress is not None:
            progress((step + 1) * _BATCH, steps * _BATCH)
    net.eval()
    with torch.inference_mode():
        parts = np.array_split(tested, math.ceil(len(tested) / _BATCH))
        right = sum(int((net(_scaled(x[part])).argmax(1) == y[part]).sum()) for part in parts)
    # Without the counts of BatchNorm, which are no weights and decide nothing.
    state = {name: x.contiguous() for name, x in net.state_dict().items() if x.is_floating_point()}
    about: dict[str, Any] = {"accuracy": right / len(tested), "tested": len(tested)}
    about["checksum"] = _checksum(state, **about)
    data = save(state, {name: str(value) for name, value in about.items()})
    write_atomically(path, lambda file: file.write(data), needed=len(data))


def _network(classes: int) -> Any:
    """Four convolutions, the average over their image, and the classes."""
    layers, width = [], 3
    for wide, stride in zip(_WIDTHS, _STRIDES, strict=True):
        convolution = nn.Conv2d(width, wide, 3, stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(wide), nn.ReLU()]
        width = wide
    average = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = nn.Sequential(nn.Sequential(*layers), average, nn.Linear(width, classes))
    return net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _scaled(x: UInt8[Tensor, "b 3 32 32"]) -> Float[Tensor, "b 3 32 32"]:
    return x.to(torch.float32, memory_format=torch.channels_last) / 127.5 - 1.0


def _batches(rows: Int[np.ndarray, " n"]) -> Iterator[Int[np.ndarray, " b"]]:
    """Batches without end; each pass over the rows is shuffled."""
    waiting, passes = rows[:0], 0
    while True:
        while len(waiting) < _BATCH:
            order = stream(0, "classifier order", passes).permutation(len(rows))
            waiting, passes = np.concatenate([waiting, rows[order]]), passes + 1
        yield waiting[:_BATCH]
        waiting = waiting[_BATCH:]


def _checksum(state: dict[str, Tensor], accuracy: float, tested: int) -> str:
    values = (state[name].numpy().tobytes() for name in sorted(state))
    return hashlib.sha256(b"".join([f"{accuracy} {tested}".encode(), *values])).hexdigest()
