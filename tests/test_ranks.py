"""Several ranks compute what one does: promises 4 to 8 where they are about more than one."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from matryoshka_diffusion.config import ConfigError, UsageError
from matryoshka_diffusion.train import distributed
from matryoshka_diffusion.train.checkpoint import load_network, newest, read
from matryoshka_diffusion.train.distributed import (
    RanksDiffer,
    World,
    compare_data,
    compare_ranks,
    rank_device,
)
from matryoshka_diffusion.train.inputs import Feed
from matryoshka_diffusion.train.signals import Stopped
from matryoshka_diffusion.train.stages import step_at
from ranks import SETTINGS, run_ranks, seen, start_ranks, train_tiny
from tiny_run import TinyPictures, encode, there, tiny_config

TRAIN = tiny_config(**SETTINGS).train


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train_tiny(World(), str(folder))
    return folder


FORMS = ("ddp", "fsdp")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on two ranks, in several forms, beside each other in one folder."""
    folder, jobs = tmp_path_factory.mktemp("together"), []
    for form in FORMS:
        with pytest.raises(Stopped):
            train_tiny(World(), f"{folder}/{form}-stopped", stop_at=8)
        parts = {"accumulate": 2, "recompute": [0, 1], "layout": "channels_last"}
        for name, options in {
            "": {},
            "-parts": parts,
            "-broken": {"break_at": 13},
            "-overflow": {"overflow_at": 8},
            "-lora": {"adapters": True},
            "-clips": {"clips": True},  # in most steps one rank has no clip
            "-stopped": {"stop_at": 28, "stop_rank": 1},
        }.items():
            jobs.append({"folder": f"{folder}/{form}{name}", "parallel": form, **options})
    assert not any("views as outputs" in said for said in run_ranks(2, jobs))
    return folder


@pytest.mark.parametrize("form", ["ddp", "fsdp", "ddp-parts", "fsdp-parts"])
def test_two_ranks_have_the_losses_of_one(alone, together, form):
    one, two = losses(alone), losses(together / form)
    assert len(one) == len(two) == 12
    assert two[0] == pytest.approx(one[0], rel=1e-6)
    assert two == pytest.approx(one, rel=1e-5)
    assert seen(together / form) == seen(alone)


@pytest.mark.parametrize("kind", ["clips", "adapters"])
def test_two_ranks_have_the_losses_of_one_on_clips_and_with_adapters(together, kind, tmp_path):
    train_tiny(World(), str(tmp_path), **{kind: True})
    name = "lora" if kind == "adapters" else kind
    for parallel in FORMS:
        expected = pytest.approx(losses(tmp_path), rel=1e-5)
        assert losses(together / f"{parallel}-{name}") == expected


@pytest.mark.parametrize("parallel", FORMS)
def test_two_ranks_end_with_the_network_of_one(alone, together, parallel):
    """Weights themselves may differ where they do not matter: biases before a norm."""
    given = Feed(tiny_config(**SETTINGS), TinyPictures(), encode)(step_at(TRAIN, 40))
    predictions = []
    for folder in (alone, together / parallel):
        weights = load_file(folder / "model" / "model.safetensors")
        net = load_network(tiny_config(dropout=0.0).model, weights, where="here")
        with torch.no_grad():
            predictions.append(net(given.x, given.t, given.cond))
    for one, two in zip(*predictions, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)


def test_each_rank_writes_its_shards_and_any_reader_puts_them_together(alone, together):
    runs = (alone, together / "ddp", together / "fsdp")
    one, ddp, fsdp = (there(newest(run / "checkpoints")) for run in runs)
    names = [sorted(path.name for path in place.glob("*.safetensors")) for place in (ddp, fsdp)]
    parts = ("ema", "optimizer", "tracks", "weights")
    assert names[0] == [f"{part}.safetensors" for part in parts]
    assert names[1] == sorted([*names[0], *(name.replace(".", ".2.", 1) for name in names[0])])
    sizes = [
        (fsdp / name).stat().st_size for name in ("weights.safetensors", "weights.2.safetensors")
    ]
    assert sizes[1] > 0.9 * sizes[0], "the ranks hold halves"
    for part in ("weights", "ema", "optimizer", "tracks"):
        mine, theirs = getattr(read(one), part), getattr(read(fsdp), part)
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert theirs.shape(name) == mine[name].shape == theirs[name].shape
    snapshots = [
        load_file(run / "ema" / "0000000045.safetensors") for run in (alone, together / "fsdp")
    ]
    for name, value in snapshots[0].items():
        torch.testing.assert_close(snapshots[1][name], value, rtol=0, atol=2e-3)


@pytest.mark.parametrize("parallel", FORMS)
def test_a_sample_that_breaks_one_rank_makes_all_skip_the_step(alone, together, parallel, tmp_path):
    with pytest.warns(UserWarning, match="samples 13 "):
        train_tiny(World(), str(tmp_path), break_at=13)
    lines = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
        for folder in (tmp_path, together / f"{parallel}-broken")
    ]
    for one, two in zip(*lines, strict=True):
        assert one["skipped"] == two["skipped"] == (one["images_seen"] > 12)
        assert one["step"] == two["step"]
        assert (two["loss"] is None) == (one["loss"] is None) == (one["images_seen"] == 16)
        if one["loss"] is not None:
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.parametrize("parallel", FORMS)
def test_a_gradient_that_is_infinite_on_one_rank_only_makes_all_skip_the_step(together, parallel):
    path = together / f"{parallel}-overflow" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [line["skipped"] for line in lines] == [0, 0] + [1] * 10
    assert [line["step"] for line in lines] == [1, 2, *range(2, 12)]
    assert lines[2]["skipped_ids"] == [8, 9, 10, 11]
    assert lines[2]["grad_norm"] is None


@pytest.mark.parametrize("parallel", FORMS)
def test_a_run_goes_on_from_one_rank_to_two_and_back(alone, together, parallel):
    """Stopped alone at 8, on two ranks at 28 (by a signal to one of them), and ended alone."""
    folder = together / f"{parallel}-stopped"
    assert newest(folder / "checkpoints") == folder / "checkpoints" / "0000000028"
    train_tiny(World(), str(folder))
    assert seen(folder) == seen(alone), "nothing is skipped, repeated or drawn anew"
    assert losses(folder) == pytest.approx(losses(alone), rel=1e-5)
    starts = json.loads((folder / "environment.json").read_text("utf-8"))
    assert [start["ranks"] for start in starts] == [1, 2, 1]


# --- what can go wrong -------------------------------------------------------------------------


def started(folder: Path, limit: int = 2) -> list[Popen[str]]:
    """Two ranks that have begun to learn, slowly, and count as dead after `limit` seconds."""
    ranks = start_ranks(2, json.dumps([{"folder": str(folder), "pace": 0.3}]), str(limit))
    record = folder / ".seen-1.jsonl"
    while not record.exists() or not record.read_text("utf-8"):
        time.sleep(0.1)
        assert ranks[0].poll() is None, ranks[0].communicate()
    return ranks


@pytest.mark.parametrize(
    ("dead", "number", "told"),
    [
        (1, signal.SIGKILL, "rank 1 (does not answer any more|has given no sign of life for 2 s)"),
        (1, signal.SIGSTOP, "rank 1 has given no sign of life for 2 s"),
        (0, signal.SIGKILL, "rank 0|the rank that kept it"),  # it keeps the store, too
        (0, signal.SIGSTOP, "the ranks' common store has not answered for 2 s|rank 0"),
    ],
)
def test_a_dead_rank_is_named_and_ends_the_others(tmp_path, dead, number, told):
    ranks = started(tmp_path)
    ranks[dead].send_signal(number)
    _, said = ranks[1 - dead].communicate(timeout=60)
    ranks[dead].kill()
    ranks[dead].communicate()
    assert ranks[1 - dead].returncode == 1
    assert re.search(told, said)
    assert "the same command continues" in said


def test_ranks_that_were_paused_together_go_on(tmp_path):
    ranks = started(tmp_path)
    for number, seconds in ((signal.SIGSTOP, 5.0), (signal.SIGCONT, 0.0)):
        for rank in ranks:
            rank.send_signal(number)
        time.sleep(seconds)
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said


def test_a_rank_that_fails_tells_the_others_why(tmp_path):
    ranks = start_ranks(2, json.dumps([{"folder": str(tmp_path), "fail_at": 9}]))
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert "ValueError: sample 9 is bad" in said[1]
    assert "DeadRank: rank 1 has left: ValueError: sample 9 is bad" in said[0]


def test_ranks_with_the_same_samples_are_refused(tmp_path):
    ranks = start_ranks(2, json.dumps([{"folder": str(tmp_path), "same_rows": True}]))
    for rank in ranks:
        assert "ranks 0 and 1 were given the same sample or noise (0)" in rank.communicate()[1]
        assert rank.returncode == 1
    assert not seen(tmp_path), "nothing was learnt"


def found(*others: Any) -> Any:
    """A world of which the ranks gather these values."""

    class Told(World):
        def gather(self, value: Any) -> list[Any]:
            return [value, *others]

    return Told(0, 1 + len(others))


def test_ranks_of_different_runs_or_data_are_refused():
    config = tiny_config(**SETTINGS)
    inputs = Feed(config, TinyPictures(), encode)(step_at(TRAIN, 0))
    with pytest.raises(RanksDiffer, match="rank 1 was started with another config"):
        compare_ranks(
            found(("other", (99,), ["-"])), config, inputs.step, inputs.ids, inputs.noise[0]
        )
    compare_data(found(), ["a", "b"])
    with pytest.raises(RanksDiffer, match=r"rank 1 was given other data.*3 images and 2"):
        compare_data(found((3, "-")), ["a", "b"])


def test_errors_that_cannot_be_sent_are_sent_in_words():
    error = ConfigError("train.lr: no such key")
    assert distributed._portable(error) is error
    sent = distributed._portable(Stopped("saved", 15))  # takes two arguments to make anew
    assert isinstance(sent, RuntimeError)
    assert str(sent) == "Stopped: saved"


def test_each_rank_takes_its_own_gpu(monkeypatch):
    assert rank_device("cuda:1") == "cuda:1"
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "6")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert rank_device("cpu") == "cpu"
    assert rank_device("cuda") == "cuda:2"  # without a launcher that says which
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert rank_device("cuda") == "cuda:3"
    with pytest.raises(UsageError, match="cuda:1 is one GPU for 8 ranks: give --device cuda"):
        rank_device("cuda:1")
