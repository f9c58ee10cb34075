"""The Inception score where it is known."""

from __future__ import annotations

import numpy as np
import pytest

from matryoshka_diffusion.metrics.inception_score import inception_score


def one_hot(labels, classes):
    return np.eye(classes)[labels]


def test_sure_of_every_class_equally_often_scores_the_number_of_classes():
    found = inception_score(one_hot(np.arange(80) % 8, 8))
    assert found == (pytest.approx(8.0, rel=1e-12), pytest.approx(0.0, abs=1e-12))


def test_always_the_same_distribution_scores_one():
    row = np.random.default_rng(0).dirichlet(np.ones(6))
    assert inception_score(np.tile(row, (30, 1))).mean == pytest.approx(1.0, rel=1e-12)


def test_splits_are_scored_apart():
    # Within each half there is one class: clear, but without any variety.
    labels = np.repeat([0, 1], 10)
    assert inception_score(one_hot(labels, 2), splits=2).mean == pytest.approx(1.0)
    assert inception_score(one_hot(labels, 2), splits=1).mean == pytest.approx(2.0)
    # 3 of one class, then one of each of 3: scores 1 and 3, so mean 2 and deviation 1.
    assert inception_score(one_hot([0, 0, 0, 0, 1, 2], 3), splits=2) == pytest.approx((2.0, 1.0))


def test_it_is_the_divergence_written_as_loops():
    rows = np.random.default_rng(1).dirichlet(np.full(5, 0.3), size=23)
    scores = []
    for first, last in ((0, 7), (7, 15), (15, 23)):  # 23 * 1 // 3 and 23 * 2 // 3
        part = rows[first:last]
        mean = part.mean(axis=0)
        divergence = [
            sum(p * (np.log(p) - np.log(q)) for p, q in zip(row, mean, strict=True)) for row in part
        ]
        scores.append(np.exp(sum(divergence) / len(part)))
    expected = (np.mean(scores), np.std(scores))
    assert inception_score(rows, splits=3) == pytest.approx(expected, rel=1e-10)


def test_what_has_no_score_is_refused():
    with pytest.raises(ValueError, match="at least 10 samples, one a split, not 9"):
        inception_score(one_hot(np.zeros(9, int), 3))
    rows = one_hot(np.zeros(12, int), 3)
    rows[4, 1] = 0.5
    with pytest.raises(ValueError, match="row 4 of the probabilities is no distribution"):
        inception_score(rows)
    rows[2, 1] = np.nan
    with pytest.raises(ValueError, match="row 2 of the features is not finite"):
        inception_score(rows)
