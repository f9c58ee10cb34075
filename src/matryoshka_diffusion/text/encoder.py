"""Text encoders behind one protocol: captions in, features of their tokens out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from matryoshka_diffusion.config import EncoderConfig

if TYPE_CHECKING:
    from matryoshka_diffusion.text.states import HiddenStates


@runtime_checkable
class TextEncoder(Protocol):
    """A frozen encoder. `key` names model and settings for caches; `width` is d."""

    @property
    def key(self) -> str: ...
    @property
    def width(self) -> int: ...
    def __call__(self, captions: Sequence[str]) -> list[Float[Tensor, "n d"]]: ...


@runtime_checkable
class Storable(TextEncoder, Protocol):
    """An encoder whose features can be stored.

    `dtype` holds them exactly. `token_counts` are those of whole captions, up to one more than
    `max_tokens`, of which features exist. `rest` leaves the device until the next call.
    """

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def max_tokens(self) -> int: ...
    def token_counts(self, captions: Sequence[str]) -> list[int]: ...
    def rest(self) -> None: ...


def load_encoder(
    config: EncoderConfig,
    device: torch.device | str = "cpu",
    *,
    half: bool = False,
    stay: bool = False,
) -> Storable:
    """The encoder that `config` names. It is on `device` while it encodes, else on the CPU.

    With `half` a T5, which may be large, has weights in bf16; features are float32 in any case.
    With `stay` the encoder is meant for batch after batch: it leaves the device only when told
    to rest, and says only once that it cuts captions.

    Raises:
        MissingExtra: an optional package is not installed.
        OSError: no usable weights at the path.
        ConfigError: no path where one is needed, or more tokens than the model takes.
    """
    if config.name == "minilm":
        from matryoshka_diffusion.text.minilm import minilm

        return minilm(config.max_tokens, config.path, device=device, stay=stay)
    from matryoshka_diffusion.text.t5 import t5

    return t5(config.max_tokens, config.path, device=device, half=half, stay=stay)


def states_of(config: EncoderConfig) -> type[HiddenStates]:
    """The class that makes an encoder of a loaded model and its tokenizer."""
    from matryoshka_diffusion.text.states import HiddenStates
    from matryoshka_diffusion.text.t5 import T5States

    return T5States if config.name == "t5" else HiddenStates
