"""Conditions of a batch as one value: labels, text, micro-conditions, the coarse image.

An empty `Conditioning()` is the unconditional case. It has no code of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.philox import send

AUGMENT_NUMBERS = 7
"""Numbers that describe how an image was augmented (see `data.augment`); all 0 if it was not."""

TENSORS = ("labels", "tokens", "mask", "augment", "image", "image_t", "dropped")
"""Fields of `Conditioning` that are one tensor."""


@dataclass(frozen=True)
class Conditioning:
    """Conditions of a batch of b rows. Every field is optional.

    Attributes:
        labels: class indices.
        tokens: text features, n tokens of d numbers for each row, padded at the end.
        mask: True for real tokens. Without a mask all tokens are real.
        micro: scalars by name, such as `scale` (the side of the original image in pixels).
        augment: description of the augmentation. Without it nothing was done.
        image: an upsampler's coarse image, enlarged to its coarsest level and under noise
            (`diffusion.augment_coarse`).
        image_t: the time of that noise, 0 for none.
        dropped: True for rows whose label and text are hidden from the network.
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
        return self.map(lambda x: send(x, device))

    def rows(self, selection: slice | Tensor) -> Conditioning:
        """The conditions of some rows."""
        return self.map(lambda x: x[selection])

    def followed_by(self, other: Conditioning) -> Conditioning:
        """Conditions of twice the rows: these, then `other`, which has as many rows and tokens.

        A mask, `augment` or `dropped` that only one of them has changes nothing in the other.
        """

        def joined(a: Tensor | None, b: Tensor | None, name: str) -> Tensor | None:
            if (given := b if a is None else a) is None:
                return None
            filler = torch.ones_like(given) if name == "mask" else torch.zeros_like(given)
            return torch.cat([filler if part is None else part for part in (a, b)])

        tensors = {
            name: joined(getattr(self, name), getattr(other, name), name) for name in TENSORS
        }
        micro = {name: torch.cat([x, other.micro[name]]) for name, x in self.micro.items()}
        return Conditioning(**tensors, micro=micro)

    def trimmed(self) -> Conditioning:
        """The same conditions without the tokens that are padding in every row."""
        if self.tokens is None or self.mask is None:
            return self
        longest = int(self.mask.sum(1).max())
        return replace(self, tokens=self.tokens[:, :longest], mask=self.mask[:, :longest])

    def padded(self, tokens: int) -> Conditioning:
        """The same conditions with zeros appended until each row has `tokens` tokens."""
        if self.tokens is None or self.tokens.shape[1] == tokens:
            return self
        missing = tokens - self.tokens.shape[1]
        real = self.tokens.new_ones(self.tokens.shape[:2], dtype=torch.bool)
        mask = F.pad(real if self.mask is None else self.mask, (0, missing))
        return replace(self, tokens=F.pad(self.tokens, (0, 0, 0, missing)), mask=mask)

    def drop(self, rows: Bool[Tensor, " b"]) -> Conditioning:
        """Hide label and text in these rows. Classifier-free guidance needs such rows."""
        return replace(self, dropped=rows if self.dropped is None else self.dropped | rows)

    def null(self) -> Conditioning:
        """Hide label and text in every row: the unconditional half of guidance.

        Raises:
            ValueError: there is neither a label nor text.
        """
        for value in (self.labels, self.tokens):
            if value is not None:
                return self.drop(torch.ones(len(value), dtype=torch.bool, device=value.device))
        raise ValueError("there is nothing to guide by: the conditioning has no label and no text")


def equally_long(a: Conditioning, b: Conditioning) -> tuple[Conditioning, Conditioning]:
    """Both conditionings with the same number of tokens: networks may attend to padding."""
    if a.tokens is None or b.tokens is None:
        return a, b
    longest = max(a.tokens.shape[1], b.tokens.shape[1])
    return a.padded(longest), b.padded(longest)


def pad(
    features: Sequence[Float[Tensor, "_ d"]],
) -> tuple[Float[Tensor, "b n d"], Bool[Tensor, "b n"]]:
    """Stack features, with zeros after the shorter ones, and mark the tokens that are real."""
    lengths = torch.tensor([len(feature) for feature in features])
    stacked = pad_sequence(list(features), batch_first=True)
    return stacked, torch.arange(stacked.shape[1]) < lengths[:, None]


def entries_of(name: str, value: Any, kinds: Any) -> list[Any] | None:
    """One value or several as a list; None stays None.

    Raises:
        UsageError: the list is empty, or an entry is of another type.
    """
    if value is None:
        return None
    one = isinstance(value, str) or not isinstance(value, Iterable)
    values = [value] if one else [*value]
    if not values:
        raise UsageError(f"{name} is empty: name at least one, or omit it")
    for place, entry in enumerate(values):
        if not isinstance(entry, kinds):
            kind = "text" if kinds is str else "a name or a number"
            raise UsageError(f"{name}[{place}] is {entry!r}: give {kind}")
    return values


def labels_of(classes: Sequence[str | int] | None, names: Sequence[str], count: int) -> list[int]:
    """Indices of classes by name or number; all `count` classes if there is none.

    A string is first read as a name ("1" may be one), then as an index. An `int` is an index.

    Raises:
        UsageError: there is no such class.
    """
    folded = [name.casefold() for name in names]

    def label(one: str | int) -> int:
        if isinstance(one, str) and one.casefold() in folded:
            return folded.index(one.casefold())
        if str(one).isdecimal() and int(one) < count:
            return int(one)
        known = ", ".join(names) if names else f"0 to {count - 1}"
        raise UsageError(f"unknown class {one!r}; there are: {known}")

    return list(range(count)) if classes is None else [label(one) for one in classes]
