"""The model in the package: what it is, that it draws, and that it says where it comes from."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from matryoshka_diffusion import sampling
from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.data.emoji import openmoji
from matryoshka_diffusion.data.source import open_data, read_all
from matryoshka_diffusion.draw.grid import SETTINGS_KEY
from matryoshka_diffusion.eval.prompts import SHEET_PROMPTS
from matryoshka_diffusion.files import MissingExtra
from matryoshka_diffusion.metrics.formulas import averages, prompt_retrieval
from matryoshka_diffusion.models.find import CAPTIONS, caption_features
from matryoshka_diffusion.models.names import shipped_models
from matryoshka_diffusion.models.save import export_model
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.presets import preset
from matryoshka_diffusion.text.encoder import load_encoder

FOLDER = shipped_models()["openmoji"]
LIMIT = 24 * 2**20


@pytest.fixture(scope="module")
def model():
    return Matryoshka.load("openmoji")


def test_it_is_small_and_halved():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < LIMIT
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def test_it_says_where_it_comes_from(model):
    """It is a model of the preset's data, and no folder of another computer is in it."""
    shipped, source_preset = model.config, preset(model.config.name)
    for part in ("process", "data", "encoder", "sampling"):
        assert getattr(shipped, part) == getattr(source_preset, part)
    assert [level.side for level in shipped.model.levels] == [16, 64, 256]
    assert shipped.train.init is None
    notice = (FOLDER / "NOTICE").read_text(encoding="utf-8")
    command = f"mdm train {shipped.name} "
    for word in ("OpenMoji", "CC BY-SA 4.0", "seed 0", command, "commit", "retrieval"):
        assert word in notice, word


def test_its_samples_say_whose_the_drawings_are(model, tmp_path):
    out = str(tmp_path / "a.png")
    assert cli.main(["sample", "openmoji", "-p", "red apple", "--steps", "1", "-o", out]) == 0
    with Image.open(tmp_path / "a.png") as picture:
        settings = json.loads(picture.info[SETTINGS_KEY])
    for word in ("OpenMoji", "https://openmoji.org", "CC BY-SA 4.0"):
        assert word in settings["attribution"]
    export_model("openmoji", tmp_path / "shared")
    assert Matryoshka.load(tmp_path / "shared").config.attribution == settings["attribution"]
    assert preset("openmoji").attribution is None


def test_stored_features_are_those_of_the_encoder_for_all_captions_in_8_bits(model):
    features = caption_features("openmoji")
    captions = openmoji(16).samples
    assert features.keys() == {*(text for sample in captions for text in sample.captions), ""}
    encoder = load_encoder(model.config.encoder)
    with safe_open(FOLDER / CAPTIONS, "pt") as file:
        assert file.metadata()["encoder"] == encoder.key
    for caption in ["", *list(features)[::100]]:
        exact, stored = encoder([caption])[0], features[caption]
        half_a_step = exact.abs().amax(1, keepdim=True) / 127 / 2
        assert ((stored - exact).abs() <= 1.001 * half_a_step + 1e-5).all()


def test_an_encoder_is_loaded_for_captions_without_stored_features_alone(monkeypatch, tmp_path):
    def load(config, *_, **__):
        raise FileNotFoundError(config.path or "the usual one")

    monkeypatch.setattr(sampling, "load_encoder", load)
    model = Matryoshka.load("openmoji")
    model.sample(["red apple", "sailboat"], negative="", guidance=2.0, n=2, steps=2)
    for prompts in ("a blue zebra", ["red apple", "a blue zebra"]):
        with pytest.raises(FileNotFoundError, match="the usual one"):
            model.sample(prompts, steps=2)
    with pytest.raises(FileNotFoundError, match="another one"):
        Matryoshka.load("openmoji", text_encoder="another one").sample("red apple", steps=2)
    # A folder of that name goes first, and captions of one model say nothing about another.
    (tmp_path / "openmoji").mkdir()
    monkeypatch.chdir(tmp_path)
    assert not caption_features("openmoji")


def test_a_caption_draws_the_same_beside_one_that_is_encoded(model):
    """Where some features are stored in 8 bits, and others are not."""
    settings: Any = {"steps": 2, "seed": 3}
    own = Matryoshka(model.net, model.config, features=caption_features("openmoji"))
    alone = own.sample("red apple", **settings).pictures[0]
    beside = own.sample(["red apple", "a blue zebra"], **settings).pictures[0]
    assert np.abs(alone.astype(int) - beside).max() <= 1


def test_without_the_encoder_an_error_names_the_nearest_caption_and_the_extra(monkeypatch):
    def load(*_, **__):
        raise MissingExtra("pip install matryoshka-diffusion[minilm]")

    monkeypatch.setattr(sampling, "load_encoder", load)
    with pytest.raises(
        MissingExtra, match=r"'red appel' .*red apple.*matryoshka-diffusion\[minilm"
    ):
        Matryoshka.load("openmoji").sample("red appel", steps=1)


def test_an_encoder_that_is_there_encodes_all_captions(model):
    encoded = []

    class Encoder:
        key, width = "zeros", 384

        def __call__(self, captions):
            encoded.extend(captions)
            return [torch.zeros(3, self.width) for _ in captions]

    Matryoshka(model.net, model.config, encoder=Encoder()).sample("red apple", steps=2)
    Matryoshka.load("openmoji", encoder=Encoder()).sample("umbrella", steps=2)
    assert encoded == ["red apple", "umbrella"]


def test_it_draws_what_it_is_asked_for(model):
    source = open_data(model.config)
    places = {text: index for index, texts in enumerate(source.captions or ()) for text in texts}
    prompts = SHEET_PROMPTS[:12]
    retrieval = prompt_retrieval(
        averages(model.sample(prompts).pictures),
        np.array([places[name] for name in prompts]),
        np.concatenate([averages(x.picture[None]) for x in read_all(source, range(len(source)))]),
    )
    assert retrieval.first >= 0.75, retrieval
