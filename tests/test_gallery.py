"""Files of `mdm sample`: images and clips, in a folder or in one file."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluating
from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.cli import models as cli_models
from matryoshka_diffusion.config import ConfigError
from matryoshka_diffusion.draw import clips, gallery, grid
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.runs.hooks import Preview
from matryoshka_diffusion.training.trainer import View
from matryoshka_diffusion.training.weights import export_weights
from test_clips_written import decode

FRAMES = evaluating.FRAMES
LOADED = functools.cache(Matryoshka.load)


def saved(folder, frames=None):
    """Write an untrained model of cats and dogs; with frames, one of clips."""
    trained = evaluating.model("classes", frames)
    export_weights(folder / "model", trained.net.state_dict(), trained.config)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("videos"), FRAMES)


@pytest.fixture(autouse=True)
def _loaded_once(monkeypatch):
    """Read each of the two models from its folder once."""
    monkeypatch.setattr(Matryoshka, "load", lambda run, **_: LOADED(str(run)))


def draw(model, *arguments):
    """Run `mdm sample` for one dog, unless the arguments say more."""
    return cli.main(["sample", str(model), "--class", "dog", *map(str, arguments)])


def samples_of(model, classes: str | list[str] = "dog", **options):
    samples = Matryoshka.load(model).sample(classes=classes, **options)
    return gallery.Gallery(samples.levels, samples.captions, samples.settings)


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def read_png(path):
    with Image.open(path) as file:
        return np.asarray(file), json.loads(file.info[grid.SETTINGS_KEY])


# --- clips -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "fps"), [(".mp4", 12.5), (".webp", 8.0), (".gif", 4.0)])
def test_one_sample_in_a_file_is_the_clip_itself(videos, suffix, fps, tmp_path, capsys):
    out = tmp_path / f"new/out{suffix}"
    assert draw(videos, "-o", out, "--seed", 7, *(() if fps == 8.0 else ("--fps", fps))) == 0
    decoded = decode(out)
    assert decoded.seconds == pytest.approx(FRAMES / fps)
    settings = decoded.settings
    assert (settings["captions"], settings["seeds"], settings["fps"]) == (["dog"], [7], fps)
    drawn = samples_of(videos, seed=7).levels[-1][0]
    assert decoded.frames.shape == drawn.shape
    assert (drawn[1:] != drawn[:-1]).any(axis=(1, 2, 3)).all()
    if suffix == ".webp":
        np.testing.assert_array_equal(decoded.frames, drawn)
    assert names(out.parent) == [out.name]
    assert str(out) in capsys.readouterr().out


def test_several_samples_in_a_file_are_a_grid_that_moves(videos, tmp_path):
    assert draw(videos, "--class", "cat", "-n", 2, "-o", tmp_path / "out.webp") == 0
    decoded = decode(tmp_path / "out.webp").frames
    clips_of = samples_of(videos, ["dog", "cat"], n=2).levels[-1]
    assert len(decoded) == FRAMES
    for frame, page in enumerate(decoded):
        dogs, cats = np.split(clips_of[:, frame], 2)
        expected = grid.grid([list(dogs), list(cats)], captions=["dog", "cat"])
        np.testing.assert_array_equal(page, np.asarray(expected))


def test_a_png_of_clips_is_a_film_strip(videos, tmp_path):
    assert draw(videos, "-n", 2, "-o", tmp_path / "out.png") == 0
    expected = grid.strip(samples_of(videos, n=2).levels[-1], ["dog", "dog"])
    pixels, settings = read_png(tmp_path / "out.png")
    np.testing.assert_array_equal(pixels, np.asarray(expected))
    assert settings["seeds"] == [0, 1]


def test_a_folder_has_each_clip_and_sheets_of_the_first(videos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gallery, "ON_SHEETS", 2)
    out = tmp_path / "v1.5"  # no suffix of a file
    assert draw(videos, "-n", 3, "-o", out) == 0
    sheets = ["grid.webp", "levels.webp", "strip.png"]
    assert names(out) == [*(f"00{n}-dog.webp" for n in range(3)), *sheets]
    assert set(sheets) <= set(grid.SHEETS)
    decoded = decode(out / "001-dog.webp")
    first = samples_of(videos, n=2)
    np.testing.assert_array_equal(decoded.frames, first.levels[-1][1])
    assert decoded.settings["seeds"] == [1]
    for name, pages in (("grid", gallery.grid_of(first)), ("levels", gallery.levels(first))):
        decoded = decode(out / f"{name}.webp")
        np.testing.assert_array_equal(decoded.frames, np.stack([np.asarray(x) for x in pages]))
        assert decoded.settings["seeds"] == [0, 1]
    assert read_png(out / "strip.png")[1]["seeds"] == [0, 1]
    output = capsys.readouterr().out
    assert "3 clips" in output
    assert f"first 2 together in {out / 'grid.webp'}" in output


def test_the_largest_sheet_fits_into_a_webp():
    each_with_a_caption = grid.grid_size(gallery.ON_SHEETS, 8, cell=gallery.CELL, captioned=True)
    assert max(each_with_a_caption) < clips.LARGEST[".webp"]


@pytest.mark.parametrize(
    ("form", "files"),
    [
        ("mp4", ["000-dog.mp4"]),
        ("gif", ["000-dog.gif"]),
        ("png", ["000-dog", *(f"000-dog/{n:04d}.png" for n in range(FRAMES))]),
    ],
)
def test_clips_in_a_folder_have_the_form_of_the_option(videos, form, files, tmp_path):
    assert draw(videos, "-o", tmp_path, "--clips", form) == 0
    assert names(tmp_path) == [*files, "levels.webp", "strip.png"]


def test_without_a_place_one_sample_is_a_file_and_several_a_folder_in_the_run(videos, capsys):
    for name in ("dog-seed5.webp", "dog-seed5-2.webp"):
        assert draw(videos, "--seed", 5) == 0
        assert str(videos / "samples" / name) in capsys.readouterr().out
    assert draw(videos, "--seed", 5, "-n", 2) == 0
    assert draw(videos, "--seed", 5, "--clips", "png") == 0
    written = names(videos / "samples")
    assert [name for name in written if "/" not in name] == [
        *("dog-seed5", "dog-seed5-2", "dog-seed5-2.webp", "dog-seed5.webp")
    ]
    assert "dog-seed5/001-dog.webp" in written
    assert "dog-seed5-2/000-dog/0000.png" in written, "frames of one clip are a folder"


@pytest.mark.parametrize("out", ["a.png", "folder"])
def test_nothing_is_overwritten_unasked(pictures, out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = Path(out if out.endswith(".png") else f"{out}/000-dog.png")
    assert draw(pictures, "-o", out) == 0
    first = file.read_bytes()
    assert draw(pictures, "-o", out, "--seed", 1) == 2
    assert file.read_bytes() == first
    message = capsys.readouterr().err
    assert f"{out} " in message
    assert "--overwrite" in message
    assert draw(pictures, "-o", out, "--seed", 1, "--overwrite") == 0
    assert read_png(file)[1]["seeds"] == [1]


@pytest.mark.parametrize(
    ("caption", "name"),
    [("Red apple!", "007-red-apple.png"), ("苹果 é", "007-苹果-é.png"), ("../a b", "007-a-b.png")],
)
def test_names_of_files_have_the_letters_of_captions(caption, name):
    assert gallery.file_name(7, caption, None, moves=False) == name


def test_previews_of_clips_move(videos, tmp_path):
    trained = Matryoshka.load(videos)
    view = View(trained.config, tmp_path, 1234, lambda: trained.net)
    path = Preview({"classes": [0, 1]}, None, "cpu")(view)
    assert path == tmp_path / "previews" / "0000001234.webp"
    decoded = decode(path)
    assert len(decoded.frames) == FRAMES
    assert decoded.seconds == pytest.approx(FRAMES / 8)
    assert decoded.settings["images_seen"] == 1234


# --- images ------------------------------------------------------------------------------------


def test_a_png_is_the_only_image_or_a_grid(pictures, tmp_path):
    samples = samples_of(pictures, n=2)
    assert draw(pictures, "-o", tmp_path / "a.png") == 0
    assert draw(pictures, "-n", 2, "-o", tmp_path / "b.PNG") == 0
    (page,) = gallery.grid_of(samples)
    np.testing.assert_array_equal(read_png(tmp_path / "a.png")[0], samples.levels[-1][0])
    pixels, settings = read_png(tmp_path / "b.PNG")
    np.testing.assert_array_equal(pixels, np.asarray(page))
    assert settings["seeds"] == [0, 1]
    assert names(tmp_path) == ["a.png", "b.PNG"]


def test_a_grid_has_a_row_for_each_caption_and_breaks_long_ones():
    pictures = np.zeros((20, 8, 8, 3), np.uint8)
    samples = gallery.Gallery((pictures,), ("a",) * 10 + ("b",) * 10, {})
    (whole,), (row,) = gallery.grid_of(samples), gallery.grid_of(samples.part(slice(8)))
    assert whole.size == grid.grid_size(4, 8, cell=gallery.CELL, captioned=True)
    assert row.size == grid.grid_size(1, 8, cell=gallery.CELL, captioned=True)


# --- destinations that are refused before anything is drawn --------------------------------------


@pytest.fixture
def undrawn(monkeypatch):
    def sample(*_, **__):
        raise AssertionError("it was drawn")

    monkeypatch.setattr(Matryoshka, "sample", sample)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("pictures", ["-o", "a.mp4"], "-o a.mp4: tiny draws images"),
        ("pictures", ["--fps", "4"], "--fps 4"),
        ("pictures", ["--clips", "gif"], "--clips gif"),
        ("pictures", ["-o", "a.jpg"], "-o a.jpg: give a folder"),
        ("videos", ["-o", "a.avi"], ".mp4, .webp, .gif"),
        ("videos", ["-o", "a.gif", "--fps", "60"], "a.gif: 60 frames per second"),
        ("videos", ["--clips", "gif", "--fps", "60"], "0.01 to 50"),
        ("videos", ["-o", "a.gif", "--clips", "gif"], "--clips gif is for a folder"),
        ("videos", ["-o", "a.webp", "-n", "1000"], "1000 clips has 1228 x 16772 pixels"),
        ("videos", ["-o", "a.mp4", "-n", "1000"], "16384 a side: give a folder"),
        ("videos", ["-o", "file/a.mp4"], "file is a file, not a folder"),
        ("videos", ["-o", "file"], "file is a file, not a folder"),
        ("videos", ["-o", "full", "--clips", "png"], "full is not empty"),
        ("pictures", ["-o", "locked/new/a.png"], "locked: give another folder"),
        ("pictures", [], "nothing can be written in"),
    ],
)
def test_a_bad_destination_is_refused(
    kind, arguments, message, request, undrawn, tmp_path, monkeypatch, capsys
):
    model = request.getfixturevalue(kind)
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("locked").mkdir()
    Path("full/mine").mkdir(parents=True)
    free = os.access
    locked = tmp_path / "locked" if arguments else model  # for root, too
    monkeypatch.setattr(os, "access", lambda path, mode: path != locked and free(path, mode))
    assert draw(model, *arguments) == 2
    assert message in capsys.readouterr().err
    assert names(tmp_path) == ["file", "full", "full/mine", "locked"]


@pytest.mark.parametrize("arguments", [["-o", "a.mp4"], ["-o", "a", "--clips", "mp4"]])
def test_an_mp4_needs_its_extra_before_anything_is_drawn(
    videos, arguments, undrawn, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    assert draw(videos, *arguments) == 1
    assert 'pip install "matryoshka-diffusion[video]"' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_fps_changes_no_sample(videos):
    """Measurements of a model do not depend on fps."""
    model = Matryoshka.load(videos)
    assert model.describe({"fps": 3.0}) == model.describe({})
    for fps in (0.001, 1001.0):  # no form of clip can store them
        with pytest.raises(ConfigError, match=r"sampling\.fps"):
            model.sampling({"fps": fps})


def test_the_command_offers_every_form_of_clip():
    assert tuple(gallery.CLIP_FORMS) == cli_models.CLIPS
