"""How a training begins without a preset, and how a finished one goes on for longer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from filming import film
from matryoshka_diffusion.cli import begin, plan
from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.cli import train as cli_train
from matryoshka_diffusion.configfile import load_config
from matryoshka_diffusion.training.checkpoint import newest
from matryoshka_diffusion.training.trainer import train
from picturing import noise, save, save_noise
from tiny_run import TinyPictures, encode, tiny_config


@pytest.fixture
def begun(monkeypatch, tmp_path):
    """The config and folder of each run that a command would train."""
    runs = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cli_train, "_train", lambda *words, **_: runs.append(words[:2]))
    return runs


def run(*words):
    return cli.main(["train", *map(str, words)])


# --- without a preset --------------------------------------------------------------------------


def test_presets_that_fit_the_images_are_proposed(begun, capsys):
    save_noise(Path("small"), 4, 70, 80)
    save_noise(Path("large pictures"), 4, 300, 280)
    assert run("--data", "small") == 0
    output = capsys.readouterr().out
    assert "4 pictures" in output
    assert "folder-64: 64 pixels" in output
    assert "minutes" in output
    assert "GB of memory" in output
    assert "folder-128" not in output
    assert "mdm train folder-64 --data small --out runs/small" in output
    assert "up to 12% of an image: --set data.shapes=own" in output
    assert run("--data", "large pictures") == 0
    output = capsys.readouterr().out
    assert "data.shapes" not in output, "squares keep 14 of 15 parts"
    assert re.search(r"^folder-256: 256 pixels, .* hours on a GPU at .* TFLOP/s", output, re.M)
    assert "mdm train folder-64 --data 'large pictures' --out runs/mine" in output
    assert not begun, "nothing is trained unasked"


@pytest.mark.parametrize(
    ("device", "gigabytes", "times", "taken"),
    [
        ("cpu", 200, 10**9, "folder-64"),
        ("cuda", 24, 10**9, "folder-256"),
        ("cuda", 12, 10**9, "folder-128"),
        ("cuda", 24, 500_000, "folder-256-cpu"),
        ("cuda", 24, 10, "folder-64"),
    ],
)
def test_with_a_folder_one_is_taken(begun, device, gigabytes, times, taken, monkeypatch):
    """The largest for which a GPU's memory and the number of images suffice."""
    precision = "matryoshka_diffusion.training.precision"
    monkeypatch.setattr(f"{precision}.best_device", lambda: device)
    monkeypatch.setattr(f"{precision}.device_memory", lambda device: gigabytes * 1e9)
    monkeypatch.setattr(begin, "MOST_TIMES", times)
    monkeypatch.setattr(plan, "memory", lambda config: int(20e9 * config.data_side / 256))
    save_noise(Path("photos"), 2, 300, 280)
    assert run("--data", "photos", "--out", "runs/a", "--set", "train.seed=7") == 0
    [(config, out)] = begun
    assert (config.name, config.train.seed, out) == (taken, 7, Path("runs/a"))
    assert config.data.path == str(Path("photos").resolve())


def test_a_begun_run_goes_on_without_a_look_at_the_images(begun, capsys):
    save(Path("photos/0.png"), noise(70))
    config = tiny_config()
    train(config, TinyPictures(), Path("runs/a"), encode=encode)
    assert run("--data", "photos", "--out", "runs/a") == 0
    [(again, _)] = begun
    assert again.name == config.name


@pytest.mark.parametrize(
    ("words", "message"), [([], "mdm presets"), (["--data", "films"], "webvid-16x64")]
)
def test_without_images_a_preset_is_needed(begun, words, message, capsys):
    film(Path("films/a.mp4"), [noise(32)] * 20)
    assert run(*words) == 2
    assert message in capsys.readouterr().err


# --- longer ------------------------------------------------------------------------------------


def test_a_finished_run_is_made_longer_once(begun, capsys, monkeypatch):
    config, folder = tiny_config(), Path("runs/a")
    train(config, TinyPictures(), folder, encode=encode)
    planned = []
    monkeypatch.setattr(cli_train, "_plan", lambda config, *_: planned.append(config))
    assert run(folder, "--more", 8, "--dry-run") == 0
    assert planned[0].train.images == config.train.images + 8
    assert load_config(folder / "config.yaml").train.images == config.train.images
    assert run(folder, "--more", 8) == 0
    longer = load_config(folder / "config.yaml")
    assert longer.train.images == config.train.images + 8
    assert begun[-1][0].train == longer.train
    capsys.readouterr()
    assert run(folder, "--more", 8) == 0
    assert "adds nothing" in capsys.readouterr().out
    assert load_config(folder / "config.yaml") == longer, "it has not finished yet"
    train(longer, TinyPictures(), folder, encode=encode)
    last = newest(folder / "checkpoints")
    assert last is not None
    assert int(last.name) == config.train.images + 8


def test_only_a_run_can_be_made_longer(begun, capsys):
    assert run("folder-64", "--more", 8, "--data", save_noise(Path("x"), 1)) == 2
    assert "--more" in capsys.readouterr().err
    assert not begun
