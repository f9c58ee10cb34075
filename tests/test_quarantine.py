"""Bad samples that turn up while training: listed, saved with the run, known when it goes on."""

from __future__ import annotations

import io
import json
import tarfile
import warnings
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from matryoshka_diffusion.config import DataConfig, RunConfig
from matryoshka_diffusion.data import decoded
from matryoshka_diffusion.data.bad import BadFile, Quarantine
from matryoshka_diffusion.data.loader import Batch, Loader
from matryoshka_diffusion.data.source import Source, open_source, split
from matryoshka_diffusion.train import checkpoint
from matryoshka_diffusion.train.trainer import train
from tiny_run import encode, tiny_config

COUNT, BAD = 40, (3, 4, 17, 30)


@pytest.fixture(autouse=True)
def _on_demand(tmp_path, monkeypatch):
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(decoded, "CACHED_PICTURES", 0)


@pytest.fixture
def shard(tmp_path) -> Path:
    return make_shard(tmp_path, BAD)


def make_shard(tmp_path: Path, bad: Collection[int]) -> Path:
    """Captioned pictures, some of them broken, and one without a caption."""
    pictures = np.random.default_rng(0).integers(0, 256, (COUNT, 16, 16, 3), dtype=np.uint8)
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as archive:

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))

        for n, pixels in enumerate(pictures):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            add(f"{n:02}.png", b"broken" if n in bad else file.getvalue())
            add(f"{n:02}.txt", b"red") if n != 9 else None
    return path


def opened(path: Path, share: float = 0.5) -> Source:
    return open_source(DataConfig(source="shards", path=str(path), max_bad_fraction=share), 16)


def pictures(path: Path) -> Source:
    return open_source(DataConfig(source="folder", path=str(path), max_bad_fraction=0.2), 16)


class Recorded(Loader):
    """A loader that remembers what it gave."""

    def __init__(self, source: Source) -> None:
        super().__init__(source, 0)
        self.given: dict[int, str] = {}

    def batch(self, ids: range) -> Batch:
        batch = super().batch(ids)
        self.given |= dict(zip(batch.ids.tolist(), batch.keys, strict=True))
        return batch


def run(config: RunConfig, source: Source, folder: Path, hooks=()) -> dict[int, str]:
    loader = Recorded(source)
    train(config, loader, folder, encode=encode, quarantine=source.quarantine, hooks=hooks)
    return loader.given


def told(seen) -> list[str]:
    """The keys of the samples that warnings were about."""
    return [str(one.message).split(": ")[0] for one in seen if "stands in" in str(one.message)]


def listed(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "bad.jsonl").read_text().splitlines()]


def begun(shard: Path, folder: Path) -> list[str]:
    """A run that ended half-way; returns the samples that it was warned of."""

    def stop(view) -> None:
        if view.images_seen == 24:
            assert (folder / "bad.jsonl").is_file()  # since the last save
            raise RuntimeError("here")

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(RuntimeError, match="here"):
            run(tiny_config(), opened(shard), folder, hooks=[(24, stop)])
    return told(seen)


# --- with a run --------------------------------------------------------------------------------


def test_a_resumed_run_knows_what_was_bad_and_is_shown_the_same(tmp_path, shard):
    config = tiny_config()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        whole = run(config, opened(shard), tmp_path / "whole")
    assert sorted(told(seen)) == [f"s.tar:{n:02}" for n in BAD]
    first = begun(shard, tmp_path / "parts")
    newest = checkpoint.newest(tmp_path / "parts" / "checkpoints")
    assert newest is not None
    saved = checkpoint.read(newest).state["bad"]
    assert [key for key, *_ in saved] == sorted(first)
    assert 0 < len(saved) < len(BAD)
    source = opened(shard)
    with warnings.catch_warnings(record=True) as second:
        warnings.simplefilter("always")
        rest = run(config, source, tmp_path / "parts")
    assert sorted([*first, *told(second)]) == sorted(told(seen))  # each once
    assert rest == {n: key for n, key in whole.items() if n >= 24}
    for name in ("whole", "parts"):
        assert [file["path"] for file in listed(tmp_path / name)] == [
            f"s.tar:{n:02}" for n in sorted((*BAD, 9))
        ]
    weights = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "parts")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_what_was_bad_before_a_resume_counts_towards_too_many(tmp_path, shard):
    begun(shard, tmp_path / "run")
    before = len(listed(tmp_path / "run"))
    assert before < len(BAD) + 1
    source = opened(shard, share=before / COUNT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=f"{before + 1} of 40 files cannot be used"):
            run(tiny_config(), source, tmp_path / "run")
    assert len(listed(tmp_path / "run")) == before + 1  # the one that was too many is listed


def test_a_checkpoint_from_before_has_no_quarantine(tmp_path, shard):
    begun(shard, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    newest = checkpoint.newest(folder)
    assert newest is not None
    snapshot = checkpoint.read(newest)
    older = {key: value for key, value in snapshot.state.items() if key != "bad"}
    tensors = [dict(part) for part in (snapshot.weights, snapshot.ema, snapshot.optimizer)]
    for path in newest.iterdir():
        path.unlink()
    checkpoint.save(folder, checkpoint.Snapshot(older, *tensors), keep=2)
    with pytest.warns(UserWarning, match="stands in"):
        run(tiny_config(), opened(shard), tmp_path / "run")
    newest = checkpoint.newest(folder)
    assert newest is not None
    assert checkpoint.read(newest).state["bad"]


def test_bad_files_of_a_folder_are_listed_too_and_a_good_set_has_no_list(tmp_path):
    config = tiny_config()
    for n in range(8):
        path = tmp_path / "set" / f"{n}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (9 * n, 0, 0)).save(path)
        path.with_suffix(".txt").write_text("red")
    run(config, pictures(tmp_path / "set"), tmp_path / "good")
    assert not (tmp_path / "good" / "bad.jsonl").exists()
    (tmp_path / "set" / "3.png").write_bytes(b"broken")
    with pytest.warns(UserWarning, match="stands in"):
        run(config, pictures(tmp_path / "set"), tmp_path / "bad")
    (file,) = listed(tmp_path / "bad")
    assert file["path"] == "3.png"
    assert "not a PNG" in file["reason"]


# --- alone -------------------------------------------------------------------------------------


def test_what_is_restored_is_neither_read_nor_told_again(shard, monkeypatch):
    first, again = opened(shard), opened(shard)
    with pytest.warns(UserWarning, match=r"s\.tar:0[34]: not a PNG"):
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
        assert expected != list(part.keys), "nothing was replaced"


def test_several_processes_of_a_run_can_put_their_findings_together():
    ours, theirs = Quarantine("set", [BadFile("a", "old")], 10), Quarantine("set", total=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for quarantine, key in ((ours, "b"), (theirs, "c"), (theirs, "b")):
            quarantine.add(BadFile(key, "broken", 7))
    ours.restore(theirs.state())
    assert [file.path for file in ours.bad] == ["a", "b", "c"]
    assert ours.state() == [["b", "broken", 7], ["c", "broken", 7]]


def test_names_that_are_no_unicode_can_be_listed(tmp_path):
    Quarantine("set", [BadFile("caf\udce9.png", "broken")]).write(tmp_path / "bad.jsonl")
    (file,) = listed(tmp_path)
    assert file["path"].startswith("caf")
