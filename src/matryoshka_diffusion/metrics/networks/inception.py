"""The Inception of FID, KID and IS, from a weights file that the user has.

The weights cannot be shipped. Two files of them are in use, both made from TensorFlow's
`inception-2015-12-05`, and a number says which it was computed with (`Inception.weights`):

- `pt_inception-2015-12-05-6726825d.pth`, the state dict of the port that pytorch-fid uses (or the
  same keys as safetensors). It is read as data: nothing in it is run. Resizing and scaling are ours
  and those of the TensorFlow graph, by which ADM's references were made.
- `inception-2015-12-05.pt`, the TorchScript archive of StyleGAN and EDM, which resizes and scales
  inside. TorchScript is a program: loading it runs what it says. Load one only from where you
  trust.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from matryoshka_diffusion.metrics.naming import INCEPTION
from matryoshka_diffusion.metrics.networks.features import weights_hash
from matryoshka_diffusion.metrics.networks.inception_net import CLASSES, SIDE, WIDTH, FIDInception
from matryoshka_diffusion.metrics.networks.resize import as_rgb, tf1_bilinear
from matryoshka_diffusion.metrics.networks.torchscript import (
    is_torchscript,
    load_torchscript,
    reason,
)

_EXPECTED = (
    "expected the TorchScript file inception-2015-12-05.pt or the state dict "
    "pt_inception-2015-12-05-6726825d.pth"
)
_SHOWN = 3


class _Network(NamedTuple):
    """What a weights file holds, on its device."""

    features: Callable[[UInt8[Tensor, "b 3 h w"]], Float[Tensor, "b 2048"]]
    classifier: Float[np.ndarray, "classes 2048"] | None
    resize: str


class Inception:
    """Pictures -> the 2,048 features that FID, KID and IS are defined on: an `Extractor`.

    Each picture's features depend on that picture only.
    """

    name = INCEPTION
    width = WIDTH

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        """Load a weights file; which of the two it is, is seen from what is in it.

        Raises:
            FileNotFoundError: there is no file.
            ValueError: it is something else; the message says what is missing or unexpected.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; {_EXPECTED}")
        self.weights = weights_hash(path)
        load = _scripted if is_torchscript(path) else _ported
        self._path, self._device = path, torch.device(device)
        self._network = load(path, self._device)
        self.resize = self._network.resize

    @torch.inference_mode()
    def __call__(self, pictures: UInt8[np.ndarray, "b h w c"]) -> Float[np.ndarray, "b 2048"]:
        """Features of one batch of pictures with one channel or three, of any side."""
        x = as_rgb(pictures, self.name, self._device)
        return self._network.features(x).float().cpu().numpy()

    def probabilities(
        self, features: Float[np.ndarray, "n 2048"]
    ) -> Float[np.ndarray, "n classes"]:
        """The distribution over the 1,008 classes that the Inception score takes.

        The classifier's bias is left out: the published scores were computed so.

        Raises:
            ValueError: the file holds no classifier.
        """
        if self._network.classifier is None:
            raise ValueError(
                f"{self._path} has no weight of {CLASSES}x{WIDTH}: there is no Inception score "
                "without the classifier"
            )
        logits = features.astype(np.float64) @ self._network.classifier.T
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return odds / odds.sum(axis=1, keepdims=True)


def _scripted(path: Path, device: torch.device) -> _Network:
    probe = torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8, device=device)
    try:
        with torch.inference_mode():
            net = load_torchscript(path, device)
            shape = tuple(net(probe, return_features=True).shape)
    except RuntimeError as error:
        raise ValueError(
            f"{path} is a TorchScript file, but no Inception: {reason(error)}"
        ) from error
    if shape != (1, WIDTH):
        raise ValueError(f"{path}: a picture has features of shape {shape}, not (1, {WIDTH})")
    classifiers = [
        weight for weight in net.state_dict().values() if weight.shape == (CLASSES, WIDTH)
    ]
    return _Network(
        features=lambda x: net(x, return_features=True),
        classifier=_classifier(classifiers[0]) if classifiers else None,
        resize=f"inside the TorchScript file to {SIDE}x{SIDE}",
    )


def _ported(path: Path, device: torch.device) -> _Network:
    state = _state_dict(path, device)
    # Built on `meta`: its usual initialisation would draw from torch's global generator.
    with torch.device("meta"):
        net = FIDInception()
    _check_keys(path, state, net.state_dict())
    net.load_state_dict(state, assign=True)
    net.eval().requires_grad_(False)
    return _Network(
        features=lambda x: net(_scaled(tf1_bilinear(x.float(), SIDE))),
        classifier=_classifier(net.fc.weight),
        resize=f"TensorFlow 1 bilinear without antialiasing to {SIDE}x{SIDE}",
    )


def _scaled(x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Bytes as the TensorFlow graph scales them. pytorch-fid has 2x / 255 - 1, half a byte off."""
    return (x - 128.0) / 128.0


def _classifier(weight: Tensor) -> Float[np.ndarray, "classes 2048"]:
    return weight.detach().cpu().double().numpy()


def _state_dict(path: Path, device: torch.device) -> dict[str, Tensor]:
    """The tensors of a file by name, without the counters that training leaves.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(path, device=str(device))
        else:
            state = torch.load(path, map_location=device, weights_only=True)
    except (
        safetensors.SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
    ) as error:
        reason = str(error).strip().splitlines()[:1]
        raise ValueError(f"cannot read {path}: {''.join(reason)}; {_EXPECTED}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no state dict (tensors by name); {_EXPECTED}")
    return {k: v for k, v in state.items() if not str(k).endswith("num_batches_tracked")}


def _check_keys(path: Path, state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    problems = {
        "missing": [key for key in wanted if key not in state],
        "unexpected": [key for key in state if key not in wanted],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(weight.shape)}"
            for key, weight in wanted.items()
            if key in state and state[key].shape != weight.shape
        ],
    }
    found = [f"{len(keys)} keys {kind} ({_some(keys)})" for kind, keys in problems.items() if keys]
    if found:
        raise ValueError(f"{path} is no FID Inception: {'; '.join(found)}; {_EXPECTED}")


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")
