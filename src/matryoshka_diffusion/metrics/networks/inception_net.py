"""The Inception-v3 that FID is defined on (Szegedy et al. 2016, Figures 5 to 7).

It is the network of TensorFlow's `inception-2015-12-05` as its port to PyTorch
(`pt_inception-2015-12-05-6726825d.pth`) stores it, under torchvision's names for the layers. Three
things differ from torchvision's Inception-v3: averages over 3x3 pixels do not count the padding,
the last block takes a maximum where an average was meant, and there are 1,008 classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 2048
CLASSES = 1008
SIDE = 299

_EPSILON = 1e-3


@dataclass(frozen=True)
class Conv:
    """One convolution of a block.

    Attributes:
        padded: TensorFlow's "SAME" at stride 1; else its "VALID".
    """

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padded: bool = True


@dataclass(frozen=True)
class Branch:
    """One way through a block: a pooling, then convolutions.

    Attributes:
        steps: those of one step all see the step before, and their results are concatenated.
    """

    steps: tuple[tuple[Conv, ...], ...]
    pool: Callable[[Tensor], Tensor] | None = None


class ConvNorm(nn.Module):
    """Convolution, frozen batch normalisation, ReLU."""

    def __init__(self, channels: int, spec: Conv) -> None:
        super().__init__()
        height, width = spec.kernel
        padding = (height // 2, width // 2) if spec.padded else 0
        self.conv = nn.Conv2d(
            channels, spec.width, spec.kernel, spec.stride, padding=padding, bias=False
        )
        self.bn = Frozen(spec.width)

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b d h w"]:
        return F.relu(self.bn(self.conv(x)))


class Frozen(nn.Module):
    """Batch normalisation by stored moments."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=_EPSILON
        )


class Mixed(nn.Module):
    """Branches side by side, their results concatenated."""

    def __init__(self, channels: int, branches: tuple[Branch, ...]) -> None:
        super().__init__()
        self._branches = branches
        for branch in branches:
            width = channels
            for step in branch.steps:
                for spec in step:
                    self.add_module(spec.name, ConvNorm(width, spec))
                width = sum(spec.width for spec in step)

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b d h w"]:
        return torch.cat([self._walk(branch, x) for branch in self._branches], dim=1)

    def _walk(self, branch: Branch, x: Tensor) -> Tensor:
        if branch.pool is not None:
            x = branch.pool(x)
        for step in branch.steps:
            x = torch.cat([self.get_submodule(spec.name)(x) for spec in step], dim=1)
        return x


_average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_halve = partial(F.max_pool2d, kernel_size=3, stride=2)
_ROW, _COLUMN, _SQUARE = (1, 7), (7, 1), (3, 3)


def _chain(*convs: Conv, pool: Callable[[Tensor], Tensor] | None = None) -> Branch:
    return Branch(tuple((conv,) for conv in convs), pool)


def _a(pooled: int) -> tuple[Branch, ...]:
    """35x35 pixels: 3x3 convolutions for 5x5 (Figure 5)."""
    return (
        _chain(Conv("branch1x1", 64)),
        _chain(Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))),
        _chain(
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, _SQUARE),
            Conv("branch3x3dbl_3", 96, _SQUARE),
        ),
        _chain(Conv("branch_pool", pooled), pool=_average),
    )


def _b() -> tuple[Branch, ...]:
    """From 35x35 to 17x17 (Figure 10)."""
    return (
        _chain(Conv("branch3x3", 384, _SQUARE, stride=2, padded=False)),
        _chain(
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, _SQUARE),
            Conv("branch3x3dbl_3", 96, _SQUARE, stride=2, padded=False),
        ),
        _chain(pool=_halve),
    )


def _c(inner: int) -> tuple[Branch, ...]:
    """17x17 pixels: rows and columns of 7 for squares (Figure 6)."""
    return (
        _chain(Conv("branch1x1", 192)),
        _chain(
            Conv("branch7x7_1", inner),
            Conv("branch7x7_2", inner, _ROW),
            Conv("branch7x7_3", 192, _COLUMN),
        ),
        _chain(
            Conv("branch7x7dbl_1", inner),
            Conv("branch7x7dbl_2", inner, _COLUMN),
            Conv("branch7x7dbl_3", inner, _ROW),
            Conv("branch7x7dbl_4", inner, _COLUMN),
            Conv("branch7x7dbl_5", 192, _ROW),
        ),
        _chain(Conv("branch_pool", 192), pool=_average),
    )


def _d() -> tuple[Branch, ...]:
    """From 17x17 to 8x8."""
    return (
        _chain(Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, _SQUARE, stride=2, padded=False)),
        _chain(
            Conv("branch7x7x3_1", 192),
            Conv("branch7x7x3_2", 192, _ROW),
            Conv("branch7x7x3_3", 192, _COLUMN),
            Conv("branch7x7x3_4", 192, _SQUARE, stride=2, padded=False),
        ),
        _chain(pool=_halve),
    )


def _e(pool: Callable[[Tensor], Tensor]) -> tuple[Branch, ...]:
    """8x8 pixels: a row and a column of 3 side by side (Figure 7)."""

    def fork(name: str) -> tuple[Conv, Conv]:
        return Conv(f"{name}a", 384, (1, 3)), Conv(f"{name}b", 384, (3, 1))

    return (
        _chain(Conv("branch1x1", 320)),
        Branch(((Conv("branch3x3_1", 384),), fork("branch3x3_2"))),
        Branch(
            (
                (Conv("branch3x3dbl_1", 448),),
                (Conv("branch3x3dbl_2", 384, _SQUARE),),
                fork("branch3x3dbl_3"),
            )
        ),
        _chain(Conv("branch_pool", 192), pool=pool),
    )


_BLOCKS = {
    "Mixed_5b": (192, _a(32)),
    "Mixed_5c": (256, _a(64)),
    "Mixed_5d": (288, _a(64)),
    "Mixed_6a": (288, _b()),
    "Mixed_6b": (768, _c(128)),
    "Mixed_6c": (768, _c(160)),
    "Mixed_6d": (768, _c(160)),
    "Mixed_6e": (768, _c(192)),
    "Mixed_7a": (768, _d()),
    "Mixed_7b": (1280, _e(_average)),
    "Mixed_7c": (2048, _e(_maximum)),
}


class FIDInception(nn.Module):
    """Pictures of 299x299 pixels -> the 2,048 features before the classifier `fc`."""

    def __init__(self) -> None:
        super().__init__()
        for channels, spec in (
            (3, Conv("Conv2d_1a_3x3", 32, _SQUARE, stride=2, padded=False)),
            (32, Conv("Conv2d_2a_3x3", 32, _SQUARE, padded=False)),
            (32, Conv("Conv2d_2b_3x3", 64, _SQUARE)),
            (64, Conv("Conv2d_3b_1x1", 80)),
            (80, Conv("Conv2d_4a_3x3", 192, _SQUARE, padded=False)),
        ):
            self.add_module(spec.name, ConvNorm(channels, spec))
        for name, (channels, branches) in _BLOCKS.items():
            self.add_module(name, Mixed(channels, branches))
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Float[Tensor, "b 3 299 299"]) -> Float[Tensor, "b 2048"]:
        """Features averaged over the last 8x8 pixels. Scaled pixels come in."""
        x = _halve(self._through(x, "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"))
        x = _halve(self._through(x, "Conv2d_3b_1x1", "Conv2d_4a_3x3"))
        return self._through(x, *_BLOCKS).mean(dim=(2, 3))

    def _through(self, x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = self.get_submodule(name)(x)
        return x
