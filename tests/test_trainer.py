"""The loop of a run: resuming, signals, its folder, the inputs of its steps, hooks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tiny_run
from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import ConfigError, MicroConfig, RunConfig, StageConfig
from matryoshka_diffusion.configfile import load_config, to_yaml
from matryoshka_diffusion.data.loader import Batch
from matryoshka_diffusion.train.checkpoint import CheckpointError, newest
from matryoshka_diffusion.train.inputs import Feed, Inputs
from matryoshka_diffusion.train.run_folder import open_run
from matryoshka_diffusion.train.signals import Interrupts, Stopped, handled
from matryoshka_diffusion.train.stages import Step, step_at
from matryoshka_diffusion.train.step import NotFinite
from matryoshka_diffusion.train.trainer import View
from tiny_run import TinyPictures, digests, encode, metrics, run, stop_at, there, tiny_config

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder)
    return folder


# --- resuming ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images_seen", "number"),
    # In the middle of a stage, at the growth, after it.
    [(4, signal.SIGTERM), (24, signal.SIGINT), (36, signal.SIGUSR1)],
)
def test_a_stopped_run_continues_bit_for_bit(whole, tmp_path, images_seen, number):
    with pytest.raises(Stopped, match=f"{images_seen} of 48.*same command") as stopped:
        run(tmp_path / "run", hooks=[stop_at(images_seen, number)])
    assert stopped.value.code == 128 + number
    run(tmp_path / "run")
    assert digests(tmp_path / "run") == digests(whole)
    assert metrics(tmp_path / "run") == metrics(whole)


def test_every_option_of_training_resumes_bit_for_bit(whole, tmp_path):
    """Channels last, recomputation, tracks of averages, a frozen nest and a ramp at once."""
    first, second = tiny_config().train.stages
    gentle = second.model_copy(update={"freeze_coarse_images": 8, "ramp_images": 16})
    tracks = {"ema_power": (0.05, 0.1), "ema_snapshot_every_images": 16}
    memory = {"layout": "channels_last", "recompute": (1,)}
    config = tiny_config(stages=(first, gentle), **tracks, **memory)
    run(tmp_path / "whole", config)
    for images_seen in (28, 36):  # while frozen, and while only the ramp goes on
        with pytest.raises(Stopped):
            run(tmp_path / "run", config, hooks=[stop_at(images_seen)])
    run(tmp_path / "run", config)
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")
    snapshots = sorted(path.stem for path in (tmp_path / "run" / "ema").iterdir())
    assert snapshots == ["0000000016", "0000000032", "0000000048"]
    assert digests(tmp_path / "run").keys() - digests(whole).keys() == {
        "tracks.safetensors",
        *(f"{name}.safetensors" for name in snapshots),
    }


def test_tracks_change_nothing_else(whole, tmp_path):
    run(tmp_path, tiny_config(ema_power=(0.1,)))
    plain, tracked = digests(whole), digests(tmp_path)
    for name in ("weights", "ema", "optimizer"):
        assert tracked[f"{name}.safetensors"] == plain[f"{name}.safetensors"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signalled_process_loses_nothing(whole, tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, tiny_run.__file__, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    stdin, stdout = there(process.stdin), there(process.stdout)
    for go_on in [True] * 6 + [False]:  # the seventh step is the first of the larger network
        assert stdout.readline() == "waiting\n"
        if go_on:
            stdin.write("\n")
            stdin.flush()
    process.send_signal(number)
    _, errors = process.communicate("\n", timeout=60)
    if number == signal.SIGKILL:
        assert there(newest(tmp_path / "run" / "checkpoints")).name == "0000000024"
    else:
        assert process.returncode == 128 + number
        assert "stopped at 28 of 48 images and saved" in errors
    run(tmp_path / "run")
    assert digests(tmp_path / "run") == digests(whole)
    assert metrics(tmp_path / "run") == metrics(whole)


def test_a_second_signal_leaves_at_once():
    code = (
        "import os, signal, time\n"
        "from matryoshka_diffusion.train.signals import Interrupts, handled\n"
        "interrupts = Interrupts()\n"
        "with handled(interrupts.note):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert interrupts.received == signal.SIGTERM\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=False)
    assert done.returncode == 130


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


def test_a_finished_run_stays_as_it_is_and_without_its_checkpoints_it_is_refused(tmp_path):
    run(tmp_path / "run")
    before, lines = digests(tmp_path / "run"), metrics(tmp_path / "run")
    assert run(tmp_path / "run") == tmp_path / "run" / "model"
    assert digests(tmp_path / "run") == before
    assert metrics(tmp_path / "run") == lines
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(CheckpointError, match="checkpoints are gone: remove"):
        run(tmp_path / "run")


def test_a_run_that_begins_from_weights_is_not_begun_without_them(tmp_path):
    with pytest.raises(CheckpointError, match=r"first checkpoint is missing.*mdm grow"):
        run(tmp_path / "run", tiny_config(init="model"))


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(Stopped):
        run(tmp_path / "run", hooks=[stop_at(8)])
    path = tmp_path / "run" / "config.yaml"  # someone edits it by hand
    config = load_config(path)
    model = config.model.model_copy(update={"embedding": 64})
    config = config.model_copy(update={"model": model})
    path.write_text(to_yaml(config))
    with pytest.raises(CheckpointError, match=r"0000000008: weights does not fit"):
        run(tmp_path / "run", config)


# --- the run folder ----------------------------------------------------------------------------


def test_a_run_folder_tells_what_was_asked_and_where_it_ran(whole):
    assert load_config(whole / "config.yaml") == tiny_config()
    (start,) = json.loads((whole / "environment.json").read_text("utf-8"))
    assert {"started", "python", "torch", "platform", "matryoshka-diffusion"} <= start.keys()
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["0000000040", "0000000048"]
    lines = map(json.loads, (whole / "metrics.jsonl").read_text("utf-8").splitlines())
    assert all(line["peak_memory_bytes"] > 50e6 for line in lines), "an interpreter with torch"


def test_another_config_is_refused_with_the_keys_that_differ(tmp_path):
    open_run(tmp_path / "run", tiny_config(), CPU)
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    stages = tiny_config().train.stages
    longer = (stages[0], stages[1].model_copy(update={"images": 4000}))
    for change, difference in [
        ({"seed": 1}, r"train\.seed is 0 there, 1 now"),
        ({"stages": longer}, r"train\.stages\[1\]\.images is 24 there, 4000 now"),
        ({"stages": stages[:1]}, r"train\.stages\[1\]\.levels is 2 there, absent now"),
        ({"precision": "bf16"}, r"train\.precision is fp32 there, bf16 now"),
    ]:
        with pytest.raises(ConfigError, match=difference + ".*another --out"):
            open_run(tmp_path / "run", tiny_config(**change), CPU)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_what_is_automatic_is_decided_once(tmp_path, monkeypatch):
    config = tiny_config(precision="auto", layout="auto")
    (tmp_path / "config.yaml").write_text(to_yaml(config))  # as growing a trained run leaves it
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    resolved = open_run(tmp_path, config, CPU)
    assert (resolved.train.precision, resolved.train.layout) == ("bf16", "nchw")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # moved to another machine
    assert open_run(tmp_path, config, CPU) == load_config(tmp_path / "config.yaml") == resolved
    assert len(json.loads((tmp_path / "environment.json").read_text("utf-8"))) == 2


def test_a_folder_of_something_else_is_not_trained_in(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"holds files but no run.*another --out"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# --- inputs ------------------------------------------------------------------------------------


def inputs(step: Step, config: RunConfig | None = None) -> Inputs:
    return Feed(config or tiny_config(), TinyPictures(), encode)(step)


def test_a_sample_is_given_the_same_in_any_batch():
    whole = inputs(Step(1, 24, (6, 3), 0.1, False))
    parts = [inputs(Step(1, 24, (2, 2), 0.1, False)), inputs(Step(1, 26, (4, 1), 0.1, False))]
    for name in ("x", "noise"):
        for level, mine in enumerate(getattr(whole, name)):
            theirs = torch.cat([getattr(part, name)[level] for part in parts])
            assert torch.equal(mine, theirs)
    assert torch.equal(whole.t, torch.cat([part.t for part in parts]))
    dropped = torch.cat([there(part.cond.dropped) for part in parts])
    assert torch.equal(there(whole.cond.dropped), dropped)
    assert whole.ids == (24, 25, 26, 27, 28, 29)
    assert [tuple(level.shape) for level in whole.x] == [(6, 3, 8, 8), (3, 3, 16, 16)]
    assert whole.cond.micro["scale"].tolist() == [16.0 + n % 16 for n in whole.ids]
    assert inputs(Step(1, 24, (2, 0), 0.1, False)).x[1].shape == (0, 3, 16, 16)


def test_micro_batches_share_the_fine_rows():
    given = inputs(Step(1, 24, (6, 3), 0.1, False))
    parts = [given.rows(slice(offset, None, 2)) for offset in range(2)]
    assert [part.ids for part in parts] == [(24, 26, 28), (25, 27, 29)]
    assert [len(part.x[1]) for part in parts] == [2, 1]
    assert torch.equal(parts[0].x[1], given.x[1][::2])
    assert torch.equal(there(parts[1].cond.tokens), there(given.cond.tokens)[1::2])


def test_noise_and_dropout_have_the_distributions_they_should():
    given = inputs(Step(1, 0, (400, 400), 0.1, False))
    for level in given.noise:
        assert abs(level.mean().item()) < 0.02
        assert abs(level.std().item() - 1) < 0.02
    correlation = torch.corrcoef(torch.stack([x[:, 0, 0, 0] for x in given.noise]))[0, 1]
    assert abs(correlation.item()) < 0.15, "levels have noise of their own"
    assert 0.22 < there(given.cond.dropped).float().mean().item() < 0.38
    assert given.t.min() > 0
    assert given.t.max() <= 1
    assert abs(given.t.mean().item() - 0.5) < 0.01


def test_without_a_learned_null_dropped_captions_are_empty_ones():
    config = tiny_config(condition_dropout=1.0)
    text = there(config.model.text).model_copy(update={"learned_null": False})
    config = config.model_copy(update={"model": config.model.model_copy(update={"text": text})})
    given = inputs(Step(0, 0, (4,), 0.1, False), config)
    assert given.cond.dropped is None
    assert there(given.cond.mask).sum(1).tolist() == [1, 1, 1, 1]  # the end of the caption


def labelled(classes: int, labels: list[int] | None) -> Feed:
    """A feed for a model of `classes` classes, from data with these labels."""

    class Labelled(TinyPictures):
        def batch(self, ids: range) -> Batch:
            values = None if labels is None else torch.tensor(labels)
            return replace(super().batch(ids), labels=values)

    config = tiny_config()
    model = config.model.model_copy(update={"text": None, "classes": classes})
    return Feed(config.model_copy(update={"model": model, "encoder": None}), Labelled())


def test_conditions_are_passed_on_or_refused_where_the_data_has_none():
    step = Step(0, 0, (3,), 0.1, False)
    assert there(labelled(3, [0, 2, 1])(step).cond.labels).tolist() == [0, 2, 1]
    assert labelled(0, [0, 2, 1])(step).cond.labels is None
    for labels, number in (([0, 2, 1], "at least 3"), (None, "none")):
        with pytest.raises(ValueError, match=f"model.classes is 2.*{number}"):
            labelled(2, labels)(step)
    config = tiny_config()
    with pytest.raises(ValueError, match="no text encoder"):
        Feed(config, TinyPictures())
    level = config.model.levels[0].model_copy(update={"micro": (MicroConfig(name="crop"),)})
    model = config.model.model_copy(update={"levels": (level, config.model.levels[1])})
    with pytest.raises(ValueError, match="the data has no 'crop'"):
        Feed(config.model_copy(update={"model": model}), TinyPictures(), encode)


# --- learning ----------------------------------------------------------------------------------


class Broken(TinyPictures):
    """Pictures of which some are NaN."""

    def __init__(self, *bad: int) -> None:
        self.bad = bad

    def batch(self, ids: range) -> Batch:
        batch = super().batch(ids)
        for row, n in enumerate(batch.ids.tolist()):
            if n in self.bad:
                batch.picture[row] = float("nan")
        return batch


def test_skipped_steps_are_counted_logged_and_survive_resuming(tmp_path):
    with (
        pytest.warns(UserWarning, match=r"skipped at 8 images.*samples 9 \(picture-9\)"),
        pytest.raises(Stopped),
    ):
        run(tmp_path, loader=Broken(9), hooks=[stop_at(20)])
    run(tmp_path)
    lines = metrics(tmp_path)
    assert [line["skipped"] for line in lines] == [0, 0] + [1] * 10
    assert lines[2]["skipped_ids"] == [9]
    assert lines[2]["loss"] is None
    assert [line["step"] for line in lines] == [1, 2, *range(2, 12)]


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
    assert (dump["images_seen"], dump["stage"], dump["lr"]) == (48, 0, step_at(config.train, 46).lr)
    assert dump["loss"] == dump["grad_norm"] == dump["loss_per_level"][0] == "nan"
    broken, good = dump["samples"]
    assert broken == {"number": 46, "key": "picture-14", "loss": "nan"}
    assert (good["number"], good["key"]) == (47, "picture-15")
    assert good["loss"] > 0.0


def test_it_learns(tmp_path):
    stages = (StageConfig(levels=2, images=320, batch_size=16, lr=5e-3),)
    run(tmp_path, tiny_config(stages=stages, dropout=0.0, condition_dropout=0.0))
    lines = metrics(tmp_path)
    for level in range(2):
        losses = [line["loss_per_level"][level] for line in lines]
        assert np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])


# --- hooks and lines ---------------------------------------------------------------------------


def test_a_hook_sees_the_run_and_cannot_change_its_numbers(whole, tmp_path):
    seen = []

    def hook(view: View) -> None:
        torch.manual_seed(len(seen))
        np.random.seed(len(seen))  # noqa: NPY002
        averaged = view.averaged()
        levels = averaged.config.levels
        z = tuple(torch.randn(1, 3, level.side, level.side) for level in levels)
        cond = Conditioning(tokens=torch.randn(1, 2, 8), micro={"scale": torch.ones(1)})
        averaged(z, torch.rand(1), cond)
        averaged.get_parameter("levels.0.stem.weight").zero_()
        seen.append((view.images_seen, len(levels)))
        assert (view.folder, view.config.name) == (tmp_path / "run", "tiny")

    run(tmp_path / "run", hooks=[(10, hook), (0, pytest.fail)])
    assert digests(tmp_path / "run") == digests(whole)
    assert metrics(tmp_path / "run") == metrics(whole)
    assert seen == [(12, 1), (20, 1), (32, 2), (40, 2), (48, 2)]


def test_a_failing_hook_is_not_hidden_and_loses_nothing(whole, tmp_path):
    def fail(view: View) -> None:
        if view.images_seen == 28:
            raise KeyError("a bug in a preview")

    with pytest.raises(KeyError, match="a bug in a preview"):
        run(tmp_path / "run", hooks=[(4, fail)])
    assert there(newest(tmp_path / "run" / "checkpoints")).name == "0000000028"
    run(tmp_path / "run", hooks=[(4, fail)])  # goes on behind the place
    assert digests(tmp_path / "run") == digests(whole)


def test_lines_of_metrics_close_at_intervals_growths_and_checkpoints(tmp_path):
    run(tmp_path, tiny_config(log_every_images=15, checkpoint_every_images=30))
    assert [line["images_seen"] for line in metrics(tmp_path)] == [16, 24, 32, 48]
