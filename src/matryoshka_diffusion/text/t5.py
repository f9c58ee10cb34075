"""T5: the encoder half of any T5 (the paper's text encoder is FLAN-T5 XL, 2048 numbers a token)."""

from __future__ import annotations

import torch
from torch import Tensor

from matryoshka_diffusion.config import ConfigError
from matryoshka_diffusion.text.states import HiddenStates, load_states

_SPACE = "▁"


class T5States(HiddenStates):
    """T5's hidden states with the tokens that the released models were trained with.

    A caption is cut into tokens after a leading space, characters that T5 does not know are left
    out, the end of the sequence is appended, and then at most `max_tokens` are kept. So the empty
    caption, by which the released models are guided, is a space and an end.
    """

    def _tokens(self, captions: list[str]) -> dict[str, Tensor]:
        rows = [self._longer(caption)[: self.max_tokens] for caption in captions]
        tokens = self.tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    def _longer(self, caption: str) -> list[int]:
        # A token has one character at least: there is no need to cut up a whole book.
        text = f" {caption}"[: 64 * self.max_tokens]
        words = self._known(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        words = words or self._known([self.tokenizer.convert_tokens_to_ids(_SPACE)])
        return words + self._known([self.tokenizer.eos_token_id])

    def _known(self, tokens: list[int | None]) -> list[int]:
        unknown = self.tokenizer.unk_token_id
        return [token for token in tokens if token is not None and token != unknown]


def t5(
    max_tokens: int,
    path: str | None,
    *,
    device: torch.device | str = "cpu",
    half: bool = False,
    stay: bool = False,
) -> HiddenStates:
    """The T5 encoder in a folder or on the hub.

    Raises:
        MissingExtra, OSError, ConfigError: as `load_encoder`.
    """
    if path is None:
        raise ConfigError(
            "encoder.path is not set: name a folder with a T5, or a model on the hub such as "
            "google/flan-t5-xl"
        )
    options = {"device": device, "half": half, "stay": stay}
    return load_states("T5", "T5EncoderModel", path, max_tokens, make=T5States, **options)
