"""Rows of features: the checks that every metric makes, and all pairs of rows block by block."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

ENTRIES = 1 << 24
"""Pairs in one block: 128 MiB in float64, so that n x m numbers never lie in memory."""


def finite(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Convert to float64. Raises `ValueError` with the first row that is not finite."""
    rows = features.astype(np.float64)
    if not np.isfinite(rows).all():
        bad = int(np.argwhere(~np.isfinite(rows).all(axis=1))[0, 0])
        raise ValueError(f"row {bad} of the features is not finite")
    return rows


def comparable(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m e"], *, metric: str, least: int
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "m d"]]:
    """Convert two sets to float64.

    Raises `ValueError` for fewer than `least` rows, different widths or values that are not finite.
    """
    if min(len(a), len(b)) < least:
        counts = f"not {len(a):,} and {len(b):,}"
        raise ValueError(f"{metric} takes at least {least:,} samples on each side, {counts}")
    same_width(a.shape[1], b.shape[1])
    return finite(a), finite(b)


def same_width(a: int, b: int) -> None:
    """Raise `ValueError` if features of these widths come from different networks."""
    if a != b:
        raise ValueError(f"features of width {a} cannot be compared with features of width {b}")


def unit(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Divide each row by its length. Raises `ValueError` if one is zero or not finite."""
    rows = finite(features)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not lengths.all():
        raise ValueError(f"row {int(lengths.argmin())} of the features is zero")
    return rows / lengths


def row_blocks(rows: int, columns: int, entries: int = ENTRIES) -> Iterator[slice]:
    """Cut `rows` into slices, each with at most `entries` pairs with `columns`."""
    size = max(1, entries // max(columns, 1))
    return (slice(first, min(first + size, rows)) for first in range(0, rows, size))


def squared_distances(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]
) -> Float[np.ndarray, "n m"]:
    """|a_i - b_j|^2 by one matrix product; in float64 its rounding does not matter."""
    squares = a @ b.T
    squares *= -2.0  # in place from here on: a block is large
    squares += np.square(a).sum(axis=1)[:, None]
    squares += np.square(b).sum(axis=1)
    return np.maximum(squares, 0.0, out=squares)
