"""The command: files that it makes, messages, and one line and a status for bad input."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from matryoshka_diffusion.cli import eval as cli_eval
from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.cli import options as cli_options
from matryoshka_diffusion.cli import terminal
from matryoshka_diffusion.denoiser import THRESHOLDS
from matryoshka_diffusion.draw.grid import SETTINGS_KEY, save_png
from matryoshka_diffusion.eval.evaluate import PROTOCOLS
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.samplers import GRIDS, SAMPLERS
from matryoshka_diffusion.training.signals import Stopped
from matryoshka_diffusion.training.weights import export_weights
from test_pipeline import text_model
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


def run(*words):
    """The status of a command, also of one that the parser refuses."""
    try:
        return cli.main([*map(str, words)])
    except SystemExit as leaving:
        return leaving.code


def check_message(text, *parts):
    """It is one line, begins with the command, and has these parts."""
    assert text.startswith("mdm")
    assert text.count("\n") == 1
    assert "Traceback" not in text
    for part in parts:
        assert part in text


# --- what commands make ------------------------------------------------------------------------


def test_sample_writes_images_a_grid_and_all_levels_with_their_settings(model, tmp_path, capsys):
    words = ["--class", "dog", "-n", 2, "--steps", 2, "--seed", 5, "--cfg", "3,1"]
    assert run("sample", model, *words, "-o", tmp_path) == 0
    names = ["000-dog.png", "001-dog.png", "grid.png", "levels.png"]
    assert sorted(os.listdir(tmp_path)) == names
    with Image.open(tmp_path / "001-dog.png") as picture:
        assert picture.size == (16, 16)
        settings = json.loads(picture.info[SETTINGS_KEY])
    assert (settings["seeds"], settings["captions"], settings["steps"]) == ([6], ["dog"], 2)
    assert settings["guidance"] == [3.0, 1.0]
    assert str(tmp_path / "grid.png") in capsys.readouterr().out
    assert run("sample", model, *words) == 0  # without -o: inside the run's folder
    assert (model / "samples" / "dog-seed5" / "grid.png").is_file()
    assert run("sample", model, "--steps", 1, "--seed", 5) == 0  # every class
    assert (model / "samples" / "cat-and-1-more-seed5" / "grid.png").is_file()


@pytest.mark.parametrize(("prompt", "noted"), [("", True), (" ", True), ("a blue thing", False)])
def test_an_empty_prompt_is_not_drawn_silently(prompt, noted, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Matryoshka, "load", lambda *_, **__: text_model())
    words = ["-p", prompt, "--steps", "2", "--device", "cpu", "-o", tmp_path / "a.png"]
    assert run("sample", "openmoji", *words) == 0
    assert ("empty prompt" in capsys.readouterr().out) == noted


def test_info_shows_presets_and_runs(model, capsys):
    assert run("info", "cc12m-64") == 0
    output = capsys.readouterr().out
    assert "437.2 M parameters" in output
    assert re.search(r"^1 +64x64 +256 512 768 +2 2 2 +0 1 5 +408,864,771 +368\.\d\d", output, re.M)
    assert run("info", model) == 0
    output = capsys.readouterr().out
    assert "2 classes" in output
    assert "stage 2: 2 levels, 24 images, batch 4, lr 0.01, mix 0.5/0.5" in output
    assert "all levels: warm-up over 8 images, decay over the last 25 % of the run" in output


def test_data_check_lists_bad_files(tmp_path, capsys):
    for number in range(3):
        save_png(np.full((64, 70, 3), number, np.uint8), tmp_path / f"{number}.png", None)
    (tmp_path / "torn.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    assert run("data", "check", tmp_path, "--set", "data.max_bad_fraction=0.5") == 0
    assert run("data", "check", tmp_path) == 1
    output = capsys.readouterr()
    assert "torn.png" in output.out
    check_message(output.err, "1 of 4 files", "data.max_bad_fraction")
    for file in tmp_path.iterdir():
        file.write_bytes(b"broken")
    assert run("data", "check", tmp_path) == 1
    output = capsys.readouterr()
    assert "bad files 4" in output.out
    check_message(output.err, str(tmp_path))


def test_growing_without_freezing_or_ramp_can_be_explicit(model, tmp_path):
    words = ["--to", 32, "--out", tmp_path / "x", "--freeze-coarse", 0, "--ramp", 0]
    assert run("grow", model, *words) == 0


@pytest.mark.parametrize(("error", "warned"), [(0.04, False), (0.95, True)])
def test_an_average_of_another_profile_is_warned_of(error, warned, monkeypatch, capsys):
    monkeypatch.setattr("matryoshka_diffusion.models.save.average_model", lambda *_: error)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run("ema", "r", "--length", 0.001, "-o", "x") == 0
    assert ("--length 0.001" in capsys.readouterr().err) == warned


# --- the parser --------------------------------------------------------------------------------


def test_the_choices_are_those_of_the_library():
    assert set(cli_options.SAMPLERS) == set(SAMPLERS)
    assert set(cli_options.GRIDS) == set(GRIDS)
    assert set(cli_options.THRESHOLDS) == set(THRESHOLDS)
    assert set(cli_eval.PROTOCOLS) == set(PROTOCOLS)


def options_of(parser, name="mdm"):
    """Yield the options of a parser and of all commands in it, by their names."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, inner in action.choices.items():
                yield from options_of(inner, f"{name} {command}")
        else:
            yield f"{name} {action.dest}", action


def test_every_option_has_a_help_text():
    assert [name for name, option in options_of(cli.build_parser()) if not option.help] == []


def test_help_and_mistyped_commands_load_nothing_heavy():
    code = (
        "import sys; from matryoshka_diffusion.cli.main import main\n"
        "for words in (['--help'], ['conjure'], ['sample', 'x', '--steps', '0']):\n"
        "    try: main(words)\n"
        "    except SystemExit: pass\n"
        "print([m for m in ('torch', 'numpy', 'pydantic', 'PIL', 'tqdm') if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.splitlines()[-1] == "[]"


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("conjure", 2, "'conjure'"),
        ("train openmoij --out x", 2, "openmoji"),
        ("train openmoji", 2, "--out"),
        ("train openmoji --out x --lora 4", 2, "lora"),
        ("train openmoji --out x --set train.sed=1", 2, "train.seed"),
        ("train openmoji --out x --set train.seed", 2, "path.to.key=value"),
        ("train openmoji --out x --set train.seed=a", 2, "train.seed"),
        ("train openmoji --out x --set model.levels[0].side=64", 2, "levels[1]"),
        ("train folder-64 --out x", 2, "--data"),
        ("train folder-64 --out x --data nowhere", 1, "nowhere"),
        ("train folder-64 --out x --data empty", 1, "empty"),
        ("train folder-64 --out full --data images", 2, "full"),
        ("train no.yaml --out x", 2, "no.yaml"),
        ("train folder-64 --out x --data images --gpus 99", 2, "--gpus 99"),
        ("ema empty --length 0.1 -o x", 2, "empty"),
        ("ema empty --length 0.3 -o x", 2, "--length 0.3"),
        ("sample nowhere -p a", 1, "nowhere"),
        ("sample me/nothing -p a", 1, "me/nothing"),
        ("info me/nothing", 1, "me/nothing"),
        ("train me/nothing --data images --out x", 1, "me/nothing"),
        ("sample MODEL --lora nowhere=0.5", 1, "nowhere"),
        ("sample MODEL --lora MODEL", 2, "no adapters"),
        ("export MODEL --format peft -o x", 2, "no adapters"),
        ("sample MODEL -p a", 2, "prompts"),
        ("sample MODEL --class cow", 2, "cat, dog"),
        ("sample MODEL --sampler euler", 2, "'euler'"),
        ("sample MODEL --steps 0", 2, "'0'"),
        ("sample MODEL -n two", 2, "'two'"),
        ("sample MODEL --device abacus", 2, "--device abacus"),
        ("sample MODEL --cfg 3;1", 2, "'3;1'"),
        ("sample MODEL --cfg 3,1,2", 2, "sampling.guidance"),
        ("sample MODEL --base a --coarse b", 2, "--coarse"),
        ("sample MODEL --coarse images", 2, "--coarse"),
        ("sample MODEL --interval 5 -5", 2, "guidance_interval"),
        ("sample MODEL --eta 2", 2, "sampling.eta"),
        ("sample MODEL --eta 0.5", 2, "--sampler ddim"),
        ("sample MODEL --rescale 0.7", 2, "--cfg"),
        ("sample MODEL --wake -3 -2 -1", 2, "sampling.wake"),
        ("eval MODEL --interval -5 5", 2, "--interval"),
        ("sweep MODEL --cfg 1,2 --eta 1", 2, "--eta"),
        ("grow MODEL --to 20 --out x", 2, "--to 20"),
        ("grow MODEL --to 32 --frames 2 --out x", 2, "--frames"),
        ("grow MODEL --to 32 --out x --ramp 100000", 2, "ramp"),
        ("info openmojo", 2, "openmoji"),
        ("info empty", 1, "empty"),
        ("eval empty", 1, "empty"),
        ("eval MODEL -n -5", 2, "'-5'"),
        ("eval MODEL -n 99999999999999 --metrics fd --ref images", 2, "10,000,000"),
        ("sample MODEL -n 99999999999999", 2, "--seed"),
        ("plot empty", 2, "empty"),
        ("eval MODEL", 2, "give -n"),
        ("eval MODEL --metrics fdi", 2, "'fdi'"),
        ("eval MODEL --protocol coco", 2, "'coco'"),
        ("eval MODEL -n 4 --clip c", 2, "--clip PATH"),
        ("eval MODEL -n 4 --inception i", 2, "fid,kid,is,prdc,fid-frames"),
        ("compare a.npz b.npz --metrics fd,is50k", 2, "(--metrics fd,is)"),
        ("compare a.npz b.npz --fvd i3d.pt", 2, "--fvd PATH"),
        ("compare a.npz b.npz --side 32", 2, "omit --side"),
        ("compare images MODEL/model --side 16", 2, "not images: mdm eval"),
        ("sweep MODEL -n 4", 2, "name what to try"),
        ("sweep MODEL --steps 10,2.5", 2, "'2.5'"),
        ("sweep MODEL --cfg 1:3", 2, "FIRST:LAST:STEP"),
        ("sweep MODEL --sampler ddim,euler", 2, "'euler'"),
    ],
)
def test_bad_input_is_one_line_and_a_status(
    words, status, message, model, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    save_png(np.zeros((64, 64, 3), np.uint8), Path("images/0.png"), None)
    assert run(*words.replace("MODEL", str(model)).split()) == status
    check_message(capsys.readouterr().err, message)
    assert sorted(os.listdir()) == ["empty", "full", "images"], "nothing is begun"


DAMAGE = {
    "empty": b"",
    "noise": bytes(range(256)) * 8,
    "deep": b"[" * 2_000 + b"\n",
    "escape": b'{"\x1b[31m": \x07}\n',
    "zip": b"PK\x03\x04" + bytes(60),
    "pickle": b"\x80\x02cos\nsystem\nq\x00X\x02\x00\x00\x00idq\x01\x85R.",
}
COMMANDS = {
    "model/config.json": ["info model", "sample model", "train model --out x"],
    "model/model.safetensors": ["sample model", "export model -o x", "eval model"],
    "run/config.yaml": ["info run", "train run", "train run/config.yaml --out x"],
    "run/metrics.jsonl": ["plot run"],
    "a.pth": ["info a.pth", "convert a.pth -o x", "sample a.pth"],
    "a.parquet": ["data check a.parquet"],
    "a.tar": ["data check a.tar"],
    "a.npz": ["eval model -n 4 --ref a.npz"],
    "a.pt": ["eval model -n 4 --metrics fid --inception a.pt"],
    "images/0.png": ["data check images"],
    "images/metadata.csv": ["data check images"],
    "images/metadata.jsonl": ["data check images"],
    "films/a.mp4": ["data check films --preset webvid-16x64"],
    "films/a.webp": ["data check films --preset webvid-16x64"],
}


@pytest.mark.parametrize("file", COMMANDS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_one_line_without_traceback(
    file, damage, model, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model / "model", "model")
    save_png(np.zeros((64, 64, 3), np.uint8), Path("images/1.png"), None)
    Path(file).parent.mkdir(exist_ok=True)
    Path(file).write_bytes(DAMAGE[damage])
    for words in COMMANDS[file]:
        status = run(*words.split())
        output = capsys.readouterr()
        assert status in (1, 2)
        check_message(output.err)
        assert Path(file).name in output.out + output.err
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", output.out + output.err)


def test_other_packages_errors_are_one_line(monkeypatch, capsys):
    import struct

    for error in (struct.error("x"), MemoryError(), KeyError("a"), RecursionError("deep")):

        def fail(*_: object, error=error) -> None:
            raise error

        monkeypatch.setattr("matryoshka_diffusion.models.save.average_model", fail)
        assert run("ema", "r", "--length", 0.1, "-o", "x") == 1
        check_message(capsys.readouterr().err)


@pytest.mark.parametrize("code", [130, 143])
def test_a_stopped_run_leaves_with_its_code(code, monkeypatch, tmp_path, capsys):
    def stop(*_, **__):
        raise Stopped("saved; the same command continues", code - 128)

    monkeypatch.setattr("matryoshka_diffusion.runs.prepare.prepare", stop)
    assert run("train", "openmoji", "--out", tmp_path / "run") == code
    check_message(capsys.readouterr().err, "the same command continues")


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(FileNotFoundError):
        run("sample", tmp_path / "nowhere", "--debug")


# --- the terminal ------------------------------------------------------------------------------


def test_control_characters_are_escaped(capsys, monkeypatch):
    text = "\x1b[31mred\x07 \udcff\u202e naïve 苹果"
    terminal.say(f"{text}\n\r")
    terminal.show(f"{text}\nsecond line")
    output = capsys.readouterr()
    escaped = r"\u001b[31mred\u0007 \udcff\u202e naïve 苹果"
    assert output.err == f"mdm: {escaped}\n"
    assert output.out == f"{escaped}\nsecond line\n"
    monkeypatch.setattr(terminal, "LOG_SECONDS", 0.0)
    with terminal.Bar(text) as bar:
        bar(1, 2)
        bar(2, 2)
    terminal.show_traceback(ValueError, ValueError(text), None)
    assert capsys.readouterr().err.count(escaped) > 1


HOSTILE = "\x1b]52;c;cm0=\x07\x9b31m\u202e\x7f\nmdm: all is well"


@pytest.mark.parametrize("kind", ["class", "file", "caption", "member", "name"])
def test_no_name_or_caption_steers_the_terminal(kind, model, tmp_path, monkeypatch, capsys):
    """Names of classes, files and tar members, captions, and names of models."""
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))
    data, picture = tmp_path / "data", tmp_path / "0.png"
    save_png(np.zeros((64, 64, 3), np.uint8), picture, None)
    words = ["data", "check", data]
    if kind == "class":
        shutil.copytree(picture.parent, data / HOSTILE, ignore=lambda *_: ["data"])
    elif kind == "file":
        data.mkdir()
        shutil.copy(picture, data)
        (data / f"{HOSTILE}.png").write_bytes(b"no picture")
    elif kind == "caption":
        data.mkdir()
        shutil.copy(picture, data)
        record = json.dumps({"file_name": "0.png", "text": HOSTILE})
        (data / "metadata.jsonl").write_text(f"{record}\n")
    elif kind == "member":
        words = ["data", "check", tmp_path / "a.tar"]
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            archive.add(picture, "0.png")
            archive.add(__file__, f"{HOSTILE}.png")
    else:
        shutil.copytree(model, data)
        config = json.loads((data / "model" / "config.json").read_bytes())
        (data / "model" / "config.json").write_text(json.dumps(config | {"name": HOSTILE}))
        words = ["info", data]
    run(*words)
    output = "".join(capsys.readouterr())
    assert r"\u001b]52;c;cm0=\u0007\u009b31m\u202e\u007f" in output
    assert all(x.isprintable() or x == "\n" for x in output)
    assert kind == "name" or "mdm: all is well" not in output.splitlines()


def test_letters_that_an_encoding_lacks_are_escaped(monkeypatch, tmp_path):
    save_png(np.zeros((64, 64, 3), np.uint8), tmp_path / "a snowman \u2603" / "0.png", None)
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "cp1252", errors="strict"))
    assert run("data", "check", tmp_path) == 0
    assert rb"a snowman \u2603" in written.getvalue()


@pytest.mark.parametrize("words", ["matryoshka_diffusion.cli info openmoji", "studies list"])
def test_a_command_ends_quietly_when_nobody_reads_on(words):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", *words.split()]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_a_log_gets_a_line_of_progress_now_and_then(monkeypatch, capsys):
    def work():
        with terminal.Bar() as bar:
            for title, done in (("one", 1), ("one", 2), ("two", 1), ("two", 2)):
                bar(title, done, 2)
        return capsys.readouterr().err

    assert work() == "", "quick work needs none"
    monkeypatch.setattr(terminal, "LOG_SECONDS", 0.0)
    output = work()
    assert all(f"mdm: {title}: 2 of 2" in output for title in ("one", "two"))
    monkeypatch.setenv("RANK", "1")
    assert work() == ""
    terminal.say("mine")
    assert capsys.readouterr().err == "mdm: rank 1: mine\n"
