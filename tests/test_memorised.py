"""The share of memorised samples, against probabilities that are known."""

from __future__ import annotations

import numpy as np
import pytest

from matryoshka_diffusion.metrics import formulas
from matryoshka_diffusion.metrics.memorised import memorised


def random(seed):
    return np.random.default_rng(seed)


def test_copies_are_memorised_and_samples_far_from_all_images_are_not():
    real = random(0).normal(size=(200, 5))
    made = real[:50] + 1e-4
    assert memorised(real, made) == 1.0
    assert memorised(real, made + 100.0) == 0.0
    assert memorised(real, np.concatenate([made, made[:30] + 100.0])) == 50 / 80


def test_copies_of_an_image_that_is_there_twice_are_memorised():
    real = random(1).normal(size=(60, 3))
    assert memorised(np.repeat(real, 2, axis=0), real + 1e-4) == 1.0


@pytest.mark.parametrize(
    ("dimensions", "probability"), [(1, 2 / 3), (2, 6 * np.pi / (8 * np.pi + 3 * np.sqrt(3)))]
)
def test_fresh_points_are_as_often_nearest_to_each_other_as_in_a_poisson_process(
    dimensions, probability, monkeypatch
):
    real, made = random(2).random((2, 4000, dimensions))
    monkeypatch.setattr(formulas, "BLOCK_PAIRS", 2**21)
    assert memorised(real, made) == pytest.approx(probability, abs=0.02)


def test_the_share_is_counted_pair_by_pair():
    real, made = random(3).normal(size=(30, 3)), random(4).normal(size=(25, 3))

    def counts(sample):
        distances = [np.linalg.norm(sample - image) for image in real]
        nearest = int(np.argmin(distances))
        others = [np.linalg.norm(real[nearest] - real[i]) for i in range(30) if i != nearest]
        return distances[nearest] < min(others)

    assert memorised(real, made) == np.mean([counts(sample) for sample in made])
    with pytest.raises(ValueError, match="all are equal"):
        memorised(np.ones((3, 2)), np.ones((3, 2)))
