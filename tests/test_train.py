"""Training from Python: the same run as that of the command, and a model at its end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import matryoshka_diffusion as mdm
from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.config import ConfigError, UsageError
from matryoshka_diffusion.configfile import load_config
from matryoshka_diffusion.draw.curves import plot
from matryoshka_diffusion.files import MissingExtra
from matryoshka_diffusion.presets import preset
from picturing import noise, save
from tiny_run import digests

SMALL = {
    "model__embedding": 32,
    "model__levels__0__widths": [32, 32],
    "model__levels__2__widths": [32, 32],
    "train__stages": [{"levels": 3, "images": 8, "batch_size": 4, "lr": 0.001}],
    "train__warmup_images": 0,
    "sampling__steps": 2,
}


@pytest.fixture
def pets(tmp_path, monkeypatch) -> Path:
    """A folder with two classes of pictures, and the working folder beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))
    for n in range(8):
        save(Path("pets") / f"class{n % 2}" / f"{n}.png", noise(70, seed=n))
    return Path("pets")


def test_a_run_of_python_is_that_of_the_command(pets, capfd):
    seen = []
    run = mdm.train(
        "folder-64",
        pets,
        "runs/a",
        device="cpu",
        progress=lambda done, total: seen.append((done, total)),
        **SMALL,
    )
    assert seen == [(4, 8), (8, 8)]
    assert not any(capfd.readouterr()), "progress was given elsewhere"
    samples = run.model.sample(classes="class1", steps=1)
    assert samples.pictures.shape == (1, 64, 64, 3)
    assert run.model is run.model
    words = ["--data", "pets", "--out", "runs/b", "--device", "cpu"]
    for name, value in SMALL.items():
        words += ["--set", f"{name.replace('__', '.')}={value}"]
    assert cli.main(["train", "folder-64", *words]) == 0
    assert digests(Path("runs/a")) == digests(Path("runs/b"))
    assert list(Path("runs/a/previews").glob("*.png"))
    capfd.readouterr()
    again = mdm.train("runs/a", device="cpu")
    assert again.folder == run.folder
    assert "8 pictures" in capfd.readouterr().out


def test_a_config_can_be_trained_and_changed(pets):
    config = preset("folder-64").model_copy(update={"name": "mine"})
    run = mdm.train(config, pets, "runs/c", device="cpu", progress=False, train__seed=7, **SMALL)
    written = load_config(run.folder / "config.yaml")
    assert (written.name, written.train.seed) == ("mine", 7)
    with pytest.raises(UsageError, match="as_='simple'"):
        mdm.train(config, pets, "runs/d", as_="simple")


def test_the_quality_of_samples_is_logged_and_drawn(pets, monkeypatch):
    network = lambda *_: lambda images: images.mean(axis=(1, 2))  # noqa: E731
    monkeypatch.setattr("matryoshka_diffusion.runs.run.EffNetLite0", network)
    settings = {**SMALL, "train__eval_every_images": 4, "train__preview_every_images": 0}
    run = mdm.train("folder-64", pets, "runs/q", device="cpu", progress=False, **settings)
    lines = map(json.loads, (run.folder / "metrics.jsonl").read_text("utf-8").splitlines())
    measured = [line["images_seen"] for line in lines if "fd_8" in line]
    assert measured == [4, 8]
    plot([run.folder], Path("curves.svg"))
    assert "FD ↓, 8 samples" in Path("curves.svg").read_text("utf-8")


def test_the_network_that_measures_is_needed_before_the_first_step(pets, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    settings = {**SMALL, "train__eval_every_images": 4}
    with pytest.raises(MissingExtra, match=r"train\.eval_every_images.*\[eval\]"):
        mdm.train("folder-64", pets, "runs/q", device="cpu", progress=False, **settings)
    assert not Path("runs/q/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("settings", "nearest"),
    [
        ({"train__sed": 1}, r"train\.seed"),
        ({"batch_size": 8}, r"train\.stages\.0\.batch_size"),
        ({"train__seed": "x"}, r"train\.seed"),
    ],
)
def test_a_wrong_setting_is_named_before_any_work(pets, settings, nearest):
    with pytest.raises(ConfigError, match=nearest):
        mdm.train("folder-64", pets, "runs/x", **settings)
    assert not Path("runs").exists()


def test_a_folder_is_needed(pets):
    with pytest.raises(UsageError, match="out="):
        mdm.train("folder-64", pets)
    with pytest.raises(ConfigError, match="folder-64"):
        mdm.train("folder-63", pets, "runs/x")
