"""How pictures are prepared for a CLIP, as the preprocessor_config.json beside its weights says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

FILE = "preprocessor_config.json"
BICUBIC = 3
"""Pillow's number of it."""


class Normalisation(NamedTuple):
    """Mean and standard deviation, by colour, of pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


OPENAI = Normalisation(
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
"""Of the pixels that every CLIP of OpenAI was trained on."""


def read_normalisation(folder: Path, side: int) -> Normalisation:
    """What pictures are normalised by: OpenAI's numbers where the folder says nothing else.

    Raises:
        ValueError: the folder's file cannot be read, or asks for another resizing than the one
            that CLIP's pictures get here: bicubic to `side`, then the middle square.
    """
    path = folder / FILE
    if not path.is_file():
        return OPENAI
    try:
        said = dict(json.loads(path.read_text(encoding="utf-8")))
        mean, std = (
            tuple(float(one) for one in said.get(name, usual))
            for name, usual in (("image_mean", OPENAI.mean), ("image_std", OPENAI.std))
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: no settings of a CLIP's pictures ({error})") from error
    for name, (wanted, found) in _settings(said, side).items():
        if found != wanted:
            raise ValueError(
                f"{path}: {name} is {found}; a CLIP's pictures are resized here by Pillow's "
                f"bicubic and cut to the middle square of {side} pixels, which is {name} {wanted}"
            )
    whole = len(mean) == len(std) == 3 and all(map(math.isfinite, (*mean, *std)))
    if not whole or min(std) <= 0.0:
        raise ValueError(f"{path}: image_mean {mean} and image_std {std} are not of three colours")
    return Normalisation(mean, std)


def _settings(said: dict[str, Any], side: int) -> dict[str, tuple[Any, Any]]:
    """Each setting as it has to be and as it is; what is not said is as transformers has it."""
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    square = {"height": side, "width": side}
    crop = said.get("crop_size", side)
    size = said.get("size", side)
    return {
        **{name: (True, said.get(name, True)) for name in steps},
        "resample": (BICUBIC, said.get("resample", BICUBIC)),
        "rescale_factor": (1 / 255, said.get("rescale_factor", 1 / 255)),
        "size": ({"shortest_edge": side}, {"shortest_edge": size} if _number(size) else size),
        "crop_size": (square, {"height": crop, "width": crop} if _number(crop) else crop),
    }


def _number(value: Any) -> bool:
    """As older files have a side."""
    return isinstance(value, int)
