"""Configs survive YAML, and everything wrong with one is an error of one line with its path."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from matryoshka_diffusion import config as cfg
from matryoshka_diffusion.config import ConfigError
from matryoshka_diffusion.configfile import (
    changed,
    dump,
    from_dict,
    from_yaml,
    load_config,
    override,
    to_yaml,
)
from matryoshka_diffusion.modelconfig import MicroConfig
from matryoshka_diffusion.presets import preset

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
    return from_dict(PLAIN)


# --- round trips -----------------------------------------------------------------------------


@st.composite
def nests(draw):
    """Levels that nest: each core is the stem of the coarser level."""
    widths = st.lists(st.sampled_from([32, 64, 96]), min_size=1, max_size=3)
    stem = draw(st.sampled_from([4, 8])) * 2 ** (len(first := draw(widths)) - 1)
    levels = []
    for index in range(draw(st.integers(1, 3))):
        own = first if index == 0 else draw(widths)
        stem = stem if index == 0 else stem * 2 ** (len(own) - 1)
        counts = st.lists(st.integers(0, 2), min_size=len(own), max_size=len(own)).map(tuple)
        patch = max(draw(st.sampled_from([1, 2])), levels[-1].patch if levels else 1)
        micro = st.sampled_from([(), (MicroConfig(name="scale", ceiling=64.0),)])
        levels.append(
            cfg.LevelConfig(
                side=stem * patch,
                widths=tuple(own),
                blocks=draw(counts),
                attention=draw(counts),
                patch=patch,
                dropout=draw(st.floats(0, 1)),
                shift_power=draw(st.floats(-4, 4)),
                micro=draw(micro),
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
            mix=draw(st.sampled_from([(), (*[0.0] * (count - 1), 1.0)])),
        )
        for count in range(1, len(levels) + 1)
    )
    weights = draw(st.sampled_from([(1.0,), tuple(float(n + 1) for n in range(len(levels)))]))
    path = draw(st.sampled_from([None, "1e3", "~", "no", "08", "2001-01-01"]))
    return cfg.RunConfig(
        name=draw(st.text("abc: #-'\"{}[]\n\u00e9", max_size=12)),
        model=cfg.ModelConfig(
            levels=levels,
            embedding=8 * draw(st.integers(1, 64)),
            text=cfg.TextConfig(features=16, width=32) if has_text else None,
            classes=0 if has_text else draw(st.integers(0, 1000)),
        ),
        process=cfg.ProcessConfig(level_weights=weights),
        data=cfg.DataConfig(source="folder", path=path),
        encoder=cfg.EncoderConfig(name="minilm") if has_text else None,
        train=cfg.TrainConfig(stages=stages, betas=draw(st.tuples(*[st.floats(0, 0.99)] * 2))),
        sampling=cfg.SamplingConfig(threshold=("none",) * len(levels)),
    )


@given(runs())
def test_a_config_survives_yaml(run):
    assert from_yaml(to_yaml(run)) == override(run, []) == run


def test_a_config_is_read_from_a_file(tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(tiny()))
    assert load_config(tmp_path / "config.yaml") == tiny()
    (tmp_path / "bytes.yaml").write_bytes(b"name: caf\xe9")
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "bytes.yaml"):
        with pytest.raises(ConfigError, match=f"^{path}: "):
            load_config(path)


def test_numbers_are_read_as_meant():
    """1e-4 needs no dot, and the class 08 stays the text that earlier versions wrote plainly."""
    text = to_yaml(tiny()).replace("lr: 0.0001", "lr: 1e-4").replace("classes: []", "classes: [08]")
    run = from_yaml(text)
    assert run.train == tiny().train
    assert run.data.classes == ("08",)


def test_derived_numbers():
    coarse, fine = tiny().model.levels
    assert (coarse.stem_side, coarse.core_side, fine.core_side) == (8, 4, 8)
    patched = fine.model_copy(update={"side": 32, "patch": 2})
    assert (patched.stem_side, patched.core_side) == (16, 8)
    level = coarse.model_copy(update={"halve": (False,)})
    assert (level.core_side, level.stride(0), coarse.stride(0)) == (8, 1, 2)
    latents = override(tiny(), ["codec={factor: 8}", "sampling.threshold=[none]"])
    assert (tiny().data_side, latents.data_side) == (16, 128)
    assert tiny().train.images == 150


def test_a_config_is_never_written_to():
    for part in (tiny(), tiny().model.levels[0]):
        with pytest.raises(ValidationError):
            setattr(part, "side", 4)  # noqa: B010


# --- assignments -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("train.stages[1].lr=1e-5", "train.stages.1.lr", 1e-5),
        ("train.betas=[1e-1, .5]", "train.betas", [0.1, 0.5]),
        ("train.stages[-1].images=7", "train.stages.1.images", 7),
        ("model.levels[0].widths=[32, 96]", "model.levels.0.widths", [32, 96]),
        ("data.path=a=b", "data.path", "a=b"),
        ("data.path=5 red apples", "data.path", "5 red apples"),
        ("data.path=null", "data.path", None),
        (" train.seed =3", "train.seed", 3),
        ("sampling={steps: 9}", "sampling.steps", 9),
    ],
)
def test_assignments_change_one_value(assignment, path, value):
    before = tiny()
    assert override(before, [assignment]) == changed(before, [(path, value)])
    assert before == tiny()


def test_assignments_are_applied_in_order_and_judged_together():
    both = ["model.text=null", "encoder=null", "train.seed=1", "train.seed=2", "codec.factor=8"]
    run = override(tiny(), [*both, "sampling.threshold=[none]"])
    assert (run.model.text, run.encoder, run.train.seed) == (None, None, 2)
    assert run.codec == cfg.CodecConfig(factor=8), "a part that was not set"


LORA = "train={init: m, stages: [{levels: 2, images: 9, batch_size: 1, lr: 1.0}], lora: "
GENTLE = "stages: [{levels: 2, images: 9, batch_size: 1, lr: 1.0, freeze_coarse_images: 9}]"
UNEVEN = (
    "model.levels=[{side: 8, patch: 4, widths: [32], blocks: [1], attention: [0]}, "
    "{side: 12, patch: 3, widths: [32, 32], blocks: [1, 1], attention: [0, 0]}]"
)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        # the assignment itself
        ("train.seed", r"train\.seed: write path\.to\.key=value"),
        ("=3", "write path"),
        ("train.seed.x=3", r"train\.seed\.x: unknown"),
        ("model.levels[2].side=4", r"model\.levels\[2\]\.side: unknown .*levels\.0\.side"),
        ("model.levels.--1.side=4", "unknown key"),
        ("model.levels.\u00b2.side=4", "unknown key"),
        ("train.seed=[", r"train\.seed=\[: line 1"),
        ("train.seed={a: 1, a: 2}", "duplicate key"),
        ("train.seed=&a [*a]", "contains itself"),
        # keys: the nearest known path
        ("modle={}", r"modle: unknown .* model\?"),
        ("seed=3", r"seed: unknown .* train\.seed\?"),
        ("train.sed=3", r"train\.sed: unknown .* train\.seed\?"),
        ("model.levels[1].width=[32]", r"model\.levels\[1\]\.width: unknown .*widths\?"),
        # types
        ("model.embedding=32.0", r"model\.embedding: .*integer"),
        ("train.stages[0].lr=fast", r"train\.stages\[0\]\.lr: .*number"),
        ("data.flip=1", r"data\.flip: .*boolean"),
        ("data.path=7", r"data\.path: .*string"),
        ("model.levels[0].widths=32", r"model\.levels\[0\]\.widths: .*write \[32\]"),
        ("train.ema_power=0.1", r"train\.ema_power: .*write \[0\.1\]"),
        ("sampling.guidance=high", r"sampling\.guidance\[0\]: .*number"),
        ("train.betas=[0.9]", r"train\.betas.*: .*required"),
        # ranges
        ("model.levels[0].side=0", r"model\.levels\[0\]\.side: .*greater than 0"),
        ("train.stages[0].lr=.inf", r"train\.stages\[0\]\.lr: .*finite"),
        ("train.ema_power=[0.05, 0.3]", r"train\.ema_power\[1\]: .*less"),
        # names
        ("sampling.sampler=euler", r"sampling\.sampler: .*'ddpm'"),
        ("data.path=None", r"data\.path: 'None'.* null"),
        ("train.init='null'", r"train\.init: 'null'.* null"),
        ("model.levels[0].input_scaling=None", r"levels\[0\]\.input_scaling: .*'none'"),
        ("model.levels[0].micro=[{name: a.b}]", r"micro\[0\]\.name: "),
        # a level
        ("model.levels[0].widths=[]", r"levels\[0\]\.widths: .*at least 1"),
        ("model.levels[0].widths=[33, 64]", r"levels\[0\]\.widths\[0\]: .*multiple of 32"),
        ("model.levels[0].blocks=[1]", r"levels\[0\]: blocks .*need 2"),
        ("model.levels[0].halve=[true, false]", r"levels\[0\]: halve .*need 1"),
        ("model.levels[0].side=9", r"levels\[0\]: side 9 .* 2"),
        ("model.levels[0].patch=3", r"levels\[0\]: side 8 .* 6"),
        ("model.levels[0].heads=5", r"levels\[0\]: heads 5 .*64"),
        ("model.text={features: 8, width: 32, layers: 1, heads: 3}", r"model\.text: heads"),
        # the nest
        ("model.levels=[]", r"model\.levels: .*at least 1"),
        ("model.levels[1].side=32", r"model: levels\[1\] .*levels\[0\].* side 16, not 8"),
        ("model.levels[1].side=4", r"model: levels\[1\]\.side .* coarse to fine"),
        (UNEVEN, r"model: levels\[1\]\.side 12 .*8"),
        ("model.levels[1].middle=true", r"model: levels\[1\]\.middle.* omit"),
        ("model.embedding=36", r"model\.embedding: .*multiple of 8"),
        ("model.embedding=8000000000000", r"model\.embedding: .*65536"),
        ("model.levels[0].widths=[32, 3200000000]", r"levels\[0\]\.widths\[1\]: .*65536"),
        ("model.levels[0].blocks=[1000000, 1]", r"model: levels: 2,000,0\d\d layers"),
        ("model.levels[0].attention=[0, 1000000]", r"model: levels: 3,000,0\d\d layers"),
        ("model.text.layers=2000", r"model: levels: 2,0\d\d layers"),
        ("sampling={grid: released, steps: 1001}", r"sampling: steps is 1,001.*trailing"),
        # data
        *(
            (f"data={{mix: [{{path: a, share: 1}}], {text}}}", rf"data: {name} .*data\.mix\[N\]")
            for name, text in (
                ("split", "split: train"),
                ("columns", "columns: {label: x}"),
                ("captions", "captions: none"),
                ("caption_suffixes", "caption_suffixes: [.x]"),
            )
        ),
        # stages
        ("train.stages=[]", r"train\.stages: .*at least 1"),
        ("train.stages[0].levels=3", r"train: stages .*shrink"),
        ("train.stages=[{levels: 3, images: 1, batch_size: 1, lr: 1.0}]", r"\[-1\]\.levels is 3"),
        ("train.stages[1].levels=3", r"train\.stages\[1\]: mix .*3"),
        ("train.stages[1].mix=[0.5, 0.6]", r"train\.stages\[1\]: mix .*1\.1"),
        ("train.stages[1].ramp_images=51", r"train\.stages\[1\]: ramp_images .*50"),
        ("train.stages[0].ramp_images=5", r"train: stages\[0\]\.ramp_images: .*init_levels"),
        ("train={init_levels: 2, " + GENTLE + "}", r"stages\[0\]\.freeze_coarse_images"),
        ("train.init_levels=2", r"train: init_levels"),
        ("train.recompute=[2]", r"train\.recompute .*level 2"),
        ("train.lora={rank: 4}", r"train: lora: .*set init"),
        (LORA + "{rank: 4, levels: [2]}}", r"train: lora\.levels: .*2"),
        # parts of a run
        ("sampling.guidance_interval=[5.0, -5.0]", r"sampling: guidance_interval"),
        ("sampling.wake=[-1.0, -2.0, -3.0]", r"sampling\.wake has 3 .* 1 or 2"),
        ("codec={}", r"sampling\.threshold .*\[none\]"),
        ("model.classes=3", r"model\.text and model\.classes.*omit"),
        ("encoder=null", "text and encoder"),
        ("sampling.guidance=[1.0, 1.0, 1.0]", r"sampling\.guidance has 3 .* 1 or 2"),
    ],
)
def test_what_is_wrong_is_said_with_its_path(assignment, message):
    with pytest.raises(ConfigError, match=message) as error:
        override(tiny(), [assignment])
    assert str(error.value).startswith("--set")
    assert "\n" not in str(error.value)


UNTRAINED = "process.level_weights=[0, 1, 1]"


def test_floors_wake_coarse_levels_before_fine_ones_in_one_log_snr():
    """Level 2 is shifted by 4 log 2 = 2.77, level 1 by half of that."""
    openmoji = preset("openmoji")
    for fits in ("[-3]", "[9, -3, -4.3]", "[9, -3, 0]"):
        assert override(openmoji, [f"sampling.wake={fits}"]).sampling.wake is not None
    with pytest.raises(ConfigError, match=r"sampling\.wake .*level 1 .*level 2.*by 0\.1137"):
        override(openmoji, ["sampling.wake=[0, -3, -4.5]"])
    for part in ("sampling", "train"):
        with pytest.raises(ConfigError, match=rf"{part}\.wake leaves level 1"):
            override(openmoji, [f"{part}.wake=[0, 3, -4.5]"])
        with pytest.raises(ConfigError, match=r"wake .*level_weights"):
            override(openmoji, ["sampling.wake=[-3]", f"{part}.wake=[-3]", UNTRAINED])
    for floors in ("null", "[-3.5]", "[9, -3.5, -2]"):
        with pytest.raises(ConfigError, match=r"sampling\.wake is below train\.wake"):
            override(openmoji, [f"sampling.wake={floors}", "train.wake=[-3]"])
    late = ["sampling.wake=[-3]", "train.wake=[-3]"]
    with pytest.raises(ConfigError, match=r"train\.stages\[2\]\.mix\[1\] is 0"):
        override(openmoji, [*late, "train.stages[2].mix=[0.5, 0, 0.5]"])
    assert override(openmoji, ["sampling.wake=[-9, -3, -2]", "train.wake=[-3]"]).train.wake


def test_adapters_and_gentle_stages_are_for_trained_levels():
    lora = override(tiny(), [LORA + "{rank: 4, levels: [0, 1]}}"]).train.lora
    assert lora == cfg.LoraConfig(rank=4, levels=(0, 1))
    with pytest.raises(ConfigError, match="train: lora: stages"):
        override(tiny(), ["train.init=m", "train.lora={rank: 4}"])
    gentle = override(tiny(), ["train={init_levels: 1, " + GENTLE + "}"]).train
    assert gentle.levels_before(0) == 1


def test_several_problems_are_said_together_up_to_three():
    with pytest.raises(ConfigError) as error:
        override(tiny(), ["train.seed=-1", "model.embedding=x", "data.flip=y", "oops=1"])
    assert str(error.value).count(";") == 2


def bomb(line: str) -> str:
    """Eleven lines that each name the one before eight times."""
    lines = (f"a{n}: &a{n} {line.format(', '.join([f'*a{n - 1}'] * 8))}" for n in range(1, 12))
    return "\n".join(["a0: &a0 {a: 1}", *lines])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected keys"),
        ("a: [", "line 1: "),
        ("name: a\nname: b", 'line 2: .*duplicate key "name"'),
        ("{{a: 1}: 3}", "unhashable key"),
        (f"1: 2\n{dump(PLAIN)}", r"\[1\]: Keys should be strings"),
        ("a: \x00", "special characters"),
        ("a: !!python/object:os.system x", "constructor"),
        ("a: &a [*a]", "contains itself"),
        ("[" * 900, "recursion"),
        (bomb("[{}]"), "aliases"),
        (bomb("{{<<: [{}]}}"), "aliases"),
    ],
)
def test_bad_yaml_is_an_error_with_its_origin(text, message):
    with pytest.raises(ConfigError, match=message) as error:
        from_yaml(text, where="run.yaml")
    assert str(error.value).startswith("run.yaml: ")
    assert "\n" not in str(error.value)


def test_a_value_may_be_written_once_and_named_again():
    stage = "{levels: 1, images: 100, batch_size: 10, lr: 0.001}"
    again = "{<<: *s, images: 50}"
    text = dump({**PLAIN, "train": {}}).replace("train: {}", "")
    run = from_yaml(f"{text}\ntrain:\n  stages: [&s {stage}, *s, {again}]\n")
    assert [one.images for one in run.train.stages] == [100, 100, 50]
