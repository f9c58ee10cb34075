"""Moments and the Fréchet distance against closed forms."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryoshka_diffusion.metrics import frechet as metrics
from matryoshka_diffusion.metrics.frechet import Moments, Reference, frechet_distance


def random(seed):
    return np.random.default_rng(seed)


def gaussian(mean, covariance, count=1000):
    """Moments that are exactly those of a Gaussian."""
    return Moments(count, np.asarray(mean, float), np.asarray(covariance, float) * (count - 1))


def close(a, b):
    assert a.count == b.count
    np.testing.assert_allclose(a.mean, b.mean, rtol=1e-12)
    np.testing.assert_allclose(a.scatter, b.scatter, rtol=0.0, atol=1e-12 * np.trace(b.scatter))


def test_moments_are_mean_and_unbiased_covariance():
    x = random(0).normal(3.0, 2.0, (50, 6))
    moments = Moments.of(x)
    np.testing.assert_allclose(moments.mean, x.mean(axis=0))
    np.testing.assert_allclose(moments.covariance, np.cov(x, rowvar=False))


@given(cuts=st.lists(st.integers(1, 39), max_size=6, unique=True).map(sorted))
def test_however_the_rows_are_cut_the_moments_are_the_same(cuts):
    x = random(1).normal(100.0, 1.0, (40, 5))
    close(Moments.stream(np.split(x, cuts)), Moments.of(x))


@pytest.mark.parametrize("gathered", [1, 7, 40, 41])
def test_however_many_rows_are_gathered_the_moments_are_the_same(gathered, monkeypatch):
    monkeypatch.setattr(metrics, "GATHERED", gathered)
    x = random(1).normal(100.0, 1.0, (40, 5))
    close(Moments.stream(np.split(x, range(3, 40, 3))), Moments.of(x))


@given(order=st.permutations(range(6)))
def test_in_whichever_order_parts_are_merged_the_moments_are_the_same(order):
    parts = [random(20 + n).normal(n, 1.0 + n, (3 + n, 4)) for n in range(6)]
    merged = reduce(Moments.merge, (Moments.of(parts[n]) for n in order))
    close(merged, Moments.of(np.concatenate(parts)))


def test_merging_commutes():
    a, b = Moments.of(random(2).normal(0, 1, (7, 4))), Moments.of(random(3).normal(5, 2, (30, 4)))
    close(a.merge(b), b.merge(a))


def test_float32_features_with_a_large_mean_keep_their_covariance():
    x = (1e4 + random(4).normal(0.0, 1.0, (20_000, 2))).astype(np.float32)
    exact = np.cov(x.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(Moments.stream(np.split(x, 200)).covariance, exact, rtol=1e-8)


def test_distance_in_one_dimension():
    # (m_a - m_b)^2 + (s_a - s_b)^2
    distance = frechet_distance(gaussian([1.0], [[4.0]]), gaussian([4.0], [[25.0]]))
    assert distance == pytest.approx(9.0 + 9.0, rel=1e-12)


def test_distance_of_covariances_that_commute():
    rotation, _ = np.linalg.qr(random(5).normal(size=(6, 6)))
    a, b = random(6).uniform(0.1, 3.0, (2, 6))
    one, other = (rotation * values @ rotation.T for values in (a, b))
    mean = random(7).normal(size=(2, 6))
    expected = np.square(mean[0] - mean[1]).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    distance = frechet_distance(gaussian(mean[0], one), gaussian(mean[1], other))
    assert distance == pytest.approx(expected, rel=1e-10)


def test_distance_to_a_linear_image_that_does_not_commute():
    # The optimal map of N(0, S) onto N(0, A S A) is x -> A x when A is symmetric and positive, so
    # the squared distance is E|x - A x|^2 = tr((I - A) S (I - A)).
    root, factor = random(8).normal(size=(2, 5, 5))
    covariance, a = root @ root.T, factor @ factor.T + 0.1 * np.eye(5)
    assert not np.allclose(covariance @ a, a @ covariance)
    rest = np.eye(5) - a
    distance = frechet_distance(
        gaussian(np.zeros(5), covariance), gaussian(np.zeros(5), a @ covariance @ a)
    )
    assert distance == pytest.approx(np.trace(rest @ covariance @ rest), rel=1e-9)


def test_samples_of_gaussians_are_as_far_apart_as_the_gaussians():
    root = random(13).normal(size=(4, 4)) / 2.0
    mean, stretch = np.array([1.0, 0.0, -1.0, 0.5]), np.array([0.5, 1.0, 1.5, 2.0])
    x = random(14).normal(size=(200_000, 4))
    y = random(15).normal(size=(200_000, 4)) * stretch @ root + mean
    exact = frechet_distance(
        gaussian(np.zeros(4), np.eye(4)), gaussian(mean, root.T * stretch**2 @ root)
    )
    # Independent of the above, since one side is the identity: |m|^2 + tr(1 + S - 2 S^(1/2)).
    values = np.linalg.eigvalsh(root.T * stretch**2 @ root)
    assert exact == pytest.approx((mean**2).sum() + np.square(1 - np.sqrt(values)).sum(), rel=1e-10)
    sampled = frechet_distance(*(Moments.stream(np.split(side, 100)) for side in (x, y)))
    assert sampled == pytest.approx(exact, rel=0.01)


def test_published_moments_are_a_reference():
    x = random(16).normal(size=(300, 5))
    moments, other = Moments.of(x), Moments.of(random(17).normal(1.0, 2.0, (200, 5)))
    reference = Reference(x.mean(axis=0), np.cov(x, rowvar=False))
    expected = frechet_distance(moments, other)
    assert frechet_distance(reference, other) == pytest.approx(expected, rel=1e-10)
    single = Reference(*(a.astype(np.float32) for a in (reference.mean, reference.covariance)))
    assert frechet_distance(other, single) == pytest.approx(expected, rel=1e-5)


def test_a_reference_that_makes_no_sense_is_refused():
    mean, covariance = np.zeros(3), np.eye(3)
    with pytest.raises(ValueError, match=r"width 3 cannot have a covariance of \(4, 4\)"):
        Reference(mean, np.eye(4))
    with pytest.raises(ValueError, match="values that are not finite"):
        Reference(mean, np.where(covariance > 0, np.nan, 0.0))
    with pytest.raises(ValueError, match="not symmetric"):
        Reference(mean, covariance + np.triu(np.ones((3, 3)), 1))
    with pytest.raises(ValueError, match="width 3 cannot meet those of 4"):
        frechet_distance(Reference(mean, covariance), Reference(np.zeros(4), np.eye(4)))


def test_distance_is_symmetric_and_zero_to_itself():
    a, b = (Moments.of(random(seed).normal(size=(60, 8))) for seed in (9, 10))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    assert 0.0 <= frechet_distance(a, a) < 1e-10


def test_fewer_samples_than_features_cost_no_precision():
    # A singular covariance: the usual sqrtm of the product turns complex or loses half the digits.
    x = random(11).normal(size=(10, 200))
    a = Moments.of(x)
    assert frechet_distance(a, Moments.of(x + 0.5)) == pytest.approx(200 * 0.25, rel=1e-9)
    assert frechet_distance(a, Moments.of(3.0 * (x - a.mean) + a.mean)) == pytest.approx(
        4.0 * np.trace(a.covariance), rel=1e-9
    )


def test_what_has_no_distance_is_refused():
    two = Moments.of(random(12).normal(size=(2, 3)))
    with pytest.raises(ValueError, match="at least 2 samples, not 1"):
        frechet_distance(two, Moments.of(np.zeros((1, 3))))
    with pytest.raises(ValueError, match="width 3 cannot meet those of 4"):
        frechet_distance(two, Moments.of(np.zeros((2, 4))))
    with pytest.raises(ValueError, match="width 3 cannot meet those of 4"):
        two.merge(Moments.of(np.zeros((2, 4))))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    x = np.zeros((4, 3))
    x[2, 1] = bad
    with pytest.raises(ValueError, match="row 2 of the features is not finite"):
        Moments.of(x)


def test_no_features_are_refused():
    with pytest.raises(ValueError, match="no features"):
        Moments.of(np.zeros((0, 3)))
    with pytest.raises(ValueError, match="no features"):
        Moments.stream([])
