"""D^r is an area average, levels nest, and shares of rows add up whatever the batches."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from matryoshka_diffusion.config import LevelConfig, ModelConfig
from matryoshka_diffusion.pyramid import (
    Resolution,
    build_pyramid,
    down_sample,
    frames_as_rows,
    pad_rows,
    ragged,
    resolution_of,
    resolutions_of,
    rows_as_frames,
    rows_of_mix,
)
from matryoshka_diffusion.runs.grow import next_frames


def picture(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


small = st.integers(1, 4)


@given(small, small, small, small, st.integers(1, 3), st.integers(1, 3))
def test_down_sampling_averages_each_window(height, width, up, across, rows, channels):
    x = picture(rows, channels, height * up, width * across)
    windows = x.reshape(rows, channels, height, up, width, across)
    expected = windows.mean(dim=(3, 5))
    torch.testing.assert_close(down_sample(x, Resolution(height, width)), expected)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_down_sampling_in_two_steps_is_down_sampling_in_one(coarse, first, second):
    x = picture(2, 3, coarse * first * second, coarse * first * second)
    between = down_sample(x, Resolution(coarse * first, coarse * first))
    here = Resolution(coarse, coarse)
    torch.testing.assert_close(down_sample(between, here), down_sample(x, here))


def test_pooled_noise_is_smaller_by_the_side_ratio():
    pooled = down_sample(picture(64, 3, 32, 32), Resolution(8, 8))
    assert pooled.std().item() == pytest.approx(1 / 4, rel=0.02)


def test_the_same_resolution_is_the_same_picture():
    x = picture(2, 3, 6, 4)
    assert torch.equal(down_sample(x, Resolution(6, 4)), x)


# --- clips ---------------------------------------------------------------------------------------


@given(small, small, small, st.integers(1, 3), st.integers(1, 3))
def test_down_sampling_a_clip_keeps_first_frames_and_averages_each(frames, fewer, side, up, rows):
    x = picture(rows, 2, frames * fewer, side * up, side * up)
    expected = [down_sample(x[:, :, n * fewer], Resolution(side, side)) for n in range(frames)]
    found = down_sample(x, Resolution(side, side, frames))
    assert torch.equal(found, torch.stack(expected, dim=2))
    assert torch.equal(down_sample(x, Resolution(side, side)), expected[0])


def test_the_papers_pyramid_of_a_clip():
    resolutions = [Resolution(2, 2), Resolution(2, 2, 4), Resolution(4, 4, 4)]
    x = picture(3, 1, 4, 4, 4)
    levels = build_pyramid(x, resolutions)
    assert [tuple(level.shape) for level in levels] == [(3, 1, 2, 2), (3, 1, 4, 2, 2), x.shape]
    assert [resolution_of(level) for level in levels] == resolutions
    assert torch.equal(levels[1][:, :, 0], levels[0])
    assert torch.equal(levels[2], x)


def test_a_level_has_the_frames_that_its_config_says():
    video = next_frames(LevelConfig(side=8, widths=(32,), blocks=(1,), attention=(0,)), 4)
    picture_level = LevelConfig(side=8, widths=(32,), blocks=(1,), attention=(0,))
    model = ModelConfig(levels=(picture_level, video), embedding=32)
    assert resolutions_of(model) == (Resolution(8, 8), Resolution(8, 8, 4))
    assert [each.shape(3) for each in resolutions_of(model)] == [(3, 8, 8), (3, 4, 8, 8)]


@pytest.mark.parametrize(("given_frames", "frames"), [(None, 2), (3, 2), (2, 4)])
def test_frames_that_do_not_divide_are_refused(given_frames, frames):
    x = picture(1, *Resolution(4, 4, given_frames).shape(1))
    with pytest.raises(ValueError, match=f"a level of {frames} frames cannot be made of"):
        down_sample(x, Resolution(4, 4, frames))


@given(st.integers(0, 3), small)
def test_frames_become_rows_clip_by_clip_and_clips_again(rows, frames):
    x = picture(rows, 2, frames, 3, 3)
    flat = frames_as_rows(x)
    assert flat.shape == (rows * frames, 2, 3, 3)
    assert torch.equal(rows_as_frames(flat, frames), x)
    for row in range(rows):
        assert torch.equal(flat[row * frames], x[row, :, 0])
    assert frames_as_rows(flat) is flat
    assert rows_as_frames(flat, None) is flat


# --- sides -----------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [Resolution(3, 4), Resolution(4, 3), Resolution(16, 16)])
def test_sides_that_do_not_divide_are_refused(resolution):
    with pytest.raises(ValueError, match=r"8x8 cannot be averaged to \d+x\d+: .* multiples"):
        down_sample(picture(1, 1, 8, 8), resolution)


def test_a_pyramid_is_coarse_to_fine_and_ends_in_the_picture():
    x = picture(2, 3, 16, 16)
    sides = (4, 8, 16)
    pyramid = build_pyramid(x, [Resolution(side, side) for side in sides])
    assert [level.shape[-1] for level in pyramid] == list(sides)
    assert pyramid[-1] is x
    means = [level.mean(dim=(2, 3)) for level in pyramid]
    torch.testing.assert_close(means[0], means[2])


def test_ragged_levels_are_prefixes():
    pyramid = build_pyramid(picture(5, 1, 4, 4), [Resolution(2, 2), Resolution(4, 4)])
    coarse, fine = ragged(pyramid, (5, 3))
    assert torch.equal(coarse, pyramid[0])
    assert torch.equal(fine, pyramid[1][:3])
    assert [len(level) for level in ragged(pyramid, (5, 0))] == [5, 0]


def test_ragged_refuses_a_finer_level_with_more_rows():
    pyramid = build_pyramid(picture(5, 1, 4, 4), [Resolution(2, 2), Resolution(4, 4)])
    with pytest.raises(AssertionError, match="prefix"):
        ragged(pyramid, (3, 5))


@given(st.integers(0, 4), st.integers(0, 4))
def test_padding_appends_zero_rows(rows, missing):
    x = picture(rows, 2, 3, 3)
    padded = pad_rows(x, rows + missing)
    assert torch.equal(padded[:rows], x)
    assert padded[rows:].shape == (missing, 2, 3, 3)
    assert (padded[rows:] == 0).all()


# --- shares of rows --------------------------------------------------------------------------


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


@given(mixes(), st.integers(0, 10**7))
def test_the_shares_of_a_run_are_exact_to_a_row_a_level(mix, images):
    for level, rows in enumerate(rows_of_mix(mix, 0, images)):
        assert abs(rows - images * sum(mix[level:])) < len(mix)


@given(mixes(), st.integers(0, 10**7), st.integers(1, 3))
def test_a_finer_level_never_holds_more_rows_however_small_the_batch(mix, first, count):
    rows = rows_of_mix(mix, first, count)
    assert list(rows) == sorted(rows, reverse=True)


def test_the_extreme_mixes_are_all_or_nothing():
    assert rows_of_mix((0.0, 0.0, 1.0), 37, 8) == (8, 8, 8)
    assert rows_of_mix((1.0, 0.0, 0.0), 37, 8) == (8, 0, 0)
