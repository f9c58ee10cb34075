"""What every metric asks of its features: enough rows, of one width, all finite."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def finite(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """The features in float64.

    Raises:
        ValueError: a value is NaN or infinite; the message names the first such row.
    """
    rows = features.astype(np.float64)
    if not np.isfinite(rows).all():
        bad = int(np.argwhere(~np.isfinite(rows).all(axis=1))[0, 0])
        raise ValueError(f"row {bad} of the features is not finite")
    return rows


def comparable(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m e"], *, metric: str, least: int
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "m d"]]:
    """Two sets of features in float64, of which `metric` takes at least `least` rows each.

    Raises:
        ValueError: too few rows, different widths, or a value that is not finite.
    """
    if min(len(a), len(b)) < least:
        raise ValueError(
            f"{metric} takes at least {least:,} samples on each side, not {len(a):,} and {len(b):,}"
        )
    same_width(a.shape[1], b.shape[1])
    return finite(a), finite(b)


def same_width(a: int, b: int) -> None:
    """Raises `ValueError` if features of these widths come from different networks."""
    if a != b:
        raise ValueError(f"features of width {a} cannot meet those of {b}")


def unit(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """The features in float64, each row divided by its length.

    Raises:
        ValueError: a row is not finite, or has no direction because it is zero.
    """
    rows = finite(features)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not lengths.all():
        raise ValueError(f"row {int(lengths.argmin())} of the features is zero")
    return rows / lengths
