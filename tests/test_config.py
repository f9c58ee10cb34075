"""Configs survive YAML, and whatever is wrong with one is said in a line that helps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from matryoshka_diffusion import config as cfg
from matryoshka_diffusion.config import ConfigError

PLAIN: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "levels": [
            {"side": 8, "widths": [32, 64], "blocks": [1, 1], "attention": [0, 1], "heads": 4},
            {"side": 16, "widths": [32, 32], "blocks": [1, 0], "attention": [0, 0], "heads": 4},
        ],
        "embedding": 32,
        "text": {"features": 16, "width": 32},
    },
    "data": {"source": "folder", "path": "pictures"},
    "encoder": {"name": "t5", "path": "weights"},
    "train": {
        "stages": [
            {"levels": 1, "images": 100, "batch_size": 10, "lr": 1e-3},
            {"levels": 2, "images": 50, "batch_size": 5, "lr": 1e-4, "mix": [0.25, 0.75]},
        ]
    },
}


def tiny() -> cfg.RunConfig:
    return cfg.from_dict(PLAIN)


def changed(path: str, value: Any) -> dict[str, Any]:
    """PLAIN with the value at a dotted path set; a path may be new."""
    data = copy.deepcopy(PLAIN)
    node: Any = data
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    for key in parents:
        node = node[key]
    node[last] = value
    return data


# --- round trips -----------------------------------------------------------------------------


@st.composite
def nests(draw):
    """Levels that nest: each core is the stem of the coarser level."""
    patch = st.sampled_from([1, 2])
    widths = st.lists(st.sampled_from([32, 64, 96]), min_size=1, max_size=3)
    stem = draw(st.sampled_from([4, 8])) * 2 ** (len(first := draw(widths)) - 1)
    levels = []
    for index in range(draw(st.integers(1, 3))):
        own = first if index == 0 else draw(widths)
        stem = stem if index == 0 else stem * 2 ** (len(own) - 1)
        counts = st.lists(st.integers(0, 2), min_size=len(own), max_size=len(own)).map(tuple)
        side = stem * max(draw(patch), levels[-1].patch if levels else 1)
        levels.append(
            cfg.LevelConfig(
                side=side,
                widths=tuple(own),
                blocks=draw(counts),
                attention=draw(counts),
                patch=side // stem,
                dropout=draw(st.floats(0, 1)),
                shift_power=draw(st.floats(-4, 4)),
                micro=draw(st.sampled_from([(), (cfg.MicroConfig(name="scale", ceiling=64.0),)])),
            )
        )
    return tuple(levels)


@st.composite
def runs(draw):
    levels = draw(nests())
    has_text = draw(st.booleans())
    stages = tuple(
        cfg.StageConfig(
            levels=count,
            images=draw(st.integers(1, 10**9)),
            batch_size=draw(st.integers(1, 4096)),
            lr=draw(st.floats(1e-9, 1.0)),
            mix=draw(st.sampled_from([(), tuple([0.0] * (count - 1) + [1.0])])),
        )
        for count in range(1, len(levels) + 1)
    )
    weights = draw(st.sampled_from([(1.0,), tuple(float(n + 1) for n in range(len(levels)))]))
    return cfg.RunConfig(
        name=draw(st.text("abc: #-'\"{}[]\n\u00e9", max_size=12)),
        model=cfg.ModelConfig(
            levels=levels,
            embedding=8 * draw(st.integers(1, 64)),
            schedule=draw(st.sampled_from(["cosine", "linear-beta"])),
            text=cfg.TextConfig(features=16, width=32) if has_text else None,
            classes=0 if has_text else draw(st.integers(0, 1000)),
        ),
        process=cfg.ProcessConfig(level_weights=weights),
        data=cfg.DataConfig(source="folder", path=draw(st.sampled_from([None, "1e3", "~", "no"]))),
        encoder=cfg.EncoderConfig(name="minilm") if has_text else None,
        train=cfg.TrainConfig(stages=stages, betas=draw(st.tuples(*[st.floats(0, 0.99)] * 2))),
        sampling=cfg.SamplingConfig(threshold=("none",) * len(levels)),
    )


@given(runs())
def test_a_config_survives_yaml(run):
    assert cfg.from_yaml(cfg.to_yaml(run)) == run
    assert cfg.override(run, []) == run


def test_a_config_is_read_from_a_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(cfg.to_yaml(tiny()))
    assert cfg.load_config(path) == tiny()


def test_numbers_with_an_exponent_need_no_dot():
    text = cfg.to_yaml(tiny()).replace("lr: 0.0001", "lr: 1e-4")
    assert "1e-4" in text
    assert cfg.from_yaml(text) == tiny()


def on_codes(factor: int) -> cfg.RunConfig:
    return cfg.from_dict(
        {**changed("codec", {"factor": factor}), "sampling": {"threshold": ["none"]}}
    )


def test_derived_numbers():
    coarse, fine = tiny().model.levels
    assert (coarse.stem_side, coarse.core_side, fine.core_side) == (8, 4, 8)
    patched = fine.model_copy(update={"side": 32, "patch": 2})
    assert (patched.stem_side, patched.core_side) == (16, 8)
    level = coarse.model_copy(update={"halve": (False,)})
    assert (level.core_side, level.stride(0), coarse.stride(0)) == (8, 1, 2)
    assert (tiny().data_side, on_codes(8).data_side) == (16, 128)
    assert tiny().train.images == 150


def test_a_config_is_never_written_to():
    with pytest.raises(ValidationError):
        tiny().name = "other"
    with pytest.raises(ValidationError):
        tiny().model.levels[0].side = 4


# --- values that are wrong -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        # keys
        ("modle", {}, r"modle: unknown key \(did you mean model\?\)"),
        ("levels", [], r"levels: unknown key \(did you mean model\.levels\?\)"),
        ("model.levels.1.width", [32], r"model\.levels\[1\]\.width: unknown key .*widths\?\)"),
        ("train.stages.0.dropout", 0.1, r"train\.stages\[0\]\.dropout: unknown key .*dropout\?\)"),
        # types
        ("model.embedding", "32", r"model\.embedding: Input should be a valid integer"),
        ("model.embedding", 32.0, r"model\.embedding: Input should be a valid integer"),
        ("model.embedding", True, r"model\.embedding: Input should be a valid integer"),
        ("train.stages.0.lr", "fast", r"train\.stages\[0\]\.lr: Input should be a valid number"),
        ("train.stages.0.lr", True, r"train\.stages\[0\]\.lr: Input should be a valid number"),
        ("data.flip", 1, r"data\.flip: Input should be a valid boolean"),
        ("data.path", 7, r"data\.path: Input should be a valid string"),
        ("model.levels.0.widths", 32, r"model\.levels\[0\]\.widths: Input should be a valid tuple"),
        ("model", [], r"model: Input should be a valid dictionary"),
        ("model", None, r"model: Input should be a valid dictionary"),
        ("train.betas", [0.9], r"train\.betas.*: Field required"),
        # ranges
        ("model.levels.0.side", 0, r"model\.levels\[0\]\.side: Input should be greater than 0"),
        ("train.seed", -1, r"train\.seed: Input should be greater than or equal to 0"),
        ("data.max_bad_fraction", 1.5, r"data\.max_bad_fraction: Input should be less than or eq"),
        ("train.stages.0.lr", float("inf"), r"train\.stages\[0\]\.lr: .*finite number"),
        ("model.levels.0.shift_power", float("nan"), r"levels\[0\]\.shift_power: .*finite number"),
        # names
        ("sampling", {"sampler": "euler"}, r"sampling\.sampler: Input should be 'ddpm', 'ddim' or"),
        ("data.source", "imagenet", r"data\.source: Input should be 'openmoji', "),
        # the text None
        ("data.path", "None", r"data: path is the text 'None'; write null \(YAML\)"),
        ("encoder", "null", r"encoder is the text 'null'; write null"),
        ("model.levels.0.input_scaling", "None", r"levels\[0\]: input_scaling is the text 'None'"),
        # shapes of a level
        ("model.levels.0.widths", [], r"model\.levels\[0\]: widths needs at least one entry"),
        ("model.levels.0.blocks", [1], r"levels\[0\]: blocks needs one entry for each of the 2"),
        ("model.levels.0.attention", [1], r"levels\[0\]: attention needs one entry for each of"),
        ("model.levels.0.halve", [True, False], r"levels\[0\]: halve needs .* the 1 steps between"),
        ("model.levels.0.side", 9, r"levels\[0\]: side 9 is not divisible by .* = 2"),
        ("model.levels.0.patch", 3, r"levels\[0\]: side 8 is not divisible by .* = 6"),
        ("model.levels.0.heads", 5, r"levels\[0\]: heads 5 does not divide the attending width 64"),
        ("model.text", {"features": 8, "width": 32, "layers": 1, "heads": 3}, r"heads 3 does not"),
        ("model.levels.0.micro", [{"name": "a.b"}], r"micro\[0\]\.name: String should match"),
        # levels of a model
        ("model.levels", [], r"model: levels needs at least one level"),
        ("model.levels.0.widths", [33, 64], r"levels\[0\]\.widths: 33 is not a multiple of 32"),
        ("model.levels.1.side", 32, r"levels\[1\] does not nest on levels\[0\].*side 16, .* at 8"),
        (
            "model.levels.1.side",
            4,
            r"levels\[1\]\.side is 4, smaller .*= 8: list .* coarse to fine",
        ),
        ("model.levels.1.middle", True, r"levels\[1\]\.middle: only the coarsest level"),
        ("model.embedding", 36, r"embedding must be a multiple of 8"),
        # stages
        ("train.stages", [], r"train: stages needs at least one stage"),
        ("train.stages.0.levels", 3, r"stages must not shrink the nest; their levels are \[3, 2\]"),
        ("train.stages.1.levels", 3, r"train\.stages\[1\]: mix needs one share for each of the 3"),
        ("train.stages.1.mix", [0.5, 0.6], r"train\.stages\[1\]: mix sums to 1\.1, not to 1"),
        (
            "train.stages.1.freeze_coarse_images",
            51,
            r"train\.stages\[1\]: freeze_coarse_images is 51, more than the stage's 50 images",
        ),
        ("train.stages.1.ramp_images", 51, r"ramp_images is 51, more than the stage's 50"),
        (
            "train.stages.0.ramp_images",
            5,
            r"stages\[0\]\.ramp_images: .* say of how many by",
        ),
        ("train.init_levels", 2, r"train: init_levels is 2, more than stages\[0\]\.levels"),
        ("train.lora", {"rank": 0}, r"train\.lora\.rank: .* greater than 0"),
        ("train.lora", {"rank": 4}, r"train: lora: adapters need a model .* set init"),
        ("train.ema_power", [0.05, 0.3], r"train\.ema_power\[1\]: .* less than 0\.288"),
        ("train.betas", [0.9, 1.0], r"train\.betas\[1\]: Input should be less than 1"),
        (
            "sampling",
            {"guidance_interval": [5.0, -5.0]},
            r"sampling: guidance_interval needs a low",
        ),
        # parts of a run
        ("codec", {"factor": 0}, r"codec\.factor: Input should be greater than 0"),
        ("codec", {}, r"sampling\.threshold is clip, but codes are not in \[-1, 1\]"),
        ("model.classes", 3, "a run has captions or classes, not both"),
        ("encoder", None, "model.text and encoder go together"),
        ("model.text", None, "model.text and encoder go together"),
        ("sampling", {"guidance": [1.0] * 3}, r"sampling\.guidance has 3 entries; give 1 or 2"),
        ("sampling", {"threshold": []}, r"sampling\.threshold has 0 entries; give 1 or 2"),
        ("process", {"level_weights": [1.0] * 3}, r"process\.level_weights has 3 entries"),
        ("process", {"weighting": [{}, {}, {}]}, r"process\.weighting has 3 entries"),
    ],
)
def test_what_is_wrong_is_said_with_its_path(path, value, message):
    with pytest.raises(ConfigError, match=message) as error:
        cfg.from_dict(changed(path, value), where="here")
    assert str(error.value).startswith("here: ")
    assert "\n" not in str(error.value)


def test_a_stage_with_more_levels_than_the_model_is_refused():
    stage = {"levels": 3, "images": 1, "batch_size": 1, "lr": 1.0}
    with pytest.raises(ConfigError, match=r"stages\[-1\]\.levels is 3, but model\.levels has 2"):
        cfg.from_dict(changed("train.stages", [stage]))


def test_adapters_are_for_the_levels_that_their_model_has():
    stages = [{"levels": 2, "images": 9, "batch_size": 1, "lr": 1.0}]
    train = {"init": "model", "stages": stages, "lora": {"rank": 4, "levels": [0, 1]}}
    lora = cfg.from_dict(changed("train", train)).train.lora
    assert lora == cfg.LoraConfig(rank=4, levels=(0, 1))
    train["lora"] = {"rank": 4, "levels": [2]}
    with pytest.raises(ConfigError, match=r"train: lora\.levels: there is no level 2"):
        cfg.from_dict(changed("train", train))
    train["stages"] = [*PLAIN["train"]["stages"]]
    with pytest.raises(ConfigError, match="stages that add levels would leave these untrained"):
        cfg.from_dict(changed("train", train))


def test_a_stage_begins_gently_only_around_trained_levels():
    for before, levels, fits in ((1, 2, True), (0, 2, False), (2, 2, False)):
        stage = {"levels": levels, "images": 9, "batch_size": 1, "lr": 1.0}
        train = {"init_levels": before, "stages": [{**stage, "freeze_coarse_images": 9}]}
        if fits:
            assert cfg.from_dict(changed("train", train)).train.levels_before(0) == before
        else:
            with pytest.raises(ConfigError, match=r"stages\[0\]\.freeze_coarse_images"):
                cfg.from_dict(changed("train", train))


def test_a_side_that_is_no_multiple_of_the_coarser_is_refused():
    coarse = {"side": 8, "widths": [32], "blocks": [1], "attention": [0]}
    fine = {"side": 12, "widths": [32, 32], "blocks": [1, 1], "attention": [0, 0]}
    levels = [{**coarse, "patch": 4}, {**fine, "patch": 3}]
    with pytest.raises(ConfigError, match=r"levels\[1\]\.side 12 is no multiple of 8"):
        cfg.from_dict(changed("model.levels", levels))


def test_none_is_a_good_name_where_it_is_one():
    run = cfg.from_dict(changed("model.levels.0.input_scaling", "none"))
    assert run.model.levels[0].input_scaling == "none"


def test_several_problems_are_said_together_up_to_three():
    data = changed("train.seed", -1)
    data["model"]["embedding"] = "x"
    data["data"]["flip"] = "y"
    data["oops"] = 1
    with pytest.raises(ConfigError) as error:
        cfg.from_dict(data)
    assert str(error.value).count(";") == 2


# --- text that is wrong ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected keys such as model and train, found no mapping"),
        ("- 1", "found no mapping"),
        ("a: [", "while parsing"),
        ("name: a\nname: b", "duplicate key 'name'"),
        ("train: {seed: 1, seed: 2}", "duplicate key 'seed'"),
        ("{[1, 2]: 3}", "unhashable key"),
        (f"1: 2\n{yaml.safe_dump(PLAIN)}", r"\[1\]: Keys should be strings"),
        ("a: \x00", "special characters are not allowed"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("a: !!int x", "invalid literal"),
        ("a: &a [*a]", "a value contains itself"),
        ("[" * 900, "recursion"),
    ],
)
def test_bad_yaml_is_an_error_with_its_origin(text, message):
    with pytest.raises(ConfigError, match=message) as error:
        cfg.from_yaml(text, where="run.yaml")
    assert str(error.value).startswith("run.yaml: ")
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"name: caf\xe9")
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "bytes.yaml"):
        with pytest.raises(ConfigError, match=f"^{path}: cannot be read"):
            cfg.load_config(path)


# --- assignments -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "read"),
    [
        ("train.stages[1].lr=1e-5", lambda run: run.train.stages[1].lr == 1e-5),
        ("train.betas=[1e-1, .5e0]", lambda run: run.train.betas == (0.1, 0.5)),
        ("train.stages.1.lr=0.5", lambda run: run.train.stages[1].lr == 0.5),
        ("train.stages[-1].images=7", lambda run: run.train.stages[1].images == 7),
        ("train.stages[1].mix=[]", lambda run: run.train.stages[1].mix == ()),
        ("model.levels[0].widths=[32, 96]", lambda run: run.model.levels[0].widths == (32, 96)),
        ("data.path=a=b", lambda run: run.data.path == "a=b"),
        ("data.path=5 red apples", lambda run: run.data.path == "5 red apples"),
        ("data.path='64'", lambda run: run.data.path == "64"),
        ("data.path=null", lambda run: run.data.path is None),
        (" train.seed =3", lambda run: run.train.seed == 3),
        ("sampling={steps: 9}", lambda run: run.sampling.steps == 9),
    ],
)
def test_assignments_change_one_value(assignment, read):
    before = tiny()
    assert read(cfg.override(before, [assignment]))
    assert before == tiny()


def test_assignments_are_applied_in_order_and_judged_together():
    both = ["model.text=null", "encoder=null", "train.seed=1", "train.seed=2"]
    run = cfg.override(tiny(), both)
    assert (run.model.text, run.encoder, run.train.seed) == (None, None, 2)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.seed", r"--set train\.seed: write path\.to\.key=value"),
        ("=3", r"--set : unknown key"),
        ("train.sed=3", r"--set train\.sed: unknown key \(did you mean train\.seed\?\)"),
        ("seed=3", r"--set seed: unknown key \(did you mean train\.seed\?\)"),
        ("train.seed.x=3", r"--set train\.seed\.x: unknown key"),
        ("model.levels[2].side=4", r"model\.levels\[2\]\.side: unknown key .*levels\[[01]\]\.side"),
        ("model.levels[-3].side=4", r"unknown key"),
        ("model.levels.--1.side=4", r"unknown key"),
        ("model.levels.\u00b2.side=4", r"unknown key"),
        ("model.levels.side=4", r"unknown key"),
        ("train.seed=[", r"--set train\.seed=\[: while parsing"),
        ("train.seed={a: 1, a: 2}", r"duplicate key 'a'"),
        ("train.seed={[1]: 2}", r"unhashable key"),
        ("train.seed=!!float x", r"could not convert"),
        ("train.seed=&a [*a]", r"contains itself"),
        ("train.seed=1e3", r"--set: train\.seed: Input should be a valid integer"),
        ("data.path=None", r"path is the text 'None'"),
    ],
)
def test_bad_assignments_are_errors(assignment, message):
    with pytest.raises(ConfigError, match=message) as error:
        cfg.override(tiny(), [assignment])
    assert "\n" not in str(error.value)


def test_the_plain_data_of_these_tests_is_what_yaml_reads():
    assert cfg.from_yaml(yaml.safe_dump(PLAIN)) == tiny()
