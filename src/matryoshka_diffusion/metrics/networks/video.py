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
    reason_of,
    tf1_bilinear,
    weights_hash,
)

SIDE = 224
FRAMES = 16  # of the clips behind most published numbers

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
            raise ValueError(f"cannot load {path}: {reason_of(error)}") from error
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

        Raises `ValueError` if the answer is no row of finite features a clip.
        """
        return np.concatenate(
            [self._few(clips[at : at + _CLIPS]) for at in range(0, len(clips), _CLIPS)]
        )

    def _few(self, clips: UInt8[np.ndarray, "b f h w c"]) -> Float[np.ndarray, "b width"]:
        x = as_rgb(clips.reshape(-1, *clips.shape[2:]), "FVD", self._device).float()
        if not self._options:
            x = tf1_bilinear(x, SIDE) / 127.5 - 1.0
        x = x.unflatten(0, clips.shape[:2]).transpose(1, 2).contiguous()
        try:
            features = self._net(x, **self._options)
        except RuntimeError as error:
            raise ValueError(
                f"{self._path} takes no clips of {tuple(x.shape[1:])} (channels, frames, height, "
                f"width): {reason_of(error)}; {_EXPECTED}"
            ) from error
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        if len(shape) != 2 or shape[0] != len(clips) or not features.isfinite().all():
            raise ValueError(
                f"{self._path}: clips have features of shape {shape} or not finite ones; the shape "
                f"of {len(clips)} clips is ({len(clips)}, d)"
            )
        return features.float().cpu().numpy()
