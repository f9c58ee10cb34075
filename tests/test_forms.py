"""Real pictures in every form that `--data` takes: each is checked, trained on and sampled."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.data.loader import Loader
from matryoshka_diffusion.data.source import open_source
from matryoshka_diffusion.runs import prepare as job

FILE = Path(__file__).parent.parent / "examples" / "data_forms.py"
FORMS = ("classes", "sidecar", "metadata", "shards", "parquet", "saved")
CAPTIONED = ("sidecar", "metadata", "shards", "parquet")
COUNT = 40
SMALL = (
    "model.embedding=32",
    "model.levels[0].widths=[32, 32]",
    "model.levels[-1].widths=[32, 32]",
    "train.stages=[{levels: 3, images: 8, batch_size: 4, lr: 1e-3}]",
    "train.warmup_images=0",
    "sampling.steps=2",
    "train.preview_every_images=0",
)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("data_forms", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def forms(example, tmp_path_factory) -> dict[str, str]:
    """Argument of `--data` for each form of 40 OpenMoji, evenly spread over the set."""
    pytest.importorskip("pyarrow")
    pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("forms")
    items = list(example.openmoji_items(24, COUNT))
    return {
        form: example.data_argument(form, write(items, folder / form))
        for form, write in example.FORMS.items()
    }


def test_every_form_holds_the_same_pictures(example, forms):
    assert tuple(example.FORMS) == FORMS
    samples = {}
    for form, data in forms.items():
        source = open_source(job.find_config("folder-64", data, []).data, 16)
        assert (len(source), source.bad, source[0].original_side) == (COUNT, (), 24), form
        assert (source.captions is not None) == (form in CAPTIONED)
        assert bool(source.classes) == (form not in CAPTIONED)
        batch = Loader(source, 0).batch(range(COUNT))
        samples[form] = sorted(
            zip((x.numpy().tobytes() for x in batch.picture), batch.captions, strict=True)
        )
    pictures = {form: [picture for picture, _ in rows] for form, rows in samples.items()}
    assert all(these == pictures["classes"] for these in pictures.values())


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_checked(forms, capsys, form):
    assert cli.main(["data", "check", forms[form]]) == 0
    printed = capsys.readouterr().out
    assert f"{COUNT} pictures" in printed
    assert "bad files 0" in printed
    assert ("captions  none" in printed) == (form not in CAPTIONED)


@pytest.mark.parametrize("form", ["classes", "shards"])  # one without captions, one with them
def test_forms_are_trained_on_and_sampled(forms, tmp_path, form):
    out = tmp_path / "run"
    changes = [word for change in SMALL for word in ("--set", change)]
    assert cli.main(["train", "folder-64", "--data", forms[form], "--out", str(out), *changes]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["images_seen"] == 8
    prompt = ["-p", "red apple"] if form in CAPTIONED else ["--class", "0"]
    assert cli.main(["sample", str(out), *prompt, "-o", str(tmp_path / "drawn.png")]) == 0
    with Image.open(tmp_path / "drawn.png") as drawn:
        assert drawn.size == (64, 64)


def test_the_example_runs_as_a_program(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["data_forms.py", str(tmp_path), "--side", "16", "--count", "8"]
    )
    example.main()
    printed = capsys.readouterr().out.splitlines()
    assert printed[3] == f"--data '{tmp_path}/shards/{{00000..00003}}.tar'"
    assert len(printed) == len(FORMS)
