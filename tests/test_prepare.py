"""From a config to a run that can start, and from a trained run to a larger one."""

from __future__ import annotations

import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.cli.info import describe
from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import ConfigError, RunConfig, UsageError
from matryoshka_diffusion.configfile import load_config, override, to_yaml
from matryoshka_diffusion.data.source import Source
from matryoshka_diffusion.draw.grid import save_png
from matryoshka_diffusion.models.find import find_model
from matryoshka_diffusion.models.save import average_model, export_model
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.presets import PRESETS, preset
from matryoshka_diffusion.presets.paper import nest
from matryoshka_diffusion.runs import grow
from matryoshka_diffusion.runs import prepare as job
from matryoshka_diffusion.text.feature_cache import FeatureCache
from matryoshka_diffusion.training.checkpoint import newest, read
from matryoshka_diffusion.training.inputs import Feed
from matryoshka_diffusion.training.run_folder import open_run
from matryoshka_diffusion.training.signals import Stopped
from matryoshka_diffusion.training.stages import Step
from matryoshka_diffusion.training.step import diffusion
from matryoshka_diffusion.training.trainer import train
from matryoshka_diffusion.training.weights import export_weights
from tiny_run import TinyPictures, encode, stop_at, there, tiny_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished tiny run."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train(tiny_config(), TinyPictures(), folder, encode=encode)
    return folder


def photos(folder, *, classes=(), captions=()):
    random = np.random.default_rng(0)
    for number in range(4):
        name = f"{classes[number % len(classes)]}/{number}" if classes else str(number)
        save_png(random.integers(0, 256, (70, 64, 3), dtype=np.uint8), folder / f"{name}.png", None)
        if captions:
            (folder / f"{name}.txt").write_text(captions[number % len(captions)])
    return folder


def test_a_config_is_found_by_preset_file_and_run_folder(trained, tmp_path):
    assert job.find_config("openmoji") == preset("openmoji")
    assert job.find_config("openmoji", as_="simple") == preset("openmoji", "simple")
    assert job.find_config(str(trained)).name == "tiny"
    (tmp_path / "mine.yaml").write_text((trained / "config.yaml").read_text())
    changed = job.find_config(str(tmp_path / "mine.yaml"), "64", ["train.seed=7"])
    assert changed.data.path == str(Path("64").resolve())  # a folder may have a number for a name
    assert changed.train.seed == 7


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("openmojo", {}, "did you mean openmoji"),
        ("RUN", {"as_": "simple"}, "--as simple.* omit"),
        ("openmoji", {"lora": 4}, r"train: lora: .* set init"),
        ("openmoji", {"assignments": ["train.averaged=0.1"]}, r"train\.averaged: .* omit"),
    ],
)
def test_a_config_that_cannot_be_is_refused(trained, name, changes, message):
    with pytest.raises(UsageError, match=message):
        job.find_config(str(trained) if name == "RUN" else name, **changes)


@pytest.mark.parametrize("kind", ["none", "classes", "text"])
def test_a_bare_model_takes_the_conditions_that_its_data_has(tmp_path, kind):
    kinds = {"classes": {"classes": ("cat", "dog")}, "text": {"captions": ("a cat", "a dog")}}
    config = job.find_config("folder-64", str(photos(tmp_path, **kinds.get(kind, {}))))
    source = job.open_data(config)
    completed = job.complete(config, source)
    assert (completed.model.text is not None) == (kind == "text")
    assert completed.model.classes == (2 if kind == "classes" else 0)
    assert completed.data.classes == (("cat", "dog") if kind == "classes" else ())
    assert completed.sampling.guidance == ((1.0,) if kind == "none" else (2.0,))
    assert job.complete(completed, source) == completed


@pytest.mark.parametrize("named", ["model", "--init", "--set", "yaml"])
def test_tuning_matches_classes_by_name(tmp_path, named):
    learnt = job.find_config("folder-64", None, ["model.classes=2", "data.classes=[owl, cat]"])
    export_weights(tmp_path / "model", NestedUNet(learnt.model).state_dict(), learnt)
    model = str(tmp_path / "model")

    def tuned(*classes: str) -> tuple[RunConfig, Source]:
        folder = str(photos(tmp_path / "-".join(classes), classes=classes))
        two = "model.classes=2"
        if named == "model":
            config = job.find_config(model, folder)
        elif named == "--init":
            config = job.find_config("folder-64", folder, [two], init=model)
        elif named == "--set":
            config = job.find_config("folder-64", folder, [two, f"train.init={model}"])
        else:
            written = job.find_config("folder-64", None, [two, "data.classes=[]"])
            written = override(written, [f"train.init={model}"])
            (tmp_path / "tuned.yaml").write_text(to_yaml(written), "utf-8")
            config = job.find_config(str(tmp_path / "tuned.yaml"), folder)
        source = job.open_data(config)
        return job.complete(config, source), source

    config, source = tuned("cat", "owl")
    assert config.data.classes == source.classes == ("owl", "cat")
    labels = {source[n].key.split("/")[0]: source[n].label for n in range(4)}
    assert labels == {"owl": 0, "cat": 1}
    with pytest.raises(ConfigError, match=r"is owl, cat, .* apple, pear: .*data\.classes=\[\]"):
        tuned("apple", "pear")
    config, source = tuned("cat")
    assert config.data.classes == source.classes == ("owl", "cat")
    assert source[0].label == 1
    for classes in (("cat", "dog", "owl"), ("apple", "dog", "pear")):
        with pytest.raises(
            ConfigError, match=r"classes is 2.* 3: .*knows owl, cat .*dog.* train a new"
        ):
            tuned(*classes)


def test_a_new_run_like_another_takes_more_classes_as_its_error_says(tmp_path):
    folder = str(photos(tmp_path, classes=("cat", "dog", "owl")))
    named = ["model.classes=2", "data.classes=[cat, dog]"]
    config = job.find_config("folder-64", folder, named)
    with pytest.raises(ConfigError, match="has 3") as refused:
        job.complete(config, job.open_data(config))
    advice = re.findall(r"--set (\S+)", str(refused.value))
    config = job.find_config("folder-64", folder, [*named, *advice])
    assert job.complete(config, job.open_data(config)).data.classes == ("cat", "dog", "owl")


def test_a_model_that_its_data_does_not_fit_is_refused(tmp_path):
    folder = str(photos(tmp_path, classes=("cat", "dog")))
    chosen = job.find_config("folder-64", folder, ["sampling.guidance=[4.0]"])
    assert job.complete(chosen, job.open_data(chosen)).sampling.guidance == (4.0,)
    for name, change, message in (
        ("folder-64", ["model.classes=3"], r"add --set model\.classes=2"),
        ("folder-64", ["model.channels=5"], r"model\.channels is 5: .*4 \(colour and opacity\)"),
        ("cc12m-64", [], "no captions"),
    ):
        config = job.find_config(name, folder, change)
        with pytest.raises(ConfigError, match=message):
            job.complete(config, job.open_data(config))


def test_an_encoder_of_another_width_is_refused(tmp_path):
    folder = photos(tmp_path, captions=("a cat",))
    changes = ["model.text={features: 2048, width: 64}", "encoder={name: minilm}"]
    with pytest.raises(ConfigError, match=r"add --set model\.text\.features=384"):
        job.prepare(job.find_config("folder-64", str(folder), changes))


# --- growing, tuning, averaging ----------------------------------------------------------------

TO_32 = partial(grow.next_level, side=32)


def test_a_grown_run_has_bit_equal_coarse_outputs_and_trains_on(trained, tmp_path):
    out = tmp_path / "grown"
    changes = ["train.stages[0].images=8", "train.ema_power=[0.1]"]
    config = grow.grow_run(str(trained), TO_32, out, changes)
    assert [level.side for level in config.model.levels] == [8, 16, 32]
    weights, small_config = find_model(trained)
    small, large = NestedUNet(small_config.model).eval(), NestedUNet(config.model).eval()
    small.load_state_dict(weights)
    large.load_state_dict(find_model(out)[0])
    z = tuple(torch.randn(2, 3, side, side) for side in (8, 16, 32))
    cond = Conditioning(tokens=torch.randn(2, 3, 8), micro={"scale": torch.full((2,), 16.0)})
    t = torch.tensor([0.2, 0.9])
    with torch.no_grad():
        before, after = small(z[:2], t, cond), large(z, t, cond)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=False))

    again = job.find_config(str(out))
    assert (train(again, Larger(), out, encode=encode) / "model.safetensors").is_file()
    assert read(there(newest(out / "checkpoints"))).tracks


class Larger(TinyPictures):
    def batch(self, ids):
        batch = super().batch(ids)
        picture = torch.nn.functional.interpolate(batch.picture, size=(32, 32))
        return type(batch)(**{**vars(batch), "picture": picture})


def test_a_grown_run_that_has_seen_no_image_takes_another_training(trained, tmp_path):
    out, start = tmp_path / "grown", find_model(trained)[0]
    grow.grow_run(str(trained), TO_32, out)
    changes = ["train.stages.0.images=8", "train.stages.0.batch_size=4", "train.ema_decay=0.5"]
    for other, key in (("model.embedding=64", "model.embedding"), ("train.init_levels=1", "init_")):
        with pytest.raises(ConfigError, match=key):
            open_run(out, job.find_config(str(out), None, [*changes, other]), torch.device("cpu"))
    config = job.find_config(str(out), None, changes)
    opened = open_run(out, config, torch.device("cpu"))
    assert opened.train.stages == config.train.stages
    assert load_config(out / "config.yaml") == opened
    begun = find_model(out)[0]
    assert all(torch.equal(begun[name], value) for name, value in start.items())
    train(config, Larger(), out, encode=encode)
    longer = job.find_config(str(out), None, ["train.stages.0.images=12"])
    with pytest.raises(ConfigError, match=r"train\.stages\[0\]\.images is 8 there, 12 now"):
        open_run(out, longer, torch.device("cpu"))


def test_a_grown_run_may_begin_gently(trained, tmp_path):
    length = ["train.stages[0].images=8"]
    config = grow.grow_run(str(trained), TO_32, tmp_path, length, freeze_coarse=4, ramp=8)
    (stage,) = config.train.stages
    assert (stage.freeze_coarse_images, stage.ramp_images) == (4, 8)
    assert config.train.init_levels == 2
    assert "coarse levels frozen for 4, new ones ramped over 8" in describe(config)
    with pytest.raises(ConfigError, match=r"freeze_coarse_images is 9, .* 8 images"):
        grow.grow_run(str(trained), TO_32, tmp_path / "x", length, freeze_coarse=9)


def test_a_model_of_any_average_is_made_after_training_and_is_known_as_one(tmp_path):
    raw = tiny_config(ema_decay=0.0, ema_power=(0.05, 0.1), ema_snapshot_every_images=4)
    train(raw, TinyPictures(), tmp_path / "run", encode=encode)
    assert 0 < average_model(tmp_path / "run", 0.08, tmp_path / "average") < 0.05
    weights, _ = find_model(tmp_path / "average")
    tracks = read(there(newest(tmp_path / "run" / "checkpoints"))).tracks
    short, long = (tracks[f"{t}/weights/levels.0.stem.weight"] for t in (0.05, 0.1))
    between = weights["levels.0.stem.weight"]
    assert (between - short).norm() + (between - long).norm() < 1.1 * (short - long).norm()
    export_model(str(tmp_path / "average"), tmp_path / "shared")
    kept = {name: find_model(tmp_path / name)[1].train for name in ("run", "average", "shared")}
    assert [one.averaged for one in kept.values()] == [None, 0.08, 0.08]
    assert [one.gives_averages for one in kept.values()] == [False, True, True]
    for name in kept:
        described = Matryoshka.load(tmp_path / name).describe({})
        assert described["averaged"] == kept[name].gives_averages
    grown = grow.grow_run(str(tmp_path / "average"), TO_32, tmp_path / "grown")
    assert not grown.train.gives_averages, "that will be another training"
    with pytest.raises(ConfigError, match="not empty"):
        average_model(tmp_path / "run", 0.08, tmp_path / "average")
    with pytest.raises(UsageError, match=r"average: .*config\.yaml"):
        average_model(tmp_path / "average", 0.08, tmp_path / "other")


def with_init(config, init, levels=2):
    stage = f"train.stages=[{{levels: {levels}, images: 8, batch_size: 4, lr: 0.01}}]"
    return override(config, [stage, f"train.init={init}"])


def test_a_warm_start_keeps_every_bit_and_happens_once(trained, tmp_path):
    weights, config = find_model(trained)
    out, config = tmp_path / "tuned", with_init(config, trained)
    grow.warm_start(config, out)
    shutil.rmtree(out / "checkpoints")  # as if its saving had been cut short
    grow.warm_start(config, out)
    begun = find_model(out)[0]
    assert begun.keys() == weights.keys()
    assert all(torch.equal(begun[name], weights[name]) for name in weights)
    train(config, TinyPictures(), out, encode=encode)
    tuned = find_model(out)[0]
    assert any(not torch.equal(tuned[name], weights[name]) for name in weights)
    grow.warm_start(config, out)
    again = find_model(out)[0]
    assert all(torch.equal(again[name], tuned[name]) for name in weights)


def test_a_warm_start_may_have_more_levels_but_no_other_ones(trained, tmp_path):
    config = find_model(trained)[1]
    small = NestedUNet(config.model.first(1), seed=3)
    export_weights(tmp_path / "small", small.state_dict(), config)
    grow.warm_start(with_init(config, tmp_path / "small"), tmp_path / "grown")
    grown = find_model(tmp_path / "grown")[0]
    assert all(torch.equal(grown[name], value) for name, value in small.state_dict().items())
    assert any(name.startswith("levels.1.") for name in grown)
    other = override(config, ["model.embedding=64"])
    for bad in (with_init(other, trained), with_init(config, trained, levels=1)):
        with pytest.raises(ConfigError, match=r"train\.init: .* is not the beginning"):
            grow.warm_start(bad, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    announced = override(with_init(config, trained), ["train.init_levels=1"])
    with pytest.raises(ConfigError, match=r"init_levels is 1, but .* has 2"):
        grow.warm_start(announced, tmp_path / "bad")


def test_a_run_may_start_with_whitened_captions(tmp_path):
    """Only the text projection differs, from the first step on, and a resumed run is the same."""
    config, captions = tiny_config(), torch.randn(64, 8).double()
    plain, white = (diffusion(config, None, None, x).build(2) for x in (None, captions))
    changed = {
        n for n, x in plain.state_dict().items() if not torch.equal(x, white.state_dict()[n])
    }
    projection = {f"conditioner.text.project.{name}" for name in ("weight", "bias")}
    assert changed == {*projection, "conditioner.text.null"}
    once, twice = tmp_path / "once", tmp_path / "twice"
    train(config, TinyPictures(), once, encode=encode, captions=captions)
    with pytest.raises(Stopped):
        train(config, TinyPictures(), twice, encode=encode, captions=captions, hooks=[stop_at(20)])
    train(config, TinyPictures(), twice, encode=encode)  # what was whitened is in the checkpoint
    weights, again = (find_model(folder)[0] for folder in (once, twice))
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def test_captions_are_whitened_where_there_are_enough_to_know_how_they_vary(monkeypatch):
    monkeypatch.setattr(
        FeatureCache, "__call__", lambda self, texts: [torch.ones(2, 384)] * len(texts)
    )
    cache = object.__new__(FeatureCache)
    cache.width = 384
    assert cache.varied([f"caption {n}" for n in range(1535)]) is None
    means = cache.varied([f"caption {n}" for n in range(5000)])
    assert means is not None
    assert means.shape == (4096, 384)


def test_a_grown_run_does_not_overwrite_and_needs_a_fitting_side(trained, tmp_path):
    with pytest.raises(ConfigError, match="not empty"):
        grow.grow_run(str(trained), TO_32, trained)
    for side in (16, 24, 8, 48):
        with pytest.raises(ConfigError, match=r"16 times a power of two \(32, 64, 128"):
            grow.grow_run(str(trained), partial(grow.next_level, side=side), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_next_level_keeps_the_shift_that_its_nest_has():
    levels = preset("openmoji").model.levels
    assert [level.shift_ratio for level in levels] == [4.0, 8.0, 16.0]
    assert grow.next_level(levels[-1], 256).shift_ratio == 64.0


def test_a_run_that_is_still_growing_is_not_grown(tmp_path):
    config = tiny_config()
    small = NestedUNet(config.model.first(1))
    export_weights(tmp_path / "run" / "model", small.state_dict(), config)
    with pytest.raises(ConfigError, match="1 of its 2 levels: finish"):
        grow.grow_run(str(tmp_path / "run"), TO_32, tmp_path / "x")


def test_the_next_level_follows_the_papers_pattern():
    levels = nest(64, 256, 1024, text=True)
    for count in (1, 2):
        expected = levels[count]
        grown = grow.next_level(levels[count - 1], expected.side)
        power = {"shift_power": expected.shift_power}
        assert grown.model_copy(update=power) == expected


def test_a_next_levels_widths_are_such_as_networks_take():
    levels = preset("openmoji", "base").model.levels
    assert levels[-1].widths[0] == 96
    assert grow.next_level(levels[-1], 32).widths == (64, 96)
    assert grow.next_level(levels[-1], 64).widths == (32, 64, 96)


@pytest.mark.parametrize(
    ("name", "times"), [*((name, 2) for name in PRESETS), ("openmoji --as base", 8)]
)
def test_every_presets_model_can_be_grown(name, times, tmp_path, monkeypatch):
    config = preset(*name.split(" --as "))
    with torch.device("meta"):
        small = NestedUNet(config.model)
        monkeypatch.setattr(grow, "find_model", lambda run: (small.state_dict(), config))
        monkeypatch.setattr(grow, "load_network", lambda *_, where: small)
        monkeypatch.setattr(grow, "_begin", lambda config, net, out: None)
        side = times * config.model.levels[-1].side
        grown = grow.grow_run(name, partial(grow.next_level, side=side), tmp_path / "x")
    assert [level.side for level in grown.model.levels[len(config.model.levels) :]] == [side]


# --- text features -----------------------------------------------------------------------------


def text_config(folder, encoder, **train):
    changes = [
        "model.text={features: 24, width: 32, heads: 2}",
        f'encoder={{name: t5, path: "{encoder}", max_tokens: 8}}',
        *(f"train.{name}={value}" for name, value in train.items()),
    ]
    return job.find_config("folder-64", str(folder), changes)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "text"


def test_features_of_a_small_set_are_stored_before_training(tmp_path, own_cache, tiny_t5):
    config = text_config(photos(tmp_path / "photos", captions=("a jay", "red")), tiny_t5)
    calls = []
    ready = job.prepare(config, progress=lambda *progress: calls.append(progress))
    assert calls == [(3, 3)], "two captions and the empty one"
    stored, few = ready.notes.splitlines()
    assert stored == f"features of 3 captions from {there(ready.encode).folder}"
    assert "not whitened" in few
    again = job.prepare(config, progress=lambda *_: pytest.fail("they are stored"))
    assert len(there(again.encode).store) == 3
    assert len(list(own_cache.glob("*/*.safetensors"))) == 1


def test_features_of_a_large_set_are_made_in_the_feed(tmp_path, own_cache, tiny_t5, monkeypatch):
    config = text_config(photos(tmp_path / "photos", captions=("a jay", "red")), tiny_t5)
    step = Step(stage=0, first=0, rows=(4,), lr=(), ends_stage=False)

    def conditions() -> tuple[Conditioning, str]:
        ready = job.prepare(config)
        return Feed(ready.config, ready.loader, ready.encode)(step)[0].cond, ready.notes

    monkeypatch.setattr(job, "SMALL_BYTES", 0)
    fly, notes = conditions()
    assert "3 of 3 captions are encoded while training, batch by batch" in notes
    assert not list(own_cache.glob("*/*.safetensors"))
    monkeypatch.undo()
    monkeypatch.setenv("MDM_CACHE", str(own_cache.parent))
    stored, _ = conditions()
    assert list(own_cache.glob("*/*.safetensors"))
    torch.testing.assert_close(fly.tokens, stored.tokens, rtol=1e-4, atol=1e-5)
    assert torch.equal(there(fly.mask), there(stored.mask))


@pytest.mark.parametrize(("precision", "half"), [("fp32", False), ("bf16", True)])
def test_a_t5_is_in_bf16_where_the_run_is(tmp_path, own_cache, tiny_t5, precision, half):
    folder = photos(tmp_path / "photos", captions=("a jay",))
    ready = job.prepare(text_config(folder, tiny_t5, precision=precision))
    assert there(ready.encode).key.endswith("-bf16") == half
    other = "bf16" if precision == "fp32" else "fp32"
    _, cache = job.captions_to_embed(text_config(folder, tiny_t5), precision=other)
    assert cache.key.endswith("-bf16") != half


def test_embed_stores_what_training_then_reads(tmp_path, own_cache, tiny_t5, capsys, monkeypatch):
    folder = photos(tmp_path / "photos", captions=("a jay", "red", "a jay", "blue"))
    config = text_config(folder, "nowhere", precision="fp32")
    (tmp_path / "mine.yaml").write_text(to_yaml(config))
    embed = ["embed", str(tmp_path / "mine.yaml"), "--text-encoder", str(tiny_t5)]
    for stored in (0, 4):
        assert cli.main(embed) == 0
        assert f"4 different captions, {stored} of them stored" in capsys.readouterr().out
    (encoder,) = own_cache.iterdir()
    monkeypatch.setattr(job, "SMALL_BYTES", 0)
    ready = job.prepare(text_config(folder, tiny_t5, precision="fp32"))
    assert ready.notes.splitlines()[0] == f"features of 4 captions from {encoder}"


def test_there_is_nothing_to_embed_without_text(tmp_path, capsys):
    folder = photos(tmp_path / "photos", classes=("cat", "dog"))
    assert cli.main(["embed", "folder-64", "--data", str(folder)]) == 2
    assert "no text" in capsys.readouterr().err
