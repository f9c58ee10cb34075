"""Standard errors against derivatives by hand, closed forms and repeated draws."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from matryoshka_diffusion.metrics import errors, formulas
from matryoshka_diffusion.metrics.errors import (
    frechet_influence,
    mean_error,
    mmd_influence,
    share_error,
    wasserstein_influence,
)
from matryoshka_diffusion.metrics.formulas import (
    Moments,
    cmmd,
    frechet_distance,
    kernel_distance,
    wasserstein,
)


def random(seed):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_error_of_a_share_is_half_of_wilsons_interval(share):
    """Its ends are the shares q that lie one of their own deviations away from p."""
    n, error = 128, share_error(share, 128)
    middle = (share + 0.5 / n) / (1.0 + 1.0 / n)
    for q in (middle - error, middle + error):
        assert (share - q) ** 2 == pytest.approx(q * (1.0 - q) / n, abs=1e-12)
    assert error > 0.0


def test_the_error_of_a_mean_is_that_of_repeated_means():
    rows = random(0).gamma(2.0, size=(4000, 50))
    assert mean_error(rows[0]) == pytest.approx(np.std(rows[0], ddof=1) / np.sqrt(50))
    assert np.mean([mean_error(row) for row in rows]) == pytest.approx(
        rows.mean(axis=1).std(), rel=0.05
    )


def frechet(real, made):
    return frechet_distance(Moments.of(real), Moments.of(made))


def frechet_terms(real, made):
    return frechet_influence(Moments.of(real), Moments.of(made))(made)


def cmmd_terms(real, made):
    return 1000.0 * mmd_influence(formulas.gaussian, formulas.unit(real), formulas.unit(made))


def motion(real, made):
    return wasserstein(real[:, 0], made[:, 0])


def motion_terms(real, made):
    return wasserstein_influence(real[:, 0], made[:, 0])


DISTANCES = {
    "fd": (frechet, frechet_terms),
    "cmmd": (cmmd, cmmd_terms),
    "motion": (motion, motion_terms),
}


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("features", [3, 40])  # 40 are more than there are samples
def test_influence_is_the_derivative_of_the_distance_by_a_samples_weight(name, features):
    """Every sample many times, and one of them once more: that is a little more weight for it."""
    distance, terms = DISTANCES[name]
    real, made = random(1).normal(size=(61, features)), random(2).normal(0.4, 1.3, (12, features))
    times = 100
    many = np.repeat(made, times, axis=0)
    unchanged = distance(real, many)
    changed = [distance(real, np.concatenate([many, made[i : i + 1]])) for i in range(3)]
    slopes = [(one - unchanged) * (len(many) + 1) for one in changed]
    influence = terms(real, many)[::times]
    expected = influence[:3] - influence.mean()
    np.testing.assert_allclose(slopes, expected, rtol=0.03, atol=0.03 * np.abs(expected).max())


def kernel(real, made):
    return kernel_distance(real, made, subsets=4, size=100).mean


DRAWN = {**DISTANCES, "kd": (kernel, partial(mmd_influence, formulas.cubic))}


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_error_of_a_distance_is_that_of_repeated_draws(name, shift):
    distance, terms = DRAWN[name]
    real = random(3).normal(size=(400, 5))

    def draw(seed):
        return random(seed).normal(shift, 1.0 + shift, (100, 5))

    deviation = np.std([distance(real, draw(seed)) for seed in range(300)])
    error = np.mean([mean_error(terms(real, draw(seed))) for seed in range(300, 330)])
    assert 0.85 * deviation < error < (1.2 if shift else 2.0) * deviation


def test_large_sets_are_compared_with_some_of_their_rows(monkeypatch):
    real, made = random(4).normal(size=(3000, 4)), random(5).normal(0.5, 1.0, (500, 4))
    influence = partial(mmd_influence, formulas.cubic, real, made)
    whole = mean_error(influence())
    monkeypatch.setattr(errors, "MOST", 400)
    assert mean_error(influence()) == pytest.approx(whole, rel=0.1)
    np.testing.assert_array_equal(influence(), influence())
