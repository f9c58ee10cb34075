"""T5: the encoder half of any T5 (the paper's text encoder is FLAN-T5 XL, 2048 numbers a token)."""

from __future__ import annotations

from matryoshka_diffusion.config import ConfigError
from matryoshka_diffusion.text.states import HiddenStates, load_states


def t5(max_tokens: int, path: str | None) -> HiddenStates:
    """The T5 encoder in a folder or on the hub.

    Raises:
        MissingExtra, OSError, ConfigError: as `load_encoder`.
    """
    if path is None:
        raise ConfigError(
            "encoder.path is not set: name a folder with a T5, or a model on the hub such as "
            "google/flan-t5-xl"
        )
    return load_states("T5", "T5EncoderModel", path, max_tokens)
