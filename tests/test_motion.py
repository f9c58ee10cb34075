"""Frame differences against what is known of patterns that move, and of numbers on a line."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryoshka_diffusion.metrics.motion import SLIGHT, compare_motion, motion, wasserstein

NUMBERS = st.lists(st.floats(0.0, 2.0), min_size=1, max_size=8).map(np.array)


def clips(frames):
    """One clip (f, h, w, 1) of the frames (f, h, w)."""
    return np.asarray(frames, np.uint8)[None, ..., None]


def test_a_clip_of_one_repeated_frame_does_not_move():
    picture = np.random.default_rng(0).integers(0, 256, (8, 8))
    assert motion(clips([picture] * 5)) == [0.0]


def test_black_and_white_in_turn_move_as_much_as_can_be():
    assert motion(clips([np.full((2, 2), 255 * (t % 2)) for t in range(4)])) == [2.0]


@pytest.mark.parametrize("speed", [0, 1, 2, 3])
def test_a_ramp_that_is_pushed_along_changes_by_speed_times_slope(speed):
    """x(i, t) = 4 (i - v t): every pixel changes by 4 v bytes, whichever way bytes go."""
    ramp = [100 + 4 * (np.arange(8) - speed * t) for t in range(6)]
    frames = np.broadcast_to(np.array(ramp)[:, None], (6, 8, 8))
    expected = 4 * speed * 2.0 / 255.0
    np.testing.assert_allclose(motion(clips(frames)), [expected], rtol=1e-12)
    np.testing.assert_allclose(motion(clips(frames[::-1])), [expected], rtol=1e-12)


def test_each_clip_has_its_own_motion_however_they_are_batched():
    many = np.random.default_rng(1).integers(0, 256, (6, 4, 8, 8, 3), dtype=np.uint8)
    x = many / 127.5 - 1.0
    expected = np.abs(x[:, 1:] - x[:, :-1]).mean(axis=(1, 2, 3, 4))
    np.testing.assert_allclose(motion(many), expected, rtol=1e-12)
    alone = np.concatenate([motion(many[n : n + 1]) for n in range(6)])
    np.testing.assert_array_equal(motion(many), alone)


def test_an_eye_that_blinks_moves_slightly_and_is_not_still():
    eye = np.zeros((2, 64, 64), np.uint8)
    eye[1, :2, :2] = 255
    [found] = motion(clips(eye))
    assert 0.0 < found < SLIGHT


def test_one_frame_cannot_move():
    with pytest.raises(ValueError, match="clips of one frame"):
        motion(np.zeros((3, 1, 4, 4, 3), np.uint8))


# --- two sets ----------------------------------------------------------------------------------


def test_shifted_numbers_are_as_far_apart_as_the_shift():
    values = np.random.default_rng(2).random(50)
    assert wasserstein(values, values + 0.3) == pytest.approx(0.3, rel=1e-12)
    assert wasserstein(values, values[::-1]) == 0.0


@given(a=NUMBERS, b=NUMBERS)
def test_it_is_the_cost_of_moving_sorted_numbers(a, b):
    """Each number as often as the other side is long: then the i-th smallest go to each other."""
    pairs = np.sort(np.repeat(a, len(b))), np.sort(np.repeat(b, len(a)))
    assert wasserstein(a, b) == pytest.approx(np.abs(pairs[0] - pairs[1]).mean(), abs=1e-12)


def test_samples_that_move_half_as_much():
    real = np.array([0.1, 0.2, 0.3])
    found = compare_motion(real, real / 2)
    assert found.ratio == pytest.approx(0.5)
    assert found.distance == pytest.approx(0.1)
    assert (found.slight, found.slight_real) == (0.0, 0.0)


def test_what_hardly_moves_is_told_apart():
    real = np.array([0.0, 0.2, SLIGHT / 2, 0.4])
    found = compare_motion(real, np.zeros(10))
    assert (found.ratio, found.slight, found.slight_real) == (0.0, 1.0, 0.5)
    assert found.distance == pytest.approx(real.mean())


def test_what_cannot_be_compared_is_refused():
    some = np.array([0.1])
    with pytest.raises(ValueError, match="none of the real clips moves"):
        compare_motion(np.zeros(3), some)
    with pytest.raises(ValueError, match="at least 1 samples on each side, not 1 and 0"):
        compare_motion(some, some[:0])
    with pytest.raises(ValueError, match="not finite"):
        compare_motion(some, np.array([np.nan]))
