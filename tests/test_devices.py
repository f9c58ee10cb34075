"""Promises for a GPU, tested without one: devices, waits of the host, kernels, memory."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.families import FAMILIES

from matryoshka_diffusion.samplers import SAMPLERS

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or shutil.which("g++") is None or sys.platform != "linux",
    reason="needs a C++ compiler, and torch's build for CPUs",
)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Any]:
    """Results of `device_contracts.py`, a process of its own because it changes torch."""
    paths = os.pathsep.join(map(str, (HERE.parent / "src", HERE.parent)))
    script, folder = str(HERE / "device_contracts.py"), str(tmp_path_factory.mktemp("trace"))
    done = subprocess.run(
        [sys.executable, script, folder],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


# --- training steps ------------------------------------------------------------------------------


def test_every_pair_of_settings_occurs(results):
    cases = [{"family": case["family"], **case["settings"]} for case in results["training"]]
    for one, other in itertools.combinations(cases[0], 2):
        values = [{repr(case[key]) for case in cases} for key in (one, other)]
        pairs = {(repr(case[one]), repr(case[other])) for case in cases}
        assert pairs == set(itertools.product(*values)), (one, other)
    assert {case["family"] for case in cases} == set(FAMILIES)


def test_a_step_waits_for_the_gpu_once_and_copies_nothing_to_it(results):
    """No step raised, so none mixes devices."""
    for case in results["training"]:
        assert case["waits"] == ["trainer.py: norms, total, *per_level = sums.tolist()"], case
        assert case["copies"].keys() == {"D2H blocking"}, case
        assert case["doubles"] == {}, case


def test_inputs_come_in_pinned_memory_without_a_wait(results):
    for case in results["training"]:
        assert case["waits of inputs"] == [], case
        assert case["copies of inputs"].keys() == {"H2D"}, case
        assert case["doubles of inputs"] == {}, case


def test_the_network_waits_for_inputs_of_another_stream_and_keeps_their_memory(results):
    beside = results["beside"]
    assert (beside["streams"], beside["recorded"]) == (["side"], ["side records"])
    first, *others = beside["order"]
    assert first == "main waits for side"
    assert sorted(others) == sorted(beside["tensors"])


def test_no_features_are_kept_in_float32_by_half_precision(results):
    for case in results["training"]:
        half = case["settings"]["precision"] != "fp32"
        assert not (half and case["kept in float32"]), case
    assert any(case["kept in float32"] for case in results["training"]), "in float32"


def test_no_attention_keeps_its_logits(results):
    for case in results["training"]:
        assert "math" not in case["attention"], case
    assert any("efficient" in case["attention"] for case in results["training"]), "in float32"


KERNELS = {
    "nest": 979,
    "text": 1478,
    "classes": 1161,
    "video": 2574,
    "latents": 1260,
    "nest of codes": 2402,
    "upsampler": 2058,
    "adapters": 2382,
}
"""Kernels of a step in bf16, in the settings that `device_contracts.py` combines with it."""


def test_a_step_launches_no_more_kernels_than_it_did(results):
    cases = [case for case in results["training"] if case["settings"]["precision"] == "bf16"]
    kernels = {case["family"]: case["kernels"] for case in cases}
    assert {name: count for name, count in kernels.items() if count > KERNELS[name]} == {}


def test_dry_runs_count_the_memory_that_a_step_keeps(results):
    for name, (traced, counted) in results["memory"].items():
        assert counted == pytest.approx(traced, rel=0.02), name


# --- sampling ------------------------------------------------------------------------------------


def test_no_step_of_a_sampler_waits_for_the_gpu_or_copies_from_memory_that_moves(results):
    """No batch raised, so none mixes devices. Before and after its steps a batch may wait."""
    for case in results["drawing"]:
        assert not any(case["waits in steps"]), case
        places = {line.partition(":")[0] for line in case["waits"]}
        assert places <= {"conditioning.py", "pipeline.py", "weights.py"}, case
        assert case["doubles"] == {}, case
        assert "math" not in case["attention"], case
    assert results["in step"] == []


def test_models_have_their_features_in_the_order_that_convolutions_take(results):
    assert results["copies of layout"] == [4, 4], "of the noisy image of each level that is awake"


def test_the_noise_of_all_levels_is_drawn_by_one_series_of_kernels(results):
    cases = [case for case in results["drawing"] if case["sampler"] == "ddpm"]
    noise = {case["family"]: case["noise"] for case in cases if case["family"] != "upsampler"}
    assert noise.keys() >= {"text", "video"}, "three levels and two"
    assert max(noise.values()) <= 4 * 300, "the start and three steps"


def test_a_guided_step_is_one_call_of_the_network(results):
    for case in results["drawing"]:
        assert set(case["rows"]) == {6 if case["guided"] else 3}, case
        assert len(case["rows"]) == (6 if case["family"] == "upsampler" else 3), case
    cases = {(case["sampler"], case["guided"]) for case in results["drawing"]}
    assert cases == set(itertools.product(SAMPLERS, (False, True)))


# --- the tracer, by hand -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "kernels"),
    [
        ("add", [("add", 4 * (256 + 128 + 256), 0)]),
        ("broadcast", [("add", 4 * (4 + 1 + 4), 0)]),
        ("in place", [("add_", 4 * (256 + 256), 0)]),
        ("views", []),
        ("nothing", []),
        ("product", [("mm", 2 * 3 * 16, 2 * 4**3)]),
        ("norm", [("native_group_norm", 4 * (3 * 256 + 2 * 8 + 2 * 4), 0)]),
        # features twice in and once out; gain and bias; statistics of groups and of channels
        ("compiled norm", [("norm", 2 * 3 * 256 + 4 * (2 * 8 + 2 * 4 + 2 * 16), 0)]),
    ],
)
def test_bytes_and_flops_are_those_of_the_tensors(results, case, kernels):
    assert results["tracing"][case]["kernels"] == [list(kernel) for kernel in kernels]


def test_a_convolution_adds_its_bias_by_itself_and_copies_what_lies_otherwise(results):
    features, weight, flops = 2 * 256, 2 * 8 * 8 * 9, 2 * 2 * 8 * 8 * 9 * 16
    convolution = ["convolution", 2 * features + weight, flops]
    tracing = results["tracing"]
    assert tracing["convolution"]["kernels"] == [["add bias", 2 * features, 0], convolution]
    assert tracing["mixed layouts"]["kernels"] == [["transpose", 2 * features, 0], convolution]


def test_kernels_of_the_backward_pass_have_the_place_of_the_forward_pass(results):
    names = [kernel[0] for kernel in results["tracing"]["backward"]["kernels"]]
    assert names == ["silu", "sum", "ones_like", "silu_backward"]
    assert results["tracing"]["backward"]["places"][-1].endswith(" backward")


def test_waits_and_copies_are_noticed(results):
    tracing = results["tracing"]
    noticed = {
        name: (case["waits"], case["copies"]) for name, case in tracing.items() if name != "mixed"
    }
    size = 4 * 256
    assert {name: value for name, value in noticed.items() if value != (0, {})} == {
        "item": (1, {"D2H blocking": 4}),
        "list": (1, {"D2H blocking": size}),
        "to the GPU": (1, {"H2D blocking": 16}),
        "pinned to the GPU": (0, {"H2D": 16}),
        "from the GPU": (0, {"D2H": size}),
    }
    assert [name for name, case in tracing.items() if name != "mixed" and case["doubles"]] == [
        "double"
    ]
    assert "expected all tensors on the GPU" in tracing["mixed"]


def test_attention_is_fused_where_heads_lie_innermost(results):
    tracing = results["tracing"]
    assert tracing["attention"]["attention"] == ["cudnn"]
    assert tracing["attention across"]["attention"] == ["math"]


def test_the_script_writes_what_a_step_does(results):
    script = results["script"]
    *kinds, total = script["rows"]
    assert total["kind"] == "all"
    assert total["ms"] == pytest.approx(sum(row["ms"] for row in kinds))
    assert script["images/s"] == pytest.approx(4e3 / total["ms"])
    assert script["GB kept an image"] > 0
