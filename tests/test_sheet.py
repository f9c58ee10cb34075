"""Sheets: every picture in its place and at the same size; files that say how they were made."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from matryoshka_diffusion.draw import sheet
from matryoshka_diffusion.eval import demo_sheet as report
from matryoshka_diffusion.rng import choose

RED, GREEN, BLUE = (220, 20, 20), (20, 200, 20), (20, 20, 220)


def plain(colour, side=8, channels=3):
    return np.full((side, side, channels), colour[:channels], np.uint8)


def boxes(image, colour):
    """Bounding box (left, top, right, bottom) of all pixels with exactly this colour."""
    rows, columns = np.nonzero((np.asarray(image) == colour).all(axis=2))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def count(image, colour):
    return int((np.asarray(image) == colour).all(axis=2).sum())


def test_pictures_of_every_level_are_shown_at_the_same_size():
    image = sheet.grid([[plain(RED, 16), plain(GREEN, 32), plain(BLUE, 64)]], cell=128)
    found = [boxes(image, colour) for colour in (RED, GREEN, BLUE)]
    assert {(right - left, low - top) for left, top, right, low in found} == {(128, 128)}
    assert [box[0] for box in found] == sorted(box[0] for box in found)
    assert len({box[1] for box in found}) == 1


@pytest.mark.parametrize("captions", [None, ["one", "two"]])
def test_the_size_of_a_grid_is_known_before_it_is_drawn(captions):
    drawn = sheet.grid([[plain(RED)] * 3, [plain(BLUE)]], captions=captions, cell=40)
    assert drawn.size == sheet.grid_size(2, 3, cell=40, captioned=captions is not None)


def test_enlarging_repeats_pixels():
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image = np.asarray(sheet.grid([[picture]], cell=64))
    shown = image[sheet.MARGIN : sheet.MARGIN + 64, sheet.MARGIN : sheet.MARGIN + 64]
    assert (shown == picture.repeat(4, axis=0).repeat(4, axis=1)).all()


def test_larger_pictures_are_averaged_and_others_keep_their_shape():
    checker = np.zeros((64, 64, 3), np.uint8)
    checker[::2] = 200
    assert count(sheet.grid([[checker]], cell=32), (100, 100, 100)) == 32 * 32
    wide = np.full((8, 16, 3), RED, np.uint8)
    left, top, right, low = boxes(sheet.grid([[wide]], cell=32), RED)
    assert (right - left, low - top) == (32, 16)


def test_grey_pictures_with_and_without_a_channel_axis():
    for picture in (np.full((8, 8, 1), 77, np.uint8), np.full((8, 8), 77, np.uint8)):
        assert count(sheet.grid([[picture]], cell=16), (77, 77, 77)) == 16 * 16


def test_captions_stay_in_their_column_and_their_row():
    bare = sheet.grid([[plain(RED)], [plain(RED)]], cell=64, captions=["", ""])
    long = "a very long caption " * 50 + "incomprehensibilities" * 20
    full = sheet.grid([[plain(RED)], [plain(RED)]], cell=64, captions=[long, ""])
    assert full.size == bare.size
    rows, columns = np.nonzero((np.asarray(full) != np.asarray(bare)).any(axis=2))
    assert len(rows)
    assert columns.max() < boxes(full, RED)[0]
    assert rows.max() < sheet.MARGIN + 64 + sheet.GAP


@pytest.mark.parametrize("caption", ["", "   ", "naïve café", "苹果 🍎", "tab\tand\nnew line"])
def test_any_caption_can_be_drawn(caption):
    sheet.grid([[plain(RED)]], captions=[caption], title=caption, columns_titles=[caption])


def test_a_mark_sets_its_row_off():
    image = sheet.grid(
        [[plain(RED)], [plain(BLUE)]], captions=["seen", "new"], marks=[None, "unseen combination"]
    )
    _, top, _, low = boxes(image, sheet.MARKED)
    assert top < boxes(image, BLUE)[1] < low
    assert top > boxes(image, RED)[1]
    assert count(image, sheet.ACCENT) > 0


def test_titles_stand_above_the_pictures():
    without = sheet.grid([[plain(RED)]])
    titled = sheet.grid([[plain(RED)]], title="A title", columns_titles=["16 px"])
    assert boxes(titled, RED)[1] > boxes(without, RED)[1] + sheet.TITLE_SIZE
    above = titled.crop((0, 0, titled.width, boxes(titled, RED)[1]))
    assert count(above, sheet.INK) > 0


def test_missing_pictures_leave_their_cell_empty():
    image = sheet.grid([[plain(RED), None], [None, plain(RED)]], cell=32)
    assert count(image, RED) == 2 * 32 * 32


def test_blocks_stand_side_by_side_and_lose_nothing():
    rows = [[plain((10 * n, 5, 5))] for n in range(1, 6)]
    tall, broad = (sheet.grid(rows, cell=32, captions=list("abcde"), blocks=n) for n in (1, 2))
    assert broad.width == 2 * tall.width
    assert broad.height < tall.height
    for [picture] in rows:
        assert count(broad, tuple(picture[0, 0])) == 32 * 32
    assert boxes(broad, (40, 5, 5))[1] == boxes(broad, (10, 5, 5))[1]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "at least one picture"),
        ([[]], {}, "at least one picture"),
        ([[plain(RED)]], {"captions": ["a", "b"]}, "captions has 2 entries for 1"),
        ([[plain(RED)]], {"marks": []}, "marks has 0 entries for 1"),
        ([[plain(RED)]], {"columns_titles": ["a", "b"]}, "columns_titles has 2 entries for 1"),
        ([[np.zeros((4, 4, 2), np.uint8)]], {}, r"not \(4, 4, 2\)"),
        ([[np.zeros((0, 4, 3), np.uint8)]], {}, r"not \(0, 4, 3\)"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(rows, options, message):
    with pytest.raises(ValueError, match=message):
        sheet.grid(rows, **options)


def test_a_png_remembers_its_settings(tmp_path):
    settings = {"prompt": "red apple, naïve 🍎", "seed": 7, "guidance": [3.0]}
    picture = np.random.default_rng(1).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    sheet.save_png(picture, tmp_path / "new" / "a.png", settings)
    with Image.open(tmp_path / "new" / "a.png") as file:
        assert json.loads(file.text[sheet.SETTINGS_KEY]) == settings
        assert (np.asarray(file) == picture).all()


def test_a_png_without_settings_and_of_an_image(tmp_path):
    sheet.save_png(sheet.grid([[plain(RED)]]), tmp_path / "a.png", None)
    with Image.open(tmp_path / "a.png") as file:
        assert not file.text


def test_a_grey_png_stays_grey(tmp_path):
    sheet.save_png(np.zeros((4, 4, 1), np.uint8), tmp_path / "a.png", None)
    with Image.open(tmp_path / "a.png") as file:
        assert file.mode == "L"


def test_a_png_that_cannot_be_written_names_its_path(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/a\.png"):
        sheet.save_png(plain(RED), tmp_path / "file" / "a.png", None)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --- the demo's sheet ------------------------------------------------------------------------


def test_the_demo_sheet_has_every_level_beside_the_real_picture():
    levels = [
        np.stack([plain((value + n, 1, 1), side) for n in range(24)])
        for value, side in ((50, 16), (100, 32), (150, 64))
    ]
    real = [plain((200 + n, 1, 1), 64) for n in range(20)]
    captions = [f"picture {n}" for n in range(24)]
    image = report.demo_sheet(levels, captions, [*real, None, None, None, None], title="Demo")
    areas = {colour: number for number, colour in image.getcolors(1 << 24) or ()}
    assert {areas[tuple(picture[0, 0])] for level in levels for picture in level} == {128 * 128}
    assert {areas[tuple(picture[0, 0])] for picture in real} == {128 * 128}
    assert boxes(image, sheet.MARKED)[1] > boxes(image, (219, 1, 1))[1]
    assert image.width < 1.5 * image.height < 2.5 * image.width


def test_the_demo_sheet_wants_lists_of_one_length():
    with pytest.raises(ValueError, match="shorter"):
        report.demo_sheet([np.zeros((2, 4, 4, 3), np.uint8)], ["a", "b"], [None], title="")


def test_fixed_choices_are_different_pictures_and_do_not_change():
    chosen = choose(1904, 128, "retrieval")
    assert len(set(chosen.tolist())) == 128
    assert chosen.min() >= 0
    assert chosen.max() < 1904
    assert (chosen == choose(1904, 128, "retrieval")).all()
    assert (chosen[:20] != choose(1904, 20, "sheet")).any()
    assert sorted(choose(5, 5, "all")) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="cannot choose 6 of 5"):
        choose(5, 6, "all")


def test_unseen_prompts_are_no_names_of_pictures_but_their_words_are():
    emoji = pytest.importorskip("emoji")
    names = {entry["en"].strip(":").replace("_", " ") for entry in emoji.EMOJI_DATA.values()}
    words = {word for name in names for word in name.split()}
    assert len(report.UNSEEN_PROMPTS) == 4
    for prompt in report.UNSEEN_PROMPTS:
        assert prompt not in names
        assert set(prompt.split()) <= words
