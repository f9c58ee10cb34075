"""The Inception of FID, KID and IS, from a weights file that the user has.

The weights cannot be shipped. Two files of them are in use, both made from TensorFlow's
`inception-2015-12-05`, and a result says which one it was computed with (`Inception.weights`):

- `pt_inception-2015-12-05-6726825d.pth`, the state dict of the port that pytorch-fid uses (or the
  same keys as safetensors). It is read as data: nothing in it is run. Resizing and scaling are
  those of the TensorFlow graph, by which ADM's references were made.
- `inception-2015-12-05.pt`, the TorchScript archive of StyleGAN and EDM, which resizes and scales
  inside. Loading it runs the program in it, which takes your consent.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from matryoshka_diffusion.metrics.formulas import Estimate, finite
from matryoshka_diffusion.metrics.networks import (
    as_rgb,
    is_torchscript,
    load_torchscript,
    reason_of,
    refuse_untrusted,
    tf1_bilinear,
    weights_hash,
)
from matryoshka_diffusion.tensorfile import FLOATS, not_floats, open_tensors

WIDTH = 2048
CLASSES = 1008
SIDE = 299
SPLITS = 10

_UNREADABLE = (SafetensorError, UnpicklingError, RuntimeError, EOFError, ValueError, LookupError)
_EXPECTED = (
    "expected the TorchScript file inception-2015-12-05.pt or the state dict "
    "pt_inception-2015-12-05-6726825d.pth"
)


def inception_score(
    probabilities: Float[np.ndarray, "n classes"], *, splits: int = SPLITS
) -> Estimate:
    """IS (Salimans et al. 2016, Section 4): exp E KL(p(y | x) || p(y)), p(y) the mean in a split.

    The samples are cut into `splits` parts in their order, as in the published code, so they must
    not be sorted by class. Parts with fewer samples than classes bias the score. The score is
    between 1 and the number of classes. Raises `ValueError` for fewer samples than splits.
    """
    rows, scores = finite(probabilities), []
    if len(rows) < splits:
        raise ValueError(f"the Inception score takes at least {splits} samples, not {len(rows)}")
    bounds = [len(rows) * index // splits for index in range(splits + 1)]
    for first, last in itertools.pairwise(bounds):
        part = rows[first:last]
        marginal = np.broadcast_to(part.mean(axis=0), part.shape)
        present = part > 0.0  # p log p is 0 where p is 0
        gains = part[present] * np.log(part[present] / marginal[present])
        scores.append(float(np.exp(gains.sum() / len(part))))
    return Estimate(float(np.mean(scores)), float(np.std(scores)))


_POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "average": partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False),
    "maximum": partial(F.max_pool2d, kernel_size=3, stride=1, padding=1),
    "halve": partial(F.max_pool2d, kernel_size=3, stride=2),
}

# One line a branch: poolings and convolutions from left to right, "NAME WIDTH [KERNEL[/STRIDE]]".
# A kernel with a stride is TensorFlow's "VALID", one without is "SAME". "+" puts two side by side.
_A = """branch1x1 64
branch5x5_1 48 > branch5x5_2 64 5x5
branch3x3dbl_1 64 > branch3x3dbl_2 96 3x3 > branch3x3dbl_3 96 3x3
average > branch_pool {}"""
_B = """branch3x3 384 3x3/2
branch3x3dbl_1 64 > branch3x3dbl_2 96 3x3 > branch3x3dbl_3 96 3x3/2
halve"""
_C = """branch1x1 192
branch7x7_1 {0} > branch7x7_2 {0} 1x7 > branch7x7_3 192 7x1
branch7x7dbl_1 {0} > branch7x7dbl_2 {0} 7x1 > branch7x7dbl_3 {0} 1x7 \
> branch7x7dbl_4 {0} 7x1 > branch7x7dbl_5 192 1x7
average > branch_pool 192"""
_D = """branch3x3_1 192 > branch3x3_2 320 3x3/2
branch7x7x3_1 192 > branch7x7x3_2 192 1x7 > branch7x7x3_3 192 7x1 > branch7x7x3_4 192 3x3/2
halve"""
_E = """branch1x1 320
branch3x3_1 384 > branch3x3_2a 384 1x3 + branch3x3_2b 384 3x1
branch3x3dbl_1 448 > branch3x3dbl_2 384 3x3 > branch3x3dbl_3a 384 1x3 + branch3x3dbl_3b 384 3x1
{} > branch_pool 192"""
_STEM = """Conv2d_1a_3x3 32 3x3/2 > Conv2d_2a_3x3 32 3x3/1 > Conv2d_2b_3x3 64 3x3 > halve \
> Conv2d_3b_1x1 80 > Conv2d_4a_3x3 192 3x3/1 > halve"""
_BLOCKS = {  # input channels and branches
    "Mixed_5b": (192, _A.format(32)),
    "Mixed_5c": (256, _A.format(64)),
    "Mixed_5d": (288, _A.format(64)),
    "Mixed_6a": (288, _B),
    "Mixed_6b": (768, _C.format(128)),
    "Mixed_6c": (768, _C.format(160)),
    "Mixed_6d": (768, _C.format(160)),
    "Mixed_6e": (768, _C.format(192)),
    "Mixed_7a": (768, _D),
    "Mixed_7b": (1280, _E.format("average")),
    "Mixed_7c": (2048, _E.format("maximum")),
}


class Branches(nn.Module):
    """Branches side by side, their results concatenated."""

    def __init__(self, channels: int, branches: str) -> None:
        super().__init__()
        self._branches = [
            [[conv.split() for conv in step.split(" + ")] for step in line.split(" > ")]
            for line in branches.splitlines()
        ]
        for branch in self._branches:
            width = channels
            for step in branch:
                if step[0][0] in _POOLS:
                    continue
                for name, outputs, *kernel in step:
                    self.add_module(name, ConvNorm(width, int(outputs), *kernel))
                width = sum(int(outputs) for _, outputs, *_ in step)

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b d h w"]:
        return torch.cat([self._walk(branch, x) for branch in self._branches], dim=1)

    def _walk(self, branch: list[list[list[str]]], x: Tensor) -> Tensor:
        for step in branch:
            parts = [_POOLS.get(name) or self.get_submodule(name) for name, *_ in step]
            x = torch.cat([part(x) for part in parts], dim=1)
        return x


class ConvNorm(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, channels: int, outputs: int, kernel: str = "1x1") -> None:
        super().__init__()
        size, _, stride = kernel.partition("/")
        height, width = map(int, size.split("x"))
        padding = 0 if stride else (height // 2, width // 2)
        self.conv = nn.Conv2d(
            channels, outputs, (height, width), int(stride or 1), padding=padding, bias=False
        )
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b d h w"]:
        return F.relu(self.bn(self.conv(x)))


class FIDInception(Branches):
    """Inception-v3 (Szegedy et al. 2016), as in TensorFlow's `inception-2015-12-05`.

    The names of layers are torchvision's. Three things differ from torchvision's network: averages
    over 3x3 pixels do not count the padding, the last block takes a maximum for an average, and
    there are 1,008 classes.
    """

    def __init__(self) -> None:
        super().__init__(3, _STEM)
        for name, (channels, branches) in _BLOCKS.items():
            self.add_module(name, Branches(channels, branches))
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Float[Tensor, "b 3 299 299"]) -> Float[Tensor, "b 2048"]:
        """Features averaged over the last 8x8 pixels, of scaled pixels."""
        x = super().forward(x)
        for name in _BLOCKS:
            x = self.get_submodule(name)(x)
        return x.mean(dim=(2, 3))


class Inception:
    """Images -> the 2,048 features that FID, KID and IS are defined on: an `Extractor`."""

    name = "Inception"
    width = WIDTH

    def __init__(
        self,
        path: str | Path,
        device: torch.device | str = "cpu",
        *,
        trust_torchscript: bool = False,
    ) -> None:
        """Load a weights file of either kind.

        Raises:
            FileNotFoundError, ValueError: there is no such file, or it holds something else.
            UsageError: it is a program, and `trust_torchscript` does not let it run.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; {_EXPECTED}")
        if is_program := is_torchscript(path):
            refuse_untrusted(path, trust_torchscript)
        self.weights = weights_hash(path)
        self._path, self._device = path, torch.device(device)
        self._features: Callable[[Tensor], Tensor]
        try:
            if is_program:
                net = load_torchscript(path, self._device)
                self._features = partial(net, return_features=True)
                self.resize = f"inside the TorchScript file to {SIDE}x{SIDE}"
                probe = torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8, device=self._device)
                with torch.inference_mode():
                    shape = tuple(self._features(probe).shape)
                if shape != (1, WIDTH):
                    raise ValueError(f"an image has features of shape {shape}, not (1, {WIDTH})")
            else:
                net = _ported(path, self._device)
                # As the TensorFlow graph scales. pytorch-fid has 2x / 255 - 1, half a byte off.
                self._features = lambda x: net((tf1_bilinear(x.float(), SIDE) - 128.0) / 128.0)
                self.resize = f"TensorFlow 1 bilinear without antialiasing to {SIDE}x{SIDE}"
        except _UNREADABLE as error:
            raise ValueError(
                f"{path} is no FID Inception: {reason_of(error)}; {_EXPECTED}"
            ) from error
        shape = (CLASSES, WIDTH)
        weight = next((w for w in net.state_dict().values() if w.shape == shape), None)
        self._classifier = None if weight is None else weight.detach().cpu().double().numpy()

    @torch.inference_mode()
    def __call__(self, pictures: UInt8[np.ndarray, "b h w c"]) -> Float[np.ndarray, "b 2048"]:
        """Features of one batch of images with 1 or 3 channels, of any side."""
        x = as_rgb(pictures, self.name, self._device)
        return self._features(x).float().cpu().numpy()

    def probabilities(
        self, features: Float[np.ndarray, "n 2048"]
    ) -> Float[np.ndarray, "n classes"]:
        """The distribution over the 1,008 classes that the Inception score takes.

        The classifier's bias is left out: the published scores were computed without it.
        Raises `ValueError` if the file holds no classifier.
        """
        if self._classifier is None:
            raise ValueError(
                f"{self._path} has no weight of {CLASSES}x{WIDTH}: omit the Inception score, or "
                "give a file with the classifier"
            )
        logits = features.astype(np.float64) @ self._classifier.T
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return odds / odds.sum(axis=1, keepdims=True)


def _ported(path: Path, device: torch.device) -> FIDInception:
    if path.suffix == ".safetensors":
        with open_tensors(path) as file:
            state: Any = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    else:
        state = torch.load(path, map_location=device, weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError("it holds no state dict (tensors by name)")
    for name, value in state.items():
        if value.dtype not in FLOATS.values() and not name.endswith("num_batches_tracked"):
            raise ValueError(f"{name} is {not_floats(value.dtype)}")
    # Built on `meta`: its usual initialisation would draw from torch's global generator.
    with torch.device("meta"):
        net = FIDInception()
    # A plain dict has no version, so the counters that training leaves may be there or not.
    net.load_state_dict(dict(state), assign=True)
    return net.eval().requires_grad_(False).float().to(device)
