"""What a picture is conditioned on, as one value: labels, text, micro-conditions, a coarse picture.

An empty `Conditioning()` is the unconditional case; there is no other code for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

AUGMENT_NUMBERS = 7
"""Numbers that say how a picture was transformed (see `data.augment`), all 0 if it was not."""


TENSORS = ("labels", "tokens", "mask", "augment", "image", "image_t", "dropped")


@dataclass(frozen=True)
class Conditioning:
    """Conditions of a batch of b rows; every field is optional.

    Attributes:
        labels: class indices.
        tokens: text features, n tokens of d numbers a row, padded at the end.
        mask: True where a token is real. Without one all are.
        micro: scalars by name, such as `scale` (the side of the original picture in pixels).
        augment: how the picture was transformed. Without it, not at all.
        image: the coarse picture of an upsampler, enlarged to its coarsest level and under noise
            (`diffusion.augment_coarse`).
        image_t: the time of that noise, 0 for none.
        dropped: True where the label and the text of a row are hidden from the network.
    """

    labels: Int[Tensor, " b"] | None = None
    tokens: Float[Tensor, "b n d"] | None = None
    mask: Bool[Tensor, "b n"] | None = None
    micro: Mapping[str, Float[Tensor, " b"]] = field(default_factory=dict)
    augment: Float[Tensor, "b 7"] | None = None
    image: Float[Tensor, "b c h w"] | None = None
    image_t: Float[Tensor, " b"] | None = None
    dropped: Bool[Tensor, " b"] | None = None

    def map(self, f: Callable[[Tensor], Tensor]) -> Conditioning:
        """Apply `f` to every tensor."""
        changed = {name: f(value) for name in TENSORS if (value := getattr(self, name)) is not None}
        return replace(self, **changed, micro={name: f(x) for name, x in self.micro.items()})

    def to(self, device: torch.device | str) -> Conditioning:
        """The same conditions on another device."""
        return self.map(lambda x: x.to(device))

    def rows(self, selection: slice | Tensor) -> Conditioning:
        """The conditions of some rows."""
        return self.map(lambda x: x[selection])

    def trimmed(self) -> Conditioning:
        """The same conditions without padding that no row needs."""
        if self.tokens is None or self.mask is None:
            return self
        longest = int(self.mask.sum(1).max())
        return replace(self, tokens=self.tokens[:, :longest], mask=self.mask[:, :longest])

    def drop(self, rows: Bool[Tensor, " b"]) -> Conditioning:
        """Hide label and text of the marked rows (classifier-free guidance needs such rows)."""
        hidden = rows if self.dropped is None else self.dropped | rows
        return replace(self, dropped=hidden)

    def null(self) -> Conditioning:
        """Hide label and text of every row: the unconditional half of guidance."""
        return self.drop(self._all_rows())

    def _all_rows(self) -> Bool[Tensor, " b"]:
        for value in (self.labels, self.tokens):
            if value is not None:
                return torch.ones(value.shape[0], dtype=torch.bool, device=value.device)
        raise ValueError("there is nothing to guide by: the conditioning has no label and no text")


def equally_long(a: Conditioning, b: Conditioning) -> tuple[Conditioning, Conditioning]:
    """Both with as many tokens, padded with zeros: networks may attend to padding."""
    if a.tokens is None or b.tokens is None:
        return a, b
    longest = max(a.tokens.shape[1], b.tokens.shape[1])
    return _padded(a, longest), _padded(b, longest)


def _padded(cond: Conditioning, length: int) -> Conditioning:
    assert cond.tokens is not None, "`equally_long` has seen to it"
    missing = length - cond.tokens.shape[1]
    if not missing:
        return cond
    mask = cond.tokens.new_ones(cond.tokens.shape[:2], dtype=torch.bool)
    mask = mask if cond.mask is None else cond.mask
    tokens = functional.pad(cond.tokens, (0, 0, 0, missing))
    return replace(cond, tokens=tokens, mask=functional.pad(mask, (0, missing)))
