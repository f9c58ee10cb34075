"""The hub: what is uploaded, what is fetched, and that paths of this computer stay here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import errors
from PIL import Image

from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.configfile import changed
from matryoshka_diffusion.models.save import export_adapters, export_model
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.runs import prepare
from matryoshka_diffusion.training.weights import export_weights
from test_adapters import BASE, write_run
from test_codec import on_codes
from test_pipeline import class_model, moving, plain_model, text_model


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A hub that is a folder: repositories by name."""

    class Api:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, name, private, exist_ok):
            assert exist_ok
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
            return f"https://hub.test/{name}{'?private' if private else ''}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, tmp_path / repo_id, dirs_exist_ok=True)

    def snapshot_download(name, revision, allow_patterns):
        if not (tmp_path / name).is_dir() or revision == "lost":
            raise OSError(f"404: {name}@{revision}")
        there = tmp_path / name
        files = {str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()}
        assert files - {"README.md"} <= set(allow_patterns)
        assert "README.md" not in allow_patterns
        return str(there)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return tmp_path


def test_a_model_goes_there_and_back_unless_a_folder_has_its_name(site, monkeypatch):
    model = class_model()
    assert model.push_to_hub("me/dolls", private=True) == "https://hub.test/me/dolls?private"
    back = Matryoshka.from_pretrained("me/dolls", revision="main", precision="fp32")
    assert back.config.model == model.config.model
    assert (back.sample(classes="cat").pictures == model.sample(classes="cat").pictures).all()
    model.push_to_hub("me/half", dtype=torch.bfloat16)
    sizes = [
        (site / "me" / name / "model.safetensors").stat().st_size for name in ("dolls", "half")
    ]
    assert sizes[1] < 0.6 * sizes[0]
    monkeypatch.chdir(site)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert Matryoshka.from_pretrained("me/dolls").config.name == "tiny"


@pytest.mark.parametrize(
    ("make", "moves", "task", "call"),
    [
        (text_model, False, "text-to-image", 'model.sample("a prompt", n=4)'),
        (class_model, False, "unconditional-image-generation", "model.sample(classes=0, n=4)"),
        (plain_model, False, "unconditional-image-generation", "model.sample(n=4)"),
        (text_model, True, "text-to-video", 'model.sample("a prompt", n=4)'),
        (class_model, True, None, "model.sample(classes=0, n=4)"),
    ],
)
def test_the_card_says_what_it_is_and_how_to_call_it(make, moves, task, call, site):
    model = moving(make()) if moves else make()
    model.push_to_hub("me/dolls", license="cc-by-sa-4.0")
    card = (site / "me" / "dolls" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header.get("pipeline_tag") == task
    assert header["license"] == "cc-by-sa-4.0"
    assert 'from_pretrained("me/dolls")' in card
    assert call in card
    assert ("samples.videos" if moves else "samples.pictures") in card
    assert ("8, 4x16" if moves else "8, 16") in card
    assert not (moves and ("picture" in card or "image" in card))


def test_paths_of_this_computer_are_not_shared(site, tmp_path):
    model = text_model()
    data = model.config.data.model_copy(update={"path": "/home/me/secret"})
    assert model.config.encoder is not None
    encoder = model.config.encoder.model_copy(update={"path": str(tmp_path)})
    train = model.config.train.model_copy(update={"init": str(tmp_path)})
    update = {"data": data, "encoder": encoder, "train": train}
    model.config = model.config.model_copy(update=update)
    with pytest.warns(UserWarning, match="is a local folder and does not go with"):
        model.push_to_hub("me/dolls")
    written = json.loads((site / "me" / "dolls" / "config.json").read_text())
    assert written["data"]["path"] is None
    assert written["encoder"]["path"] is None
    assert written["train"]["init"] is None
    for path in (site / "me" / "dolls").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()


def test_an_export_names_no_path_of_this_computer_unasked(tmp_path):
    model = text_model()
    assert model.config.encoder is not None
    mix = ({"path": str(tmp_path / "a"), "share": 1.0}, {"path": str(tmp_path / "b"), "share": 1.0})
    changes: dict[str, Any] = {"train.init": str(tmp_path), "data.path": None, "data.mix": mix}
    changes |= {"encoder.path": str(tmp_path), "sampling.guide": str(tmp_path)}
    for data in (changes, {**changes, "data.path": str(tmp_path), "data.mix": ()}):
        config = changed(model.config, data.items())
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        export_weights(tmp_path / "run", model.net.state_dict(), config)
        with pytest.warns(UserWarning, match="is a local folder and does not go with"):
            export_model(str(tmp_path / "run"), tmp_path / "shared" / str(len(data["data.mix"])))
    encoder = str(tmp_path / "t5")
    export_model(str(tmp_path / "run"), tmp_path / "named", text_encoder=encoder)
    named = json.loads((tmp_path / "named" / "config.json").read_text())
    assert named["encoder"]["path"] == encoder, "it was asked for"
    files = [path for path in (tmp_path / "shared").rglob("*") if path.is_file()]
    assert len(files) == 6
    assert not [path for path in files if str(tmp_path).encode() in path.read_bytes()]


def test_what_the_hub_does_not_give_is_one_clear_error(site, tmp_path):
    for name in ("openmoji", tmp_path):
        with pytest.raises(UsageError, match="omit revision"):
            Matryoshka.from_pretrained(name, revision="main")
    for name, revision in (("me/lost", None), ("me/dolls", "lost")):
        with pytest.raises(OSError, match=rf"^{name}: no folder here.*404"):
            Matryoshka.from_pretrained(name, revision=revision)
    with pytest.raises(FileNotFoundError, match="no shipped model of that name"):
        Matryoshka.from_pretrained("nothing")


def test_a_proxy_that_refuses_is_one_clear_error(monkeypatch):
    """Its error is of the HTTP library's common type, and none of the hub's own."""

    def refused(*_, **__):
        raise vars(errors)["HTTPError"]("403 Forbidden")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    with pytest.raises(OSError, match=r"^me/dolls: no folder here.*403"):
        Matryoshka.load("me/dolls")


def test_every_command_takes_a_hub_id_where_it_takes_a_model(site, tmp_path, monkeypatch, capsys):
    class_model().push_to_hub("me/dolls")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # not where the stand-in has a folder me/dolls
    draw = ["--class", "cat", "--steps", "2", "--device", "cpu"]
    assert cli.main(["sample", "me/dolls", *draw, "-o", "cat.png"]) == 0
    assert cli.main(["sample", "me/dolls", *draw]) == 0
    assert [path.suffix for path in Path("samples").iterdir()] == [".png"]
    assert cli.main(["info", "me/dolls"]) == 0
    assert "2 levels" in capsys.readouterr().out
    assert cli.main(["export", "me/dolls", "-o", "own"]) == 0
    assert cli.main(["sample", "own", *draw, "-o", "own.png"]) == 0
    assert Image.open("own.png").tobytes() == Image.open("cat.png").tobytes()
    assert cli.main(["grow", "me/dolls", "--to", "32", "--out", "grown"]) == 0
    tuned = prepare.find_config("me/dolls", "pets")
    assert (tuned.name, tuned.train.init) == ("tiny-tuned", "me/dolls")
    from_it = prepare.find_config("folder-64", "pets", init="me/dolls")
    assert (from_it.train.init, from_it.data.classes) == ("me/dolls", ("cat", "dog", "eel"))
    assert cli.main(["train", "me/dolls", "--data", "nowhere", "--out", "run"]) == 1
    assert "nowhere" in capsys.readouterr().err
    # A folder of the name takes precedence, and a folder of the owner is no owner on the hub.
    shutil.copytree(site / "me" / "dolls", Path("me") / "dolls")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert cli.main(["sample", "me/dolls", *draw, "-o", "cat2.png"]) == 0
    assert cli.main(["sample", "me/dols", *draw]) == 1
    assert "me/dols: no such folder" in capsys.readouterr().err


def test_adapters_come_from_the_hub_too(site, tmp_path, monkeypatch):
    base = tmp_path / "base"
    export_weights(base, BASE.net.state_dict(), BASE.config)
    export_adapters(str(write_run(base, tmp_path / "run")), site / "me" / "pets")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    here, there = (
        Matryoshka.load(base, adapters={name: 1.0}) for name in (str(tmp_path / "run"), "me/pets")
    )
    assert there.adapters == ("pets=1",)
    assert there.weights_hash == here.weights_hash


@pytest.mark.parametrize(
    "name", ["me/dolls/x", "../dolls", "me/", "/dolls", "me/do lls", "-me/dolls"]
)
def test_other_names_are_no_hub_ids(name, site):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Matryoshka.load(name)


def test_a_codec_goes_with_its_model(site, tiny_codec):
    config = on_codes(tiny_codec())
    model = Matryoshka(NestedUNet(config.model), config)
    model.push_to_hub("me/codes")
    assert str(tiny_codec()) not in (site / "me" / "codes" / "config.json").read_text()
    back = Matryoshka.from_pretrained("me/codes")
    assert (back.sample(n=1).pictures == model.sample(n=1).pictures).all()
