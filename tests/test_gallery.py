"""What `mdm sample` writes: of pictures and of clips, in a folder or in one file."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.config import ConfigError, LevelConfig
from matryoshka_diffusion.draw import animation, gallery, sheet, video
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.runs.hooks import Preview
from matryoshka_diffusion.train.checkpoint import export_weights
from matryoshka_diffusion.train.trainer import View
from test_clip_files import decode
from tiny_run import tiny_config

FRAMES = 4
LOADED = functools.cache(Matryoshka.load)


def run_folder(folder, finest):
    """A model of cats and dogs that was never trained, with this finest level."""
    config = tiny_config(dropout=0.0)
    levels = (config.model.levels[0], finest)
    nest = config.model.model_copy(update={"text": None, "classes": 2, "levels": levels})
    data = config.data.model_copy(update={"classes": ("cat", "dog")})
    sampling = config.sampling.model_copy(update={"steps": 1})
    changed = {"model": nest, "encoder": None, "data": data, "sampling": sampling}
    config = config.model_copy(update=changed)
    net = NestedUNet(nest, seed=3)
    for name, weight in net.named_parameters():
        if name.endswith("head.weight"):  # which draws nothing at first
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    export_weights(folder / "model", net.state_dict(), config)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """8 and 16 pixels."""
    finest = LevelConfig(side=16, widths=(32, 32), blocks=(1, 1), attention=(0, 0))
    return run_folder(tmp_path_factory.mktemp("pictures"), finest)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A picture of 8 pixels, and 4 frames of the same size."""
    finest = LevelConfig(
        side=8,
        frames=FRAMES,
        widths=(32, 32, 32),
        blocks=(1, 1, 1),
        attention=(0, 0, 0),
        halve_frames=(True, True),
    )
    return run_folder(tmp_path_factory.mktemp("videos"), finest)


@pytest.fixture(autouse=True)
def _loaded_once(monkeypatch):
    """Each of the two models is read from its folder for the first test that wants it."""
    monkeypatch.setattr(Matryoshka, "load", lambda run, **_: LOADED(str(run)))


def draw(model, *arguments):
    """`mdm sample` of one dog, or what else is asked for."""
    return cli.main(["sample", str(model), "--class", "dog", *map(str, arguments)])


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def settings_of(path):
    with Image.open(path) as file:
        return json.loads(file.info[sheet.SETTINGS_KEY])


# --- clips -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "fps"), [(".mp4", 12.5), (".webp", 8.0), (".gif", 4.0)])
def test_one_sample_in_a_file_is_the_clip_itself(videos, suffix, fps, tmp_path, capsys):
    out = tmp_path / f"new/out{suffix}"
    given = () if fps == 8.0 else ("--fps", fps)
    assert draw(videos, "-o", out, "--seed", 7, *given) == 0
    found = decode(out)
    assert found.seconds == pytest.approx(FRAMES / fps)
    made = found.settings
    assert (made["captions"], made["seeds"], made["fps"]) == (["dog"], [7], fps)
    drawn = Matryoshka.load(videos).sample(classes="dog", seed=7).videos[0]
    assert found.frames.shape == drawn.shape
    assert (drawn[1:] != drawn[:-1]).any(axis=(1, 2, 3)).all()
    if suffix == ".webp":
        np.testing.assert_array_equal(found.frames, drawn)
    assert names(out.parent) == [out.name]
    assert capsys.readouterr().out == f"1 clip in {out}\n"


def test_several_samples_in_a_file_are_a_grid_that_moves(videos, tmp_path, capsys):
    assert draw(videos, "--class", "cat", "-n", 2, "-o", tmp_path / "out.webp") == 0
    found = decode(tmp_path / "out.webp").frames
    samples = Matryoshka.load(videos).sample(classes=["dog", "cat"], n=2)
    for frame, page in enumerate(found):
        dogs, cats = np.split(samples.videos[:, frame], 2)
        expected = sheet.grid([list(dogs), list(cats)], captions=["dog", "cat"])
        np.testing.assert_array_equal(page, np.asarray(expected))
    assert len(found) == FRAMES
    assert capsys.readouterr().out == f"4 clips in {tmp_path / 'out.webp'}\n"


def test_a_png_of_clips_is_a_film_strip(videos, tmp_path):
    assert draw(videos, "-n", 2, "-o", tmp_path / "out.png") == 0
    samples = Matryoshka.load(videos).sample(classes="dog", n=2)
    expected = animation.strip(samples.videos, ["dog", "dog"])
    with Image.open(tmp_path / "out.png") as file:
        np.testing.assert_array_equal(np.asarray(file), np.asarray(expected))
    assert settings_of(tmp_path / "out.png")["seeds"] == [0, 1]


def test_a_folder_has_each_clip_and_sheets_of_all(videos, tmp_path, capsys):
    out = tmp_path / "v1.5"  # no suffix of a file
    assert draw(videos, "-n", 2, "-o", out) == 0
    sheets = ["grid.webp", "levels.webp", "strip.png"]
    assert names(out) == ["000-dog.webp", "001-dog.webp", *sheets]
    samples = Matryoshka.load(videos).sample(classes="dog", n=2)
    found = decode(out / "001-dog.webp")
    np.testing.assert_array_equal(found.frames, samples.videos[1])
    assert found.settings["seeds"] == [1]
    assert len(decode(out / "levels.webp").frames) == len(decode(out / "grid.webp").frames)
    assert set(names(out)) - {"000-dog.webp", "001-dog.webp"} <= set(sheet.SHEETS)
    assert capsys.readouterr().out == f"2 clips in {out}, together in {out / 'grid.webp'}\n"


def test_sheets_show_as_many_clips_as_they_can_hold(videos, tmp_path, monkeypatch, capsys):
    each_with_a_caption = sheet.grid_size(gallery.ON_SHEETS, 8, cell=gallery.CELL, captioned=True)
    assert max(each_with_a_caption) < video.LARGEST[".webp"]
    monkeypatch.setattr(gallery, "ON_SHEETS", 2)
    assert draw(videos, "-n", 3, "-o", tmp_path) == 0
    first = Matryoshka.load(videos).sample(classes="dog", n=2)
    for name, expected in (("grid", gallery.grid(first)), ("levels", gallery.levels(first))):
        found = decode(tmp_path / f"{name}.webp")
        np.testing.assert_array_equal(found.frames, np.stack([np.asarray(x) for x in expected]))
        assert found.settings["seeds"] == [0, 1]
    assert settings_of(tmp_path / "strip.png")["seeds"] == [0, 1]
    assert (tmp_path / "002-dog.webp").is_file()
    together = f"the first 2 together in {tmp_path / 'grid.webp'}"
    assert capsys.readouterr().out == f"3 clips in {tmp_path}, {together}\n"


@pytest.mark.parametrize(
    ("form", "files"),
    [
        ("mp4", ["000-dog.mp4"]),
        ("gif", ["000-dog.gif"]),
        ("png", ["000-dog", *(f"000-dog/{n:04d}.png" for n in range(FRAMES))]),
    ],
)
def test_clips_in_a_folder_have_the_form_that_is_asked_for(videos, form, files, tmp_path):
    assert draw(videos, "-o", tmp_path, "--clips", form) == 0
    assert names(tmp_path) == [*files, "grid.webp", "levels.webp", "strip.png"]


def test_without_a_place_clips_go_where_pictures_go(videos):
    assert draw(videos, "--seed", 5) == 0
    assert (videos / "samples" / "dog-seed5" / "000-dog.webp").is_file()


def test_previews_of_clips_move(videos, tmp_path):
    trained = Matryoshka.load(videos)
    view = View(trained.config, tmp_path, 1234, lambda: trained.net)
    path = Preview({"classes": [0, 1]}, None, "cpu")(view)
    assert path == tmp_path / "previews" / "0000001234.webp"
    found = decode(path)
    assert len(found.frames) == FRAMES
    assert found.seconds == pytest.approx(FRAMES / 8)
    assert found.settings["images_seen"] == 1234


# --- pictures ----------------------------------------------------------------------------------


def test_a_png_is_the_only_picture_or_a_grid(pictures, tmp_path, capsys):
    samples = Matryoshka.load(pictures).sample(classes="dog", n=2)
    assert draw(pictures, "-o", tmp_path / "a.png") == 0
    assert draw(pictures, "-n", 2, "-o", tmp_path / "b.PNG") == 0
    (grid,) = gallery.grid(samples)
    for name, expected in (("a.png", samples.pictures[0]), ("b.PNG", grid)):
        with Image.open(tmp_path / name) as file:
            np.testing.assert_array_equal(np.asarray(file), np.asarray(expected))
    assert names(tmp_path) == ["a.png", "b.PNG"]
    assert settings_of(tmp_path / "b.PNG")["seeds"] == [0, 1]
    assert capsys.readouterr().out.splitlines()[0] == f"1 picture in {tmp_path / 'a.png'}"


# --- what is refused, before anything is drawn ---------------------------------------------------


@pytest.fixture
def undrawn(monkeypatch):
    def sample(*_, **__):
        raise AssertionError("it was drawn")

    monkeypatch.setattr(Matryoshka, "sample", sample)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("pictures", ["-o", "a.mp4"], "-o a.mp4: tiny draws pictures, no clips; give a folder or"),
        ("pictures", ["-o", "a.webp"], "draws pictures, no clips"),
        ("pictures", ["--fps", "4"], "--fps 4.0: tiny draws pictures, no clips"),
        ("pictures", ["--clips", "gif"], "--clips gif: tiny draws pictures, no clips"),
        ("pictures", ["-o", "a.jpg"], "-o a.jpg: samples go into a folder or a .png file"),
        ("videos", ["-o", "a.avi"], "of a model of videos also into .mp4, .webp, .gif"),
        ("videos", ["-o", "a.gif", "--fps", "60"], "a.gif: 60 frames per second; this form"),
        ("videos", ["--clips", "gif", "--fps", "60"], "can have 0.01 to 50"),
        ("videos", ["-o", "a.gif", "--clips", "gif"], "--clips gif is for a folder"),
        ("videos", ["-o", "a.webp", "-n", "1000"], "a grid of 1000 clips has 1228 x 16772 pixels"),
        ("videos", ["-o", "a.mp4", "-n", "1000"], "this form can have 16384 a side: give a folder"),
        ("videos", ["-o", "file/a.mp4"], "file is a file, not a folder"),
        ("videos", ["-o", "file"], "file is a file, not a folder"),
        ("pictures", ["-o", "locked/new/a.png"], "nothing can be written in "),
    ],
)
def test_what_cannot_be_written_is_refused(
    kind, arguments, message, request, undrawn, tmp_path, monkeypatch, capsys
):
    model = request.getfixturevalue(kind)
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("locked").mkdir()
    free = os.access
    locked = tmp_path / "locked"  # for root, too
    monkeypatch.setattr(os, "access", lambda path, mode: path != locked and free(path, mode))
    assert draw(model, *arguments) == 2
    assert message in capsys.readouterr().err
    assert names(tmp_path) == ["file", "locked"]


def test_folders_of_frames_want_an_empty_folder(videos, undrawn, tmp_path, capsys):
    (tmp_path / "mine").touch()
    assert draw(videos, "-o", tmp_path, "--clips", "png") == 2
    assert f"{tmp_path} is not empty" in capsys.readouterr().err


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
    """So measurements of a model do not depend on it."""
    model = Matryoshka.load(videos)
    assert model.describe({"fps": 3.0}) == model.describe({})
    for fps in (0.001, 1001.0):  # which no form of clip can hold
        with pytest.raises(ConfigError, match=r"sampling\.fps"):
            model.sampling({"fps": fps})


def test_the_command_knows_the_forms_of_clips():
    assert tuple(gallery.CLIP_FORMS) == cli.CLIPS
