"""CLIP: what CMMD and the CLIP score look through, from a folder that the user has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from torch import Tensor

from matryoshka_diffusion.files import require
from matryoshka_diffusion.metrics.checks import comparable, unit
from matryoshka_diffusion.metrics.networks.clip_preparation import OPENAI, read_normalisation
from matryoshka_diffusion.metrics.networks.features import weights_hash
from matryoshka_diffusion.metrics.networks.resize import as_rgb, pil_bicubic

_LETTERS = {768: "B", 1024: "L", 1280: "H", 1664: "bigG"}


class CLIP:
    """Pictures and captions -> embeddings in one space, before they are made of length 1.

    An `Extractor` of pictures. Attributes beyond the protocol's:

        variant: which CLIP it is, such as "ViT-L/14-336" (patches of 14 pixels, pictures of 336).
            Its shape says so, with the beginning of its weights' hash where its activation or its
            pictures' normalisation are not those of OpenAI.
    """

    name = "CLIP"

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        """Load a transformers folder: config.json, *.safetensors and the tokenizer's files.

        Only safetensors are read and no code of the folder is run.

        Raises:
            MissingExtra: transformers is not installed.
            FileNotFoundError: there is no such folder, or it has no safetensors.
            ValueError: it holds something else than a CLIP, or its pictures are resized in another
                way.
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
        vision = model.config.vision_config
        self._side: int = vision.image_size
        self.weights = weights_hash(*files)
        self.width: int = model.config.projection_dim
        self._normalisation = read_normalisation(folder, self._side)
        self.resize = f"Pillow's bicubic and the middle square, {self._side}x{self._side}"
        if self._normalisation != OPENAI:
            self.resize += ", mean {} and deviation {}".format(*self._normalisation)
        self.variant = self._variant(model.config)

    def _variant(self, config: Any) -> str:
        vision, acts = config.vision_config, (config.vision_config, config.text_config)
        letter = _LETTERS.get(vision.hidden_size, str(vision.hidden_size))
        shape = f"ViT-{letter}/{vision.patch_size}-{self._side}"
        like_openai = all(part.hidden_act == "quick_gelu" for part in acts)
        known = like_openai and self._normalisation == OPENAI
        return shape if known else f"{shape}-{self.weights[:8]}"

    @torch.inference_mode()
    def __call__(self, pictures: UInt8[np.ndarray, "b h w c"]) -> Float[np.ndarray, "b width"]:
        """Embeddings of one batch of pictures with one channel or three."""
        x = pil_bicubic(as_rgb(pictures, self.name, self._device), self._side) / 255.0
        mean, std = (x.new_tensor(values).view(3, 1, 1) for values in self._normalisation)
        pooled = self._model.vision_model(pixel_values=(x - mean) / std).pooler_output
        return self._model.visual_projection(pooled).cpu().numpy()

    @torch.inference_mode()
    def texts(self, captions: Sequence[str]) -> Float[np.ndarray, "b width"]:
        """Embeddings of captions; what goes beyond the model's 77 tokens is cut off."""
        longest = self._model.config.text_config.max_position_embeddings
        tokens: dict[str, Tensor] = self._tokenizer(
            list(captions),
            padding=True,
            truncation=True,
            max_length=longest,
            return_tensors="pt",
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


def clip_score(
    images: Float[np.ndarray, "n d"], texts: Float[np.ndarray, "m e"]
) -> Float[np.ndarray, " n"]:
    """100 max(cos, 0) of each picture and its caption; their mean is the CLIP score.

    Hessel et al. 2021 ("CLIPScore") scale by 2.5; text-to-image papers, torchmetrics and the paper
    of this project report 100. One number a picture, so means add up over batches.

    Raises:
        ValueError: not one caption a picture, different widths, or a row that is zero or not
            finite.
    """
    if len(images) != len(texts):
        raise ValueError(f"{len(images)} pictures cannot be scored by {len(texts)} captions")
    images, texts = comparable(images, texts, metric="the CLIP score", least=1)
    return 100.0 * (unit(images) * unit(texts)).sum(axis=1).clip(min=0.0)
