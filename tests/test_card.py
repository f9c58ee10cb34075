"""The card of a shared model: what machines read, code that runs, and figures of these weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.configfile import changed
from matryoshka_diffusion.eval.result import FILE, Result, append, folder_of
from matryoshka_diffusion.models.card import read_figures
from matryoshka_diffusion.training.weights import export_weights
from test_adapters import BASE, write_run


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A finished run, in a folder that commands run in."""
    monkeypatch.chdir(tmp_path)
    whose = "Pictures by Me, CC BY 4.0"
    config = changed(BASE.config, [("attribution", whose), ("data.path", str(tmp_path / "secret"))])
    export_weights(tmp_path / "run" / "model", BASE.net.state_dict(), config)
    return tmp_path / "run"


def export(run: Path, *words: str) -> str:
    """The card of an export of the run into the folder that cards call this-folder."""
    assert cli.main(["export", str(run), "-o", "this-folder", *words]) == 0
    return Path("this-folder", "README.md").read_text(encoding="utf-8")


def code(card: str) -> str:
    [block] = re.findall(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)
    return block


def test_an_export_has_a_card_that_the_hub_can_read(run):
    export(run, "--license", "cc-by-4.0")
    card = ModelCard.load(Path("this-folder", "README.md"))
    assert card.data.to_dict() == {
        "library_name": "matryoshka-diffusion",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["matryoshka-diffusion", "diffusion"],
        "license": "cc-by-4.0",
    }
    assert str(card) == Path("this-folder", "README.md").read_text(encoding="utf-8")
    for part in (
        "# tiny",
        "8, 16",
        f"{BASE.config.train.images} images",
        "`folder`",
        "Pictures by Me, CC BY 4.0",
    ):
        assert part in card.text
    assert str(run.parent) not in card.content


def test_the_code_on_the_card_draws(run, monkeypatch, capsys):
    card = export(run)
    assert "license" not in ModelCard(card).data.to_dict()
    assert "under which licence" in card, "it asks for what is missing"
    names: dict = {}
    exec(code(card), names)
    assert names["samples"].pictures.shape == (4, 16, 16, 3)
    [command] = re.findall(r"`mdm (sample this-folder [^`]*)`", card)
    assert cli.main([*command.split(), "--steps", "2"]) == 0


def test_the_card_of_adapters_names_the_model_and_draws_with_it(run):
    adapted = write_run(run / "model", run.parent / "adapted")
    card = export(adapted, "--format", "peft", "--license", "mit")
    data = ModelCard(card).data.to_dict()
    assert data["library_name"] == "peft"
    assert "lora" in data["tags"]
    assert "base_model" not in data, "it is a folder of this computer"
    assert str(run.parent) not in card
    assert BASE.weights_hash[:16] in card, "but it can be recognised"
    names: dict = {}
    exec(code(card).replace("MODEL", str(run)), names)
    assert names["model"].adapters == ("this-folder=1",)


def test_the_card_of_a_pipeline_draws_with_diffusers(run):
    pytest.importorskip("diffusers")
    card = export(run, "--format", "diffusers")
    names: dict = {}
    exec(code(card), names)
    assert names["image"].size == (16, 16)


def test_figures_of_these_weights_are_on_the_card_and_no_others(run):
    place = f"folder {run.parent / 'faces'}"
    mine: Any = {"of": "tiny", "weights": BASE.describe({})["weights"], "n": 2_000}
    others = {**mine, "weights": "0" * 64}
    append(
        [
            Result(key="fid", metric="FID-2K", value=40.0, reference="old", **mine),
            Result(key="fid", metric="FID-2K", value=12.345, error=0.2, reference=place, **mine),
            Result(key="kid", metric="KID", value=0.5, **others),
            Result(key="is", metric="IS", value=float("nan"), **mine),
        ],
        folder_of(str(run), "eval") / FILE,
    )
    with open(folder_of(str(run), "eval") / FILE, "a", encoding="utf-8") as file:
        file.write('[1]\n{"weights": 1')
    card: Any = ModelCard(export(run))
    [figure] = card.data.eval_results
    assert (figure.metric_type, figure.metric_value) == ("fid", 12.345)
    assert figure.dataset_name == "folder faces"
    assert "| FID-2K | 12.35 ± 0.2 | 2,000 | folder faces |" in card.text
    assert str(run.parent) not in card.content
    assert "KID" not in card.text
    assert "nan" not in card.text


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("folder {}/faces, cut to squares", "folder faces, cut to squares"),
        ("datasets hf:{}/faces@test", "datasets hf:faces@test"),
        ("FID [reference ({}/a/*.tar)]", "FID [reference (*.tar)]"),
        ("datasets hf:you/faces@test", "datasets hf:you/faces@test"),
        ("shards https://host.org/a/{{0..9}}.tar", "shards https://host.org/a/{{0..9}}.tar"),
    ],
)
def test_names_of_references_lose_the_folders_of_this_computer(run, name, shared):
    mine: Any = {"of": "tiny", "weights": BASE.describe({})["weights"], "n": 2_000}
    one = Result(key="fid", metric="FID", value=1.0, reference=name.format(run.parent), **mine)
    append([one], folder_of(str(run), "eval") / FILE)
    [figure] = read_figures(run, BASE.net.state_dict())
    assert figure.reference == shared.format()


def test_a_licence_is_refused_where_no_card_is_written(run, capsys):
    words = ["export", str(run), "--format", "onnx", "--license", "mit", "-o", "x"]
    assert cli.main(words) == 2
    assert "--license" in capsys.readouterr().err
