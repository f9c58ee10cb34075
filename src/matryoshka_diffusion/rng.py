"""Randomness as a pure function of (seed, purpose, counter).

Nothing in this project draws from a global generator. Each random quantity has a stream of its own
by name and number. Resuming, evaluating, another batch size or another number of processes
therefore cannot change a sample's numbers. The generator is Philox, which is counter-based: a new
stream costs microseconds, two streams never meet, and a GPU draws the same noise as a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from matryoshka_diffusion.philox import Place, normal_rows

GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
"""The golden ratio less one: the step of the sequence of `stratified`."""


def stream(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """The generator for a seed, a purpose and up to three counters.

    Examples:
        >>> float(stream(0, "demo", 7).random()) == float(stream(0, "demo", 7).random())
        True
    """
    return Place.of(seed, purpose, counters).generator()


def normal(
    purpose: str,
    places: Sequence[tuple[int, ...]],
    shape: tuple[int, ...],
    device: torch.device | str = "cpu",
) -> Float[Tensor, "b ..."]:
    """Standard normal float32 numbers of a shape for each (seed, up to three counters)."""
    rows = [[place] for place in places]
    return normal_parts(purpose, rows, [shape], device)[0]


def normal_parts(
    purpose: str,
    places: Sequence[Sequence[tuple[int, ...]]],
    shapes: Sequence[tuple[int, ...]],
    device: torch.device | str = "cpu",
) -> tuple[Float[Tensor, "b ..."], ...]:
    """Draw as `normal` for several shapes at once; the places of a row have one seed."""
    streams = [[Place.of(seed, purpose, own) for seed, *own in row] for row in places]
    parts = normal_rows(streams, [math.prod(shape) for shape in shapes], device)
    return tuple(rows.unflatten(1, shape) for rows, shape in zip(parts, shapes, strict=True))


def uniform(seed: int, purpose: str, ids: Iterable[int]) -> Float[Tensor, " b"]:
    """One float64 number in [0, 1) for each id."""
    return torch.tensor([stream(seed, purpose, n).random() for n in ids], dtype=torch.float64)


def stratified(seed: int, purpose: str, ids: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Evenly spread float64 numbers in (0, 1]: 1 - frac(u + n phi), with u fixed by the seed.

    Any run of consecutive ids n covers the interval almost uniformly: it is a Kronecker sequence
    with the golden ratio. So sampling is stratified, whatever batches the ids are cut into.
    """
    offset = stream(seed, purpose).random()
    return 1.0 - torch.remainder(offset + ids.double() * GOLDEN, 1.0)


def choose(total: int, count: int, purpose: str) -> Int[np.ndarray, " n"]:
    """Choose `count` different indices below `total`, in ascending order: the same in every run.

    Fixed choices make runs comparable, and nobody picks the good ones.

    Raises:
        ValueError: `count` exceeds `total`.

    Examples:
        >>> bool((choose(1904, 20, "sheet") == choose(1904, 20, "sheet")).all())
        True
    """
    if count > total:
        raise ValueError(f"cannot choose {count} of {total} images")
    return np.sort(stream(0, f"choose {purpose}").permutation(total)[:count])
