"""Text encoders behind one protocol: captions in, features of their tokens out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from matryoshka_diffusion.config import EncoderConfig


@runtime_checkable
class TextEncoder(Protocol):
    """A frozen encoder. `key` names model and settings for caches; `width` is d."""

    @property
    def key(self) -> str: ...
    @property
    def width(self) -> int: ...
    def __call__(self, captions: Sequence[str]) -> list[Float[Tensor, "n d"]]: ...


def load_encoder(config: EncoderConfig) -> TextEncoder:
    """The encoder that `config` names, on the CPU.

    Raises:
        MissingExtra: an optional package is not installed.
        OSError: no usable weights at the path.
        ConfigError: no path where one is needed, or more tokens than the model takes.
    """
    if config.name == "minilm":
        from matryoshka_diffusion.text.minilm import minilm

        return minilm(config.max_tokens, config.path)
    from matryoshka_diffusion.text.t5 import t5

    return t5(config.max_tokens, config.path)
