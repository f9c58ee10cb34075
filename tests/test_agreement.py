"""Levels that are one picture agree; others differ by as much as they were made to."""

from __future__ import annotations

import numpy as np
import pytest

from matryoshka_diffusion.metrics.agreement import level_agreement


def pictures(side, count=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def averaged(fine, side):
    count, old, _, channels = fine.shape
    window = old // side
    return fine.reshape(count, side, window, side, window, channels).mean(axis=(2, 4))


def test_levels_of_one_picture_agree_up_to_the_rounding():
    fine = pictures(16)
    levels = [averaged(fine, side).round().astype(np.uint8) for side in (4, 8)]
    gaps = level_agreement([*levels, fine])
    assert gaps.shape == (3, 2)
    assert 0.0 < gaps.max() <= 0.5 / 255


def test_the_levels_of_a_clip_agree_in_space_and_time():
    """D^r in time is the first frame of every so many; a picture is the first of all."""
    clips = pictures(16, count=12).reshape(3, 4, 16, 16, 3)
    halved = averaged(clips[:, ::2].reshape(6, 16, 16, 3), 8).reshape(3, 2, 8, 8, 3)
    levels = [level.round().astype(np.uint8) for level in (halved[:, 0], halved)]
    assert level_agreement([*levels, clips]).max() <= 0.5 / 255
    other = averaged(clips[:, 1], 8).round().astype(np.uint8)
    assert level_agreement([other, clips]).min() > 0.01


def test_each_picture_and_level_has_its_own_difference():
    fine = np.full((2, 8, 8, 1), 100, np.uint8)
    coarse = np.full((2, 2, 2, 1), 100, np.uint8)
    middle = np.full((2, 4, 4, 1), 100, np.uint8)
    coarse[1] += 51
    middle[0, :2] -= 51
    np.testing.assert_allclose(
        level_agreement([coarse, middle, fine]), [[0.0, 0.1], [0.2, 0.0]], atol=1e-12
    )


def test_it_is_the_mean_distance_to_the_area_average():
    coarse, fine = pictures(4, seed=1), pictures(12, seed=2)
    expected = np.abs(averaged(fine / 255, 4) - coarse / 255).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(level_agreement([coarse, fine])[:, 0], expected, rtol=1e-12)


def test_one_level_has_nothing_to_agree_with():
    assert level_agreement([pictures(8)]).shape == (3, 0)


def test_levels_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="no levels"):
        level_agreement([])
    with pytest.raises(ValueError, match="levels of 2, 3 pictures"):
        level_agreement([pictures(4, count=2), pictures(8)])
    with pytest.raises(ValueError, match="8x8 cannot be averaged to 3x3"):
        level_agreement([pictures(3), pictures(8)])
