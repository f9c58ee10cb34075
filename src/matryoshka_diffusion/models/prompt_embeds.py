"""Text of a pipeline of diffusers: prompts for its encoder, or their features from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from matryoshka_diffusion.config import EncoderConfig, UsageError
from matryoshka_diffusion.text.encoder import HiddenStates, states_of

Prompts = str | Sequence[str] | None


class PromptEncoder:
    """A text encoder for which some captions are names of features that it was given.

    It satisfies `TextEncoder`, so a model takes features wherever it takes prompts.
    """

    def __init__(self, config: EncoderConfig, width: int, encoder: HiddenStates | None) -> None:
        self._name, self._encoder, self.width = config.name, encoder, width
        self._given: dict[str, Float[Tensor, "n d"]] = {}

    @property
    def key(self) -> str:
        """Name of the encoder, or its hash if it is there."""
        return self._name if self._encoder is None else self._encoder.key

    def __call__(self, captions: Sequence[str]) -> list[Float[Tensor, "n d"]]:
        texts = [caption for caption in captions if caption not in self._given]
        if texts and self._encoder is None:
            raise UsageError(
                "this pipeline has no text encoder: give prompt_embeds, and with guidance "
                "negative_prompt_embeds, or load it with text_encoder and tokenizer"
            )
        encoded = iter(self._encoder(texts) if texts and self._encoder is not None else ())
        return [
            self._given[caption] if caption in self._given else next(encoded)
            for caption in captions
        ]

    def names(
        self, name: str, prompts: Prompts, embeds: Tensor | None, mask: Tensor | None
    ) -> Prompts:
        """The prompts or, in place of missing ones, a name for each row of `embeds`.

        `name` is that of the argument, `mask` is true for tokens that are no padding.

        Raises:
            UsageError: there are both prompts and features, or features of another shape.
        """
        if embeds is None and mask is None:
            return prompts
        if embeds is None or prompts is not None:
            raise UsageError(f"{name}: give either texts, or {name}_embeds with their mask")
        if (
            embeds.dim() != 3
            or not len(embeds)
            or embeds.shape[2] != self.width
            or not embeds.is_floating_point()
        ):
            raise UsageError(
                f"{name}_embeds are {tuple(embeds.shape)}: give numbers of shape (prompts, tokens, "
                f"{self.width}), as encode_prompt does"
            )
        real = torch.ones(embeds.shape[:2]) if mask is None else mask
        if real.shape != embeds.shape[:2] or not real.bool().any(1).all():
            raise UsageError(
                f"{name}_attention_mask is {tuple(real.shape)}: give {tuple(embeds.shape[:2])} and "
                "at least one token in each row"
            )
        rows = zip(embeds.float().cpu(), real.bool().cpu(), strict=True)
        given = {f"{name}_embeds[{row}]": one[kept] for row, (one, kept) in enumerate(rows)}
        self._given |= given
        return [*given] if len(given) > 1 else next(iter(given))


def texts_of(
    encoder: PromptEncoder | None,
    arguments: Mapping[str, tuple[Prompts, Tensor | None, Tensor | None]],
) -> tuple[Prompts, ...]:
    """Prompts, or names for their features: for each argument its texts, features and mask.

    Raises:
        UsageError: as `PromptEncoder.names`, or there are features for a network without text.
    """
    if encoder is not None:
        return tuple(encoder.names(name, *parts) for name, parts in arguments.items())
    for name, (_, embeds, mask) in arguments.items():
        if embeds is not None or mask is not None:
            raise UsageError(f"this network takes no text: omit {name}_embeds and its mask")
    return tuple(texts for texts, _, _ in arguments.values())


def one_each(texts: Prompts, count: int, each: int) -> str | list[str] | None:
    """Negative prompts for `count` images, of which `each` belong to one prompt.

    Raises:
        UsageError: there are several texts, but not one for each prompt.
    """
    if isinstance(texts, str | None):
        return texts
    several = [text for text in texts for _ in range(each)]
    if len(several) != count:
        raise UsageError("negative_prompt: give one text, or one for each prompt")
    return several


def pipeline_encoder(
    config: EncoderConfig, width: int, model: Any, tokenizer: Any, device: torch.device
) -> PromptEncoder:
    """The encoder of a pipeline's components, on the device where the pipeline runs them."""
    if model is None:
        return PromptEncoder(config, width, None)
    placed = _PlacedEncoder(model, device)
    states = states_of(config)(config.name, placed, tokenizer, config.max_tokens)
    return PromptEncoder(config, width, states)


class _PlacedEncoder(nn.Module):
    """A text encoder where its pipeline runs it; its tokens and features are on the CPU.

    It is in a tuple, or `HiddenStates` would move it and undo what the pipeline's user set.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        super().__init__()
        self.config, self._model, self._device = model.config, (model,), device

    def forward(self, **tokens: Int[Tensor, "b n"]) -> SimpleNamespace:
        placed = {name: value.to(self._device) for name, value in tokens.items()}
        states = self._model[0](**placed).last_hidden_state
        return SimpleNamespace(last_hidden_state=states.float().cpu())
