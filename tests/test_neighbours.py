"""Precision, recall, density and coverage against loops, and where the answer is known."""

from __future__ import annotations

import tracemalloc
from functools import partial

import numpy as np
import pytest

from matryoshka_diffusion.metrics import mmd, neighbours
from matryoshka_diffusion.metrics.mmd import cmmd
from matryoshka_diffusion.metrics.neighbours import density_coverage, precision_recall
from matryoshka_diffusion.metrics.pairs import row_blocks


def random(seed):
    return np.random.default_rng(seed)


def distance(a, b):
    return float(np.sqrt(((a - b) ** 2).sum()))


def radius(points, index, k):
    others = [distance(points[index], p) for j, p in enumerate(points) if j != index]
    return sorted(others)[k - 1]


def share_inside(points, queries, k):
    """Of the queries, how many lie in a closed ball around a point."""
    radii = [radius(points, i, k) for i in range(len(points))]
    inside = [any(distance(q, p) <= r for p, r in zip(points, radii, strict=True)) for q in queries]
    return sum(inside) / len(inside)


def clouds(seed=0, real=40, made=30):
    return random(seed).normal(size=(real, 3)), random(seed + 1).normal(1.3, 0.9, (made, 3))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_shares_of_points_in_balls(k):
    real, made = clouds()
    found = precision_recall(real, made, k=k)
    assert found.precision == pytest.approx(share_inside(real, made, k), rel=1e-12)
    assert found.recall == pytest.approx(share_inside(made, real, k), rel=1e-12)
    assert 0.0 < found.precision < 1.0
    assert 0.0 < found.recall < 1.0


@pytest.mark.parametrize("k", [1, 3, 5])
def test_density_and_coverage_count_balls_around_real_points(k):
    real, made = clouds(2)
    radii = [radius(real, i, k) for i in range(len(real))]
    inside = [[distance(y, x) < r for y in made] for x, r in zip(real, radii, strict=True)]
    found = density_coverage(real, made, k=k)
    assert found.density == pytest.approx(sum(map(sum, inside)) / (k * len(made)), rel=1e-12)
    assert found.coverage == pytest.approx(sum(map(any, inside)) / len(real), rel=1e-12)
    assert 0.0 < found.coverage < 1.0


def test_by_hand_on_a_line():
    # Balls around real points (k = 1): 0 +- 1, 1 +- 1, 3 +- 2. Around samples: both +- 8.5.
    real, made = np.array([[0.0], [1.0], [3.0]]), np.array([[1.5], [10.0]])
    assert precision_recall(real, made, k=1) == (0.5, 1.0)
    assert density_coverage(real, made, k=1) == (pytest.approx(2 / 2), pytest.approx(2 / 3))


def test_equal_sets_overlap_wholly_and_distant_ones_not_at_all():
    grid = np.stack(np.meshgrid([0.0, 1.0, 3.0, 7.0], [0.0, 2.0, 5.0, 11.0]), -1).reshape(-1, 2)
    points = grid + np.arange(16)[:, None] / 64.0  # no ties, and exact in float64
    assert precision_recall(points, points) == (1.0, 1.0)
    assert density_coverage(points, points) == (1.0, 1.0)
    assert precision_recall(points, points + 1000.0) == (0.0, 0.0)
    assert density_coverage(points, points + 1000.0) == (0.0, 0.0)


def test_samples_of_one_picture_are_precise_and_recall_nothing_more():
    real = random(4).normal(size=(50, 2))
    made = real[:1] + 1e-6 * random(5).normal(size=(50, 2))
    found = precision_recall(real, made)
    assert found.precision == 1.0
    assert found.recall <= 1 / 50


def test_density_and_coverage_of_one_distribution_are_what_theory_says():
    # E[density] = 1 and, for n points on both sides (Naeem et al. 2020),
    # E[coverage] = 1 - (n - 1) ... (n - k) / ((2n - 1) ... (2n - k)).
    n, k = 100, 5
    missed = np.prod([(n - i) / (2 * n - i) for i in range(1, k + 1)])
    found = np.array(
        [density_coverage(*random(seed).normal(size=(2, n, 3)), k=k) for seed in range(200)]
    )
    error = found.std(axis=0) / np.sqrt(len(found))
    assert (np.abs(found.mean(axis=0) - [1.0, 1.0 - missed]) < 3.0 * error).all()
    assert (error < 0.01).all()


def test_blocks_of_rows_change_nothing(monkeypatch):
    real, made = clouds(8)
    whole = precision_recall(real, made), density_coverage(real, made)
    monkeypatch.setattr(neighbours, "row_blocks", partial(row_blocks, entries=100))
    assert (precision_recall(real, made), density_coverage(real, made)) == whole


@pytest.mark.parametrize("metric", [precision_recall, density_coverage, cmmd])
def test_all_pairs_never_lie_in_memory(metric, monkeypatch):
    n = 1200
    real, made = random(9).normal(size=(2, n, 2))
    for module in (neighbours, mmd):
        monkeypatch.setattr(module, "row_blocks", partial(row_blocks, entries=10 * n))
    tracemalloc.start()
    metric(real, made)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * n * n / 10


def test_what_cannot_be_compared_is_refused():
    real, made = clouds()
    with pytest.raises(ValueError, match="precision and recall takes at least 4 samples"):
        precision_recall(real, made[:3])
    with pytest.raises(ValueError, match="density and coverage takes at least 6 samples"):
        density_coverage(real[:5], made)
    with pytest.raises(ValueError, match="width 3 cannot meet those of 2"):
        density_coverage(real, made[:, :2])
    made[7, 1] = np.nan
    with pytest.raises(ValueError, match="row 7 of the features is not finite"):
        precision_recall(real, made)
