"""CLIP: the network of CMMD and the CLIP score, from a folder that the user has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError

from matryoshka_diffusion.files import digest, require
from matryoshka_diffusion.metrics.distances import comparable, unit
from matryoshka_diffusion.metrics.networks import as_rgb, reason_of, weights_hash

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
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True
            )
            model, loading = transformers.CLIPModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
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
        except (
            OSError,
            ValueError,
            TypeError,
            LookupError,
            RuntimeError,
            SafetensorError,
        ) as error:
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
