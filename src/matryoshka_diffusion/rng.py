"""Randomness as a pure function of (seed, purpose, counter).

Nothing in this project draws from a global generator. Whatever is random asks for its own stream
by name and number, so resuming, evaluating, another batch size or another number of processes
cannot change what a sample is given. The generator is Philox, which is counter-based: making a
stream costs microseconds and two streams never meet.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def stream(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """The generator that belongs to `purpose` and up to three `counters` under `seed`.

    Example:
        >>> float(stream(0, "demo", 7).random()) == float(stream(0, "demo", 7).random())
        True
    """
    assert len(counters) <= 3, "a Philox counter has four words and the first one counts draws"
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=16).digest()
    # The low word advances while drawing, so the streams of different counters are disjoint.
    counter = [0, *counters, *[0] * (3 - len(counters))]
    bits = np.random.Philox(key=np.frombuffer(digest, np.uint64), counter=counter)
    return np.random.Generator(bits)


def normal(seed: int, purpose: str, *counters: int, shape: tuple[int, ...]) -> Float[Tensor, "..."]:
    """Standard normal float32 numbers, contiguous and on the CPU, so that devices agree."""
    draw = stream(seed, purpose, *counters).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(draw)


def uniform(seed: int, purpose: str, ids: Iterable[int]) -> Float[Tensor, " b"]:
    """One float64 number in [0, 1) for each id."""
    return torch.tensor([stream(seed, purpose, n).random() for n in ids], dtype=torch.float64)


def stratified(seed: int, purpose: str, ids: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Evenly spread float64 numbers in (0, 1]: frac(u + n phi), u fixed by the seed.

    Any run of consecutive ids covers the interval almost uniformly (a Kronecker sequence with the
    golden ratio), whatever the batch it is cut into: stratified sampling without a batch.
    """
    offset = stream(seed, purpose).random()
    return 1.0 - torch.remainder(offset + ids.double() * GOLDEN, 1.0)


def choose(total: int, count: int, purpose: str) -> Int[np.ndarray, " n"]:
    """Choose `count` different indices below `total`, in ascending order: the same in every run.

    Fixed choices make runs comparable, and nobody picks the good ones.

    Raises:
        ValueError: `count` exceeds `total`.

    Example:
        >>> bool((choose(1904, 20, "sheet") == choose(1904, 20, "sheet")).all())
        True
    """
    if count > total:
        raise ValueError(f"cannot choose {count} of {total} pictures")
    return np.sort(stream(0, f"choose {purpose}").permutation(total)[:count])
