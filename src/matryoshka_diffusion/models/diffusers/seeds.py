"""From the generators that diffusers takes to seeds, one for each picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def seeds_of(
    generator: torch.Generator | Sequence[torch.Generator] | None, count: int
) -> tuple[int, ...]:
    """The seeds of `count` pictures; every generator is advanced by one draw.

    One generator gives consecutive seeds; several give one each. A fresh generator stands for the
    seed it was made with, so `torch.Generator().manual_seed(7)` means the pictures 7, 8, ...; one
    that was used before gives a seed that it draws. None is torch's global generator, which gives
    a drawn seed in any case.

    Raises:
        ValueError: as many generators as pictures are needed.
    """
    if generator is None:
        first = _draw(torch.default_generator)
        return tuple(range(first, first + count))
    if isinstance(generator, torch.Generator):
        first = _seed(generator)
        return tuple(range(first, first + count))
    if len(generator) != count:
        raise ValueError(f"generator: {len(generator)} generators for {count} pictures")
    return tuple(_seed(one) for one in generator)


def _seed(generator: torch.Generator) -> int:
    seed = generator.initial_seed()
    fresh = torch.Generator(generator.device).manual_seed(seed)
    is_fresh = torch.equal(generator.get_state(), fresh.get_state())
    drawn = _draw(generator)
    return seed if is_fresh else drawn


def _draw(generator: torch.Generator) -> int:
    return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
