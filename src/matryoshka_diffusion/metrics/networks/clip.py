"""CLIP: the network of CMMD and the CLIP score, from a folder that the user has."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from matryoshka_diffusion.files import require
from matryoshka_diffusion.metrics.networks import as_rgb, weights_hash
from matryoshka_diffusion.metrics.rows import comparable, unit

_LETTERS = {768: "B", 1024: "L", 1280: "H", 1664: "bigG"}
_PREPARATION = "preprocessor_config.json"


def clip_score(
    images: Float[np.ndarray, "n d"], texts: Float[np.ndarray, "m e"]
) -> Float[np.ndarray, " n"]:
    """100 max(cos, 0) of each image and its caption; their mean is the CLIP score.

    Hessel et al. 2021 ("CLIPScore") scale by 2.5; text-to-image papers, torchmetrics and the paper
    of this project report 100. Raises `ValueError` as `rows.comparable` and `rows.unit` do.
    """
    if len(images) != len(texts):
        raise ValueError(f"{len(images)} pictures cannot be scored by {len(texts)} captions")
    images, texts = comparable(images, texts, metric="the CLIP score", least=1)
    return 100.0 * (unit(images) * unit(texts)).sum(axis=1).clip(min=0.0)


class CLIP:
    """Images and captions -> embeddings in one space, before normalisation to length 1.

    It is an `Extractor`. `variant` says which CLIP it is, such as "ViT-L/14-336" (patches of 14
    pixels, images of 336), with the first digits of its weights' hash unless activation and
    normalisation are those of OpenAI.
    """

    name = "CLIP"

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        """Load a transformers folder: config.json, *.safetensors and the tokenizer's files.

        Only safetensors are read and no code of the folder is run. Raises `MissingExtra`,
        `FileNotFoundError` without safetensors, or `ValueError` if it is another network, or
        resizes images in another way.
        """
        transformers = require("transformers", "eval", "CLIP")
        folder = Path(path).expanduser()
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(
                f"{folder}: no *.safetensors; expected a folder with a CLIP as transformers saves "
                "it: config.json, model.safetensors and the tokenizer's files"
            )
        model, self._tokenizer = _load(transformers, folder)
        self._model = model.eval().requires_grad_(False).float().to(device)
        self._device = torch.device(device)
        vision, text = model.config.vision_config, model.config.text_config
        self._side: int = vision.image_size
        self.weights = weights_hash(*files)
        self.width: int = model.config.projection_dim
        self._mean, self._std, usual = _normalisation(transformers, folder, self._side)
        self.resize = f"Pillow's bicubic and the middle square, {self._side}x{self._side}"
        if not usual:
            self.resize += f", mean {self._mean} and deviation {self._std}"
        letter = _LETTERS.get(vision.hidden_size, str(vision.hidden_size))
        self.variant = f"ViT-{letter}/{vision.patch_size}-{self._side}"
        if not (usual and vision.hidden_act == text.hidden_act == "quick_gelu"):
            self.variant += f"-{self.weights[:8]}"

    @torch.inference_mode()
    def __call__(self, pictures: UInt8[np.ndarray, "b h w c"]) -> Float[np.ndarray, "b width"]:
        """Embeddings of one batch of images with 1 or 3 channels."""
        x = pil_bicubic(as_rgb(pictures, self.name, self._device), self._side) / 255.0
        mean, std = (x.new_tensor(values).view(3, 1, 1) for values in (self._mean, self._std))
        pooled = self._model.vision_model(pixel_values=(x - mean) / std).pooler_output
        return self._model.visual_projection(pooled).cpu().numpy()

    @torch.inference_mode()
    def texts(self, captions: Sequence[str]) -> Float[np.ndarray, "b width"]:
        """Embeddings of captions, which are cut off after the model's 77 tokens."""
        longest = self._model.config.text_config.max_position_embeddings
        tokens: dict[str, Tensor] = self._tokenizer(
            list(captions), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        pooled = self._model.text_model(
            input_ids=tokens["input_ids"].to(self._device),
            attention_mask=tokens["attention_mask"].to(self._device),
        ).pooler_output
        return self._model.text_projection(pooled).cpu().numpy()


def _load(transformers: Any, folder: Path) -> tuple[Any, Any]:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, loading = transformers.CLIPModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, LookupError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"cannot load CLIP from {folder}: {' '.join(str(error).split())}"
        ) from error
    # transformers would go on with random weights
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"{folder} is no CLIP: {len(missing)} weights are missing, first {missing[0]}"
        )
    return model, tokenizer


def _normalisation(
    transformers: Any, folder: Path, side: int
) -> tuple[tuple[float, ...], tuple[float, ...], bool]:
    """Mean and deviation by colour of pixels in [0, 1], and whether they are those of OpenAI."""
    path = folder / _PREPARATION
    square = {"size": side, "crop_size": side}
    usual = transformers.CLIPImageProcessorPil(**square).to_dict()
    try:
        written = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        settings = transformers.CLIPImageProcessorPil(**{**square, **written}).to_dict()
        mean, std = (tuple(map(float, settings[name])) for name in ("image_mean", "image_std"))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: these are no settings of a CLIP's images ({error})") from error
    for name in usual.keys() - {"image_mean", "image_std", "image_processor_type"}:
        if settings[name] != usual[name]:
            raise ValueError(
                f"{path}: {name} is {settings[name]}; images are resized here by Pillow's bicubic "
                f"and cut to the middle square of {side} pixels, which needs {usual[name]}"
            )
    whole = len(mean) == len(std) == 3 and all(map(math.isfinite, (*mean, *std)))
    if not whole or min(std) <= 0.0:
        raise ValueError(f"{path}: image_mean {mean} and image_std {std} are not of three colours")
    return mean, std, (mean, std) == (tuple(usual["image_mean"]), tuple(usual["image_std"]))


def pil_bicubic(x: UInt8[Tensor, "b c H W"], side: int) -> Float[Tensor, "b c side side"]:
    """Whole numbers in [0, 255]: bicubic with antialiasing as in Pillow; then the middle square.

    The shorter side becomes `side` pixels. Like Pillow, it goes along the rows first and rounds to
    bytes before it goes along the columns: where bicubic weights overshoot, that cuts off values
    that would come back. Pillow's weights are whole numbers, so here and there a byte differs by
    one. (Of images higher than wide, recent versions of Pillow do the columns first; CLIP's did
    not.)
    """
    height, width = x.shape[-2:]
    tall, wide = (max(side, int(side * edge / min(height, width))) for edge in (height, width))
    y = _bicubic_bytes(_bicubic_bytes(x.float(), height, wide), tall, wide)
    top, left = (tall - side) // 2, (wide - side) // 2
    return y[:, :, top : top + side, left : left + side]


def _bicubic_bytes(x: Tensor, height: int, width: int) -> Tensor:
    resized = F.interpolate(x, size=(height, width), mode="bicubic", antialias=True)
    return resized.round().clamp(0.0, 255.0)
