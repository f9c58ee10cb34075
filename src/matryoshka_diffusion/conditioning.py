"""What a picture is conditioned on, as one value: labels, text, micro-conditions.

An empty `Conditioning()` is the unconditional case; there is no other code for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Conditions of a batch of b rows; every field is optional.

    Attributes:
        labels: class indices.
        tokens: text features, n tokens of d numbers a row, padded at the end.
        mask: True where a token is real. Without one all are.
        micro: scalars by name, such as `scale` (the side of the original picture in pixels).
        dropped: True where the label and the text of a row are hidden from the network.
    """

    labels: Int[Tensor, " b"] | None = None
    tokens: Float[Tensor, "b n d"] | None = None
    mask: Bool[Tensor, "b n"] | None = None
    micro: Mapping[str, Float[Tensor, " b"]] = field(default_factory=dict)
    dropped: Bool[Tensor, " b"] | None = None

    def map(self, f: Callable[[Tensor], Tensor]) -> Conditioning:
        """Apply `f` to every tensor."""
        changed = {
            name: f(value)
            for name in ("labels", "tokens", "mask", "dropped")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **changed, micro={name: f(x) for name, x in self.micro.items()})

    def to(self, device: torch.device | str) -> Conditioning:
        """The same conditions on another device."""
        return self.map(lambda x: x.to(device))

    def rows(self, selection: slice | Tensor) -> Conditioning:
        """The conditions of some rows."""
        return self.map(lambda x: x[selection])

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
