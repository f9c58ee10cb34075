"""D^r is an area average, levels nest, and shares of rows add up whatever the batches."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from matryoshka_diffusion.pyramid import (
    Resolution,
    build_pyramid,
    down_sample,
    frames_as_rows,
    pad_rows,
    ragged,
    resolution_of,
    rows_as_frames,
    rows_of_mix,
    up_sample,
)

small = st.integers(1, 4)


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# --- D^r -----------------------------------------------------------------------------------------


@given(small, small, small, small, st.integers(1, 3), st.integers(1, 3))
def test_down_sampling_averages_each_window(height, width, up, across, rows, channels):
    x = image(rows, channels, height * up, width * across)
    windows = x.reshape(rows, channels, height, up, width, across)
    result = down_sample(x, Resolution(height, width))
    torch.testing.assert_close(result, windows.mean(dim=(3, 5)))
    assert down_sample(x, resolution_of(x)) is x


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_down_sampling_in_two_steps_is_down_sampling_in_one(coarse, first, second):
    x = image(2, 3, coarse * first * second, coarse * first * second)
    between = down_sample(x, Resolution(coarse * first, coarse * first))
    here = Resolution(coarse, coarse)
    torch.testing.assert_close(down_sample(between, here), down_sample(x, here))


@given(small, small, small, st.integers(1, 3), st.integers(1, 3))
def test_down_sampling_a_clip_keeps_first_frames_and_averages_each(frames, fewer, side, up, rows):
    x = image(rows, 2, frames * fewer, side * up, side * up)
    expected = [down_sample(x[:, :, n * fewer], Resolution(side, side)) for n in range(frames)]
    result = down_sample(x, Resolution(side, side, frames))
    assert torch.equal(result, torch.stack(expected, dim=2))
    assert torch.equal(down_sample(x, Resolution(side, side)), expected[0])


def test_a_pyramid_is_coarse_to_fine_in_space_and_time_and_ends_in_the_clip():
    resolutions = [Resolution(2, 2), Resolution(2, 2, 4), Resolution(4, 4, 4)]
    x = image(3, 1, 4, 4, 4)
    levels = build_pyramid(x, resolutions)
    assert [resolution_of(level) for level in levels] == resolutions
    assert [tuple(level.shape[1:]) for level in levels] == [each.shape(1) for each in resolutions]
    assert torch.equal(levels[1][:, :, 0], levels[0])
    assert levels[2] is x


@pytest.mark.parametrize(
    ("fine", "coarse", "sizes"),
    [
        ((8, 8), Resolution(3, 4), "8x8 .* 3x4"),
        ((8, 8), Resolution(16, 16), "8x8 .* 16x16"),
        ((4, 4), Resolution(4, 4, 2), "2 frames .* no frames"),
        ((3, 4, 4), Resolution(4, 4, 2), "2 frames .* 3 frames"),
        ((2, 4, 4), Resolution(4, 4, 4), "4 frames .* 2 frames"),
    ],
)
def test_a_resolution_that_does_not_divide_is_refused(fine, coarse, sizes):
    with pytest.raises(ValueError, match=sizes):
        down_sample(image(1, 1, *fine), coarse)


def test_up_sampling_keeps_planes_and_is_nothing_at_the_same_side():
    ramp = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 1, 8, 8)
    fine = up_sample(ramp, Resolution(32, 32))
    expected = (torch.arange(32.0) + 0.5) / 4 - 0.5  # the centres of the finer pixels
    torch.testing.assert_close(fine[0, 0, 5], expected.clamp(0.0, 7.0))  # the border is repeated
    assert up_sample(ramp, Resolution(8, 8)) is ramp


@pytest.mark.parametrize("coarse", [Resolution(4, 4), Resolution(4, 4, 2), Resolution(8, 8, 2)])
def test_up_sampling_holds_a_frame_until_the_next_one(coarse: Resolution):
    x = image(2, 3, *coarse.shape(1)[1:])
    fine = up_sample(x, Resolution(8, 8, 4))
    assert resolution_of(fine) == Resolution(8, 8, 4)
    kept = down_sample(fine, Resolution(8, 8, coarse.frames))
    assert torch.equal(kept, up_sample(x, Resolution(8, 8, coarse.frames)))
    assert torch.equal(fine[:, :, 1], fine[:, :, 0])
    assert torch.equal(fine[:, :, 3], fine[:, :, 2])


@given(st.integers(0, 3), small)
def test_frames_become_rows_clip_by_clip_and_clips_again(rows, frames):
    x = image(rows, 2, frames, 3, 3)
    flat = frames_as_rows(x)
    assert flat.shape == (rows * frames, 2, 3, 3)
    assert all(torch.equal(flat[row * frames], x[row, :, 0]) for row in range(rows))
    assert torch.equal(rows_as_frames(flat, frames), x)
    assert frames_as_rows(flat) is rows_as_frames(flat, None) is flat


# --- ragged pyramids -----------------------------------------------------------------------------


@given(st.integers(0, 4), st.integers(0, 4))
def test_ragged_levels_are_prefixes_and_padding_appends_zero_rows(rows, missing):
    x = image(rows + missing, 2, 3, 3)
    _, prefix = ragged((x, x), (rows + missing, rows))
    assert torch.equal(prefix, x[:rows])
    padded = pad_rows(prefix, rows + missing)
    assert torch.equal(padded[:rows], prefix)
    assert padded.shape == x.shape
    assert not padded[rows:].any()


def mixes():
    """Shares in percent that sum to one, for one to four levels."""
    cuts = st.lists(st.integers(0, 100), max_size=3).map(lambda cuts: [0, *sorted(cuts), 100])
    return cuts.map(lambda ends: tuple((b - a) / 100 for a, b in itertools.pairwise(ends)))


@given(mixes(), st.integers(0, 10**9), st.lists(st.integers(1, 50), min_size=1, max_size=6))
def test_any_batches_of_a_span_hold_the_same_rows(mix, first, counts):
    whole = rows_of_mix(mix, first, sum(counts))
    starts = [first + sum(counts[:index]) for index in range(len(counts))]
    parts = [rows_of_mix(mix, *span) for span in zip(starts, counts, strict=True)]
    assert tuple(map(sum, zip(*parts, strict=True))) == whole
    assert whole[0] == sum(counts)
    assert all(list(rows) == sorted(rows, reverse=True) for rows in parts)


@given(mixes(), st.integers(0, 10**7))
def test_the_shares_of_a_run_are_exact_to_a_row_a_level(mix, images):
    for level, rows in enumerate(rows_of_mix(mix, 0, images)):
        assert abs(rows - images * sum(mix[level:])) < len(mix)
    assert rows_of_mix((0.0, 1.0), images, 8) == (8, 8)
    assert rows_of_mix((1.0, 0.0), images, 8) == (8, 0)
