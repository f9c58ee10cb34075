"""The command: what it makes, what it says, and that bad input is one line and a status."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.cli import options as cli_options
from matryoshka_diffusion.denoiser import THRESHOLDS
from matryoshka_diffusion.draw.grid import SETTINGS_KEY, save_png
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.runs import prepare as job
from matryoshka_diffusion.runs.hooks import Preview
from matryoshka_diffusion.samplers import GRIDS, SAMPLERS
from matryoshka_diffusion.train.checkpoint import export_weights
from matryoshka_diffusion.train.signals import Stopped
from matryoshka_diffusion.train.trainer import View
from tiny_run import tiny_config


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A class-conditional model that was never trained, in a run folder."""
    config = tiny_config(dropout=0.0)
    nest = config.model.model_copy(update={"text": None, "classes": 2})
    data = config.data.model_copy(update={"classes": ("cat", "dog")})
    config = config.model_copy(update={"model": nest, "encoder": None, "data": data})
    folder = tmp_path_factory.mktemp("run")
    export_weights(folder / "model", NestedUNet(nest).state_dict(), config)
    return folder


def test_the_choices_are_those_of_the_library():
    assert set(cli_options.SAMPLERS) == set(SAMPLERS)
    assert set(cli_options.GRIDS) == set(GRIDS)
    assert set(cli_options.THRESHOLDS) == set(THRESHOLDS)


def test_sample_writes_pictures_a_grid_and_all_levels_with_their_settings(model, tmp_path, capsys):
    arguments = ["sample", str(model), "--class", "dog", "-n", "2", "--steps", "2", "--seed", "5"]
    assert cli.main([*arguments, "-o", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "000-dog.png",
        "001-dog.png",
        "grid.png",
        "levels.png",
    ]
    with Image.open(tmp_path / "001-dog.png") as picture:
        assert picture.size == (16, 16)
        settings = json.loads(picture.info[SETTINGS_KEY])
    assert (settings["seeds"], settings["captions"], settings["steps"]) == ([6], ["dog"], 2)
    assert str(tmp_path / "grid.png") in capsys.readouterr().out
    assert cli.main(arguments) == 0  # without -o: inside the run's folder
    assert cli.main(arguments) == 0  # again: the first ones stay
    for name in ("dog-seed5", "dog-seed5-2"):
        assert (model / "samples" / name / "grid.png").is_file()


def test_guidance_is_one_weight_or_one_for_each_level(model, tmp_path, capsys):
    asked = ["sample", str(model), "--class", "dog", "--steps", "1", "-o", str(tmp_path / "a.png")]
    for text, weights in (("3", [3.0]), ("3,1", [3.0, 1.0])):
        assert cli.main([*asked, "--cfg", text]) == 0
        with Image.open(tmp_path / "a.png") as picture:
            assert json.loads(picture.info[SETTINGS_KEY])["guidance"] == weights
    capsys.readouterr()
    assert cli.main([*asked, "--cfg", "3,1,2"]) != 0
    assert "sampling.guidance has 3 entries; give 1 or 2" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*asked, "--cfg", "3;1"])
    assert "'3;1' is no number, nor one for each level" in capsys.readouterr().err


def test_previews_show_every_class_at_every_level(model, tmp_path):
    trained = Matryoshka.load(model)
    config = trained.config.model_copy(
        update={"sampling": trained.config.sampling.model_copy(update={"steps": 2})}
    )
    view = View(config, tmp_path, 1234, lambda: trained.net)
    path = Preview({"classes": [0, 1]}, None, "cpu")(view)
    assert path == tmp_path / "previews" / "0000001234.png"
    with Image.open(path) as page:
        assert json.loads(page.info[SETTINGS_KEY])["images_seen"] == 1234


def test_info_shows_presets_and_runs(model, capsys):
    assert cli.main(["info", "cc12m-64"]) == 0
    shown = capsys.readouterr().out
    assert "437.2 M parameters" in shown
    assert re.search(r"^1 +64x64 +256 512 768 +2 2 2 +0 1 5 +408,864,771 +368\.\d\d", shown, re.M)
    assert cli.main(["info", str(model)]) == 0
    shown = capsys.readouterr().out
    assert "2 classes" in shown
    assert "stage 2: 2 levels, 24 images, batch 4, lr 0.01, mix 0.5/0.5" in shown


def test_data_check_lists_what_is_bad(tmp_path, capsys):
    for number in range(3):
        picture = np.full((64, 70, 3), number, np.uint8)
        save_png(picture, tmp_path / "d" / f"{number}.png", None)
    (tmp_path / "d" / "torn.png").write_bytes((tmp_path / "d" / "0.png").read_bytes()[:60])
    check = ["data", "check", str(tmp_path / "d")]
    assert cli.main([*check, "--set", "data.max_bad_fraction=0.5"]) == 0
    assert cli.main(check) == 1
    shown = capsys.readouterr()
    assert "3 pictures" in shown.out
    assert "torn.png" in shown.out
    assert "1 of 4 files are bad, and data.max_bad_fraction is 0.01" in shown.err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "COMMAND"),
        (["conjure"], 2, "invalid choice: 'conjure'"),
        (["train", "openmoij", "--out", "x"], 2, "did you mean openmoji?"),
        (["train", "openmoji"], 2, "--out"),
        (
            ["train", "openmoji", "--out", "x", "--lora", "4"],
            2,
            "--lora: name the model in the place",
        ),
        (["ema", "empty", "--length", "0.1", "-o", "x"], 2, "empty: no run folder with a"),
        (["ema", "empty", "--length", "0.3", "-o", "x"], 2, "--length 0.3: give"),
        (
            ["train", "openmoji", "--out", "x", "--set", "train.sed=1"],
            2,
            "did you mean train.seed?",
        ),
        (["train", "openmoji", "--out", "x", "--set", "seed=1"], 2, "did you mean train.seed?"),
        (["train", "openmoji", "--out", "x", "--set", "train.seed"], 2, "path.to.key=value"),
        (["train", "openmoji", "--out", "x", "--set", "train.seed=a"], 2, "train.seed"),
        (["train", "openmoji", "--out", "x", "--set", "model.levels[0].side=64"], 2, "levels[1]"),
        (["train", "folder-64", "--out", "x"], 2, "--data"),
        (["train", "folder-64", "--out", "x", "--data", "nowhere"], 1, "nowhere does not exist"),
        (["train", "folder-64", "--out", "x", "--data", "empty"], 1, "holds no picture"),
        (["train", "no.yaml", "--out", "x"], 2, "no.yaml: cannot be read"),
        (["sample", "nowhere", "-p", "a"], 1, "nowhere: no such folder"),
        (["sample", "MODEL", "-p", "a"], 2, "takes no prompts"),
        (["sample", "MODEL", "--class", "cow"], 2, "there are: cat, dog"),
        (["sample", "MODEL", "--sampler", "euler"], 2, "invalid choice: 'euler'"),
        (["sample", "MODEL", "--steps", "0"], 2, "'0' is not a whole number above 0"),
        (["sample", "MODEL", "-n", "two"], 2, "'two' is not a whole number"),
        (["sample", "MODEL", "--device", "abacus"], 2, "--device abacus"),
        (["grow", "MODEL", "--to", "20", "--out", "x"], 2, "--to 20: give 16 times a power of two"),
        (
            ["grow", "MODEL", "--to", "32", "--out", "x", "--ramp", "100000"],
            2,
            "--freeze-coarse and --ramp: 100000 is more than",
        ),
        (["info", "openmojo"], 2, "did you mean openmoji?"),
        (["info", "empty"], 1, "neither a model nor a checkpoint"),
        (["eval", "empty"], 1, "neither a model nor a checkpoint"),
        (["eval", "MODEL", "-n", "-5"], 2, "'-5' is not a whole number above 0"),
        (["sample", "MODEL", "--interval", "5", "-5"], 2, "guidance_interval needs a lower"),
        (["sample", "MODEL", "--eta", "2"], 2, "sampling.eta"),
        (["sample", "MODEL", "--eta", "0.5"], 2, "--eta is of ddim: add --sampler ddim"),
        (["sample", "MODEL", "--rescale", "0.7"], 2, "--rescale is of guidance: give a weight"),
        (["eval", "MODEL", "--interval", "-5", "5"], 2, "--interval is of guidance"),
        (["sweep", "MODEL", "--cfg", "1,2", "--eta", "1"], 2, "--eta is of ddim"),
    ],
)
def test_bad_input_is_one_line_and_a_status(
    arguments, status, message, model, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    arguments = [str(model) if word == "MODEL" else word for word in arguments]
    try:
        found = cli.main(arguments)
    except SystemExit as leaving:
        found = leaving.code
    told = capsys.readouterr().err
    assert found == status
    assert message in told
    assert told.startswith("mdm")
    assert told.count("\n") == 1
    assert "Traceback" not in told
    assert sorted(os.listdir()) == ["empty"], "nothing is begun"


def options_of(parser, name="mdm"):
    """The options of a parser and of all commands in it, by their names."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, inner in action.choices.items():
                yield from options_of(inner, f"{name} {command}")
        else:
            yield f"{name} {action.dest}", action


def test_every_option_says_what_it_does():
    assert [name for name, option in options_of(cli.build_parser()) if not option.help] == []


def test_nothing_gentle_can_be_asked_for_explicitly(model, tmp_path):
    grow = ["grow", str(model), "--to", "32", "--out", str(tmp_path / "x")]
    assert cli.main([*grow, "--freeze-coarse", "0", "--ramp", "0"]) == 0


@pytest.mark.parametrize(("error", "warned"), [(0.04, False), (0.95, True)])
def test_an_average_that_is_not_matched_is_warned_of(error, warned, monkeypatch, capsys):
    monkeypatch.setattr(job, "average_model", lambda *_: error)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["ema", "r", "--length", "0.001", "-o", "x"]) == 0
    told = capsys.readouterr().err
    assert ("--length 0.001 is not matched, its profile is off by 95%" in told) == warned


def test_data_check_lists_a_set_that_is_all_bad(tmp_path, capsys):
    for n in range(7):
        (tmp_path / f"{n}.png").write_bytes(b"broken")
    assert cli.main(["data", "check", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert "bad files 7" in shown.out
    assert all(f"{n}.png: not a PNG" in shown.out for n in range(7))
    assert "none is left to learn from" in shown.err
    assert "max_bad_fraction" not in shown.err


@pytest.mark.parametrize("code", [130, 143])
def test_a_stopped_run_leaves_with_its_code(code, monkeypatch, tmp_path, capsys):
    def stop(*_, **__):
        raise Stopped("saved; the same command continues", code - 128)

    monkeypatch.setattr("matryoshka_diffusion.runs.prepare.prepare", stop)
    assert cli.main(["train", "openmoji", "--out", str(tmp_path / "run")]) == code
    assert capsys.readouterr().err == "mdm: saved; the same command continues\n"


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(FileNotFoundError):
        cli.main(["sample", str(tmp_path / "nowhere"), "--debug"])


def test_help_is_quick_because_it_loads_nothing_heavy():
    code = (
        "import sys; from matryoshka_diffusion.cli.main import build_parser; build_parser();"
        "print([m for m in ('torch', 'numpy', 'pydantic', 'PIL', 'tqdm') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_another_config_in_the_run_folder_is_refused(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    for number in range(2):
        save_png(np.zeros((64, 64, 3), np.uint8), tmp_path / "d" / f"{number}.png", None)
    train = ["train", "folder-64", "--data", str(tmp_path / "d"), "--out", str(folder)]
    assert cli.main(train) == 2
    assert "holds files but no run" in capsys.readouterr().err
