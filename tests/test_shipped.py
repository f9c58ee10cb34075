"""The model in the package: what it is, that it draws, and that it says where it comes from."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors import safe_open

from matryoshka_diffusion.data.source import open_source
from matryoshka_diffusion.eval.prompts import SHEET_PROMPTS
from matryoshka_diffusion.metrics.formulas import averages, prompt_retrieval
from matryoshka_diffusion.models.find import shipped_models
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.presets import preset

FOLDER = shipped_models()["openmoji"]
LIMIT = 24 * 2**20


@pytest.fixture(scope="module")
def model():
    return Matryoshka.load("openmoji")


def test_it_is_small_and_halved():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < LIMIT
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def test_it_was_made_by_the_preset_run_longer_and_says_where_it_comes_from(model):
    """Nothing but the lengths of the stages differs, and no folder of another computer is in it."""
    shipped, source_preset = model.config, preset("openmoji")
    stages, expected = (
        [stage.model_copy(update={"images": 1}) for stage in config.train.stages]
        for config in (shipped, source_preset)
    )
    assert stages == expected
    for part in ("model", "process", "sampling", "data", "encoder"):
        assert getattr(shipped, part) == getattr(source_preset, part)
    notice = (FOLDER / "NOTICE").read_text(encoding="utf-8")
    for word in ("OpenMoji", "CC BY-SA 4.0", "seed 0", "mdm train openmoji", "commit", "retrieval"):
        assert word in notice, word


def test_it_draws_what_it_is_asked_for(model):
    source = open_source(model.config.data, 64)
    places = {text: index for index in range(len(source)) for text in source[index].captions}
    prompts = SHEET_PROMPTS[:12]
    retrieval = prompt_retrieval(
        averages(model.sample(prompts).pictures),
        np.array([places[name] for name in prompts]),
        averages(np.stack([source[index].picture for index in range(len(source))])),
    )
    assert retrieval.first >= 0.75, retrieval
