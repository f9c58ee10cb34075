"""Files whose tensors have the names of version 0.1.0 are read as files of today."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from matryoshka_diffusion.models.find import find_model
from matryoshka_diffusion.nn.nested import old_name
from matryoshka_diffusion.training import checkpoint
from matryoshka_diffusion.training.averages import synthesise
from matryoshka_diffusion.training.checkpoint import newest
from matryoshka_diffusion.training.trainer import train
from matryoshka_diffusion.training.weights import fingerprint
from test_upsampler import upsampler_config
from tiny_run import TinyPictures, encode

RENAMED = ("adapters.1.inward.weight", "levels.0.micro.coarse_time.0.bias")


def with_first_names(path: Path) -> None:
    """Rewrite a safetensors file with the names that version 0.1.0 gave to its tensors."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {old_name(name): value.clone() for name, value in load_file(path).items()}
    assert any("levels.1.inward." in name for name in tensors), path
    assert any("levels.0.image_time." in name for name in tensors), path
    save_file(tensors, path, metadata)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of an upsampler with two levels, and the same run with first names in every file."""
    config = upsampler_config(levels=2)
    recipe = config.train.model_copy(update={"ema_power": (0.05, 0.1)})
    folder = tmp_path_factory.mktemp("runs")
    run = folder / "present"
    train(config.model_copy(update={"train": recipe}), TinyPictures(), run, encode=encode)
    old = shutil.copytree(run, folder / "first")
    for path in old.rglob("*.safetensors"):
        with_first_names(path)
    return run, old


def everything(run: Path) -> dict[str, Tensor]:
    """All tensors of a run: of its model, of an average made afterwards, of its checkpoint."""
    path = newest(run.parent / "present" / "checkpoints")  # the manifest has sums of present names
    assert path is not None
    saved = checkpoint.read(run / "checkpoints" / path.name)
    parts: dict[str, Mapping[str, Tensor]] = {
        "model": find_model(run)[0],
        "average": synthesise(run / "ema", 0.07).weights,
        **{name: getattr(saved, name) for name in ("weights", "ema", "optimizer", "tracks")},
    }
    for part, tensors in parts.items():
        assert all(any(name in key for key in tensors) for name in RENAMED), part
    return {f"{part} {key}": x for part, tensors in parts.items() for key, x in tensors.items()}


def test_first_names_are_read_as_present_ones(runs: tuple[Path, Path]):
    present, first = map(everything, runs)
    assert present.keys() == first.keys()
    assert all(torch.equal(present[name], first[name]) for name in present)


def test_a_network_exported_for_diffusers_opens_with_first_names(runs, tmp_path):
    from matryoshka_diffusion.models.diffusers import MDMNetwork

    weights, config = find_model(runs[0])
    network = MDMNetwork(config.model_dump(mode="json"), 2)
    network.net.load_state_dict(weights)
    network.save_pretrained(tmp_path)
    with_first_names(tmp_path / "diffusion_pytorch_model.safetensors")
    opened = MDMNetwork.from_pretrained(tmp_path).net.state_dict()
    assert all(torch.equal(opened[name], value) for name, value in weights.items())


def test_the_hash_of_weights_is_that_of_version_0_1_0():
    """Configs of LoRA runs and upsamplers name their base by it."""
    inward, time = RENAMED
    weights = {inward: torch.arange(6.0).view(2, 3), time: torch.arange(4, dtype=torch.bfloat16)}
    assert fingerprint(weights).startswith("3d6e0fbae6a4fc432c0bcb9a605fb8da")
