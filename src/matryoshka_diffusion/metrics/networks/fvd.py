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
        self._device, self.frames, self.weights = torch.device(device), frames, weights_hash(path)
        try:
            self._net = load_torchscript(path, self._device)
            arguments = {argument.name for argument in self._net.forward.schema.arguments}
            self._options = _I3D_OPTIONS if set(_I3D_OPTIONS) <= arguments else {}
            self.width = self(np.zeros((1, frames, SIDE, SIDE, 3), np.uint8)).shape[1]
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path}: {reason_of(error)}; {_EXPECTED}") from error
        how = "inside the TorchScript file" if self._options else "TensorFlow 1 bilinear"
        self.resize = f"{how} to {SIDE}x{SIDE}"
        self.name = "I3D" if self._options and self.width == _I3D_WIDTH else "Video"

    @torch.inference_mode()
    def __call__(self, clips: UInt8[np.ndarray, "b f h w c"]) -> Float[np.ndarray, "b width"]:
        """Features of one batch of clips with 1 or 3 channels.

        Raises `ValueError` if the answer is no row of finite features a clip.
        """
        rows = []
        for few in np.split(clips, range(_CLIPS, len(clips), _CLIPS)):
            x = as_rgb(few.reshape(-1, *few.shape[2:]), "FVD", self._device).float()
            if not self._options:
                x = tf1_bilinear(x, SIDE) / 127.5 - 1.0
            x = x.unflatten(0, few.shape[:2]).transpose(1, 2).contiguous()
            y = self._net(x, **self._options)
            shape = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            if len(shape) != 2 or shape[0] != len(few) or not y.isfinite().all():
                raise ValueError(
                    f"a network of clips has features of shape {shape}, not ({len(few)}, d), or "
                    "they are not finite"
                )
            rows.append(y.float().cpu().numpy())
        return np.concatenate(rows)
