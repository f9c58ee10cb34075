from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tiny_run
from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import ConfigError, MicroConfig, RunConfig, StageConfig
from matryoshka_diffusion.configfile import load_config, to_yaml
from matryoshka_diffusion.data.loader import Batch
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.train.checkpoint import CheckpointError, newest
from matryoshka_diffusion.train.inputs import Feed, Inputs
from matryoshka_diffusion.train.log import Display, Entry, Metrics, summary
from matryoshka_diffusion.train.run_folder import open_run
from matryoshka_diffusion.train.signals import Interrupts, Stopped, handled
from matryoshka_diffusion.train.stages import Step, step_at, steps
from matryoshka_diffusion.train.step import NotFinite, Sample, Skipped, Stepped, diffusion
from matryoshka_diffusion.train.trainer import Trainer, View, train
from tiny_run import TinyPictures, encode, tiny_config

CPU = torch.device("cpu")
T = TypeVar("T")
OF_THE_MACHINE = {"images_per_second", "data_wait", "seconds", "peak_memory_bytes"}
ROOT = Path(__file__).parent.parent


def run(folder: Path, config: RunConfig | None = None, **options: Any) -> Path:
    options = {"loader": TinyPictures(), "encode": encode} | options
    return train(config or tiny_config(), folder=folder, **options)


def there(value: T | None) -> T:
    """A value that a test knows to be there."""
    assert value is not None
    return value


def digests(folder: Path) -> dict[str, str]:
    """What a run has learnt: hashes of weights, average and optimizer, and of what is exported."""
    last = there(newest(folder / "checkpoints"))
    paths = [*last.glob("*.safetensors"), *folder.glob("model/*")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics, without what depends on the machine."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    return [{key: line[key] for key in line.keys() - OF_THE_MACHINE} for line in lines]


def stop_at(images_seen: int):
    """A hook that sends this process a SIGTERM, as a cluster would."""

    def hook(view: View) -> None:
        if view.images_seen == images_seen:
            os.kill(os.getpid(), signal.SIGTERM)

    return (1, hook)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder)
    return folder


# --- resuming ----------------------------------------------------------------------------------


@pytest.mark.parametrize("images_seen", [4, 16, 24, 36])  # mid-stage, at the growth, after it
def test_a_stopped_run_continues_bit_for_bit(whole, tmp_path, images_seen):
    with pytest.raises(Stopped, match=f"stopped at {images_seen} of 48") as stopped:
        run(tmp_path / "run", hooks=[stop_at(images_seen)])
    assert stopped.value.code == 128 + signal.SIGTERM
    run(tmp_path / "run")
    assert digests(tmp_path / "run") == digests(whole)
    assert metrics(tmp_path / "run") == metrics(whole)


@pytest.mark.parametrize("other", [{"precision": "bf16"}, {"layout": "channels_last"}])
def test_a_run_resumes_bit_for_bit_in_bf16_and_channels_last(tmp_path, other):
    config = tiny_config(**other)
    run(tmp_path / "whole", config)
    with pytest.raises(Stopped):
        run(tmp_path / "run", config, hooks=[stop_at(28)])
    run(tmp_path / "run", config)
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")


@pytest.mark.parametrize("images_seen", [8, 28])
def test_tracks_resume_bit_for_bit_and_change_nothing_else(whole, tmp_path, images_seen):
    config = tiny_config(ema_power=(0.05, 0.1), ema_snapshot_every_images=16)
    run(tmp_path / "whole", config)
    with pytest.raises(Stopped):
        run(tmp_path / "run", config, hooks=[stop_at(images_seen)])
    run(tmp_path / "run", config)
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")
    plain, tracked = digests(whole), digests(tmp_path / "whole")
    assert tracked.keys() - plain.keys() == {"tracks.safetensors"}
    assert plain["ema.safetensors"] == tracked["ema.safetensors"]
    snapshots = [sorted((tmp_path / name / "ema").iterdir()) for name in ("run", "whole")]
    assert [path.name[:-12] for path in snapshots[0]] == ["0000000016", "0000000032", "0000000048"]
    for mine, theirs in zip(*snapshots, strict=True):
        assert mine.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL])
def test_a_signalled_process_loses_nothing(whole, tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, tiny_run.__file__, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert process.stdin
    assert process.stdout
    for go_on in [True] * 6 + [False]:  # the seventh step is the first of the larger network
        assert process.stdout.readline() == "waiting\n"
        if go_on:
            process.stdin.write("\n")
            process.stdin.flush()
    process.send_signal(number)
    _, errors = process.communicate("\n", timeout=60)
    if number == signal.SIGKILL:
        assert there(newest(tmp_path / "run" / "checkpoints")).name == "0000000024"
    else:
        assert process.returncode == 128 + number
        assert "stopped at 28 of 48 images and saved" in errors
        assert "the same command continues" in errors
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
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=30, check=False)
    assert done.returncode == 130


def test_signal_handlers_are_put_back_and_other_threads_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    with handled(Interrupts().note):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    seen = []

    def elsewhere() -> None:
        with handled(Interrupts().note):
            seen.append(0)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [0]


def test_a_finished_run_is_left_as_it_is(tmp_path):
    run(tmp_path / "run")
    before, lines = digests(tmp_path / "run"), metrics(tmp_path / "run")
    assert run(tmp_path / "run") == tmp_path / "run" / "model"
    assert digests(tmp_path / "run") == before
    assert metrics(tmp_path / "run") == lines


def test_a_run_whose_checkpoints_are_gone_is_not_started_over(tmp_path):
    run(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(CheckpointError, match=r"its checkpoints are gone: remove it to start over"):
        run(tmp_path / "run")


def test_a_run_that_begins_from_weights_is_not_begun_without_them(tmp_path):
    config = tiny_config(init="model")
    with pytest.raises(CheckpointError, match=r"begins from trained weights.*mdm grow"):
        run(tmp_path / "run", config)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(Stopped):
        run(tmp_path / "run", hooks=[stop_at(8)])
    path = tmp_path / "run" / "config.yaml"  # someone edits it by hand
    config = load_config(path)
    model = config.model.model_copy(update={"embedding": 64})
    config = config.model_copy(update={"model": model})
    path.write_text(to_yaml(config))
    with pytest.raises(CheckpointError, match=r"0000000008: weights does not fit the network"):
        run(tmp_path / "run", config)


# --- the run folder ----------------------------------------------------------------------------


def test_a_run_folder_tells_what_was_asked_and_where_it_ran(whole):
    assert load_config(whole / "config.yaml") == tiny_config()
    (start,) = json.loads((whole / "environment.json").read_text("utf-8"))
    assert {"started", "python", "torch", "platform", "matryoshka-diffusion"} <= start.keys()
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["0000000040", "0000000048"]


def test_another_config_is_refused_with_the_keys_that_differ(tmp_path):
    open_run(tmp_path / "run", tiny_config(), CPU)
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    stages = tiny_config().train.stages
    longer = (stages[0], stages[1].model_copy(update={"images": 4000}))
    for change, told in [
        ({"seed": 1}, r"train\.seed is 0 there, 1 now"),
        ({"stages": longer}, r"train\.stages\[1\]\.images is 24 there, 4000 now"),
        ({"stages": stages[:1]}, r"train\.stages\[1\]\.levels is 2 there, absent now"),
        ({"precision": "bf16"}, r"train\.precision is fp32 there, bf16 now"),
    ]:
        with pytest.raises(ConfigError, match=told + ".*(another --out, or drop)"):
            open_run(tmp_path / "run", tiny_config(**change), CPU)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_automatic_precision_is_decided_once(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert open_run(tmp_path, tiny_config(precision="auto"), CPU).train.precision == "bf16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # moved to another machine
    assert open_run(tmp_path, tiny_config(precision="auto"), CPU).train.precision == "bf16"
    assert len(json.loads((tmp_path / "environment.json").read_text("utf-8"))) == 2


def test_a_prepared_run_is_resolved_at_its_first_start(tmp_path):
    config = tiny_config(precision="auto")
    (tmp_path / "config.yaml").write_text(to_yaml(config))  # as growing a trained run leaves it
    resolved = open_run(tmp_path, config, CPU)
    assert resolved.train.precision in ("bf16", "fp32")
    assert load_config(tmp_path / "config.yaml") == resolved


def test_a_folder_of_something_else_is_not_trained_in(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="holds files but no run"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_metrics_beyond_the_checkpoint_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = Metrics(path, 0)
    for images_seen in (4, 8, 12):
        log.write({"images_seen": images_seen})
    with open(path, "a") as file:
        file.write('{"images_se')  # killed while writing
    Metrics(path, 8).write({"images_seen": 9})
    assert path.read_text() == '{"images_seen": 4}\n{"images_seen": 8}\n{"images_seen": 9}\n'


# --- what a step is given ----------------------------------------------------------------------


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


def test_a_step_without_fine_rows_is_given_an_empty_level():
    given = inputs(Step(1, 24, (2, 0), 0.1, False))
    assert given.x[1].shape == given.noise[1].shape == (0, 3, 16, 16)


def test_micro_batches_share_the_fine_rows():
    given = inputs(Step(1, 24, (6, 3), 0.1, False))
    parts = [given.rows(slice(offset, None, 2)) for offset in range(2)]
    assert [part.ids for part in parts] == [(24, 26, 28), (25, 27, 29)]
    assert [len(part.x[1]) for part in parts] == [2, 1]
    assert torch.equal(parts[0].x[1], given.x[1][::2])
    assert torch.equal(there(parts[1].cond.tokens), there(given.cond.tokens)[1::2])


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
            batch = super().batch(ids)
            values = None if labels is None else torch.tensor(labels)
            return replace(batch, labels=values)

    config = tiny_config()
    model = config.model.model_copy(update={"text": None, "classes": classes})
    return Feed(config.model_copy(update={"model": model, "encoder": None}), Labelled())


def test_labels_are_passed_on_and_checked():
    step = Step(0, 0, (3,), 0.1, False)
    assert there(labelled(3, [0, 2, 1])(step).cond.labels).tolist() == [0, 2, 1]
    assert labelled(0, [0, 2, 1])(step).cond.labels is None
    with pytest.raises(ValueError, match="classes is 2, but the data has at least 3"):
        labelled(2, [0, 2, 1])(step)
    with pytest.raises(ValueError, match="classes is 2, but the data has none"):
        labelled(2, None)(step)


def test_conditions_that_cannot_be_had_are_an_error_at_the_start():
    config = tiny_config()
    with pytest.raises(ValueError, match="no text encoder"):
        Feed(config, TinyPictures())
    level = config.model.levels[0].model_copy(update={"micro": (MicroConfig(name="crop"),)})
    model = config.model.model_copy(update={"levels": (level, config.model.levels[1])})
    with pytest.raises(ValueError, match="the data has no 'crop'"):
        Feed(config.model_copy(update={"model": model}), TinyPictures(), encode)


# --- the step ----------------------------------------------------------------------------------


def learner_after(images_seen: int, config: RunConfig | None = None) -> Trainer:
    """A trainer that was trained on the first images of a run."""
    config = config or tiny_config()
    trainer, feed = Trainer(diffusion(config), CPU), Feed(config, TinyPictures(), encode)
    for step in steps(config.train):
        if step.first >= images_seen:
            break
        trainer.grow(len(step.rows))
        trainer.step(feed(step))
    return trainer


def state(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of everything that a step may change."""
    snapshot = trainer.snapshot()
    return {
        f"{part}.{name}": value.clone()
        for part in ("weights", "ema", "optimizer", "tracks")
        for name, value in getattr(snapshot, part).items()
    }


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("accumulate", [2, 3, 4, 5])
def test_accumulated_gradients_equal_those_of_the_whole_batch(accumulate):
    stages = (StageConfig(levels=2, images=20, batch_size=5, lr=0.1, mix=(0.4, 0.6)),)
    gradients, outcomes = [], []
    for count in (1, accumulate):
        config = tiny_config(dropout=0.0, stages=stages, accumulate=count, clip_norm=1e9)
        trainer = Trainer(diffusion(config), CPU)
        outcomes.append(
            trainer.step(Feed(config, TinyPictures(), encode)(step_at(config.train, 0)))
        )
        gradients.append({n: there(p.grad).clone() for n, p in trainer.net.named_parameters()})
    for name, whole in gradients[0].items():
        scale = whole.abs().max().item()
        torch.testing.assert_close(gradients[1][name], whole, rtol=1e-5, atol=2e-6 * scale + 1e-9)
    torch.testing.assert_close(outcomes[1].per_level, outcomes[0].per_level, rtol=1e-6, atol=0)
    assert outcomes[1].loss == pytest.approx(outcomes[0].loss, rel=1e-6)
    assert outcomes[1].grad_norm == pytest.approx(outcomes[0].grad_norm, rel=1e-5)


def test_gradients_are_clipped_to_the_norm_and_the_norm_before_is_told():
    config = tiny_config(clip_norm=1e-3)
    trainer = Trainer(diffusion(config), CPU)
    outcome = trainer.step(inputs(step_at(config.train, 0)))
    norms = [there(p.grad).norm() for p in trainer.net.parameters()]
    assert torch.stack(norms).norm().item() == pytest.approx(1e-3, rel=1e-3)
    assert outcome.grad_norm > 0.1


def test_growing_in_training_keeps_coarse_outputs_bit_equal():
    trainer = learner_after(24)
    given = inputs(Step(1, 24, (4, 4), 0.1, False))

    def coarse(net: NestedUNet) -> Tensor:
        with torch.no_grad():
            return net(given.x[: len(net.levels)], given.t, given.cond)[0]

    networks = [trainer.net.eval(), trainer.network(trainer.averaged())]
    before = state(trainer)
    expected = [coarse(net) for net in networks]
    trainer.grow(2)
    networks = [trainer.net.eval(), trainer.network(trainer.averaged())]
    for mine, theirs in zip(map(coarse, networks), expected, strict=True):
        assert torch.equal(mine, theirs)
    after = state(trainer)
    assert_same({name: after[name] for name in before}, before)
    new = {name.split(".", 1)[1] for name in after.keys() - before.keys()}
    assert new
    assert all(name.startswith("levels.1.") for name in new)
    for name in new:
        assert torch.equal(after[f"ema.{name}"], after[f"weights.{name}"])


def test_the_averaged_network_is_a_frozen_copy_in_eval_mode():
    trainer = learner_after(8)
    before = state(trainer)
    averaged = trainer.network(trainer.averaged())
    assert not any(module.training for module in averaged.modules())
    assert not any(value.requires_grad for value in averaged.parameters())
    for name, value in averaged.named_parameters():
        assert torch.equal(value, before[f"ema.{name}"])
        value.zero_()
    assert_same(state(trainer), before)


def test_dropout_inside_the_network_depends_on_the_step_and_not_on_torchs_generator():
    first, second = learner_after(8), learner_after(8)
    given = inputs(step_at(tiny_config().train, 8))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = first.step(given)
    assert torch.equal(torch.get_rng_state(), before), "nor does training touch it"
    torch.manual_seed(2)
    assert second.step(given) == one
    assert_same(state(first), state(second))
    no_dropout = learner_after(8, tiny_config(dropout=0.0)).step(given)
    assert no_dropout.loss != one.loss


def test_the_average_of_a_new_level_warms_up_from_its_own_first_step():
    config = tiny_config(ema_decay=0.9999)
    trainer, started = learner_after(24, config), NestedUNet(config.model, config.train.seed)
    trainer.grow(2)
    feed = Feed(config, TinyPictures(), encode)
    trainer.step(feed(next(steps(config.train, 24))))
    initial, live = dict(started.named_parameters()), dict(trainer.net.named_parameters())
    for name, average in trainer.ema.weights.items():
        if name.startswith("levels.1."):  # (1 + 0) / (10 + 0) of what it was
            torch.testing.assert_close(average, 0.1 * initial[name] + 0.9 * live[name])


def test_tracks_of_a_new_level_begin_with_it():
    trainer = learner_after(28, tiny_config(ema_power=(0.05, 0.1)))
    ages = {
        name.split(".")[1]: age for name, age in trainer.tracks.ages.items() if "levels" in name
    }
    assert ages == {"0": 28, "1": 4}
    for average in trainer.tracks.averages.values():  # one step old: the weights after it
        for name, value in trainer.net.named_parameters():
            if name.startswith("levels.1."):
                assert torch.equal(average[name], value)


def gentle_config(**changes: Any) -> RunConfig:
    """The tiny run with a track, its second stage with a gentle start."""
    first, second = tiny_config().train.stages
    return tiny_config(stages=(first, second.model_copy(update=changes)), ema_power=(0.1,))


def test_a_frozen_nest_keeps_every_bit_while_the_new_level_learns():
    config = gentle_config(freeze_coarse_images=10)  # the steps from 24, 28 and 32
    trainer, feed = learner_after(24, config), Feed(config, TinyPictures(), encode)
    before = state(trainer)
    trainer.grow(2)
    grown = state(trainer)
    for first in (24, 28, 32):
        outcome = trainer.step(feed(step_at(config.train, first)))
        gradients = [p.grad.norm() for p in trainer.net.parameters() if p.grad is not None]
        clipped = min(outcome.grad_norm, config.train.clip_norm)
        assert torch.stack(gradients).norm().item() == pytest.approx(clipped, rel=1e-3)
    after = state(trainer)
    assert_same({name: after[name] for name in before}, before)
    new = [name for name in grown if name not in before]
    assert all("levels.1." in name for name in new)
    assert [name for name in new if torch.equal(after[name], grown[name])] == []
    trainer.step(feed(step_at(config.train, 36)))
    thawed = state(trainer)
    assert [name for name in before if torch.equal(thawed[name], before[name])] == []


def test_a_ramp_lessens_what_the_new_level_adds_to_the_loss():
    config = gentle_config(ramp_images=16)
    trainer = learner_after(24, config)
    trainer.grow(2)
    given = Feed(config, TinyPictures(), encode)(step_at(config.train, 24))
    loss, (coarse, fine), *_ = trainer.step(given)
    assert fine > 0
    assert loss == pytest.approx(coarse + 0.25 * fine, rel=1e-6)


def test_a_gentle_growth_resumes_bit_for_bit(tmp_path):
    config = gentle_config(freeze_coarse_images=8, ramp_images=16)
    run(tmp_path / "whole", config)
    for images_seen in (28, 36):  # while frozen, and while only the ramp goes on
        folder = tmp_path / str(images_seen)
        with pytest.raises(Stopped):
            run(folder, config, hooks=[stop_at(images_seen)])
        run(folder, config)
        assert digests(folder) == digests(tmp_path / "whole")


def with_nan(given: Inputs, row: int) -> Inputs:
    broken = [level.clone() for level in given.x]
    broken[0][row] = float("nan")
    return replace(given, x=tuple(broken))


def test_a_step_that_is_not_finite_is_skipped_and_its_sample_named():
    trainer = learner_after(8, tiny_config(ema_power=(0.1,)))
    before = state(trainer)
    given = inputs(step_at(tiny_config().train, 8))
    outcome = trainer.step(with_nan(given, row=2))
    assert_same(state(trainer), before)
    assert isinstance(outcome, Skipped)
    assert [sample[:2] for sample in outcome.culprits] == [(10, "picture-10")]
    assert trainer.progress.images_seen == 12
    assert (trainer.progress.steps, trainer.progress.skipped) == (2, 1)
    assert isinstance(trainer.step(given), Stepped)
    assert trainer.progress.skipped_in_a_row == 0


def test_an_infinite_gradient_is_skipped_although_the_loss_is_finite():
    trainer = learner_after(8)
    before = state(trainer)
    next(trainer.net.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    outcome = trainer.step(inputs(step_at(tiny_config().train, 8)))
    assert isinstance(outcome, Skipped)
    assert np.isfinite(outcome.loss)
    assert [sample.number for sample in outcome.culprits] == [8, 9, 10, 11]
    assert_same(state(trainer), before)


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
    with pytest.warns(UserWarning, match=r"skipped at 8 images.*samples 9 \(picture-9\)"):
        run(tmp_path, loader=Broken(9))
    lines = metrics(tmp_path)
    assert [line["skipped"] for line in lines] == [0, 0] + [1] * 10
    assert lines[2]["skipped_ids"] == [9]
    assert lines[2]["loss"] is None
    assert [line["step"] for line in lines] == [1, 2, *range(2, 12)]


def test_too_many_steps_that_are_not_finite_stop_the_run(tmp_path):
    stages = (StageConfig(levels=1, images=80, batch_size=2, lr=0.1),)
    config = tiny_config(stages=stages)
    told = r"20 steps in a row, up to 48 images.*smaller train\.st.*not-finite\.json tells more"
    with pytest.warns(UserWarning, match="step skipped"), pytest.raises(NotFinite, match=told):
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


# --- hooks -------------------------------------------------------------------------------------


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
        seen.append((view.images_seen, len(levels), view.folder, view.config.name))

    run(tmp_path / "run", hooks=[(10, hook), (0, pytest.fail)])
    assert digests(tmp_path / "run") == digests(whole)
    assert metrics(tmp_path / "run") == metrics(whole)
    assert [(images, levels) for images, levels, *_ in seen] == [
        (12, 1),
        (20, 1),
        (32, 2),
        (40, 2),
        (48, 2),
    ]
    assert seen[0][2:] == (tmp_path / "run", "tiny")


def test_a_failing_hook_is_not_hidden_and_loses_nothing(whole, tmp_path):
    def fail(view: View) -> None:
        if view.images_seen == 28:
            raise KeyError("a bug in a preview")

    with pytest.raises(KeyError, match="a bug in a preview"):
        run(tmp_path / "run", hooks=[(4, fail)])
    assert there(newest(tmp_path / "run" / "checkpoints")).name == "0000000028"
    run(tmp_path / "run", hooks=[(4, fail)])  # goes on behind the place
    assert digests(tmp_path / "run") == digests(whole)


# --- what a run tells --------------------------------------------------------------------------


def test_lines_of_metrics_close_at_intervals_growths_and_checkpoints(tmp_path):
    run(tmp_path, tiny_config(log_every_images=15, checkpoint_every_images=30))
    assert [line["images_seen"] for line in metrics(tmp_path)] == [16, 24, 32, 48]


def test_metrics_on_a_full_disk_name_their_file(tmp_path):
    log = Metrics(tmp_path / "metrics.jsonl", 0)
    log.path = Path("/dev/full")
    with pytest.raises(OSError, match="cannot write /dev/full: No space left"):
        log.write({"images_seen": 4})


def entry(rows: tuple[int, ...], losses: tuple[float, ...], *, skipped: bool = False) -> Entry:
    step = Step(len(rows) - 1, 0, rows, 0.1, False)
    told = (sum(losses), losses, 2.0)
    outcome = Skipped(*told, (Sample(7, "key", losses[0]),)) if skipped else Stepped(*told)
    return Entry(step, outcome, 0.1, 0.3)


def test_a_summary_weighs_levels_by_their_rows():
    entries = [
        entry((4, 3), (1.0, 2.0)),
        entry((4, 1), (3.0, 6.0)),
        entry((4, 4), (float("nan"), float("nan")), skipped=True),
    ]
    told = summary(entries)
    assert told["loss_per_level"] == [2.0, 3.0]
    assert told["loss"] == 6.0
    assert told["skipped_ids"] == [7]
    assert told["images_per_second"] == pytest.approx(10.0)
    assert told["data_wait"] == pytest.approx(0.25)
    assert summary([entry((4, 0), (1.0, 0.0))])["loss_per_level"] == [1.0, None]
    assert summary([entry((4,), (1.0,)), entry((4, 4), (3.0, 5.0))])["loss_per_level"] == [2, 5]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO) -> str:
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr("matryoshka_diffusion.train.log.PLAIN_SECONDS", 0.0)
    display = Display(tiny_config().train, (8, 16), 24)
    display.show(entry((4, 3), (0.25, 0.5)))
    display.close()
    return stderr.getvalue()


def test_a_terminal_gets_a_bar(monkeypatch):
    told = show(monkeypatch, Terminal())
    assert "\r" in told
    for part in ("28.0/48.0", "images/s", "2/2 8:0.2500 16:0.5000", "wait 25%"):
        assert part in told


def test_a_log_file_gets_plain_lines(monkeypatch):
    told = show(monkeypatch, io.StringIO())
    assert re.fullmatch(
        r"4 of 48 images, 10 images/s, 0:04 left, 2/2 8:0\.2500 16:0\.5000 "
        r"wait 25%\n",
        told,
    )
