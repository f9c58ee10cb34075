"""Adapters: what they are around stays, what they add is merged, what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from matryoshka_diffusion.cli.info import describe
from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import ConfigError, LoraConfig, RunConfig, StageConfig
from matryoshka_diffusion.configfile import changed, load_config
from matryoshka_diffusion.models.find import find_model
from matryoshka_diffusion.models.save import average_model, export_model
from matryoshka_diffusion.nn.lora import Adapted, attach, merged_state
from matryoshka_diffusion.nn.nested import NestedUNet, learnt_parameters
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.pyramid import Pyramid
from matryoshka_diffusion.runs import prepare as job
from matryoshka_diffusion.runs.grow import grow_run, next_level, warm_start
from matryoshka_diffusion.training.checkpoint import CheckpointError, newest, read
from matryoshka_diffusion.training.inputs import Feed
from matryoshka_diffusion.training.run_folder import open_run
from matryoshka_diffusion.training.signals import Stopped
from matryoshka_diffusion.training.stages import steps
from matryoshka_diffusion.training.step import diffusion
from matryoshka_diffusion.training.trainer import Trainer, train
from matryoshka_diffusion.training.weights import export_weights, fingerprint
from tiny_run import TinyPictures, encode, stop_at, there, tiny_config

CPU = torch.device("cpu")
EVERYWHERE = LoraConfig(rank=2, maps="all")


def net(seed: int = 0) -> NestedUNet:
    """A network without zeros in it, so that every adapter matters."""
    network = NestedUNet(tiny_config(dropout=0.0).model)
    generator = torch.Generator().manual_seed(seed)
    for value in network.parameters():
        nn.init.normal_(value, std=0.1, generator=generator)
    return network


def predict(network: NestedUNet) -> Pyramid:
    generator = torch.Generator().manual_seed(1)
    z = tuple(torch.randn(2, 3, side, side, generator=generator) for side in (8, 16))
    tokens = torch.randn(2, 3, 8, generator=generator)
    cond = Conditioning(tokens=tokens, micro={"scale": torch.full((2,), 16.0)})
    with torch.no_grad():
        return network(z, torch.tensor([0.2, 0.9]), cond)


def trained_adapters(network: NestedUNet) -> NestedUNet:
    """The network after something was learnt: no adapter is zero."""
    for value in learnt_parameters(network).values():
        nn.init.normal_(value, std=0.3, generator=torch.Generator().manual_seed(len(value)))
    return network


# --- the network -------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [LoraConfig(rank=4), EVERYWHERE])
def test_adapters_start_without_effect_bit_for_bit(lora):
    before = predict(net())
    after = predict(attach(net(), lora))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("lora", [LoraConfig(rank=4, alpha=6.0), EVERYWHERE])
def test_a_merged_network_computes_what_the_adapted_one_does(lora):
    adapted = trained_adapters(attach(net(), lora))
    plain = net(seed=7)
    plain.load_state_dict(merged_state(adapted))
    for mine, theirs, before in zip(predict(plain), predict(adapted), predict(net()), strict=True):
        assert (mine - before).abs().max() > 1e-3 * before.abs().max()
        scale = theirs.abs().max().item()
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6 * scale)


def test_only_the_chosen_levels_and_maps_have_adapters():
    def adapted(lora: LoraConfig) -> set[str]:
        network = attach(net(), lora)
        assert learnt_parameters(network).keys() == {
            f"{name}.{part}.weight"
            for name, module in network.named_modules()
            if isinstance(module, Adapted)
            for part in ("down", "up")
        }
        return {name for name, module in network.named_modules() if isinstance(module, Adapted)}

    attention = adapted(LoraConfig(rank=2))
    assert {name.rsplit(".", 1)[1] for name in attention} == {"qkv", "text_kv", "out"}
    assert all(name.startswith("levels.0.") for name in attention), "only there is attention"
    assert attention == adapted(LoraConfig(rank=2, levels=(0,)))
    everything = adapted(EVERYWHERE)
    assert attention < everything
    outer = adapted(LoraConfig(rank=2, maps="all", levels=(1,)))
    assert outer == {name for name in everything if name.startswith("levels.1.")}
    with pytest.raises(ConfigError, match=r"levels \[1\] hold no attention.*maps=all"):
        attach(net(), LoraConfig(rank=2, levels=(1,)))


def test_initial_adapters_depend_on_the_seed_and_their_name_only():
    def start(seed: int, **changes: Any) -> dict[str, Tensor]:
        return dict(learnt_parameters(attach(net(), LoraConfig(rank=2, **changes), seed)))

    some, all_of_them, other = start(3), start(3, maps="all"), start(4)
    assert all(torch.equal(value, all_of_them[name]) for name, value in some.items())
    downs = [name for name in some if ".down." in name]
    assert not any(torch.equal(some[name], other[name]) for name in downs)
    assert all(some[name].any() for name in downs)


# --- a run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model folder to put adapters around."""
    folder = tmp_path_factory.mktemp("models") / "model"
    export_weights(folder, net().state_dict(), tiny_config())
    return folder


def tuning(model: Path, **lora: Any) -> RunConfig:
    """A run of 12 images that trains adapters around the model."""
    return tiny_config(
        stages=(StageConfig(levels=2, images=12, batch_size=4, lr=1e-2),),
        init=str(model),
        lora=LoraConfig(**({"rank": 2, "base": fingerprint(find_model(model)[0])} | lora)),
        ema_power=(0.1,),
    )


def run(folder: Path, model: Path, config: RunConfig | None = None, **options: Any) -> Path:
    base = find_model(model)[0]
    config = config or tuning(model)
    return train(config, TinyPictures(), folder, encode=encode, base=base, **options)


@pytest.fixture(scope="module")
def tuned(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "run"
    run(folder, model)
    return folder


def test_a_run_changes_the_adapters_and_nothing_else(model):
    config, base = tuning(model), find_model(model)[0]
    trainer = Trainer(diffusion(config, base), CPU)
    start = {name: value.clone() for name, value in trainer.net.state_dict().items()}
    feed = Feed(config, TinyPictures(), encode)
    for step in list(steps(config.train))[:2]:
        trainer.step(feed(step))
    learnt = learnt_parameters(trainer.net).keys()
    moved = {n for n, value in trainer.net.state_dict().items() if not torch.equal(value, start[n])}
    assert moved == learnt
    assert trainer.ema.weights.keys() == trainer.tracks.ages.keys() == learnt
    for name, value in base.items():
        assert torch.equal(value, find_model(model)[0][name])


def test_what_is_saved_is_as_small_as_the_adapters(tuned, model, tmp_path):
    snapshot = read(there(newest(tuned / "checkpoints")))
    file = tuned / "model" / "lora.safetensors"
    assert not (tuned / "model" / "model.safetensors").exists()
    assert load_file(file).keys() == snapshot.weights.keys() == snapshot.ema.keys()
    assert all(".down." in name or ".up." in name for name in snapshot.weights)
    sizes = {}
    for rank in (2, 8):
        adapters = learnt_parameters(attach(net(), LoraConfig(rank=rank)))
        export_weights(tmp_path / str(rank), adapters, tuning(model, rank=rank))
        path = tmp_path / str(rank) / "lora.safetensors"
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        sizes[rank] = path.stat().st_size - header
    assert sizes[8] == 4 * sizes[2]
    assert file.stat().st_size < 0.05 * (model / "model.safetensors").stat().st_size
    with safe_open(file, "pt") as opened:
        metadata = json.loads(opened.metadata()["lora"])
    assert metadata["rank"] == 2
    assert metadata["base"] == fingerprint(find_model(model)[0])
    assert metadata["base_model"] == str(model)


@pytest.mark.parametrize("images_seen", [4, 8])
def test_a_stopped_run_of_adapters_continues_bit_for_bit(tuned, model, tmp_path, images_seen):
    with pytest.raises(Stopped):
        run(tmp_path, model, hooks=[stop_at(images_seen)])
    run(tmp_path, model)
    for name in ("weights", "ema", "optimizer", "tracks"):
        mine, theirs = (
            there(newest(folder / "checkpoints")) / f"{name}.safetensors"
            for folder in (tmp_path, tuned)
        )
        assert mine.read_bytes() == theirs.read_bytes()
    mine, theirs = (folder / "model" / "lora.safetensors" for folder in (tmp_path, tuned))
    assert mine.read_bytes() == theirs.read_bytes()


def test_a_run_of_adapters_samples_finished_or_not_and_exports_whole(tuned, model, tmp_path):
    config = there(tuning(model).train.lora)
    adapted = attach(net(), config)
    adapted.load_state_dict(load_file(tuned / "model" / "lora.safetensors"), strict=False)
    expected = predict(adapted.eval())
    unfinished = tmp_path / "unfinished"
    shutil.copytree(tuned, unfinished)
    shutil.rmtree(unfinished / "model")
    export_model(str(tuned), tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").is_file()
    average_model(tuned, 0.1, tmp_path / "average")
    assert (tmp_path / "average" / "lora.safetensors").is_file()
    places = (tuned, tuned / "model" / "lora.safetensors", unfinished, tmp_path / "whole")
    for place in places:
        loaded = Matryoshka.load(place)
        for mine, theirs in zip(predict(loaded.net), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6 * theirs.abs().max().item())
        assert loaded.config.train.lora is None, "the weights are whole"
    Matryoshka.load(tmp_path / "average")
    grown = grow_run(str(tuned), partial(next_level, side=32), tmp_path / "grown")
    assert (grown.train.init, grown.train.lora) == (None, None), "it begins with whole weights"


# --- what does not fit -------------------------------------------------------------------------


def test_adapters_of_another_model_are_refused(tuned, model, tmp_path):
    shutil.copytree(tuned / "model", tmp_path / "adapters")
    path = tmp_path / "adapters" / "config.json"
    config = json.loads(path.read_text())
    export_weights(tmp_path / "other", net(seed=5).state_dict(), tiny_config())
    config["train"]["init"] = str(tmp_path / "other")
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"other is not the model that the adapters are for"):
        find_model(tmp_path / "adapters")
    config["train"]["init"] = str(tmp_path / "nowhere")
    path.write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder.*correct train\.init"):
        find_model(tmp_path / "adapters")
    shutil.copytree(model, tmp_path / "nowhere")  # it had moved
    find_model(tmp_path / "adapters")


def test_a_run_goes_on_with_its_model_at_another_place(tuned, model, tmp_path):
    run, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(tuned, run)
    shutil.copytree(model, moved)
    config = changed(load_config(run / "config.yaml"), [("train.init", str(moved))])
    assert open_run(run, config, torch.device("cpu")).train.init == str(moved)
    assert load_config(run / "config.yaml").train.init == str(moved)
    other = changed(config, [("train.init", "elsewhere"), ("train.lora.base", "another hash")])
    with pytest.raises(ConfigError, match=r"train\.init is .*moved there, elsewhere now"):
        open_run(run, other, torch.device("cpu"))


def test_a_file_of_adapters_that_does_not_fit_is_refused_with_what_differs(tuned, tmp_path):
    shutil.copytree(tuned / "model", tmp_path, dirs_exist_ok=True)
    path, file = tmp_path / "config.json", tmp_path / "lora.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    adapters = load_file(file)
    name = min(adapters)
    save_file({**adapters, name: torch.zeros(3, 3)}, file, metadata)
    with pytest.raises(CheckpointError, match=rf"{name} is \(3, 3\), the network's \(2, 32"):
        find_model(tmp_path)
    del adapters[name]
    save_file(adapters, file, metadata)
    with pytest.raises(CheckpointError, match=f"lora.safetensors does not fit.*{name} is missing"):
        find_model(tmp_path)
    config = json.loads(path.read_text())
    config["train"]["lora"]["rank"] = 4
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"rank is 2 in it, 4 in config\.json"):
        find_model(tmp_path)
    for foreign, error in (("[]", "rank is None in it"), ("{", "no valid JSON")):
        save_file(adapters, file, {"lora": foreign})
        with pytest.raises(ValueError, match=error):
            find_model(tmp_path)


def test_a_fingerprint_is_of_names_types_shapes_and_bits():
    weights = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
    same = fingerprint({"b": torch.tensor(3.0), "a": torch.tensor([1.0, 2.0])})
    assert fingerprint(weights) == same
    for change in (
        {"a": torch.tensor([1.0, 2.0 + 2e-7])},
        {"a": torch.tensor([[1.0, 2.0]])},
        {"a": torch.tensor([1.0, 2.0]).bfloat16()},
        {"c": torch.tensor(0.0)},
    ):
        assert fingerprint(weights | change) != same


# --- from the command line ---------------------------------------------------------------------


def test_a_rank_is_all_that_the_command_line_needs(model):
    config = job.find_config(str(model), "photos", ["train.lora.alpha=16.0"], lora=8)
    assert config.train.lora == LoraConfig(rank=8, alpha=16.0)
    assert config.train.init == str(model)
    assert config.train.stages[0].lr == 2e-4
    assert job.find_config(str(model), "photos", []).train.stages[0].lr == 2e-5
    assert f"adapters of rank 8 (attention maps, levels all) around {model}" in describe(config)


def test_the_base_of_adapters_is_found_and_checked(model, tmp_path):
    config = tuning(model, base="")
    completed, base = job._with_adapted(config)
    assert there(completed.train.lora).base == fingerprint(there(base))
    assert job._with_adapted(completed)[0] == completed
    levels = config.model.levels
    changed = (levels[0].model_copy(update={"shift_ratio": 3.0}), levels[1])
    other = config.model_copy(update={"model": config.model.model_copy(update={"levels": changed})})
    with pytest.raises(ConfigError, match=r"model\.levels of .* is not that of this run"):
        job._with_adapted(other)
    with pytest.raises(ConfigError, match="hold no attention"):
        job._with_adapted(tuning(model, levels=(1,)))
    warm_start(config, tmp_path / "run")
    assert not (tmp_path / "run").exists(), "the model is not copied into the run"
