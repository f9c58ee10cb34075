"""Bad samples that turn up while training: listed, saved with the run, known when it goes on."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from matryoshka_diffusion.data import decoded
from matryoshka_diffusion.data.bad import BadFile, Quarantine
from matryoshka_diffusion.data.loader import Batch, Loader
from matryoshka_diffusion.data.source import Source, split
from matryoshka_diffusion.training import checkpoint
from matryoshka_diffusion.training.trainer import train
from picturing import encode as encode_image
from picturing import opened as opened_kind
from picturing import save, write_tar
from tiny_run import encode, tiny_config

COUNT, BAD = 40, (3, 4, 17, 30)


@pytest.fixture(scope="module", autouse=True)
def _on_demand():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoded, "CACHED_PICTURES", 0)
        yield


def make_shard(path: Path, bad: Collection[int]) -> Path:
    """Captioned pictures, some of them broken, and one without a caption."""
    parts = []
    for n in range(COUNT):
        colour = (6 * n, 255 - 6 * n, n)
        parts.append((f"{n:02}.png", b"broken" if n in bad else encode_image(colour, (16, 16))))
        parts += [] if n == 9 else [(f"{n:02}.txt", b"red")]
    return write_tar(path / "s.tar", parts)


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    return make_shard(tmp_path_factory.mktemp("shard"), BAD)


def opened(path: Path, share: float = 0.5) -> Source:
    return opened_kind(path, share, kind="shards")


class Recorded(Loader):
    """A loader that remembers what it gave."""

    def __init__(self, source: Source) -> None:
        super().__init__(source, 0)
        self.given: dict[int, str] = {}

    def batch(self, ids: Sequence[int]) -> Batch:
        batch = super().batch(ids)
        self.given |= dict(zip(batch.ids.tolist(), batch.keys, strict=True))
        return batch


def run(source: Source, folder: Path, hooks=()) -> tuple[dict[int, str], list[str]]:
    """Samples that a run received, and those that it was warned of."""
    loader, options = Recorded(source), {"encode": encode, "quarantine": source.quarantine}
    messages: list[str] = []
    # Another thread reads, and `warnings.catch_warnings` is not made for threads.
    note = SimpleNamespace(warn=lambda message, **_: messages.append(message))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matryoshka_diffusion.data.bad.warnings", note)
        train(tiny_config(), loader, folder, hooks=hooks, **options)
    return loader.given, [x.split(": ")[0] for x in messages if "stands in" in x]


def listed(folder: Path) -> list[str]:
    lines = (folder / "bad.jsonl").read_text().splitlines()
    return [json.loads(line)["path"] for line in lines]


@pytest.fixture(scope="module")
def begun(shard, tmp_path_factory) -> Path:
    """A run that ended half-way."""
    folder = tmp_path_factory.mktemp("begun") / "run"

    def stop(view) -> None:
        if view.images_seen == 24:
            raise RuntimeError("here")

    with pytest.raises(RuntimeError, match="here"):
        run(opened(shard), folder, [(24, stop)])
    return folder


@pytest.fixture
def parts(begun, tmp_path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run"))


def newest(folder: Path) -> Path:
    path = checkpoint.newest(folder / "checkpoints")
    assert path is not None
    return path


# --- with a run --------------------------------------------------------------------------------


def test_a_resumed_run_knows_what_was_bad_and_is_shown_the_same(tmp_path, shard, parts):
    everything, warned = run(opened(shard), tmp_path / "whole")
    assert sorted(warned) == [f"s.tar:{n:02}" for n in BAD]
    saved = [key for key, *_ in checkpoint.read(newest(parts)).state["bad"]]
    assert 0 < len(saved) < len(BAD)
    rest, warned_later = run(opened(shard), parts)
    assert sorted([*saved, *warned_later]) == sorted(warned)  # each once
    assert rest == {n: key for n, key in everything.items() if n >= 24}
    for folder in (tmp_path / "whole", parts):
        assert listed(folder) == [f"s.tar:{n:02}" for n in sorted((*BAD, 9))]
    weights = [path / "model" / "model.safetensors" for path in (tmp_path / "whole", parts)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_run_that_is_killed_leaves_the_list_of_its_last_checkpoint(shard, tmp_path):
    lists = []
    run(opened(shard), tmp_path / "run", [(12, lambda view: lists.append(listed(view.folder)))])
    assert [len(one) for one in lists] == sorted(len(one) for one in lists)
    assert 1 < len(lists[0]) < len(lists[-1]) <= len(BAD) + 1


def test_what_was_bad_before_a_resume_counts_towards_too_many(shard, parts):
    before = len(listed(parts))
    assert before < len(BAD) + 1
    with pytest.raises(ValueError, match=f"{before + 1} of 40 files cannot be used"):
        run(opened(shard, share=before / COUNT), parts)
    assert len(listed(parts)) == before + 1  # the one that was too many is listed


def test_a_checkpoint_from_before_has_no_quarantine(shard, parts):
    snapshot = checkpoint.read(newest(parts))
    older = {key: value for key, value in snapshot.state.items() if key != "bad"}
    tensors = [dict(part) for part in (snapshot.weights, snapshot.ema, snapshot.optimizer)]
    for path in newest(parts).iterdir():
        path.unlink()
    checkpoint.save(parts / "checkpoints", checkpoint.Snapshot(older, *tensors), keep=2)
    assert run(opened(shard), parts)[1]
    assert checkpoint.read(newest(parts)).state["bad"]


# --- alone -------------------------------------------------------------------------------------


def test_bad_files_of_a_folder_are_listed_too_and_a_good_set_has_no_list(tmp_path):
    for n in range(8):
        save(tmp_path / "set" / f"{n}.png")
    opened_kind(tmp_path / "set").quarantine.write(tmp_path / "bad.jsonl")
    assert not (tmp_path / "bad.jsonl").exists()
    Quarantine("set", [BadFile("caf\udce9.png", "broken")]).write(tmp_path / "bad.jsonl")
    assert listed(tmp_path)[0].startswith("caf")  # a name that is no Unicode
    names = ["a\x9b31m\x7f\u202e.png", "苹果.png"]
    Quarantine("set", [BadFile(name, "broken") for name in names]).write(tmp_path / "bad.jsonl")
    assert listed(tmp_path) == names
    text = (tmp_path / "bad.jsonl").read_text("utf-8")
    assert names[1] in text
    assert all(x.isprintable() or x == "\n" for x in text)


def test_what_is_restored_is_neither_read_nor_told_again(shard):
    first, again = opened(shard), opened(shard)
    with pytest.warns(UserWarning, match=r"s\.tar:0[34]: not PNG"):
        stand_in = first[3].key
    again.quarantine.restore(json.loads(json.dumps(first.quarantine.state())))
    assert again.bad == first.bad
    read = []
    again = replace(again, read=lambda n, cut: read.append(n) or first.read(n, cut))
    assert again[3].key == stand_in == "s.tar:05"
    assert read == [5]
    assert again.part([3, 4, 5])[0].key == stand_in
    assert again.part([3]).quarantine is again.quarantine


def test_what_stands_in_for_a_held_out_picture_is_held_out_too(tmp_path):
    bad = range(0, COUNT, 3)
    for part in split(opened(make_shard(tmp_path, bad)), 0.3):
        assert part is not None
        own = [key for key in part.keys if int(key[-2:]) not in bad]
        expected = [next((k for k in own if k >= key), own[0]) for key in part.keys]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert [x.key for x in part.many(range(len(part)))] == expected
            assert [part[n].key for n in range(len(part))] == expected
        assert expected != part.keys, "nothing was replaced"


def test_several_processes_of_a_run_can_put_their_findings_together():
    ours, theirs = Quarantine("set", [BadFile("a", "old")], 10), Quarantine("set", total=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for quarantine, key in ((ours, "b"), (theirs, "c"), (theirs, "b")):
            quarantine.add(BadFile(key, "broken", 7))
    ours.restore(theirs.state())
    assert [file.path for file in ours.bad] == ["a", "b", "c"]
    assert ours.state() == [["b", "broken", 7], ["c", "broken", 7]]
