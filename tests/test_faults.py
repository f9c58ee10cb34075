"""The tools of `make chaos`: faults happen when they should, and broken promises are noticed."""

from __future__ import annotations

import builtins
import io
import json
import os
import random
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest

from faults import child, kills, product, ranks, runner, shards
from faults.product import Ended, Run, Workshop
from faults.report import Result, table
from matryoshka_diffusion.config import DataConfig
from matryoshka_diffusion.data.source import open_source
from matryoshka_diffusion.files import write_atomically
from matryoshka_diffusion.training import checkpoint
from test_checkpoint import snapshot, truncate


@pytest.fixture
def own_disk(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Put back all that `Disk.install` replaces after the test."""
    for name in ("replace", "rename", "mkdir", "unlink", "rmdir", "fsync"):
        monkeypatch.setattr(os, name, getattr(os, name))
    for module in (builtins, io):
        monkeypatch.setattr(module, "open", open)
    return monkeypatch


@pytest.mark.parametrize(
    ("kind", "moment", "left"),
    [("open", 1, []), ("write", 3, [b"12345678"]), ("fsync", 1, [b"1234567890abcdef"])],
)
def test_an_error_of_the_disk_comes_at_its_moment(tmp_path, own_disk, kind, moment, left):
    contents = []
    own_disk.setattr(Path, "unlink", lambda path: contents.append(path.read_bytes()))
    child.Disk(moment=moment, then="EIO", inside=str(tmp_path), kinds=[kind]).install()
    with pytest.raises(OSError, match=r"a\.bin: Input/output error"):
        write_atomically(tmp_path / "a.bin", lambda file: file.write(b"1234567890abcdef"))
    assert contents == left


def test_a_power_cut_empties_files_that_were_not_synced(tmp_path, own_disk):
    own_disk.setattr(os, "kill", lambda *_: None)
    child.Disk(moment=1, then="power", inside=str(tmp_path), kinds=["rmdir"]).install()
    write_atomically(tmp_path / "synced", lambda file: file.write(b"on the disk"))
    (tmp_path / "new").mkdir()
    with open(tmp_path / "new" / "other", "w") as file:
        file.write("on its way")
    os.rename(tmp_path / "new", tmp_path / "renamed")
    with pytest.raises(AssertionError):
        (tmp_path / "renamed").rmdir()
    assert (tmp_path / "synced").read_bytes() == b"on the disk"
    assert (tmp_path / "renamed" / "other").read_bytes() == b""


def test_whole_shards_are_good_and_damaged_ones_are_as_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))
    shards.write_whole(tmp_path / "whole")
    assert len(open_source(DataConfig(source="shards", path=str(tmp_path / "whole")), 32)) == 64
    for seed in range(3):
        folder = tmp_path / str(seed)
        damage = shards.write_damaged(folder, random.Random(seed))
        data = DataConfig(source="shards", path=str(folder), max_bad_fraction=1.0)
        source = open_source(data, 32)
        assert set(source.keys) == damage.good
        assert Counter(bad.path for bad in source.bad) == Counter(damage.reported)
        assert set(damage.late) < set(damage.reported)


@pytest.mark.parametrize(
    ("saved", "before", "status", "count"),
    [
        ((16, 32), 32, -9, None),
        ((16,), 32, -9, "lost checkpoints"),
        ((8,), 8, -9, "lost more than an interval"),
        ((16, 32), 32, 1, ""),
    ],
)
def test_a_kill_that_costs_too_much_is_noticed(tmp_path, saved, before, status, count):
    run, result = Run(tmp_path / "run", "data"), Result(2, "kills")
    assert (run.newest(), run.reached(), run.torn(), run.kept()) == (0, 0, [], {})
    for images_seen in saved:
        checkpoint.save(run.checkpoints, snapshot(images_seen), keep=2)
    (run.folder / "metrics.jsonl").write_text('{"images_seen": 32}\n{"images_seen": 3')
    kills._judge(result, run, before, Ended(status, ""))
    assert bool(result.failures) == (count is not None)
    assert not count or result.counts[count] == 1
    truncate(run.checkpoints / f"{saved[-1]:010d}" / checkpoint.MANIFEST)
    assert (run.newest(), run.reached(), len(run.torn())) == ((0, *saved)[-2], 32, 1)


def test_a_process_that_hangs_is_killed(tmp_path):
    code = "import sys, time; print('here', file=sys.stderr, flush=True); time.sleep(60)"
    process = product.Process([sys.executable, "-c", code], tmp_path / "log")
    process.wait_to_say("here")
    assert product.killed_later(process, 0.0) == Ended(-signal.SIGKILL, "here\n")
    with pytest.raises(TimeoutError, match="does not say: nothing"):
        process.wait_to_say("nothing")


@pytest.mark.parametrize(
    ("losses", "differing", "failures"),
    [
        ([1.0 + 1e-7, 2.0 + 1e-5, None], 0, 0),
        ([1.0 + 1e-5, 2.0 + 1e-4, None], 2, 2),
        ([1.0, None, 3.0], 2, 2),
        ([1.0, 2.0], 0, 1),
    ],
)
def test_losses_that_differ_are_noticed(tmp_path, losses, differing, failures):
    runs, result = [Run(tmp_path / name, "data") for name in ("one", "two")], Result(6, "ranks")
    for run, values in zip(runs, (losses, [1.0, 2.0, None]), strict=True):
        run.folder.mkdir()
        text = "".join(json.dumps({"loss": loss}) + "\n" for loss in values)
        (run.folder / "metrics.jsonl").write_text(text)
    ranks._compare(result, *runs)
    assert (result.counts["differing losses"], len(result.failures)) == (differing, failures)


def test_a_scenario_that_raises_is_a_failure_and_the_table_says_so(tmp_path, monkeypatch):
    def good(shop: Workshop, result: Result, until: float) -> None:
        result.counts["kills"] += 1_000
        result.expect(True, "", "lost checkpoints")
        result.expect(shop.chance.random() < 1.0, "")

    def bad(shop: Workshop, result: Result, until: float) -> None:
        result.expect(False, "one is gone", "lost checkpoints")
        raise KeyError("a bug")

    monkeypatch.setattr(runner, "SCENARIOS", {"good": (2, good), "bad": (9, bad)})
    shop = Workshop(tmp_path, "data", random.Random(0), {}, 1.0, 1.0)
    results = [runner.attempt(title, shop, 0, 0.0) for title in ("bad", "good")]
    assert [len(result.failures) for result in results] == [2, 0]
    assert "a bug" in results[0].failures[1]
    lines = table(results).splitlines()
    assert [line.split()[-1] for line in lines[2:4]] == ["kept", "BROKEN"]
    assert "kills 1,000, lost checkpoints 0" in lines[2]
    assert lines[-1].startswith("in all: lost checkpoints 1, torn checkpoints 0")


def test_a_broken_promise_is_the_exit_status_and_keeps_the_runs(monkeypatch, capsys):
    results, calls = [], []
    monkeypatch.setattr(runner, "run", lambda *options: calls.append(options) or results)
    monkeypatch.setenv("MDM_CACHE", "")  # put back after the test
    for failures in ([], ["lost"]):
        results[:] = [Result(9, "corrupt samples in shards", failures=failures)]
        status = runner.main(["--only", "9", "--seed", "7", "--minutes", "0.5"])
        titles, folder, *settings = calls.pop()
        assert (titles, settings) == (["corrupt samples in shards"], [7, 30.0])
        repeats = "--seed 7 repeats" in capsys.readouterr().out
        assert bool(failures) == status == folder.exists() == repeats
    shutil.rmtree(folder)
