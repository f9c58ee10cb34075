"""Text encoders of a pipeline's folder that are whole, where the libraries would only warn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from matryoshka_diffusion.tensorfile import open_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
else:
    PreTrainedModel = PreTrainedTokenizerBase = Any


def check_encoder(text_encoder: PreTrainedModel) -> None:
    """Raise `ValueError` unless the folder holds all weights: transformers fills gaps at random."""
    folder = Path(str(text_encoder.name_or_path))
    saved: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with open_tensors(path) as file:
            saved.update(file.keys())
    state = text_encoder.state_dict(keep_vars=True)
    loaded = {id(state[name]) for name in saved & state.keys()}  # tied weights have several names
    missing = [f"{name} is missing" for name, weight in state.items() if id(weight) not in loaded]
    surplus = [f"{name} is not in the encoder" for name in sorted(saved - state.keys())]
    if problems := missing + surplus:
        raise ValueError(f"{folder}: {problems[0]}, one of {len(problems)} such weights")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `FileNotFoundError` without a vocabulary: transformers makes one without words."""
    folder = Path(str(tokenizer.name_or_path))
    names = list(tokenizer.vocab_files_names.values())
    if not any((folder / name).is_file() for name in names):
        raise FileNotFoundError(f"{folder}: there is no {' or '.join(names)}")
