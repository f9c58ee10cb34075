"""Adapters beside a model: in peft's form and ours, several at a time, each with its share."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.cli.options import path_and_share
from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import ConfigError, LoraConfig, StageConfig, UsageError
from matryoshka_diffusion.models import adapters as added_to
from matryoshka_diffusion.models import peft
from matryoshka_diffusion.models.adapters import add_adapters, read_adapters
from matryoshka_diffusion.models.find import find_model
from matryoshka_diffusion.models.save import export_adapters, export_model
from matryoshka_diffusion.nn.lora import attach
from matryoshka_diffusion.nn.nested import NestedUNet, learnt_parameters
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.pyramid import Pyramid
from matryoshka_diffusion.training.checkpoint import CheckpointError
from matryoshka_diffusion.training.weights import export_weights, fingerprint
from test_pipeline import class_model

BASE = class_model()
"""The model that the adapters are for."""


def predict(network: nn.Module) -> Pyramid:
    generator = torch.Generator().manual_seed(1)
    z = tuple(torch.randn(2, 3, side, side, generator=generator) for side in (8, 16))
    cond = Conditioning(labels=torch.tensor([0, 2]), micro={"scale": torch.full((2,), 16.0)})
    with torch.no_grad():
        return network(z, torch.tensor([0.2, 0.9]), cond)


def adapted(weights: dict[str, Tensor]) -> NestedUNet:
    network = NestedUNet(BASE.net.config)
    network.load_state_dict(weights)
    return network.eval()


def same(mine: Pyramid, theirs: Pyramid) -> bool:
    return all(
        (a - b).abs().max() <= 2e-6 * b.abs().max() for a, b in zip(mine, theirs, strict=True)
    )


def write_run(base: Path, folder: Path, seed: int = 0, **lora: Any) -> Path:
    """Write the model folder of a finished run of adapters; return the run."""
    settings = LoraConfig(**{"rank": 2, "base": fingerprint(find_model(base)[0]), **lora})
    stages = (StageConfig(levels=2, images=12, batch_size=4, lr=1e-2),)
    update = {"init": str(base), "lora": settings, "stages": stages}
    train = BASE.config.train.model_copy(update=update)
    network = attach(adapted(BASE.net.state_dict()), settings, seed)
    generator = torch.Generator().manual_seed(seed)
    for value in learnt_parameters(network).values():
        nn.init.normal_(value, std=0.3, generator=generator)
    config = BASE.config.model_copy(update={"train": train})
    export_weights(folder / "model", learnt_parameters(network), config)
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """A model, two runs of adapters around it, and the first of them in peft's form."""
    root = tmp_path_factory.mktemp("adapters")
    base = root / "base"
    export_weights(base, BASE.net.state_dict(), BASE.config)
    pets = write_run(base, root / "pets", alpha=3.0)
    snow = write_run(base, root / "snow", seed=1, maps="all")
    export_adapters(str(pets), root / "form")
    return {"base": base, "pets": pets, "snow": snow, "form": root / "form"}


def copied(places: dict[str, Path], folder: Path, **settings: Any) -> Path:
    """A copy of the adapters in peft's form, with other settings."""
    folder.mkdir()
    for path in places["form"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    file = folder / peft.SETTINGS
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


# --- what they compute ---------------------------------------------------------------------------


def test_all_forms_of_adapters_are_added_as_their_own_run_merges_them(places):
    weights, _ = find_model(places["base"])
    merged, _ = find_model(places["pets"])
    forms = (
        *(places["pets"], places["pets"] / "model", places["pets"] / "model" / "lora.safetensors"),
        *(places["form"], places["form"] / peft.WEIGHTS),
    )
    for form in forms:
        added = add_adapters(weights, {str(form): 1.0}, where="base")
        assert added.keys() == merged.keys()
        assert all(torch.equal(added[name], value) for name, value in merged.items()), form
    assert not same(predict(adapted(merged)), predict(BASE.net))


def test_shares_weigh_the_changes_of_several_adapters(places):
    weights, _ = find_model(places["base"])
    pets, snow = str(places["pets"]), str(places["snow"])
    alone = {name: add_adapters(weights, {name: 1.0}, where="base") for name in (pets, snow)}
    both = add_adapters(weights, {pets: 0.5, snow: -2.0}, where="base")
    for name, value in weights.items():
        expected = value + 0.5 * (alone[pets][name] - value) - 2.0 * (alone[snow][name] - value)
        torch.testing.assert_close(both[name], expected, rtol=0, atol=1e-5)
    unchanged = add_adapters(weights, {pets: 0.0}, where="base")
    assert all(torch.equal(unchanged[name], value) for name, value in weights.items())
    with pytest.raises(UsageError, match=r"pets.*finite"):
        add_adapters(weights, {pets: float("nan")}, where="base")


def test_a_model_draws_with_adapters_and_its_samples_name_them(places):
    run: Any = {"precision": "fp32", "device": "cpu"}
    plain = Matryoshka.load(places["base"], **run).sample(classes="cat", steps=3)
    model = Matryoshka.load(places["base"], adapters={str(places["form"]): 1.0}, **run)
    drawn = model.sample(classes="cat", steps=3)
    merged = Matryoshka.load(places["pets"], **run).sample(classes="cat", steps=3)
    assert (drawn.pictures == merged.pictures).all()
    assert (drawn.pictures != plain.pictures).any()
    assert drawn.settings["adapters"] == ("form=1",)
    assert "adapters" not in plain.settings
    assert model.describe({})["weights"] != BASE.describe({})["weights"]


# --- the library peft ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_peft_loads_what_is_exported_and_computes_the_same(places):
    library: Any = pytest.importorskip("peft")
    form, network = str(places["form"]), adapted(BASE.net.state_dict())
    theirs = library.PeftModel.from_pretrained(network, form)
    assert same(predict(theirs), predict(adapted(find_model(places["pets"])[0])))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["qkv", "out"], "lora_alpha": 5},
        {"target_modules": r".*\.conv\d?|.*modulation", "use_rslora": True},
        {"target_modules": ["qkv", "out"], "alpha_pattern": {"qkv": 7}, "rank_pattern": {"out": 3}},
    ],
)
def test_what_peft_trains_around_the_network_is_added_as_peft_computes_it(
    places, tmp_path, settings
):
    library: Any = pytest.importorskip("peft")
    config = library.LoraConfig(r=2, init_lora_weights=False, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = library.get_peft_model(adapted(BASE.net.state_dict()), config)
    model.eval().save_pretrained(str(tmp_path))
    weights, _ = find_model(places["base"])
    mine = predict(adapted(add_adapters(weights, {str(tmp_path): 1.0}, where="base")))
    assert same(mine, predict(model))
    assert not same(mine, predict(BASE.net))


def test_settings_of_peft_decide_the_scale_of_each_layer(places, tmp_path):
    """Without the library: the formulas of its documentation."""
    layers = read_adapters(places["form"]).changes
    assert {change.scale for change in layers.values()} == {1.5}
    qkv = next(name for name in layers if name.endswith("qkv"))
    patterns = {"alpha_pattern": {"qkv": 8.0}, "use_rslora": True}
    changed = read_adapters(copied(places, tmp_path / "a", **patterns)).changes
    assert changed[qkv].scale == pytest.approx(8.0 / 2**0.5)
    others = [one.scale for name, one in changed.items() if not name.endswith("qkv")]
    assert others == pytest.approx([3.0 / 2**0.5] * len(others))
    exact = {"alpha_pattern": {"^qkv": 8.0}}
    assert read_adapters(copied(places, tmp_path / "b", **exact)).changes[qkv].scale == 1.5


def test_adapters_of_a_pipelines_network_are_read_too(places, tmp_path):
    folder = copied(places, tmp_path / "pipeline")
    tensors = load_file(folder / peft.WEIGHTS)
    inside = {name.replace("model.levels", "model.net.levels"): tensors[name] for name in tensors}
    save_file(inside, folder / peft.WEIGHTS)
    changes = read_adapters(folder).changes
    assert changes.keys() == read_adapters(places["form"]).changes.keys()
    qkv = next(name for name in changes if name.endswith("qkv"))
    settings = json.loads((folder / peft.SETTINGS).read_text())
    for pattern, scale in ((f"^net.{qkv}", 4.0), (f"net.{qkv}", 4.0), (f"^{qkv}", 1.5)):
        settings["alpha_pattern"] = {pattern: 8.0}
        (folder / peft.SETTINGS).write_text(json.dumps(settings))
        assert read_adapters(folder).changes[qkv].scale == scale


def test_the_model_is_hashed_once_for_all_adapters(places, monkeypatch):
    weights, _ = find_model(places["base"])
    hashed: list[int] = []
    monkeypatch.setattr(added_to, "fingerprint", lambda x: hashed.append(1) or fingerprint(x))
    add_adapters(weights, {str(places[name]): 1.0 for name in ("pets", "snow")}, where="base")
    assert len(hashed) == 1


# --- what is refused -----------------------------------------------------------------------------


def test_adapters_of_another_model_are_refused(places, tmp_path):
    weights, _ = find_model(places["base"])
    other = {name: value + 0.01 for name, value in weights.items()}
    for form in (places["pets"], places["form"]):
        with pytest.raises(CheckpointError, match=rf"{form}.*another model than mine"):
            add_adapters(other, {str(form): 1.0}, where="mine")
    # Without a hash, as peft writes them, only layers and shapes can tell.
    folder = copied(places, tmp_path / "bare")
    tensors = load_file(folder / peft.WEIGHTS)
    save_file(tensors, folder / peft.WEIGHTS)
    assert add_adapters(other, {str(folder): 1.0}, where="mine")
    name = next(name for name in tensors if name.endswith("qkv.lora_B.weight"))
    save_file({**tensors, name: tensors[name][:5].clone()}, folder / peft.WEIGHTS)
    with pytest.raises(CheckpointError, match=r"bare.*qkv are .*\(5, 2, 1, 1\).*\(96, 32, 1, 1\)"):
        add_adapters(other, {str(folder): 1.0}, where="mine")
    renamed = {name.replace("qkv", "qkw"): value for name, value in tensors.items()}
    save_file(renamed, folder / peft.WEIGHTS)
    with pytest.raises(CheckpointError, match=r"mine has no layer .*qkw \(did you mean .*qkv\?\)"):
        add_adapters(other, {str(folder): 1.0}, where="mine")


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["stem"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"r": 0}, "r"),
        ({"lora_alpha": "much"}, "lora_alpha"),
        ({"alpha_pattern": {"(a+)+b": 1.0}}, "alpha_pattern"),
    ],
)
def test_settings_that_are_no_plain_lora_are_refused_by_name(places, tmp_path, settings, key):
    folder = copied(places, tmp_path / "other", **settings)
    with pytest.raises(ConfigError, match=rf"adapter_config\.json.*{key}"):
        read_adapters(folder)


def test_damaged_or_incomplete_files_are_refused_with_their_path(places, tmp_path):
    folder = copied(places, tmp_path / "cut", rank_pattern={"qkv": 4})
    with pytest.raises(CheckpointError, match=r"cut.*qkv has rank 2.*says 4"):
        read_adapters(folder)
    tensors = load_file(folder / peft.WEIGHTS)
    for change, message in (
        (dict(sorted(tensors.items())[1:]), "two maps of .* is missing"),
        ({**tensors, "base_model.model.stem.weight": torch.zeros(2, 2)}, "stem.weight is no map"),
        ({name: value.flatten() for name, value in tensors.items()}, "is no map"),
    ):
        save_file(change, folder / peft.WEIGHTS)
        with pytest.raises(CheckpointError, match=rf"{folder / peft.WEIGHTS}.*{message}"):
            read_adapters(folder)
    (folder / peft.WEIGHTS).write_bytes(b"PK" * 50)
    with pytest.raises(ValueError, match=rf"{folder / peft.WEIGHTS}.*damaged"):
        read_adapters(folder)
    for text in ("[]", "{"):
        (folder / peft.SETTINGS).write_text(text)
        with pytest.raises(ValueError, match=str(folder / peft.SETTINGS)):
            read_adapters(folder)
    (folder / peft.WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{folder / peft.WEIGHTS}: missing"):
        read_adapters(folder)


def test_a_file_with_some_other_bytes_is_read_or_refused_with_its_path(places, tmp_path):
    folder, chance, refusals = copied(places, tmp_path / "fuzzed"), random.Random(0), []
    weights, _ = find_model(places["base"])
    for name, size in ((peft.WEIGHTS, 1_500), (peft.SETTINGS, 600)):
        original = (folder / name).read_bytes()
        for _ in range(60):
            data = bytearray(original)
            for _ in range(chance.randint(1, 3)):
                data[chance.randrange(min(size, len(data)))] = chance.randrange(256)
            (folder / name).write_bytes(data)
            try:
                add_adapters(weights, {str(folder): 1.0}, where="base")
            except (ValueError, OSError) as error:
                refusals.append(str(error))
        (folder / name).write_bytes(original)
    assert len(refusals) > 60
    assert all(str(folder) in message for message in refusals)


def test_a_layer_of_a_very_long_name_is_refused_at_once(places, tmp_path):
    folder = copied(places, tmp_path / "long")
    maps = {"A": torch.zeros(2, 4), "B": torch.zeros(4, 2)}
    long = {f"base_model.model.{'x' * 2**20}.lora_{part}.weight": maps[part] for part in maps}
    save_file(long, folder / peft.WEIGHTS)
    with pytest.raises(CheckpointError, match=r"mine has no layer x{200};"):
        add_adapters(find_model(places["base"])[0], {str(folder): 1.0}, where="mine")


def test_a_pickle_is_refused_unopened(places, tmp_path):
    folder = copied(places, tmp_path / "pickled")
    (folder / peft.WEIGHTS).unlink()
    (folder / peft.PICKLE).write_bytes(b"\x80\x04cos\nsystem\n")
    for path in (folder, folder / peft.PICKLE):
        with pytest.raises(UsageError, match=rf"{folder / peft.PICKLE}: a pickle.*safetensors"):
            read_adapters(path)


def test_a_model_is_no_adapter_and_an_adapter_no_model(places, tmp_path):
    with pytest.raises(UsageError, match=r"base.*whole model"):
        read_adapters(places["base"])
    with pytest.raises(UsageError, match=r"base.*whole model"):
        export_adapters(str(places["base"]), tmp_path / "out")
    with pytest.raises(UsageError, match=rf"{places['form']}.*--lora"):
        find_model(places["form"])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_adapters("nowhere")


# --- from the command line -----------------------------------------------------------------------


def test_the_commands_draw_with_several_adapters_and_export_them_merged(places, tmp_path, capsys):
    both = ["--lora", f"{places['form']}=0.5", "--lora", str(places["snow"])]
    base = str(places["base"])
    draw = ["--class", "cat", "--precision", "fp32", "--device", "cpu", "--steps", "3", "-o"]
    assert cli.main(["sample", base, *both, *draw, str(tmp_path / "a.png")]) == 0
    assert cli.main(["export", base, *both, "-o", str(tmp_path / "merged")]) == 0
    assert cli.main(["sample", str(tmp_path / "merged"), *draw, str(tmp_path / "b.png")]) == 0
    one, other = (Image.open(tmp_path / name) for name in ("a.png", "b.png"))
    assert one.tobytes() == other.tobytes()
    assert '"adapters": ["form=0.5", "snow=1"]' in json.dumps(one.info | {}).replace("\\", "")
    edit = ["edit", base, *both, "--keep", f"16={tmp_path / 'a.png'}", *draw]
    assert cli.main([*edit, str(tmp_path / "kept.png")]) == 0
    assert Image.open(tmp_path / "kept.png").tobytes() == one.tobytes()
    capsys.readouterr()
    twice = ["--lora", "a=0.5", "--lora", "a=2"]
    assert cli.main(["sample", base, *twice, *draw, str(tmp_path / "c.png")]) == 2
    assert "--lora a" in capsys.readouterr().err


def test_a_share_follows_the_last_equals_sign_unless_a_folder_has_the_whole_name(tmp_path):
    (tmp_path / "lr=0.1").mkdir()
    for text, expected in (
        ("pets", ("pets", 1.0)),
        ("pets=0.7", ("pets", 0.7)),
        ("pets=-1", ("pets", -1.0)),
        ("size=big", ("size=big", 1.0)),
        (f"{tmp_path}/lr=0.1", (f"{tmp_path}/lr=0.1", 1.0)),
        (f"{tmp_path}/lr=0.1=0.5", (f"{tmp_path}/lr=0.1", 0.5)),
        (f"{tmp_path}/lr=0.2", (f"{tmp_path}/lr", 0.2)),
    ):
        assert path_and_share(text) == expected


def test_an_export_for_peft_names_no_path_of_this_computer(places, tmp_path, capsys):
    out, run = tmp_path / "out", str(places["pets"])
    assert cli.main(["export", run, "--format", "peft", "--dtype", "bf16", "-o", str(out)]) == 0
    assert all(value.dtype == torch.bfloat16 for value in load_file(out / peft.WEIGHTS).values())
    for path in out.iterdir():
        assert str(places["base"].parent).encode() not in path.read_bytes()
    assert read_adapters(out).base == fingerprint(find_model(places["base"])[0])
    again = ["export", run, "--format", "peft", "-o"]
    assert cli.main([*again, str(out)]) == 2
    assert cli.main([*again, str(tmp_path / "x"), "--lora", run]) == 2
    assert cli.main([*again, str(tmp_path / "x"), "--text-encoder", "t5"]) == 2
    assert not (tmp_path / "x").exists()


def test_a_whole_export_of_adapters_with_others_on_top_is_refused(places, tmp_path):
    """The adapters were trained around the base, not around the base with others in it."""
    with pytest.raises(CheckpointError, match="another model"):
        export_model(str(places["pets"]), tmp_path, adapters={str(places["snow"]): 1.0})
