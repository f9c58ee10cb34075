"""A pipeline's text encoder and tokenizer as a `TextEncoder`."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matryoshka_diffusion.config import EncoderConfig
from matryoshka_diffusion.text.encoder import HiddenStates, states_of


def encoder_of(
    config: EncoderConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> HiddenStates:
    """The encoder that `config` names, made of loaded parts and run on `device`."""
    states = states_of(config)
    return states(config.name, Placed(model, device), tokenizer, config.max_tokens)


class Placed(nn.Module):
    """An encoder where its pipeline runs it: tokens and features are on the CPU, in float32.

    It holds the encoder in a tuple: `HiddenStates` makes its model float32 and moves it about,
    which would undo what the pipeline's user chose.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        super().__init__()
        self.config = model.config
        self._model = (model,)
        self._device = device

    def forward(self, **tokens: Tensor) -> SimpleNamespace:
        placed = {name: value.to(self._device) for name, value in tokens.items()}
        states = self._model[0](**placed).last_hidden_state
        return SimpleNamespace(last_hidden_state=states.float().cpu())
