"""Several batches sampled in step, seen as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import SamplingConfig
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.pyramid import Pyramid
from matryoshka_diffusion.samplers import State

BATCH_SIZE = 64
"""Rows that the network sees at once, as in `Matryoshka.sample`."""


def lockstep(
    model: Matryoshka,
    cond: Conditioning,
    seeds: Sequence[int],
    sampling: SamplingConfig,
    negative: str | list[str] | None = None,
) -> Iterator[State]:
    """The states of all rows, in their order, step by step.

    `Matryoshka.sample` finishes one batch before the next, but a callback of diffusers sees all
    pictures at every step. What is written into `z` of a state is what sampling goes on from.

    Args:
        negative: one text for all rows or one for each.
    """
    batches = model.batches(cond, len(seeds), BATCH_SIZE)
    order = torch.cat(batches).argsort().to(model.device)
    streams = [
        model.stream(
            cond.rows(rows).trimmed(),
            [seeds[row] for row in rows.tolist()],
            sampling,
            [negative[row] for row in rows.tolist()] if isinstance(negative, list) else negative,
        )
        for rows in batches
    ]

    def together(parts: Sequence[Pyramid]) -> Pyramid:
        return tuple(torch.cat(level)[order] for level in zip(*parts, strict=True))

    for states in zip(*streams, strict=True):
        z = together([state.z for state in states])
        x = together([state.x for state in states])
        yield State(states[0].step, states[0].t, z, x)
        for rows, state in zip(batches, states, strict=True):
            for own, whole in zip(state.z, z, strict=True):
                own.copy_(whole[rows.to(whole.device)])
