"""Prompt retrieval on cases where the answer can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from matryoshka_diffusion.metrics.retrieval import Retrieval, prompt_retrieval


def flat(*values, side=16, channels=3):
    """Pictures of one grey value each."""
    return np.stack([np.full((side, side, channels), value, np.uint8) for value in values])


def indices(*values):
    return np.array(values, np.int64)


def test_perfect_samples_are_all_found():
    training = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    chosen = indices(3, 49, 0, 17)
    assert prompt_retrieval(training[chosen], chosen, training) == Retrieval(1.0, 1.0, 4)


def test_shares_count_first_places_and_places_among_five():
    training = flat(0, 20, 40, 60, 80, 100, 120)
    samples = flat(1, 1, 1, 1)
    # The five nearest to 1 are 0, 20, 40, 60, 80 in this order.
    assert prompt_retrieval(samples, indices(0, 1, 4, 5), training) == Retrieval(0.25, 0.75, 4)


def test_among_equal_distances_the_lower_index_is_nearer():
    training = flat(10, 30)
    assert prompt_retrieval(flat(20), indices(0), training).first == 1.0
    assert prompt_retrieval(flat(20), indices(1), training).first == 0.0


def test_a_twin_of_the_prompted_picture_is_a_hit():
    training = flat(200, 10, 10)
    assert prompt_retrieval(flat(12), indices(2), training).first == 1.0
    assert prompt_retrieval(flat(12), indices(0), training).first == 0.0


def test_six_twins_are_as_good_as_one():
    training = flat(*[10] * 7, 200)
    assert prompt_retrieval(flat(10), indices(6), training) == Retrieval(1.0, 1.0, 1)
    assert prompt_retrieval(flat(10), indices(7), training) == Retrieval(0.0, 0.0, 1)


def test_pictures_are_compared_at_16_pixels():
    fine = np.zeros((2, 64, 64, 1), np.uint8)
    fine[0, ::4] = 80  # the same area averages from another arrangement of pixels
    fine[1, 1::4] = 80
    training = np.concatenate([flat(25, side=64, channels=1), fine])
    assert prompt_retrieval(flat(20, channels=1), indices(2), training).first == 1.0
    assert prompt_retrieval(flat(24, channels=1), indices(0), training).first == 1.0


def test_few_training_pictures_do_not_confuse_the_five_nearest():
    assert prompt_retrieval(flat(0, 99), indices(1, 1), flat(0, 100)) == Retrieval(0.5, 1.0, 2)


def test_the_result_reads_as_a_line():
    line = str(Retrieval(0.78125, 0.921875, 128))
    assert line == (
        "prompt retrieval over 128 captions: 0.781 nearest, 0.922 among the five nearest"
    )


@pytest.mark.parametrize(
    ("samples", "prompted", "training", "message"),
    [
        (flat(0)[:0], indices(), flat(0), "at least one sample"),
        (flat(0), indices(1), flat(0), r"outside 0 \.\. 0"),
        (flat(0), indices(-1), flat(0), r"outside 0 \.\. 0"),
        (flat(0, side=24), indices(0), flat(0), "side 24"),
        (flat(0), indices(0), flat(0, side=8), "side 8"),
    ],
)
def test_what_cannot_be_compared_is_refused(samples, prompted, training, message):
    with pytest.raises(ValueError, match=message):
        prompt_retrieval(samples, prompted, training)
