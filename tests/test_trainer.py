"""The loop of a run: resuming, signals, its folder, the inputs of its steps, hooks."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import ConfigError, RunConfig, StageConfig
from matryoshka_diffusion.configfile import load_config, override, to_yaml
from matryoshka_diffusion.data.loader import Batch, Loader
from matryoshka_diffusion.data.source import Source, array_source
from matryoshka_diffusion.diffusion import Process
from matryoshka_diffusion.files import UnreadableError
from matryoshka_diffusion.schedule import wakes_at
from matryoshka_diffusion.training import checkpoint, precision
from matryoshka_diffusion.training.checkpoint import CheckpointError, newest
from matryoshka_diffusion.training.distributed import World
from matryoshka_diffusion.training.inputs import Feed, Inputs
from matryoshka_diffusion.training.run_folder import RunInUse, open_run
from matryoshka_diffusion.training.signals import Interrupts, Stopped, handled
from matryoshka_diffusion.training.stages import Step, step_at
from matryoshka_diffusion.training.step import NotFinite
from matryoshka_diffusion.training.trainer import Trainer, View
from ranks import fork, start
from tiny_run import TinyPictures, digests, encode, metrics, run, stop_at, there, tiny_config

CPU = torch.device("cpu")
FIRST, SECOND = tiny_config().train.stages


def epoch_of_ten() -> Source:
    """Ten pictures: steps of four end in the middle of an epoch."""
    return array_source(
        name="ten",
        array=np.random.default_rng(0).integers(0, 256, (10, 16, 16, 3), dtype=np.uint8),
        keys=[f"picture-{n}" for n in range(10)],
        original_sides=[20 + n for n in range(10)],
        captions=[(f"caption {n}", f"words {n}") for n in range(10)],
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder)
    return folder


# --- resuming ----------------------------------------------------------------------------------


def test_a_stopped_run_continues_bit_for_bit(whole, tmp_path):
    """Stopped in the middle of a stage, at the growth and after it; tracks change nothing else."""
    config = tiny_config(ema_power=(0.1,))
    for place, number in ((4, signal.SIGTERM), (24, signal.SIGINT), (36, signal.SIGUSR1)):
        with pytest.raises(Stopped, match=f"{place} of 48") as stopped:
            run(tmp_path / "run", config, hooks=[stop_at(place, number)])
        assert stopped.value.code == 128 + number
    run(tmp_path / "run", config)
    expected = {k: v for k, v in digests(whole).items() if k.endswith(".safetensors")}
    assert len(expected) == 4
    assert expected.items() <= digests(tmp_path / "run").items()
    assert metrics(tmp_path / "run") == metrics(whole)


SHORT = tuple(stage.model_copy(update={"images": 12}) for stage in (FIRST, SECOND))
GENTLE = SHORT[1].model_copy(update={"freeze_coarse_images": 8, "ramp_images": 12})
TRACKS = {"ema_power": (0.05, 0.1), "ema_snapshot_every_images": 8}
MEMORY = {"layout": "channels_last", "recompute": (1,)}


@pytest.mark.parametrize(
    ("settings", "places"),
    [
        # While the coarse level is frozen, and while only the ramp goes on.
        ({"stages": (SHORT[0], GENTLE), "lr_per_level": True, **TRACKS, **MEMORY}, (16, 20)),
        ({"stages": SHORT, "precision": "bf16", "accumulate": 2}, (12,)),
        ({"stages": SHORT, "accumulate": 2, "threads": 2, "dropout": 0.0}, (8,)),
        ({"stages": SHORT, "accumulate": 2, "wake": (-1.0,)}, (16,)),
    ],
    ids=["gentle", "bf16", "threads", "wake"],
)
def test_every_option_of_training_resumes_bit_for_bit(tmp_path, monkeypatch, settings, places):
    """Also in the middle of an epoch: each sample is used once, with the same time and noise."""
    config, step, used = tiny_config(**settings), Trainer.step, []

    def recorded(self: Any, parts: Sequence[Inputs]) -> Any:
        (inputs,) = parts
        noise = hashlib.sha256(b"".join(level.numpy().tobytes() for level in inputs.noise))
        used.append((inputs.ids, inputs.keys, inputs.t.tolist(), noise.hexdigest()))
        return step(self, parts)

    def go(name: str, **options: Any) -> dict[str, Any]:
        loader = Loader(epoch_of_ten(), config.train.seed, flip=True)
        run(tmp_path / name, config, loader=loader, **options)
        last = there(newest(tmp_path / name / "checkpoints"))
        state = json.loads((last / "state.json").read_text("utf-8"))
        return {**digests(tmp_path / name), **state, "seconds": 0}

    monkeypatch.setattr(Trainer, "step", recorded)
    expected = go("whole")
    undisturbed = list(used)
    used.clear()
    for place in places:
        with pytest.raises(Stopped):
            go("parts", hooks=[stop_at(place)])
    assert go("parts") == expected
    assert used == undisturbed
    keys = [key for _, keys, *_ in used for key in keys]
    assert [n for ids, *_ in used for n in sorted(ids)] == list(range(24))
    assert sorted(keys[:10]) == sorted(epoch_of_ten().keys)
    snapshots = sorted(path.stem for path in (tmp_path / "parts").glob("ema/*"))
    assert snapshots == ["0000000008", "0000000016", "0000000024"] * ("ema_power" in settings)


def test_data_that_cannot_be_read_stops_a_run_and_costs_no_step(whole, tmp_path):
    """At the first step there is nothing to save, later all steps are."""
    loader = TinyPictures()
    for unreadable_at, saved in ((1, 0), (14, 12), (27, 24), (45, 44)):
        loader.unreadable_at = unreadable_at
        with pytest.raises(UnreadableError, match=r"https://host/0\.tar: HTTP 503"):
            run(tmp_path / "run", loader=loader)
        path = newest(tmp_path / "run" / "checkpoints")
        assert int("0" if path is None else path.name) == saved
    run(tmp_path / "run")
    assert digests(tmp_path / "run") == digests(whole)
    assert metrics(tmp_path / "run") == metrics(whole)


@pytest.mark.parametrize("place", [0, 24])
def test_a_stop_does_not_wait_for_data_that_does_not_come(tmp_path, place):
    reached, release = threading.Event(), threading.Event()

    class Stuck(TinyPictures):
        def batch(self, ids: Sequence[int]) -> Batch:
            if ids[0] == place:
                reached.wait(30 if place else 0)
                os.kill(os.getpid(), signal.SIGTERM)
                release.wait(30)
            return super().batch(ids)

    def note(view: View) -> None:
        if view.images_seen == place:
            reached.set()

    with pytest.raises(Stopped) as stopped:
        run(tmp_path, loader=Stuck(), hooks=[(1, note)])
    release.set()
    assert stopped.value.code == 128 + signal.SIGTERM
    path = newest(tmp_path / "checkpoints")
    assert int("0" if path is None else path.name) == place


def train_and_wait(folder: str, place: int) -> None:
    """Train in a process of its own, which waits at its hooks after so many images."""

    def wait(view: View) -> None:
        if view.images_seen == place:
            Path(folder, ".waits").touch()
            time.sleep(60)

    run(Path(folder), hooks=[(1, wait)])


def test_one_process_has_a_run_and_kill_9_costs_it_an_interval_at_most(whole, tmp_path):
    process = start(train_and_wait, str(tmp_path / "run"), 28)  # the larger network's first step
    while not (tmp_path / "run" / ".waits").exists():
        time.sleep(0.05)
        assert process.process.is_alive(), process.end()
    with pytest.raises(RunInUse, match=rf"{tmp_path / 'run'} .*process {process.process.pid} on"):
        run(tmp_path / "run")
    process.send(signal.SIGKILL)
    assert process.end()[0] == -signal.SIGKILL
    assert there(newest(tmp_path / "run" / "checkpoints")).name == "0000000024"
    run(tmp_path / "run")
    assert digests(tmp_path / "run") == digests(whole)
    assert metrics(tmp_path / "run") == metrics(whole)


def get_two_signals() -> None:
    interrupts = Interrupts()
    with handled(interrupts.note):
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.received == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)


def test_a_second_signal_leaves_at_once():
    assert fork(get_two_signals) == 130


def test_signal_handlers_are_put_back_and_other_threads_are_left_alone():
    before, inside = signal.getsignal(signal.SIGTERM), []

    def look() -> None:
        with handled(Interrupts().note):
            inside.append(signal.getsignal(signal.SIGTERM))

    look()
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert inside[0] != before
    assert inside[1] == before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_finished_run_stays_as_it_is_and_without_its_checkpoints_it_is_refused(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    assert run(folder) == folder / "model"
    assert digests(folder) == digests(whole)
    assert metrics(folder) == metrics(whole)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(CheckpointError, match="checkpoints are gone: remove"):
        run(folder)


def test_a_run_that_begins_from_weights_is_not_begun_without_them(tmp_path):
    with pytest.raises(CheckpointError, match=r"first checkpoint is missing.*mdm grow"):
        run(tmp_path / "run", tiny_config(init="model"))


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after two steps."""
    folder = tmp_path_factory.mktemp("early") / "run"
    with pytest.raises(Stopped):
        run(folder, hooks=[stop_at(8)])
    return folder


Damage = Callable[[dict[str, torch.Tensor], str], Any]


@pytest.mark.parametrize(
    ("part", "damage", "message"),
    [
        ("weights", lambda tensors, name: tensors.pop(name), "missing"),
        ("ema", lambda tensors, name: tensors.update({f"{name}s": torch.zeros(1)}), "not in the"),
        ("optimizer", lambda tensors, name: tensors.update({name: torch.zeros(7, 7)}), r"\(7, 7\)"),
        ("optimizer", lambda tensors, name: tensors.clear(), r"step is missing"),
    ],
)
def test_a_part_of_a_checkpoint_that_does_not_fit_is_refused_whole(
    early, tmp_path, part: str, damage: Damage, message: str
):
    folder = shutil.copytree(early, tmp_path / "run")
    saved = checkpoint.read(there(newest(folder / "checkpoints")))
    changed = dict(getattr(saved, part))
    damage(changed, next(name for name in changed if "weight" in name))
    saved = replace(saved, **{part: changed}, state={**saved.state, "images_seen": 9})
    checkpoint.save(folder / "checkpoints", saved, keep=1)
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=f"{part} .*{message}"):
        run(folder)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_of_another_network_is_refused(early, tmp_path):
    folder = shutil.copytree(early, tmp_path / "run")
    config = override(load_config(folder / "config.yaml"), ["model.embedding=64"])
    (folder / "config.yaml").write_text(to_yaml(config))
    with pytest.raises(CheckpointError, match=r"0000000008: weights"):
        run(folder, config)


# --- the run folder ----------------------------------------------------------------------------


def test_a_run_folder_holds_its_config_and_says_where_it_ran(whole):
    assert load_config(whole / "config.yaml") == tiny_config()
    (begun,) = json.loads((whole / "environment.json").read_text("utf-8"))
    assert {"started", "python", "torch", "platform", "matryoshka-diffusion"} <= begun.keys()
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["0000000040", "0000000048"]
    lines = map(json.loads, (whole / "metrics.jsonl").read_text("utf-8").splitlines())
    assert all(line["peak_memory_bytes"] > 50e6 for line in lines), "an interpreter with torch"


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 1}, r"train\.seed is 0 there, 1 now"),
        ({"stages": (FIRST, SECOND.model_copy(update={"images": 4000}))}, r"\[1\]\.images is 24"),
        ({"stages": (FIRST,)}, r"train\.stages\[1\]\.levels is 2 there, absent now"),
    ],
)
def test_another_config_is_refused_with_the_keys_that_differ(whole, tmp_path, change, difference):
    shutil.copy(whole / "config.yaml", tmp_path)
    with pytest.raises(ConfigError, match=difference + ".*another --out"):
        open_run(tmp_path, tiny_config(**change), CPU)
    assert load_config(tmp_path / "config.yaml") == tiny_config()


def test_what_is_automatic_is_decided_once(tmp_path, monkeypatch):
    config = tiny_config(precision="auto", layout="auto")
    (tmp_path / "config.yaml").write_text(to_yaml(config))  # as growing a trained run leaves it
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    monkeypatch.setattr(precision, "speed_of_bf16", lambda: 1.6)
    monkeypatch.setattr(precision, "library", lambda dtype: None)  # no compiler
    resolved = open_run(tmp_path, config, CPU)
    assert (resolved.train.precision, resolved.train.layout) == ("bf16", "nchw")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # moved to another machine
    assert open_run(tmp_path, config, CPU) == load_config(tmp_path / "config.yaml") == resolved
    assert len(json.loads((tmp_path / "environment.json").read_text("utf-8"))) == 2


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 10_000, b"\xff"])
def test_a_file_that_only_informs_stops_no_run(content, tmp_path):
    path = tmp_path / "environment.json"
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=f"{path} is damaged"):
        open_run(tmp_path, tiny_config(), CPU)
    assert len(json.loads(path.read_bytes())) == 1


def test_a_folder_of_something_else_is_not_trained_in(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"no config\.yaml"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# --- inputs ------------------------------------------------------------------------------------


def inputs(step: Step, config: RunConfig | None = None) -> Inputs:
    return Feed(config or tiny_config(), TinyPictures(), encode)(step)[0]


def test_a_sample_is_given_the_same_in_any_batch():
    all_rows = inputs(Step(1, 24, (6, 3), (), False))
    parts = [inputs(Step(1, 24, (2, 2), (), False)), inputs(Step(1, 26, (4, 1), (), False))]
    for name in ("x", "noise"):
        for level, mine in enumerate(getattr(all_rows, name)):
            theirs = torch.cat([getattr(part, name)[level] for part in parts])
            assert torch.equal(mine, theirs)
    assert torch.equal(all_rows.t, torch.cat([part.t for part in parts]))
    dropped = torch.cat([there(part.cond.dropped) for part in parts])
    assert torch.equal(there(all_rows.cond.dropped), dropped)
    assert all_rows.ids == (24, 25, 26, 27, 28, 29)
    assert [tuple(level.shape) for level in all_rows.x] == [(6, 3, 8, 8), (3, 3, 16, 16)]
    assert all_rows.cond.micro["scale"].tolist() == [16.0 + n % 16 for n in all_rows.ids]
    assert inputs(Step(1, 24, (2, 0), (), False)).x[1].shape == (0, 3, 16, 16)


def ranked(step: Step, config: RunConfig, size: int) -> list[Inputs]:
    worlds = (World(rank, size) for rank in range(size))
    return [Feed(config, TinyPictures(), encode, world=world)(step)[0] for world in worlds]


@pytest.mark.parametrize("size", [1, 3])
def test_a_sample_has_the_levels_that_are_awake_at_its_time_and_is_else_the_same(size):
    """The finer level of the first 30 of 40 samples, where it is above the floor."""
    unmixed = (FIRST, SECOND.model_copy(update={"mix": ()}))
    step, config = Step(1, 24, (40, 30), (), False), tiny_config(wake=(-1.0,), stages=unmixed)
    plain = inputs(step)
    schedule = Process.from_config(config.process, config.model).schedules[1]
    wide_awake = (schedule.log_snr(plain.t.double()) >= -1.0).tolist()
    deep = {n for n, is_awake in zip(plain.ids[:30], wide_awake[:30], strict=True) if is_awake}
    parts = ranked(step, config, size)
    assert sorted(n for part in parts for n in part.ids) == list(range(24, 64))
    assert {n for part in parts for n in part.ids[: len(part.x[1])]} == deep
    assert 0 < len(deep) < 30
    for part in parts:
        assert part.step == step._replace(rows=(40, len(deep)))
        for row, n in enumerate(part.ids):
            before = plain.rows(slice(n - 24, n - 23))
            now = part.rows(slice(row, row + 1))
            assert (now.keys, now.t.item()) == (before.keys, before.t.item())
            assert torch.equal(now.cond.micro["scale"], before.cond.micro["scale"])
            assert torch.equal(there(now.cond.dropped), there(before.cond.dropped))
            for level in range(2 if n in deep else 1):
                assert torch.equal(now.x[level], before.x[level])
                assert torch.equal(now.noise[level], before.noise[level])


@pytest.mark.parametrize("size", [1, 3])
def test_a_sample_that_a_mix_gives_fine_levels_has_a_time_at_which_they_are_awake(size):
    """All of the first 30 of 40 samples, their times spread evenly up to that of the floor."""
    step, config = Step(1, 24, (40, 30), (), False), tiny_config(wake=(-1.0,))
    schedule = Process.from_config(config.process, config.model).schedules[1]
    wakes = wakes_at(schedule, -1.0)
    parts, plain = ranked(step, config, size), inputs(step)
    assert {n for part in parts for n in part.ids[: len(part.x[1])]} == set(range(24, 54))
    times = {n: t for part in parts for n, t in zip(part.ids, part.t.tolist(), strict=True)}
    for n, usual in zip(plain.ids, plain.t.tolist(), strict=True):
        assert times[n] == pytest.approx(usual * (wakes if n < 54 else 1.0), rel=1e-6)
    fine = torch.tensor([times[n] for n in range(24, 54)]).sort().values / wakes
    assert (fine - (torch.arange(30) + 0.5) / 30).abs().max() < 0.06
    assert (schedule.log_snr(fine.double() * wakes) >= -1.0 - 1e-6).all()


def test_noise_and_dropout_have_the_distributions_they_should():
    batch = inputs(Step(1, 0, (400, 400), (), False))
    for level in batch.noise:
        assert abs(level.mean().item()) < 0.02
        assert abs(level.std().item() - 1) < 0.02
    correlation = torch.corrcoef(torch.stack([x[:, 0, 0, 0] for x in batch.noise]))[0, 1]
    assert abs(correlation.item()) < 0.15, "levels have noise of their own"
    assert 0.22 < there(batch.cond.dropped).float().mean().item() < 0.38
    assert 0 < batch.t.min() < batch.t.max() <= 1
    assert abs(batch.t.mean().item() - 0.5) < 0.01


def test_without_a_learned_null_dropped_captions_are_empty_ones():
    changes = ["train.condition_dropout=1.0", "model.text.learned_null=false"]
    config = override(tiny_config(), changes)
    cond = inputs(Step(0, 0, (4,), (), False), config).cond
    assert cond.dropped is None
    assert there(cond.mask).sum(1).tolist() == [1, 1, 1, 1]  # the end of the caption


def labelled(classes: int, labels: list[int] | None) -> Feed:
    """A feed for a model of `classes` classes, from data with these labels."""

    class Labelled(TinyPictures):
        def batch(self, ids: Sequence[int]) -> Batch:
            values = None if labels is None else torch.tensor(labels)
            return replace(super().batch(ids), labels=values)

    changes = [f"model.classes={classes}", "model.text=null", "encoder=null"]
    return Feed(override(tiny_config(), changes), Labelled())


def test_conditions_are_passed_on_or_refused_where_the_data_has_none():
    step = Step(0, 0, (3,), (), False)
    assert there(labelled(3, [0, 2, 1])(step)[0].cond.labels).tolist() == [0, 2, 1]
    assert labelled(0, [0, 2, 1])(step)[0].cond.labels is None
    for labels, number in (([0, 2, 1], "at least 3"), (None, "none")):
        with pytest.raises(ValueError, match=f"model.classes is 2.*{number}"):
            labelled(2, labels)(step)
    config = tiny_config()
    with pytest.raises(ValueError, match="no text encoder"):
        Feed(config, TinyPictures())
    crop = override(config, ["model.levels[0].micro=[{name: crop}]"])
    with pytest.raises(ValueError, match="no 'crop'"):
        Feed(crop, TinyPictures(), encode)


# --- learning ----------------------------------------------------------------------------------


class Broken(TinyPictures):
    """Pictures of which some are NaN."""

    def __init__(self, *bad: int) -> None:
        self.bad = bad

    def batch(self, ids: Sequence[int]) -> Batch:
        batch = super().batch(ids)
        for row, n in enumerate(batch.ids.tolist()):
            if n in self.bad:
                batch.picture[row] = float("nan")
        return batch


def test_skipped_steps_are_counted_logged_and_survive_resuming(tmp_path):
    config = tiny_config(stages=(FIRST,))
    with (
        pytest.warns(UserWarning, match=r"skipped at 8 images.*samples 9 \(picture-9\)"),
        pytest.raises(Stopped),
    ):
        run(tmp_path, config, loader=Broken(9), hooks=[stop_at(16)])
    run(tmp_path, config)
    lines = metrics(tmp_path)
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1, 1]
    assert [line["step"] for line in lines] == [1, 2, 2, 3, 4, 5]
    assert lines[2]["skipped_ids"] == [9]
    assert lines[2]["loss"] is None


def test_too_many_steps_that_are_not_finite_stop_the_run(tmp_path):
    stages = (StageConfig(levels=1, images=80, batch_size=2, lr=0.1),)
    config = tiny_config(stages=stages)
    message = r"20 steps in a row, up to 48 .*train\.stages\[0\]\.lr.*not-finite\.json"
    with pytest.warns(UserWarning, match="step skipped"), pytest.raises(NotFinite, match=message):
        run(tmp_path, config, loader=Broken(*range(8, 80, 2)))
    last = there(newest(tmp_path / "checkpoints"))
    weights = load_file(last / "weights.safetensors").values()
    assert all(bool(value.isfinite().all()) for value in weights)
    dump = json.loads((tmp_path / "not-finite.json").read_text("utf-8"))
    assert "samples 46 (picture-14)" in dump["error"]
    assert (dump["images_seen"], dump["stage"]) == (48, 0)
    assert dump["lr_per_level"] == [*step_at(config.train, 46).lr]
    assert dump["loss"] == dump["grad_norm"] == dump["loss_per_level"][0] == "nan"
    broken, good = dump["samples"]
    assert broken == {"number": 46, "key": "picture-14", "loss": "nan"}
    assert (good["number"], good["key"]) == (47, "picture-15")
    assert good["loss"] > 0.0


# --- hooks and lines ---------------------------------------------------------------------------


def test_a_hook_sees_the_run_and_cannot_change_its_numbers_even_if_it_fails(whole, tmp_path):
    calls = []

    def hook(view: View) -> None:
        torch.manual_seed(len(calls))
        np.random.seed(len(calls))  # noqa: NPY002
        averaged = view.averaged()
        levels = averaged.config.levels
        z = tuple(torch.randn(1, 3, level.side, level.side) for level in levels)
        cond = Conditioning(tokens=torch.randn(1, 2, 8), micro={"scale": torch.ones(1)})
        averaged(z, torch.rand(1), cond)
        averaged.get_parameter("levels.0.stem.weight").detach().zero_()
        calls.append((view.images_seen, len(levels)))
        assert (view.folder, view.config.name) == (tmp_path / "run", "tiny")
        if view.images_seen == 20:
            raise KeyError("a bug in a preview")

    hooks = [(10, hook), (0, pytest.fail)]
    with pytest.raises(KeyError, match="a bug in a preview"):
        run(tmp_path / "run", hooks=hooks)
    assert there(newest(tmp_path / "run" / "checkpoints")).name == "0000000020"
    run(tmp_path / "run", hooks=hooks)  # goes on behind the place
    assert digests(tmp_path / "run") == digests(whole)
    assert metrics(tmp_path / "run") == metrics(whole)
    assert calls == [(12, 1), (20, 1), (32, 2), (40, 2), (48, 2)]


def test_lines_of_metrics_close_at_intervals_growths_and_checkpoints(tmp_path):
    config = tiny_config(log_every_images=15, checkpoint_every_images=30, lr_per_level=True)
    run(tmp_path, config)
    assert [line["images_seen"] for line in metrics(tmp_path)] == [16, 24, 32, 48]
    rates = [step_at(config.train, n - 4).lr for n in (16, 24, 32, 48)]  # of their last steps
    assert [tuple(line["lr_per_level"]) for line in metrics(tmp_path)] == rates
