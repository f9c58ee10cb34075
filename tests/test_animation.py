"""Sheets that move: every level at its own pace, the same page with another frame."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image, ImageSequence
from PIL.ExifTags import Base

from matryoshka_diffusion.draw import animation, sheet
from test_clip_files import decode
from test_sheet import count

STILL = np.full((2, 4, 4, 3), 250, np.uint8)


def counted(frames, side, base, clips=2):
    """Clips whose frame k is of the colour (base + k, clip, 1) all over."""
    levels = np.ones((clips, frames, side, side, 3), np.uint8)
    levels[..., 0] = base + np.arange(frames)[:, None, None]
    levels[..., 1] = np.arange(clips)[:, None, None, None]
    return levels


def test_levels_show_at_every_moment_what_they_have_then():
    levels = [STILL, counted(2, 4, 100), counted(4, 8, 200)]
    shown = [[int(level[0, 0, 0, 0]) for level in moment] for moment in animation.moments(levels)]
    assert shown == [[250, 100, 200], [250, 100, 201], [250, 101, 202], [250, 101, 203]]
    assert [len(list(animation.moments([STILL] * n))) for n in (1, 3)] == [1, 1]


def test_a_sheet_has_a_page_for_every_moment_that_is_an_ordinary_grid():
    levels = [STILL, counted(3, 8, 100)]
    captions = ["one", "two"]
    drawn = animation.pages(levels, captions=captions, title="T", cell=32)
    assert len(drawn) == 3
    for moment, page in enumerate(drawn):
        expected = sheet.grid(
            [[STILL[clip], levels[1][clip, moment]] for clip in range(2)],
            captions=captions,
            columns_titles=["4 px", "3x8 px"],
            title="T",
            cell=32,
        )
        np.testing.assert_array_equal(np.asarray(page), np.asarray(expected))


@pytest.mark.parametrize(
    ("frames", "shown"), [(1, [0]), (8, range(8)), (9, [0, 2, 4, 6, 8]), (16, range(0, 16, 2))]
)
def test_a_film_strip_has_every_kth_frame_of_each_clip(frames, shown):
    image = animation.strip(counted(frames, 4, 100), ["one", "two"])
    found = {frame: count(image, (100 + frame, 1, 1)) for frame in range(frames)}
    assert found == {frame: 128 * 128 * (frame in shown) for frame in range(frames)}
    assert animation.strip(counted(2, 4, 100)).width == 2 * 128 + sheet.GAP + 2 * sheet.MARGIN


def test_a_sheet_moves_no_faster_than_it_can(tmp_path):
    """A run whose clips are written with more frames per second has previews all the same."""
    path = animation.save_pages(animation.pages([counted(6, 4, 100)]), tmp_path / "a", 1000.0, None)
    found = decode(path)
    assert found.seconds == pytest.approx(6 / 90, abs=0.001)
    assert np.diff([*found.begins, found.seconds]).min() > 0.0105, "10 ms are shown as 100"


def test_a_page_is_a_png_and_several_are_an_animation(tmp_path):
    settings = {"seeds": [1]}
    (page,) = animation.pages([STILL])
    path = animation.save_pages([page], tmp_path / "v1.5", 4.0, settings)
    assert path == tmp_path / "v1.5.png"
    with Image.open(path) as file:
        assert json.loads(file.info[sheet.SETTINGS_KEY]) == settings
        np.testing.assert_array_equal(np.asarray(file), np.asarray(page))
    drawn = animation.pages([counted(3, 4, 100)])
    path = animation.save_pages(drawn, tmp_path / "v1.5", 4.0, settings)
    assert path == tmp_path / "v1.5.webp"
    with Image.open(path) as file:
        assert json.loads(file.getexif()[Base.ImageDescription]) == {sheet.SETTINGS_KEY: settings}
        for image, expected in zip(ImageSequence.Iterator(file), drawn, strict=True):
            np.testing.assert_array_equal(np.asarray(image.convert("RGB")), np.asarray(expected))
            assert image.info["duration"] == 250
