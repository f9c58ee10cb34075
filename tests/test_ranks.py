"""Several ranks compute what one does, and end together when one of them cannot go on."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from matryoshka_diffusion.config import ConfigError, UsageError
from matryoshka_diffusion.training import distributed
from matryoshka_diffusion.training.checkpoint import PARTS, newest, read
from matryoshka_diffusion.training.distributed import (
    RanksDiffer,
    World,
    compare_data,
    joined,
    rank_device,
    shared,
    whole,
)
from matryoshka_diffusion.training.inputs import Feed, compare_ranks
from matryoshka_diffusion.training.signals import Stopped
from matryoshka_diffusion.training.stages import Step, step_at
from matryoshka_diffusion.training.step import diffusion
from matryoshka_diffusion.training.weights import load_network
from nests import wake
from ranks import SETTINGS, SHARES, Process, end_ranks, seen, start_ranks, train_jobs, train_tiny
from tiny_run import TinyPictures, digests, encode, metrics, there, tiny_config

TRAIN = tiny_config(**SETTINGS).train
FORMS = ("ddp", "fsdp")
CUT: dict[str, Any] = {"accumulate": 2, "recompute": (0, 1), "layout": "channels_last"}
JOBS: dict[str, dict[str, Any]] = {
    "plain": {},
    "broken": {"break_at": 13, "overflow_at": 16},
    "adapters": {"kind": "adapters"},
    "clips": {"kind": "clips"},  # in most steps one rank has no clip
    "shapes": {"kind": "shapes"},  # in all steps one rank has no image of some shape
}


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trainings of one process."""
    folder = tmp_path_factory.mktemp("alone")
    for name, options in JOBS.items():
        if name != "broken":
            train_tiny(World(), f"{folder}/{name}", **options)
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same trainings on two ranks in both forms, and one that a single process began."""
    folder, jobs = tmp_path_factory.mktemp("together"), []
    for form in FORMS:
        place = f"{folder}/{form}-stopped"
        with pytest.raises(Stopped):
            train_tiny(World(), place, stop_at=4, **CUT)
        jobs += [{"folder": f"{folder}/{form}-{name}", **job} for name, job in JOBS.items()]
        jobs += [{"folder": place, "stop_at": 12, "stop_rank": 1, **CUT}]
        for job in jobs[-len(JOBS) - 1 :]:
            job["parallel"] = form
    names = {"mix": {}, "mix-stopped": {"stop_at": 12, "stop_rank": 1}}
    jobs += [{"folder": f"{folder}/{name}", "kind": "mix", **job} for name, job in names.items()]
    jobs += [{"folder": f"{folder}/mix-stopped", "kind": "mix"}]
    assert not any(
        "views as outputs" in text for text in end_ranks(start_ranks(2, train_jobs, jobs))
    )
    return folder


@pytest.mark.parametrize("name", ["plain", "adapters", "clips", "shapes"])
@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_have_the_losses_of_one(alone, together, form, name):
    one, two = losses(alone / name), losses(together / f"{form}-{name}")
    assert two[0] == pytest.approx(one[0], rel=1e-6)
    assert two == pytest.approx(one, rel=1e-5)
    assert seen(together / f"{form}-{name}") == seen(alone / name)


@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_end_with_the_network_of_one(alone, together, form):
    """Weights themselves may differ where they do not matter: biases before a norm."""
    (inputs,) = Feed(tiny_config(**SETTINGS), TinyPictures(), encode)(step_at(TRAIN, 16))
    predictions = []
    for folder in (alone / "plain", together / f"{form}-plain"):
        weights = load_file(folder / "model" / "model.safetensors")
        net = load_network(tiny_config(dropout=0.0).model, weights, where="here")
        with torch.no_grad():
            predictions.append(net(inputs.x, inputs.t, inputs.cond))
    for one, two in zip(*predictions, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)


def test_each_rank_writes_its_shards_and_any_reader_puts_them_together(alone, together):
    runs = (alone / "plain", together / "ddp-plain", together / "fsdp-plain")
    one, ddp, fsdp = (there(newest(run / "checkpoints")) for run in runs)
    names = [{path.name for path in place.glob("*.safetensors")} for place in (ddp, fsdp)]
    assert names[0] == {f"{part}.safetensors" for part in PARTS}
    assert names[1] == names[0] | {f"{part}.2.safetensors" for part in PARTS}
    first, second = (
        (fsdp / name).stat().st_size for name in ("weights.safetensors", "weights.2.safetensors")
    )
    assert second > 0.9 * first, "the ranks hold halves"
    for part in PARTS:
        mine, theirs = getattr(read(one), part), getattr(read(fsdp), part)
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert theirs.shape(name) == mine[name].shape == theirs[name].shape
    mine, theirs = (load_file(run / "ema" / "0000000021.safetensors") for run in runs[::2])
    for name, value in mine.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=2e-3)


def test_shards_are_put_together_in_bf16_and_their_gradients_averaged_in_float32(tmp_path):
    end_ranks(start_ranks(2, compare_shards, str(tmp_path / "results")))
    results = json.loads((tmp_path / "results").read_text())
    assert results["types"] == ["torch.bfloat16", "torch.float32"]
    assert results["gradients"] == ["torch.float32"]
    assert 0 < results["error"] < 0.05, "rounded; a sum in place of the mean would be 1"


def compare_shards(path: str) -> None:
    """Compare the gradient of a network whose shards are put together in bf16 and in float32."""
    config = tiny_config(precision="bf16", dropout=0.0)
    recipe, device = diffusion(config), torch.device("cpu")
    gradients: list[dict[str, Any]] = []
    types = []
    with joined(device, "fsdp", 20) as world:
        feed = Feed(config, TinyPictures(), encode, world=world)
        (inputs,) = feed(Step(0, 0, (4, 2), (), False))
        for dtype in (None, torch.bfloat16):
            net: Any = wake(recipe.build(2))
            level = net.levels[1]
            for part in (level.stem, level.encoder[0].residual.conv1):
                part.register_forward_hook(lambda part, *_: types.append(str(part.weight.dtype)))
            loss = recipe.loss(shared(net, world, device, dtype), inputs)
            (world.size * loss.total).backward()
            gradients.append({n: whole(p.grad) for n, p in net.named_parameters()})
    plain, half = (torch.cat([g.flatten() for g in each.values()]) for each in gradients)
    results = {
        "types": sorted(set(types[2:])),
        "gradients": sorted({str(gradient.dtype) for gradient in gradients[1].values()}),
        "error": float((half - plain).norm() / plain.norm()),
    }
    if world.leads:
        Path(path).write_text(json.dumps(results))


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(together, tmp_path):
    """NaN in a picture, then an infinite gradient; `train_tiny` checks that no bit changes."""
    with pytest.warns(UserWarning, match=r"samples (13|16) "):
        train_tiny(World(), str(tmp_path), **JOBS["broken"])
    for folder in (tmp_path, together / "ddp-broken", together / "fsdp-broken"):
        lines = metrics(folder)
        assert [line["skipped"] for line in lines] == [0, 0, 0, 1, 2, 2]
        assert [line["step"] for line in lines] == [1, 2, 3, 3, 3, 4]
        assert (lines[3]["loss"], lines[4]["grad_norm"]) == (None, None)
        assert lines[4]["skipped_ids"] == [16, 17, 18, 19]
        for one, two in zip(losses(tmp_path), losses(folder), strict=True):
            assert two == (one if one is None else pytest.approx(one, rel=1e-5))


@pytest.mark.parametrize("form", FORMS)
def test_a_run_goes_on_from_one_rank_to_two_and_back(alone, together, form):
    """Stopped alone at 4 images, on two ranks at 12 by a signal to one of them; ended alone."""
    folder = together / f"{form}-stopped"
    assert there(newest(folder / "checkpoints")).name == "0000000012"
    train_tiny(World(), str(folder), **CUT)
    assert seen(folder) == seen(alone / "plain"), "nothing is skipped, repeated or drawn anew"
    assert losses(folder) == pytest.approx(losses(alone / "plain"), rel=1e-5)
    starts = json.loads((folder / "environment.json").read_text("utf-8"))
    assert [start["ranks"] for start in starts] == [1, 2, 1]


def test_a_run_on_a_mix_continues_bit_for_bit_on_two_ranks(together):
    """Stopped at 12 of 21 images by a signal to one rank, when both sets are read again."""
    whole, stopped = together / "mix", together / "mix-stopped"
    assert len(json.loads((stopped / "environment.json").read_text("utf-8"))) == 2
    assert digests(stopped) == digests(whole)
    assert metrics(stopped) == metrics(whole)
    assert seen(stopped) == seen(whole)
    parts = [int(key.partition(":")[0]) for _, key, *_ in seen(whole)]
    for count in range(1, len(parts) + 1):
        given = parts[:count].count(0), parts[:count].count(1)
        assert given == pytest.approx([count * share for share in SHARES], abs=1)


# --- what can go wrong -------------------------------------------------------------------------


def started(folder: Path) -> list[Process]:
    """Two ranks that have begun to learn, slowly, and count as dead after two seconds."""
    ranks = start_ranks(2, train_jobs, [{"folder": str(folder), "pace": 0.4}], 2)
    record = folder / ".seen-1.jsonl"
    while not record.exists() or not record.read_text("utf-8"):
        time.sleep(0.1)
        assert ranks[0].process.is_alive(), ranks[0].end()
    return ranks


@pytest.mark.parametrize(
    ("dead", "number", "message"),
    [
        (1, signal.SIGKILL, "rank 1 (does not answer any more|has given no sign of life for 2 s)"),
        (1, signal.SIGSTOP, "rank 1 has given no sign of life for 2 s"),
        (0, signal.SIGKILL, "rank 0|the rank that kept it"),  # it keeps the store, too
        (0, signal.SIGSTOP, "the ranks' common store has not answered for 2 s|rank 0"),
    ],
)
def test_a_dead_rank_is_named_and_ends_the_others(tmp_path, dead, number, message):
    ranks = started(tmp_path)
    ranks[dead].send(number)
    status, errors = ranks[1 - dead].end()
    ranks[dead].process.kill()
    assert status == 1
    assert re.search(message, errors)
    assert "the same command continues" in errors


def test_data_that_one_rank_cannot_read_stops_all_and_they_save(tmp_path):
    job = {"folder": str(tmp_path), "unreadable_at": 9}
    errors = end_ranks(start_ranks(2, train_jobs, [job]), (1, 1))
    assert "https://host/0.tar: HTTP 503; stopped at 8 of 21 images" in errors[1]
    assert "the data of another rank cannot be read; stopped at 8 of 21 images" in errors[0]
    assert there(newest(tmp_path / "checkpoints")).name == "0000000008"


def test_ranks_that_were_paused_together_go_on(tmp_path):
    ranks = started(tmp_path)
    for number, seconds in ((signal.SIGSTOP, 5.0), (signal.SIGCONT, 0.0)):
        for rank in ranks:
            rank.send(number)
        time.sleep(seconds)
    end_ranks(ranks)


@pytest.mark.parametrize(
    ("job", "messages"),
    [
        (
            {"fail_at": 9},
            ["DeadRank: rank 1 has left: ValueError: sample 9 is bad", "Error: sample 9 is bad"],
        ),
        ({"same_rows": True}, 2 * ["ranks 0 and 1 were given the same sample or noise (0)"]),
    ],
)
def test_a_rank_that_fails_tells_the_others_why(tmp_path, job, messages):
    errors = end_ranks(start_ranks(2, train_jobs, [{"folder": str(tmp_path), **job}]), (1, 1))
    assert all(message in text for message, text in zip(messages, errors, strict=True))
    assert bool(seen(tmp_path)) == ("fail_at" in job), "ranks with the same samples learn nothing"


def world_of(*others: Any) -> Any:
    """A world of which the other ranks give these values."""

    class Others(World):
        def gather(self, value: Any) -> list[Any]:
            return [value, *others]

    return Others(0, 1 + len(others))


def test_ranks_of_different_runs_or_data_are_refused():
    config = tiny_config(**SETTINGS)
    inputs = Feed(config, TinyPictures(), encode)(step_at(TRAIN, 0))
    with pytest.raises(RanksDiffer, match=r"rank 1 .*another config"):
        compare_ranks(world_of(("other", (99,), ["-"])), config, inputs)
    compare_data(world_of(), ["a", "b"], [0, 0])
    with pytest.raises(RanksDiffer, match=r"rank 1 .*other data.*3 images and 2"):
        compare_data(world_of((3, "-")), ["a", "b"], [0, 0])


def test_ranks_whose_images_have_other_shapes_are_refused():
    given: list[Any] = []

    class Noting(World):
        def gather(self, value: Any) -> list[Any]:
            given.append(value)
            return [value]

    compare_data(Noting(1, 2), ["a", "b"], [0, 3])
    compare_data(world_of(*given), ["a", "b"], [0, 3])
    with pytest.raises(RanksDiffer, match=r"rank 1 .*other data"):
        compare_data(world_of(*given), ["a", "b"], [0, 2])


def test_an_error_that_cannot_be_pickled_is_sent_as_text():
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
    with pytest.raises(UsageError, match=r"cuda:1 .*--device cuda"):
        rank_device("cuda:1")
