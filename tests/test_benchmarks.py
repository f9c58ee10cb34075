"""Every benchmark runs, on models so small that its numbers mean nothing."""

from __future__ import annotations

import inspect
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from benchmarks import (
    against_release,
    cold_start,
    families,
    files_touched,
    first_gpu,
    harness,
    nests,
    peer_networks,
    peers,
    release,
    resume,
    stages,
)
from benchmarks.meter import Meter
from benchmarks.step_time import largest_batch

import recordings
from matryoshka_diffusion.cli.main import main as mdm
from matryoshka_diffusion.nn.costs import count_parameters
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.presets import preset
from ranks import FORKS, start

CPU = torch.device("cpu")
SMALL = ["--model", "tiny", "--batch", "2"]
SCRIPTS = {
    "step_time": [*SMALL, "--fp16"],
    "memory": SMALL,
    "optimizer": ["--model", "tiny"],
    "loading": [*SMALL, "--pictures", "4", "--sides", "40"],
    "sample_time": ["--steps", "1", "--counts", "1"],
    "noise": ["--samples", "1"],
    "cold_start": ["--steps", "1", "--prompts", "umbrella"],
    "resume": ["--model", "tiny"],
    "peers": [
        "--wider",
        "1",
        "--batch",
        "1",
        "--samples",
        "1",
        "--precisions",
        "fp32",
        "--steps",
        "1",
        "--clock",
        "cpu",
    ],
    "nests": ["--levels", "1", "5", "--batch", "1", "--precisions", "fp32"],
    "against_release": [
        *("--networks", "1.9M", "--precisions", "bf16"),
        *("--batch", "1", "--samples", "1", "--steps", "1"),
    ],
    "scale": ["--shards", "2", "--rows", "200", "--stages", "open", "batch", "check"],
}


def test_every_script_is_tried():
    scripts = {path.stem for path in (harness.ROOT / "benchmarks").glob("[a-z]*.py")}
    shared = {"harness", "steps", "meter", "blocks", "families", "peer_networks", "release"}
    own_tests = {"files_touched", "first_gpu", "stages", "fake_gpu", "tracer", "trace"}
    assert scripts - shared - own_tests == set(SCRIPTS)


@pytest.mark.parametrize(("loss", "status"), [(0.5, 0), (0.25, 1)])
def test_a_comparison_prints_what_differs(loss, status, tmp_path, monkeypatch, capsys):
    for name, value in (("before", 0.5), ("after", loss)):
        cases = {"plain": {"run/metrics.jsonl": [{"loss": value}]}}
        recording = {"made with": {}, "problems": {}, "cases": cases}
        (tmp_path / f"{name}.json").write_text(json.dumps(recording))
    paths = [str(tmp_path / f"{name}.json") for name in ("before", "after")]
    monkeypatch.setattr(sys, "argv", ["recordings", "compare", *paths])
    assert recordings.main() == status
    assert ("0.25" in capsys.readouterr().out) == bool(status)


def test_files_count_when_a_function_in_them_is_called():
    watch = files_touched.Watch(harness.ROOT / "benchmarks")
    sys.setprofile(watch)
    try:
        harness.kind_of("A processor")
        exec(compile("x = 1", str(harness.ROOT / "benchmarks" / "steps.py"), "exec"))
    finally:
        sys.setprofile(None)
    assert watch.take().called == ["harness.py"]
    assert watch.take().called == []


def main_of(name: str, words: Sequence[str], output: Path) -> None:
    """Run a benchmark with its output in a file."""
    preset_is_tiny(pytest.MonkeyPatch())
    with open(output, "w", encoding="utf-8") as file, redirect_stdout(file):
        import_module(f"benchmarks.{name}").main(words)


def preset_is_tiny(patch: pytest.MonkeyPatch) -> None:
    for name in ("steps", "step_time", "optimizer", "loading", "resume"):
        patch.setattr(f"benchmarks.{name}.preset", families.tiny)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Presets are tiny, and no process imports torch for itself."""

    def child(command: list[str], *, env: Mapping[str, str] | None = None, **_: object) -> object:
        python, _option, module, *words = command
        output, changed = tmp_path / "output", dict((env or {}).items() - os.environ.items())
        status, errors = start(main_of, module.split(".")[1], words, output, **changed).end()
        assert (python, status) == (sys.executable, 0), errors
        return SimpleNamespace(stdout=output.read_text("utf-8"))

    def cpu_seconds(words: Sequence[str], *_: object) -> float:
        monkeypatch.chdir(tmp_path)
        assert words[0] == "-c" or mdm(words[2:]) == 0
        return 1.0

    preset_is_tiny(monkeypatch)
    for name in ("resume", "scale"):
        monkeypatch.setattr(f"benchmarks.{name}.subprocess", SimpleNamespace(run=child, PIPE=None))
    monkeypatch.setattr(cold_start, "cpu_seconds", cpu_seconds)
    monkeypatch.setattr(against_release, "PROCESSES", FORKS)


def test_cpu_time_of_a_process_is_measured_and_its_failure_told():
    assert cold_start.cpu_seconds(["-c", "sum(range(10**6))"], Path(), 1) > 0
    with pytest.raises(SystemExit, match="no such thing"):
        cold_start.cpu_seconds(["-c", "raise OSError('no such thing')"], Path(), 1)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_and_writes_what_it_found(name, tmp_path, capsys, small):
    script = import_module(f"benchmarks.{name}")
    assert f"python -m benchmarks.{name}" in (script.__doc__ or "")
    common = ["--repeats", "1", "--threads", "1", "--device", "cpu", "--out", str(tmp_path)]
    words = [*SCRIPTS[name], *common]
    path = script.main(words)
    written = json.loads(path.read_text("utf-8"))
    assert path.name == f"{name}-{harness.kind_of(harness.cpu_model())}.json"
    assert written["benchmark"] == name
    assert written["command"] == " ".join([f"python -m benchmarks.{name}", *words])
    assert {"commit", "date", "machine", "rows"} <= written.keys()
    assert written["machine"]["threads"] == 1
    assert written["machine"]["torch"] == str(torch.__version__)
    numbers = [x for row in written["rows"] for x in row.values() if isinstance(x, int | float)]
    assert numbers
    assert all(math.isfinite(x) and x > 0 for x in numbers)
    output = capsys.readouterr().out
    assert all(str(key) in output for key in written["rows"][0])


def test_speeds_of_stages_are_compared_with_the_first_package(tmp_path, monkeypatch):
    """`mdm train openmoji` itself is run by the tests of the shipped presets."""
    speeds = {"before": 40.0, "now": 60.0, stages.ONE: 50.0}

    def measured(src: Path, stage: int, steps: int, threads: int | None) -> float:
        name = "before" if src == tmp_path / "src" else stages.ONE if threads == 1 else "now"
        return speeds[name] * (1 + stage)

    monkeypatch.setattr(stages, "images_per_second", measured)
    words = ["--before", str(tmp_path / "src"), "--busy", "--repeats", "2", "--out", str(tmp_path)]
    rows = json.loads(stages.main(words).read_text("utf-8"))["rows"]
    assert [row["speed"] for row in rows] == [1.0, 1.5, 1.25] * 3
    assert [row["images/s"] for row in rows[3:6]] == [80.0, 120.0, 100.0]


def test_all_sections_for_a_gpu_run_on_tiny_networks(tmp_path, monkeypatch):
    config = families.tiny("tiny")
    monkeypatch.setattr(families, "FAMILIES", {"tiny": partial(families.try_family, config)})
    path = first_gpu.main(["--out", str(tmp_path), "--device", "cpu", "--commit", "abc"])
    content = json.loads(path.read_text("utf-8"))
    assert content["commit"] == "abc"
    assert content["machine"]["torch"] == str(torch.__version__)
    sections = content["sections"]
    assert list(sections) == list(first_gpu.SECTIONS)
    assert not [name for name, found in sections.items() if "error" in json.dumps(found)]
    assert sections["smoke"]["tiny bf16"] == "ok"
    ours = [found for name, found in sections["norms"].items() if name.endswith("normalise")]
    assert ours
    assert all(found["wrong by"] < 2**-7 for found in ours)
    assert sections["steps"]["tiny"]["as it is"]["images/s"] > 0
    assert sections["steps"]["tiny"]["deterministic"]["images/s"] > 0
    assert sections["agreement"]["CPU and GPU, fp32"]["most"] <= 1
    assert sections["agreement"]["CPU and GPU, bf16"]["most"] > 0
    assert sections["runs"]["bf16, resumed: largest difference of a weight"] == 0.0


def test_steps_that_fit_in_no_batch_are_recorded(monkeypatch):
    batches = []

    def scarce(bench: first_gpu.Bench, name: str, batch: int) -> None:
        batches.append((name, batch))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(first_gpu.Bench, "trainer", scarce)
    sizes = first_gpu.WITHOUT_GPU._replace(training={"tiny": 12, "base": 2})
    found = first_gpu.steps(first_gpu.Bench(Meter(CPU), sizes, {}))
    assert batches == [("tiny", 12), ("tiny", 6), ("tiny", 3), ("base", 2)]
    assert all("out of memory" in found[name]["error"] for name in ("tiny", "base"))


def test_a_section_that_fails_is_recorded_and_the_next_one_runs(tmp_path, monkeypatch):
    def fail(bench: first_gpu.Bench) -> first_gpu.Numbers:
        raise RuntimeError("mixed devices")

    sections = {"first": (fail, 0.0), "second": (lambda bench: {"x": 1}, 0.0), "long": (fail, 1e3)}
    monkeypatch.setattr(first_gpu, "SECTIONS", sections)
    path = first_gpu.main(["--out", str(tmp_path), "--device", "cpu", "--seconds", "500"])
    found = json.loads(path.read_text("utf-8"))["sections"]
    assert "mixed devices" in found["first"]["error"]
    assert found["second"]["x"] == 1
    assert found["long"] == {"skipped": "no time left"}


def test_variants_take_turns_and_the_first_round_does_not_count():
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = harness.take_turns(variants, 2, CPU)
    assert calls == list("ababab")
    assert {name: len(rounds) for name, rounds in seconds.items()} == {"a": 2, "b": 2}


def test_turns_are_timed_by_the_clock_that_is_given():
    ticks = iter([0.0, 10.0, 12.5])  # the round that does not count only begins
    assert harness.take_turns({"": lambda: None}, 1, CPU, lambda: next(ticks)) == {"": [2.5]}


def test_speed_is_taken_within_rounds():
    """A machine that is ten times slower in one round changes nothing."""
    seconds = {"slow": [2.0, 20.0, 2.0], "fast": [1.0, 10.0, 1.0]}
    assert harness.speed(seconds, "fast", "slow") == 2.0
    assert harness.speed(seconds, "slow", "slow") == 1.0


def test_the_largest_batch_is_found_by_doubling():
    assert largest_batch(lambda batch: batch <= 50) == 32
    assert largest_batch(lambda batch: False) == 0


def test_cores_of_others_are_all_busy_ones_but_our_own():
    before, after = harness.Usage(10.0, 100.0, 5.0), harness.Usage(20.0, 118.0, 13.0)
    assert after.cores_of_others(before) == 1.0
    assert after.cores_of_others(before._replace(busy=None)) is None


@pytest.mark.parametrize("name", peer_networks.KINDS)
def test_networks_of_other_libraries_have_the_nests_flops_and_evaluations(name, monkeypatch):
    kind = peer_networks.KINDS[name]
    if missing := kind.missing():
        pytest.skip(f"not installed: {missing}")
    task = peer_networks.Task(side=64, channels=3, evaluations=2, device=CPU)
    for factor, widths in kind.widths.items():
        flops = peers.nest_flops(peers.wider(factor))
        assert peer_networks.forward_flops(kind, task, widths) == pytest.approx(flops, rel=0.05)
    peer = kind.build(task, kind.widths[1])
    forward = mock.Mock(wraps=peer.net.forward)
    monkeypatch.setattr(peer.net, "forward", forward)
    assert peer.sample(1).shape == (1, 3, 64, 64)
    assert forward.call_count == task.evaluations


def test_an_average_of_another_library_goes_on_following_the_weights():
    task = peer_networks.Task(side=8, channels=3, evaluations=1, device=CPU)
    schedule_only = peer_networks._of_diffusers(task, torch.nn.Linear(1, 1), lambda count: ())
    net = torch.nn.Linear(1, 1)
    update = schedule_only.average(net)
    averaged = inspect.getclosurevars(update).nonlocals["ema"]
    update()
    before = averaged.shadow_params[0].clone()
    with torch.no_grad():
        net.weight += 1.0
    update()
    assert averaged.shadow_params[0] > before


def test_a_module_is_imported_without_what_it_does_not_need(tmp_path, monkeypatch):
    package = tmp_path / "peer_package"
    package.mkdir()
    (package / "__init__.py").write_text("import no_such_package")
    (package / "part.py").write_text("WIDTH = 8")
    source = "import no_such_package.images as images\nfrom peer_package.part import WIDTH"
    (package / "whole.py").write_text(f"{source}\nDOUBLE = 2 * WIDTH")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    module = peer_networks.module_without("peer_package.whole", "no_such_package")
    assert module.DOUBLE == 16


def test_nests_end_with_256_pixels_and_share_their_coarse_levels():
    five = nests.nest(5).model
    assert [level.side for level in five.levels] == [16, 32, 64, 128, 256]
    assert five.first(3) == preset("openmoji").model
    assert nests.nest(2).model == five.first(2)
    assert [*five.problems()] == []


def test_the_state_of_a_checkpoint_is_weights_average_and_two_moments(tmp_path, small):
    size = resume.write(resume.run_config("tiny"), tmp_path)
    count = count_parameters(NestedUNet(families.tiny("tiny").model))
    assert size == pytest.approx(4 * 4 * count, rel=1e-3)


@pytest.mark.parametrize("operation", ["attend", "residual"])
def test_the_release_must_predict_what_the_nest_does_before_it_is_timed(operation, monkeypatch):
    config = against_release.run_of("1.9M")
    assert against_release.difference(config) < against_release.TOLERANCE
    correct = getattr(release, operation)
    monkeypatch.setattr(release, operation, lambda *inputs: 1.01 * correct(*inputs))
    assert against_release.difference(config) > against_release.TOLERANCE
