"""All pairs of two sets of rows, a block at a time: n x m numbers never lie in memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

ENTRIES = 1 << 24
"""Numbers of one block: 128 MiB in float64."""


def row_blocks(rows: int, columns: int, entries: int = ENTRIES) -> Iterator[slice]:
    """Slices of `rows` such that each of them has at most `entries` pairs with `columns`.

    Example:
        >>> [(block.start, block.stop) for block in row_blocks(5, 10, entries=20)]
        [(0, 2), (2, 4), (4, 5)]
    """
    size = max(1, entries // max(columns, 1))
    return (slice(first, min(first + size, rows)) for first in range(0, rows, size))


def squared_distances(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]
) -> Float[np.ndarray, "n m"]:
    """|a_i - b_j|^2 by one product of matrices; in float64 its rounding is of no weight."""
    squares = a @ b.T
    squares *= -2.0  # in place from here on: a block is large
    squares += np.square(a).sum(axis=1)[:, None]
    squares += np.square(b).sum(axis=1)
    return np.maximum(squares, 0.0, out=squares)
