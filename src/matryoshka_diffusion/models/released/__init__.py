"""The paper's released checkpoints: read safely, mapped key by key, with the same numbers."""

from __future__ import annotations

from matryoshka_diffusion.models.released.convert import convert, converted
from matryoshka_diffusion.models.released.keys import convert_state_dict
from matryoshka_diffusion.models.released.load import load_released, read_released
from matryoshka_diffusion.models.released.settings import model_config

__all__ = [
    "convert",
    "convert_state_dict",
    "converted",
    "load_released",
    "model_config",
    "read_released",
]
