"""The part of the network that all levels share: text, labels and augmentation."""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from matryoshka_diffusion.conditioning import AUGMENT_NUMBERS, Conditioning
from matryoshka_diffusion.config import ModelConfig, TextConfig
from matryoshka_diffusion.nn.layers import TextLayer, zero

SHRINKAGE = 0.002
"""Share of the mean variance that `TextTower.whiten` adds to every direction's own."""


class Context(NamedTuple):
    """A `Conditioning`, and what the `Conditioner` made of it for the levels.

    Attributes:
        cond: the conditions themselves.
        tokens: text to attend to.
        mask: True for tokens that attention may see. Without a mask it sees all.
        embedding: a vector to add to the time embedding.
    """

    cond: Conditioning
    tokens: Float[Tensor, "b n d"] | None = None
    mask: Bool[Tensor, "b n"] | None = None
    embedding: Float[Tensor, "b e"] | None = None

    def rows(self, count: int | torch.SymInt) -> Context:
        """The context of the first `count` rows."""
        first = slice(count)
        tensors = (self.tokens, self.mask, self.embedding)
        return Context(self.cond.rows(first), *(None if x is None else x[first] for x in tensors))


class Conditioner(nn.Module):
    """Turn a `Conditioning` into a `Context`, once for all levels."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.micro = config.micro_names
        self.text = TextTower(config.text, config.embedding) if config.text else None
        # The last row stands for a hidden label.
        self.label = nn.Embedding(config.classes + 1, config.embedding) if config.classes else None
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)
        # Linear and without a bias, so that an image without augmentation (zeros) adds nothing. It
        # is built last, because building draws numbers that the weights above must not depend on.
        augment = nn.Linear(AUGMENT_NUMBERS, config.embedding, bias=False)
        self.augment = zero(augment) if config.augment else None

    def forward(self, cond: Conditioning) -> Context:
        """Raises ValueError if a condition that the network was built for is missing."""
        if missing := self.micro - cond.micro.keys():
            raise ValueError(f"this network is conditioned on {min(missing)}: add it to micro")
        tokens = mask = None
        embeddings: list[Tensor] = []
        if self.text is not None:
            tokens, mask, pooled = self.text(cond)
            embeddings.append(pooled)
        if self.label is not None:
            if (labels := cond.labels) is None:
                raise ValueError("this network is conditioned on classes, but labels is None")
            if cond.dropped is not None:
                labels = torch.where(cond.dropped, self.label.num_embeddings - 1, labels)
            embeddings.append(self.label(labels))
        if self.augment is not None and cond.augment is not None:
            embeddings.append(self.augment(cond.augment))
        return Context(cond, tokens, mask, reduce(torch.add, embeddings) if embeddings else None)


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
        self.null = nn.Parameter(torch.empty(config.features)) if config.learned_null else None
        if self.null is not None:  # diffusers replaces the initialisers by ones that return None
            nn.init.normal_(self.null)
        # These two layers keep the variance of the features. Torch's default divides it by three
        # in each, and a caption would start much quieter than the time that it is added to.
        for linear in (self.project, self.pool):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    @torch.no_grad()
    def whiten(self, captions: Float[Tensor, "n d"]) -> None:
        """Make the initial projection a random map of whitened features, which vary equally.

        Features of a language model vary most in a few directions that captions have in common, so
        that similar captions are hard to tell apart. The initial weights take the inverse root of
        the covariance of captions; the network stays what it is.

        Args:
            captions: the mean features of each caption, of several times `d` captions: what the
                fewer ones do not show would be enlarged without bound.
        """
        x = captions.double()
        mean = x.mean(dim=0)
        variance, axes = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
        scale = (variance.clamp(min=0.0) + SHRINKAGE * variance.mean()).sqrt()
        weight = self.project.weight.double() @ (axes / scale) @ axes.T
        self.project.weight.copy_(weight)
        if self.project.bias is not None:
            self.project.bias.copy_(-weight @ mean)
        if self.null is not None:  # as far from the mean as a caption
            self.null.copy_(mean + axes @ (scale * (axes.T @ self.null.double())))

    def forward(
        self, cond: Conditioning
    ) -> tuple[Float[Tensor, "b n d"], Bool[Tensor, "b n"] | None, Float[Tensor, "b e"]]:
        """Tokens, the mask for attention (None: attend to all), and the pooled embedding."""
        if cond.tokens is None:
            raise ValueError("this network is conditioned on text, but tokens is None")
        tokens, mask = self._with_null(cond)
        attention_mask = mask if self.masked else None
        tokens = self.project(tokens)
        for layer in self.layers:
            tokens = layer(tokens, attention_mask)
        # The released models average over padding if their text layers attended to it.
        pool_mask = mask if self.masked or not self.layers else torch.ones_like(mask)
        weight = pool_mask.to(tokens) / pool_mask.sum(1, keepdim=True)
        pooled = self.pool(torch.einsum("bn,bnd->bd", weight, tokens))
        return tokens, attention_mask, pooled

    def _with_null(self, cond: Conditioning) -> tuple[Float[Tensor, "b n d"], Bool[Tensor, "b n"]]:
        """Replace the text of dropped rows by the learned null token."""
        assert cond.tokens is not None
        tokens, mask = cond.tokens, cond.mask
        if mask is None:
            mask = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
        if cond.dropped is None:
            return tokens, mask
        if self.null is None:
            raise ValueError("no learned null caption: encode '' instead of dropping rows")
        first = torch.arange(tokens.shape[1], device=tokens.device) == 0
        dropped = cond.dropped[:, None]
        tokens = torch.where(dropped[:, :, None], self.null.to(tokens.dtype), tokens)
        return tokens, torch.where(dropped, first, mask)
