"""Grids: every image in its place and at one size; files that store how they were made."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from matryoshka_diffusion.draw import clips, fonts, grid
from matryoshka_diffusion.draw.grid import SETTINGS_KEY, save_png
from test_clips_written import decode

RED, GREEN, BLUE = (220, 20, 20), (20, 200, 20), (20, 20, 220)
STILL = np.full((2, 4, 4, 3), 250, np.uint8)


def plain(colour, side=8):
    return np.full((side, side, 3), colour, np.uint8)


def boxes(image, colour):
    """Bounding box (left, top, right, bottom) of all pixels with exactly this colour."""
    rows, columns = np.nonzero((np.asarray(image) == colour).all(axis=2))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def count(image, colour):
    return int((np.asarray(image) == colour).all(axis=2).sum())


def numbered(frames, side, base):
    """Two clips; frame k of clip c has the colour (base + k, c, 1) all over."""
    levels = np.ones((2, frames, side, side, 3), np.uint8)
    levels[..., 0] = base + np.arange(frames)[:, None, None]
    levels[..., 1] = np.arange(2)[:, None, None, None]
    return levels


def test_images_of_every_level_have_the_same_size():
    image = grid.grid([[plain(RED, 16), plain(GREEN, 32), plain(BLUE, 64)]], cell=128)
    places = [boxes(image, colour) for colour in (RED, GREEN, BLUE)]
    assert {(right - left, low - top) for left, top, right, low in places} == {(128, 128)}
    assert [box[0] for box in places] == sorted(box[0] for box in places)
    assert len({box[1] for box in places}) == 1


@pytest.mark.parametrize("captions", [None, ["one", "two"]])
def test_the_size_of_a_grid_is_known_before_it_is_drawn(captions):
    drawn = grid.grid([[plain(RED)] * 3, [plain(BLUE)]], captions=captions, cell=40)
    assert drawn.size == grid.grid_size(2, 3, cell=40, captioned=captions is not None)


def test_enlarging_repeats_pixels_and_shrinking_averages_them():
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image = np.asarray(grid.grid([[picture]], cell=64))
    cell = image[grid.MARGIN : grid.MARGIN + 64, grid.MARGIN : grid.MARGIN + 64]
    assert (cell == picture.repeat(4, axis=0).repeat(4, axis=1)).all()
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[::2] = 200
    assert count(grid.grid([[stripes]], cell=32), (100, 100, 100)) == 32 * 32
    left, top, right, low = boxes(grid.grid([[np.full((8, 16, 3), RED, np.uint8)]], cell=32), RED)
    assert (right - left, low - top) == (32, 16)
    for grey in (np.full((8, 8, 1), 77, np.uint8), np.full((8, 8), 77, np.uint8)):
        assert count(grid.grid([[grey]], cell=16), (77, 77, 77)) == 16 * 16


def test_captions_stay_in_their_column_and_their_row():
    long = "a very long caption " * 50 + "incomprehensibilities" * 20
    bare, full = (
        grid.grid([[plain(RED)], [plain(RED)]], cell=64, captions=[text, ""]) for text in ("", long)
    )
    assert full.size == bare.size
    rows, columns = np.nonzero((np.asarray(full) != np.asarray(bare)).any(axis=2))
    assert len(rows)
    assert columns.max() < boxes(full, RED)[0]
    assert rows.max() < grid.MARGIN + 64 + grid.GAP


@pytest.mark.parametrize("caption", ["", "   ", "naïve café", "苹果 🍎", "tab\tand\nnew line"])
def test_any_caption_can_be_drawn(caption):
    grid.grid([[plain(RED)]], captions=[caption], title=caption, columns_titles=[caption])


@pytest.fixture
def no_fonts(monkeypatch):
    """A system without fonts and without matplotlib."""
    monkeypatch.setattr(fonts, "FONTS", ())
    monkeypatch.setattr(fonts, "find_spec", lambda name: None)
    monkeypatch.setattr(fonts, "_MISSING", set())
    monkeypatch.setenv("PATH", "")
    caches = (fonts._installed, fonts._known_to_fontconfig)
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


def captioned(caption):
    return np.asarray(grid.grid([[plain(RED)]], captions=[caption], cell=256))


@pytest.mark.parametrize("caption", ["Größe", "りんご x", "Пр", "a 🍎", "\ud83c"])
def test_a_letter_that_no_font_has_is_an_escape_and_no_box(caption, no_fonts):
    escaped = "".join(
        each if each.isascii() else each.encode("unicode_escape").decode() for each in caption
    )
    np.testing.assert_array_equal(captioned(caption), captioned(escaped))


@pytest.mark.parametrize(
    ("caption", "package"),
    [
        ("赤い", "fonts-noto-cjk"),
        ("리", "fonts-noto-cjk"),
        ("Пр", "fonts-noto-core"),
        ("a 🍎", "fonts-symbola"),
    ],
)
def test_a_font_to_install_is_named_once(caption, package, no_fonts):
    with pytest.warns(UserWarning, match=package) as found:
        grid.grid([[plain(RED)], [plain(RED)]], captions=[caption, caption])
    assert len(found) == 1


def test_a_font_that_fontconfig_knows_is_used(no_fonts, tmp_path, monkeypatch):
    with pytest.warns(UserWarning, match="fonts-noto-core"):
        escaped = captioned("ж")
    font = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    program = tmp_path / "fc-list"
    program.write_text(f"#!/bin/sh\n[ $3 = :charset=436 ] && echo '{font}' && echo /no/font.pfb\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    fonts._known_to_fontconfig.cache_clear()
    assert (captioned("ж") != escaped).any()
    assert (captioned("ж") != captioned(fonts.NOWHERE)).any()


@pytest.mark.parametrize("caption", ["Größe", "Привет", "Ελληνικά", "€ ®"])
def test_letters_of_other_fonts_are_drawn(caption):
    """By matplotlib's font, where the system has none."""
    escaped = caption.encode("unicode_escape").decode()
    assert (captioned(caption) != captioned(escaped)).any()
    box = captioned(fonts.NOWHERE)
    assert (captioned(caption[0]) != box).any()
    assert fonts.width_of(caption, 13) > fonts.width_of(caption[0], 13) > 0


def test_letters_that_are_written_in_two_ways_are_drawn_in_one():
    np.testing.assert_array_equal(captioned("e\u0301\ufe0f\u200d"), captioned("\xe9"))


def test_marks_highlight_rows_and_titles_stand_above():
    rows = [[plain(RED)], [plain(BLUE)]]
    marked = grid.grid(rows, captions=["seen", "new"], marks=[None, "unseen combination"])
    _, top, _, low = boxes(marked, grid.MARKED)
    assert boxes(marked, RED)[1] < top < boxes(marked, BLUE)[1] < low
    assert count(marked, grid.ACCENT) > 0
    titled = grid.grid(rows, title="A title", columns_titles=["16 px"])
    assert boxes(titled, RED)[1] > boxes(grid.grid(rows), RED)[1] + grid.TITLE_SIZE
    above = titled.crop((0, 0, titled.width, boxes(titled, RED)[1]))
    assert count(above, grid.INK) > 0


def test_captions_grow_with_the_cells():
    def height(cell):
        sheet = grid.grid([[plain(RED)]], captions=["H"], cell=cell)
        _, top, _, low = boxes(sheet, grid.INK)
        return low - top

    assert height(64) == height(128)
    assert height(256) > 1.6 * height(128)


def test_blocks_stand_side_by_side_and_empty_cells_stay_empty():
    rows = [[plain((10 * n, 5, 5))] for n in range(1, 6)]
    tall, broad = (grid.grid(rows, cell=32, captions=list("abcde"), blocks=n) for n in (1, 2))
    assert broad.width == 2 * tall.width
    assert broad.height < tall.height
    for [picture] in rows:
        assert count(broad, tuple(picture[0, 0])) == 32 * 32
    assert boxes(broad, (40, 5, 5))[1] == boxes(broad, (10, 5, 5))[1]
    gaps = grid.grid([[plain(RED), None], [None, plain(RED)]], cell=32)
    assert count(gaps, RED) == 2 * 32 * 32


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "at least one"),
        ([[]], {}, "at least one"),
        ([[plain(RED)]], {"captions": ["a", "b"]}, "captions has 2"),
        ([[plain(RED)]], {"marks": []}, "marks has 0"),
        ([[plain(RED)]], {"columns_titles": ["a", "b"]}, "columns_titles has 2"),
        ([[np.zeros((4, 4, 5), np.uint8)]], {}, r"\(4, 4, 5\)"),
        ([[np.zeros((0, 4, 3), np.uint8)]], {}, r"\(0, 4, 3\)"),
    ],
)
def test_a_grid_refuses_lists_that_do_not_fit(rows, options, message):
    with pytest.raises(ValueError, match=message):
        grid.grid(rows, **options)


# --- levels and clips --------------------------------------------------------------------------


def test_each_moment_has_the_frame_of_every_level():
    levels = [STILL, numbered(2, 4, 100), numbered(4, 8, 200)]
    values = [[int(level[0, 0, 0, 0]) for level in moment] for moment in grid.moments(levels)]
    assert values == [[250, 100, 200], [250, 100, 201], [250, 101, 202], [250, 101, 203]]
    assert len(list(grid.moments([STILL, STILL]))) == 1


def test_a_sheet_has_a_page_for_every_moment():
    levels, captions = [STILL, numbered(3, 8, 100)], ["one", "two"]
    drawn = grid.pages(levels, captions=captions, title="T", cell=32)
    assert len(drawn) == 3
    for moment, page in enumerate(drawn):
        expected = grid.grid(
            [[STILL[clip], levels[1][clip, moment]] for clip in range(2)],
            captions=captions,
            columns_titles=["4 px", "3x8 px"],
            title="T",
            cell=32,
        )
        np.testing.assert_array_equal(np.asarray(page), np.asarray(expected))


@pytest.mark.parametrize(
    ("frames", "values"), [(1, [0]), (8, range(8)), (9, [0, 2, 4, 6, 8]), (16, range(0, 16, 2))]
)
def test_a_film_strip_has_every_kth_frame_of_each_clip(frames, values):
    image = grid.strip(numbered(frames, 4, 100), ["one", "two"])
    counts = [count(image, (100 + frame, 1, 1)) for frame in range(frames)]
    assert counts == [128 * 128 * (frame in values) for frame in range(frames)]


def test_one_page_is_a_png_and_several_are_an_animation(tmp_path):
    settings = {"seeds": [1]}
    (page,) = grid.pages([STILL])
    path = clips.save_pages([page], tmp_path / "v1.5", 4.0, settings)
    assert path == tmp_path / "v1.5.png"
    with Image.open(path) as file:
        assert json.loads(file.info[SETTINGS_KEY]) == settings
        np.testing.assert_array_equal(np.asarray(file), np.asarray(page))
    drawn = grid.pages([numbered(3, 4, 100)])
    path = clips.save_pages(drawn, tmp_path / "v1.5", 4.0, settings)
    assert path == tmp_path / "v1.5.webp"
    decoded = decode(path)
    np.testing.assert_array_equal(decoded.frames, np.stack([np.asarray(page) for page in drawn]))
    assert (decoded.settings, decoded.seconds) == (settings, 0.75)
    # A run whose clips are faster than a WebP can be has previews all the same.
    decoded = decode(clips.save_pages(drawn, tmp_path / "b", 1000.0, None))
    assert decoded.seconds == pytest.approx(3 / 90, abs=0.001)
    assert np.diff([*decoded.begins, decoded.seconds]).min() > 0.0105, "browsers show 10 ms as 100"


# --- PNG files ---------------------------------------------------------------------------------


def test_a_png_stores_its_settings_and_its_pixels(tmp_path):
    settings = {"prompt": "red apple, naïve 🍎", "seed": 7, "guidance": [3.0]}
    picture = np.random.default_rng(1).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    save_png(picture, tmp_path / "new" / "a.png", settings)
    with Image.open(tmp_path / "new" / "a.png") as file:
        assert json.loads(file.text[SETTINGS_KEY]) == settings
        assert (np.asarray(file) == picture).all()
    save_png(np.zeros((4, 4, 1), np.uint8), tmp_path / "grey.png", None)
    with Image.open(tmp_path / "grey.png") as file:
        assert (file.mode, file.text) == ("L", {})


def test_a_png_that_cannot_be_written_names_its_path(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/a\.png"):
        save_png(plain(RED), tmp_path / "file" / "a.png", None)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
