"""What all levels share: text (projected, attended to, pooled), labels, and augmentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from matryoshka_diffusion.conditioning import AUGMENT_NUMBERS, Conditioning
from matryoshka_diffusion.config import ModelConfig, TextConfig
from matryoshka_diffusion.nn.layers import TextLayer, zero


class Context(NamedTuple):
    """A `Conditioning` as the levels see it: tokens to attend to, a sum for the time embedding."""

    tokens: Float[Tensor, "b n d"] | None
    mask: Bool[Tensor, "b n"] | None
    embedding: Float[Tensor, "b e"] | None
    micro: Mapping[str, Float[Tensor, " b"]]
    image: Float[Tensor, "b c h w"] | None
    image_t: Float[Tensor, " b"] | None

    def rows(self, count: int) -> Context:
        """The context of the first `count` rows, those that a finer level holds."""
        tokens, mask, embedding, image, image_t = (
            None if part is None else part[:count]
            for part in (self.tokens, self.mask, self.embedding, self.image, self.image_t)
        )
        micro = {name: value[:count] for name, value in self.micro.items()}
        return Context(tokens, mask, embedding, micro, image, image_t)


class Conditioner(nn.Module):
    """What is known of the pictures of a batch -> `Context`. The nest owns one, levels none."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.micro = config.micro_names
        self.coarse = config.coarse
        self.text = TextTower(config.text, config.embedding) if config.text else None
        # The last row stands for a label that is hidden.
        self.label = nn.Embedding(config.classes + 1, config.embedding) if config.classes else None
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)
        # Linear and without a bias, so that zeros (nothing was done) add nothing. It is made last,
        # because that draws numbers, and the weights above must not change with it.
        wide = config.embedding
        self.augment = (
            zero(nn.Linear(AUGMENT_NUMBERS, wide, bias=False)) if config.augment else None
        )

    def forward(self, cond: Conditioning) -> Context:
        """Raises ValueError if a condition that the network was built for is missing."""
        if missing := self.micro - cond.micro.keys():
            raise ValueError(f"this network is conditioned on {min(missing)}: add it to micro")
        if self.coarse is not None and (cond.image is None or cond.image_t is None):
            raise ValueError("this network is an upsampler, but image or image_t is None")
        tokens = mask = embedding = None
        if self.text is not None:
            tokens, mask, embedding = self.text(cond)
        if self.label is not None:
            if cond.labels is None:
                raise ValueError("this network is conditioned on classes, but labels is None")
            hidden = self.label.num_embeddings - 1
            labels = cond.labels
            if cond.dropped is not None:
                labels = torch.where(cond.dropped, hidden, labels)
            label = self.label(labels)
            embedding = label if embedding is None else embedding + label
        if self.augment is not None and cond.augment is not None:
            told = self.augment(cond.augment)
            embedding = told if embedding is None else embedding + told
        return Context(tokens, mask, embedding, cond.micro, cond.image, cond.image_t)


class TextTower(nn.Module):
    """Project text features, let them attend to each other, pool them into an embedding."""

    def __init__(self, config: TextConfig, embedding: int) -> None:
        super().__init__()
        self.masked = config.masked
        self.project = nn.Linear(config.features, config.width)
        self.layers = nn.ModuleList(
            TextLayer(config.width, config.heads) for _ in range(config.layers)
        )
        self.pool = nn.Linear(config.width, embedding, bias=False)
        self.null = nn.Parameter(torch.randn(config.features)) if config.learned_null else None
        # Keep the variance of the features, which torch's default divides by three in each of the
        # two layers, so that a caption starts about as loud as the time it is added to.
        for linear in (self.project, self.pool):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def forward(
        self, cond: Conditioning
    ) -> tuple[Float[Tensor, "b n d"], Bool[Tensor, "b n"] | None, Float[Tensor, "b e"]]:
        """Tokens, the mask that attention obeys (None: attend to all), pooled embedding."""
        if cond.tokens is None:
            raise ValueError("this network is conditioned on text, but tokens is None")
        tokens, mask = self._with_null(cond)
        attention_mask = mask if self.masked else None
        tokens = self.project(tokens)
        for layer in self.layers:
            tokens = layer(tokens, attention_mask)
        # The released models average over padding where their text layers attended to it.
        pool_mask = mask if self.masked or not self.layers else torch.ones_like(mask)
        weight = pool_mask.to(tokens) / pool_mask.sum(1, keepdim=True)
        pooled = self.pool(torch.einsum("bn,bnd->bd", weight, tokens))
        return tokens, attention_mask, pooled

    def _with_null(self, cond: Conditioning) -> tuple[Float[Tensor, "b n d"], Bool[Tensor, "b n"]]:
        """Replace dropped rows by the one learned null token."""
        assert cond.tokens is not None
        tokens = cond.tokens
        mask = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
        mask = mask if cond.mask is None else cond.mask
        if cond.dropped is None:
            return tokens, mask
        if self.null is None:
            raise ValueError(
                "this network has no learned null caption: encode the empty caption instead of "
                "dropping rows"
            )
        first = torch.arange(tokens.shape[1], device=tokens.device) == 0
        dropped = cond.dropped[:, None]
        tokens = torch.where(dropped[:, :, None], self.null.to(tokens.dtype), tokens)
        return tokens, torch.where(dropped, first, mask)
