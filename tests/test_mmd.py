"""KID and CMMD against their sums, written as loops."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from matryoshka_diffusion.metrics import mmd
from matryoshka_diffusion.metrics.mmd import cmmd, kernel_distance
from matryoshka_diffusion.metrics.pairs import row_blocks


def random(seed):
    return np.random.default_rng(seed)


def pairs(kernel, x, y, *, itself):
    """The mean of the kernel over all pairs, one at a time."""
    values = [kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(y) if itself or i != j]
    return sum(values) / len(values)


def cubic(a, b):
    return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1.0) ** 3


def gaussian(a, b):
    a, b = (v / np.sqrt(sum(p * p for p in v)) for v in (a, b))
    return np.exp(-sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / 200.0)


def test_kernel_distance_is_the_unbiased_sum_over_pairs():
    x, y = random(0).normal(size=(9, 4)), random(1).normal(0.5, 1.5, (9, 4))
    expected = (
        pairs(cubic, x, x, itself=False)
        + pairs(cubic, y, y, itself=False)
        - 2.0 * pairs(cubic, x, y, itself=True)
    )
    found = kernel_distance(x, y, subsets=1, size=9)
    assert found.mean == pytest.approx(expected, rel=1e-10)
    assert found.std == 0.0


def test_kernel_distance_by_hand():
    # One feature; k(0, 2) = 1, k(1, 1) = 8 and k(0, 1) = 1, k(2, 1) = 27.
    x, y = np.array([[0.0], [2.0]]), np.array([[1.0], [1.0]])
    assert kernel_distance(x, y, subsets=3, size=2).mean == pytest.approx(1 + 8 - 2 * (1 + 27) / 2)


def test_kernel_distance_averages_subsets_that_never_change():
    x, y = random(2).normal(size=(60, 3)), random(3).normal(0.3, 1.0, (50, 3))
    found = kernel_distance(x, y, subsets=40, size=20)
    assert found == kernel_distance(x, y, subsets=40, size=20)
    assert found.std > 0.0
    whole = kernel_distance(x[:50], y, subsets=1, size=50).mean
    assert found.mean == pytest.approx(whole, abs=3.0 * found.std)


def test_kernel_distance_of_one_distribution_is_zero_on_average():
    sides = [(random(2 * n).normal(size=(50, 4)), random(2 * n + 1).normal(size=(50, 4)))
             for n in range(100)]  # fmt: skip
    values = [kernel_distance(x, y, subsets=1, size=50).mean for x, y in sides]
    assert min(values) < 0.0 < max(values)
    assert abs(np.mean(values)) < 3.0 * np.std(values) / 10.0


def test_cmmd_is_a_thousand_times_the_biased_sum_over_pairs():
    x, y = random(4).normal(size=(7, 5)), random(5).normal(1.0, 2.0, (4, 5))
    expected = 1000.0 * (
        pairs(gaussian, x, x, itself=True)
        + pairs(gaussian, y, y, itself=True)
        - 2.0 * pairs(gaussian, x, y, itself=True)
    )
    assert cmmd(x, y) == pytest.approx(expected, rel=1e-9)
    assert cmmd(3.0 * x, y / 7.0) == pytest.approx(expected, rel=1e-9)


def test_cmmd_by_hand():
    # Two opposite directions: |x - y|^2 = 4, so 1000 (1 + 1 - 2 exp(-4 / 200)).
    x, y = np.array([[2.0, 0.0]]), np.array([[-5.0, 0.0]])
    assert cmmd(x, y) == pytest.approx(2000.0 * (1.0 - np.exp(-0.02)), rel=1e-12)
    assert cmmd(x, x) == 0.0


def test_blocks_of_rows_change_nothing(monkeypatch):
    x, y = random(6).normal(size=(23, 4)), random(7).normal(1.0, 1.0, (31, 4))
    whole = cmmd(x, y)
    monkeypatch.setattr(mmd, "row_blocks", partial(row_blocks, entries=70))
    assert cmmd(x, y) == pytest.approx(whole, rel=1e-11)


def test_what_cannot_be_compared_is_refused():
    rows = random(8).normal(size=(999, 2))
    with pytest.raises(
        ValueError, match=r"kernel distance takes at least 1,000 samples .* not 999"
    ):
        kernel_distance(rows, rows)
    with pytest.raises(
        ValueError, match="CMMD takes at least 1 samples on each side, not 999 and 0"
    ):
        cmmd(rows, rows[:0])
    with pytest.raises(ValueError, match="width 2 cannot meet those of 1"):
        cmmd(rows, rows[:, :1])
    with pytest.raises(ValueError, match="row 3 of the features is zero"):
        cmmd(rows, np.where(np.arange(999)[:, None] == 3, 0.0, rows))
    for metric in (cmmd, partial(kernel_distance, size=10)):
        with pytest.raises(ValueError, match="row 3 of the features is not finite"):
            metric(rows, np.where(np.arange(999)[:, None] == 3, np.nan, rows))
