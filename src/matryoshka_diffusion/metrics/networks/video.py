"""The network of FVD, from a TorchScript file that the user has.

FVD (Unterthiner et al. 2018, "Towards accurate generative models of video") is the Fréchet distance
between clips on the features of an I3D that was trained on Kinetics-400. Its weights cannot be
shipped. The signature of a file says which of two kinds it is:

- `i3d_torchscript.pt`, which StyleGAN-V made of the published network and most papers use since. It
  scales and resizes inside, and returns the 400 numbers before the softmax.
- Any other network from clips (b, 3, f, 224, 224) in [-1, 1] to features (b, d). Frames are resized
  here, as the published code of FVD did it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from matryoshka_diffusion.metrics.networks import (
    as_rgb,
    is_torchscript,
    load_torchscript,
    tf1_bilinear,
    torchscript_reason,
    weights_hash,
)

SIDE = 224
FRAMES = 16
"""Frames of the clips behind most published numbers."""

_I3D_WIDTH = 400
_I3D_OPTIONS = {"rescale": True, "resize": True, "return_features": True}
_CLIPS = 4  # at a time: a clip of 16 x 224 x 224 is 10 MB, and I3D's activations ten times that
_EXPECTED = (
    "expected a TorchScript network of clips such as i3d_torchscript.pt, or one from "
    f"(b, 3, f, {SIDE}, {SIDE}) in [-1, 1] to features (b, d)"
)


class VideoNet:
    """Clips -> features: an `Extractor` of clips. A clip's features depend on that clip only.

    Its `name` is "I3D" if the file is one, else "Video". `frames` is the length of its clips.
    """

    def __init__(
        self, path: str | Path, frames: int = FRAMES, device: torch.device | str = "cpu"
    ) -> None:
        """Load a file and probe it with one black clip.

        Raises `FileNotFoundError`, or `ValueError` if it is no TorchScript or fails on the probe.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; {_EXPECTED}")
        if not is_torchscript(path):
            raise ValueError(f"{path} is no TorchScript file; {_EXPECTED}")
        self._path, self._device, self.frames = path, torch.device(device), frames
        try:
            self._net = load_torchscript(path, self._device)
        except RuntimeError as error:
            raise ValueError(f"cannot load {path}: {torchscript_reason(error)}") from error
        arguments = {argument.name for argument in self._net.forward.schema.arguments}
        self._options = _I3D_OPTIONS if set(_I3D_OPTIONS) <= arguments else {}
        inside = "inside the TorchScript file"
        self.resize = f"{inside if self._options else 'TensorFlow 1 bilinear'} to {SIDE}x{SIDE}"
        self.weights = weights_hash(path)
        self.width = self(np.zeros((1, frames, SIDE, SIDE, 3), np.uint8)).shape[1]
        self.name = "I3D" if self._options and self.width == _I3D_WIDTH else "Video"

    @torch.inference_mode()
    def __call__(self, clips: UInt8[np.ndarray, "b f h w c"]) -> Float[np.ndarray, "b width"]:
        """Features of one batch of clips with 1 or 3 channels.

        Raises `ValueError` for clips of another length, or if the answer is no row of finite
        features a clip.
        """
        if clips.shape[1] != self.frames:
            raise ValueError(
                f"{self._path} was opened for {self.frames} frames, not {clips.shape[1]}"
            )
        parts = [self._few(clips[at : at + _CLIPS]) for at in range(0, len(clips), _CLIPS)]
        features = np.concatenate(parts)
        if not np.isfinite(features).all():
            raise ValueError(f"{self._path}: the features of a clip are not finite")
        return features

    def _few(self, clips: UInt8[np.ndarray, "b f h w c"]) -> Float[np.ndarray, "b width"]:
        x = self._prepare(clips)
        try:
            features = self._net(x, **self._options)
        except RuntimeError as error:
            raise ValueError(
                f"{self._path} takes no clips of {tuple(x.shape[1:])} (channels, frames, height, "
                f"width): {torchscript_reason(error)}; {_EXPECTED}"
            ) from error
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(clips):
            raise ValueError(
                f"{self._path}: {len(clips)} clips of {self.frames} frames have features of shape "
                f"{shape}, not ({len(clips)}, d)"
            )
        return features.float().cpu().numpy()

    def _prepare(self, clips: UInt8[np.ndarray, "b f h w c"]) -> Float[Tensor, "b 3 f H W"]:
        """Bytes as numbers for a file that scales inside; else resized and scaled to [-1, 1]."""
        count, frames = clips.shape[:2]
        x = as_rgb(clips.reshape(-1, *clips.shape[2:]), "FVD", self._device).float()
        if not self._options:
            x = tf1_bilinear(x, SIDE) / 127.5 - 1.0
        return x.unflatten(0, (count, frames)).transpose(1, 2).contiguous()
