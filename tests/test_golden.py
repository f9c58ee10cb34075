"""Folders that version 0.1.0 wrote open, resume and, with its noise, sample as they did then."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from matryoshka_diffusion import rng
from matryoshka_diffusion.cli.main import main as mdm
from matryoshka_diffusion.philox import Place

GOLDEN = Path(__file__).parent / "data" / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
CLASSES = (
    "--class",
    "disk",
    "--class",
    "square",
    "-n",
    "2",
    "--seed",
    "3",
    "--steps",
    "4",
    "--precision",
    "fp32",
)


def noise_of_then(
    places: list[list[Place]], counts: list[int], device: object
) -> list[torch.Tensor]:
    """Normal numbers as they were drawn when the folders were written."""
    parts = []
    for own, count in zip(zip(*places, strict=True), counts, strict=True):
        rows = [place.generator().standard_normal(count, dtype=np.float32) for place in own]
        parts.append(torch.from_numpy(np.stack(rows)))
    return parts


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The working folder of then: all paths in the files are relative to it."""
    with tarfile.open(GOLDEN / "folders.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rng, "normal_rows", noise_of_then)
    return tmp_path


@pytest.mark.filterwarnings("default:.* does not say which data")  # runs of its time did not
def test_a_stopped_run_resumes_to_the_same_numbers(folders):
    assert mdm(["train", "run"]) == 0
    lines = map(json.loads, (folders / "run" / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if line["images_seen"] > 32]
    np.testing.assert_allclose(losses, EXPECTED["losses"], rtol=1e-5)
    last = folders / "run" / "checkpoints" / f"{64:010d}"
    files = {name: last / f"{name}.safetensors" for name in ("weights", "ema", "optimizer")}
    files["model"] = folders / "run" / "model" / "model.safetensors"
    for name, path in files.items():
        matrices = [x for x in load_file(path).values() if x.ndim > 1]
        sums = sorted([list(x.shape), float(x.astype(np.float64).sum())] for x in matrices)
        wanted = sorted(
            [shape, total]
            for shape, total, _ in EXPECTED["tensors"][name]["each"]
            if len(shape) > 1
        )
        assert [shape for shape, _ in sums] == [shape for shape, _ in wanted]
        np.testing.assert_allclose([x for _, x in sums], [x for _, x in wanted], atol=1e-4)


@pytest.mark.parametrize("name", ["model", "adapters"])
def test_a_model_draws_the_same_samples(name, folders):
    assert mdm(["sample", name, *CLASSES, "-o", f"drawn-{name}"]) == 0
    pictures = sorted((folders / f"samples-{name}").iterdir())
    assert len(pictures) == 4
    for path in pictures:
        drawn, expected = (
            np.asarray(Image.open(file)).astype(int)
            for file in (folders / f"drawn-{name}" / path.name, path)
        )
        assert abs(drawn - expected).max() <= 1
