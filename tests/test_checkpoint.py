"""Checkpoints appear whole or not at all, and a wrong one is refused whole."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from matryoshka_diffusion.configfile import from_dict
from matryoshka_diffusion.files import BrokenFile
from matryoshka_diffusion.tensorfile import read_weights
from matryoshka_diffusion.training.checkpoint import (
    FILES,
    MANIFEST,
    CheckpointError,
    Snapshot,
    Stored,
    newest,
    read,
    save,
)
from matryoshka_diffusion.training.weights import check_same, export_weights, load_weights
from tiny_run import there, tiny_config


def snapshot(images_seen: int) -> Snapshot:
    generator = torch.Generator().manual_seed(images_seen)
    weights = {"a.weight": torch.randn(3, 4, generator=generator), "a.bias": torch.zeros(3)}
    return Snapshot(
        state={"images_seen": images_seen, "steps": 7, "seconds": 0.1, "config": {}},
        weights=weights,
        ema={name: value + 1 for name, value in weights.items()},
        optimizer={"a.weight.step": torch.tensor(7.0), "a.weight.exp_avg": torch.ones(3, 4)},
    )


def assert_equal(one: Snapshot, other: Snapshot) -> None:
    assert one.state == other.state
    for part in ("weights", "ema", "optimizer"):
        mine, theirs = getattr(one, part), getattr(other, part)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_is_read(tmp_path):
    path = save(tmp_path / "checkpoints", snapshot(640), keep=2)
    assert path == tmp_path / "checkpoints" / "0000000640"
    assert names(path) == sorted([*FILES, MANIFEST])
    assert newest(path.parent) == path
    assert_equal(read(path), snapshot(640))


def test_a_tensor_is_read_on_access_and_belongs_to_the_caller(tmp_path):
    """Else a run that copies them holds them twice while it resumes."""
    path = save(tmp_path, snapshot(3), keep=1)
    weights = read(path).weights
    first = weights["a.weight"].fill_(5)
    assert not torch.equal(weights["a.weight"], first)
    with pytest.raises(KeyError, match="no such name"):
        weights["no such name"]
    (path / "weights.safetensors").unlink()
    assert "a.weight" in weights
    assert "no such name" not in weights
    with pytest.raises(FileNotFoundError):
        weights["a.weight"]


def test_a_file_that_ends_too_early_or_holds_other_types_is_damaged(tmp_path):
    path = tmp_path / "x.safetensors"
    for value in (torch.ones(3, 4), torch.ones(2, dtype=torch.float8_e4m3fn)):
        save_file({"a": value}, path)
        stored = Stored([path])
        if value.dtype == torch.float32:
            os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(BrokenFile, match=str(path)):
            stored["a"]


def test_tensors_of_any_layout_are_saved(tmp_path):
    weights = {"w": torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last)}
    path = save(
        tmp_path,
        replace(snapshot(1), weights=weights, ema={"w": weights["w"].mT}, optimizer={}),
        keep=1,
    )
    assert torch.equal(read(path).weights["w"], weights["w"])
    assert torch.equal(read(path).ema["w"], weights["w"].mT)


def test_only_the_newest_are_kept_and_none_is_written_again(tmp_path):
    assert newest(tmp_path / "absent") is None
    (tmp_path / ".0000000008.tmp").mkdir()  # a save that was killed
    assert newest(tmp_path) is None
    for images_seen in (8, 16, 100, 24000):
        path = save(tmp_path, snapshot(images_seen), keep=2)
    assert names(tmp_path) == ["0000000100", "0000024000"]
    before = path.stat().st_ino
    save(tmp_path, snapshot(24000), keep=2)
    assert path.stat().st_ino == before


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [Path.unlink, truncate, flip_a_bit])
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_torn_checkpoint_is_ignored(tmp_path, name, damage):
    good, torn = (save(tmp_path, snapshot(n), keep=2) for n in (8, 16))
    damage(torn / name)
    with pytest.warns(UserWarning, match="0000000016 is ignored"):
        assert newest(tmp_path) == good
    # The run goes on from there and comes to the torn one's place again.
    assert save(tmp_path, snapshot(16), keep=2) == torn
    assert newest(tmp_path) == torn
    assert_equal(read(torn), snapshot(16))


@pytest.mark.parametrize(
    ("edit", "key"),
    [
        (lambda state: [], "dictionary"),
        (lambda state: {}, "images_seen"),
        (lambda state: state | {"images_seen": -5}, "images_seen"),
        (lambda state: state | {"images_seen": "8"}, "images_seen"),
        (lambda state: state | {"images_seen": 16}, "images_seen"),
        (lambda state: state | {"images_seen": 10**30}, "images_seen"),
        (lambda state: state | {"steps": 7.5}, "steps"),
        (lambda state: state | {"skipped": None}, "skipped"),
        (lambda state: state | {"seconds": float("nan")}, "seconds"),
        (lambda state: state | {"scale": {"factor": 0.0}}, "scale.factor"),
        (lambda state: state | {"scale": 2.0}, "scale"),
        (lambda state: state | {"config": []}, "config"),
        (lambda state: state | {"bad": [["a.png", 3]]}, "bad"),
        (lambda state: state | {"bad": {}}, "bad"),
        (lambda state: state | {"step": 7}, "step"),
    ],
)
def test_a_state_that_is_none_is_named_although_its_manifest_fits(edit, key, tmp_path):
    path = save(tmp_path, snapshot(8), keep=1) / "state.json"
    data = json.dumps(edit(json.loads(path.read_bytes()))).encode()
    path.write_bytes(data)
    manifest = json.loads((path.parent / MANIFEST).read_bytes())
    manifest[path.name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path.parent / MANIFEST).write_text(json.dumps(manifest))
    assert newest(tmp_path) == path.parent
    with pytest.raises(CheckpointError, match=f"{path}: .*{key}.*remove {path.parent}") as error:
        read(path.parent)
    assert "\n" not in str(error.value)


def test_a_torn_checkpoint_never_displaces_a_complete_one(tmp_path):
    torn = save(tmp_path, snapshot(100), keep=1)
    truncate(torn / FILES[0])
    good = save(tmp_path, snapshot(50), keep=1)
    with pytest.warns(UserWarning, match="is ignored"):
        assert newest(tmp_path) == good


def test_only_torn_checkpoints_are_an_error_not_a_fresh_start(tmp_path):
    (save(tmp_path, snapshot(8), keep=1) / MANIFEST).unlink()
    with (
        pytest.warns(UserWarning, match=r"manifest.json is missing"),
        pytest.raises(CheckpointError, match="no complete checkpoint"),
    ):
        newest(tmp_path)


class Killed(BaseException):
    """kill -9, as far as it can be had within a process."""


def kill_after(patch: pytest.MonkeyPatch, moment: int) -> None:
    """Let so many steps happen on the disk, then raise `Killed`, and let nothing happen after."""
    left = moment

    def counted(real: Callable[..., Any], raises: bool) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left
            if left == 0 and raises:
                raise Killed
            left -= raises
            return real(*args, **options) if left else None

        return call

    for name in ("fsync", "replace", "rename", "mkdir"):
        patch.setattr(os, name, counted(getattr(os, name), raises=True))
    patch.setattr(shutil, "rmtree", counted(shutil.rmtree, raises=False))
    patch.setattr(Path, "unlink", counted(Path.unlink, raises=False))


def test_killed_at_any_moment_of_a_save_the_last_checkpoint_stands(tmp_path, monkeypatch):
    for moment in range(1, 100):
        folder = tmp_path / str(moment)
        save(folder, snapshot(8), keep=1)
        with monkeypatch.context() as patch:
            kill_after(patch, moment)
            try:
                save(folder, snapshot(16), keep=1)
                whole = True
            except Killed:
                whole = False
        last = there(newest(folder))
        assert last.name == "0000000016" or not whole
        assert_equal(read(last), snapshot(int(last.name)))
        save(folder, snapshot(24), keep=1)
        assert names(folder) == ["0000000024"]
        if whole:
            break
    assert moment > 10, "files, folders and the rename are moments of their own"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_any_failure_of_the_disk_names_path_and_reason(tmp_path, monkeypatch, code):
    good = save(tmp_path, snapshot(8), keep=1)

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        message = f"{tmp_path}/0000000016 of 172 bytes: .*{os.strerror(code)}"
        with pytest.raises(OSError, match=message) as caught:
            save(tmp_path, snapshot(16), keep=1)
    assert caught.value.errno == code
    assert names(tmp_path) == [good.name]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/checkpoints/0000000008"):
        save(tmp_path / "file" / "checkpoints", snapshot(8), keep=1)


def test_integers_are_no_weights_and_floats_of_any_size_are(tmp_path):
    net = torch.nn.Linear(2, 2)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        load_weights(net, {name: x.to(dtype) for name, x in net.state_dict().items()}, where="a")
    integers = {name: x.to(torch.int32) for name, x in net.state_dict().items()}
    save_file(integers, tmp_path / "x.safetensors")
    for weights in (integers, Stored([tmp_path / "x.safetensors"])):
        with pytest.raises(CheckpointError, match=r"here .*weight is [iI]"):
            load_weights(net, weights, where="here")
    with pytest.raises(ValueError, match=r"x\.safetensors: .*int32"):
        read_weights(tmp_path / "x.safetensors")


def test_weights_that_do_not_fit_are_refused_and_change_nothing():
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    weights = {name: torch.full_like(value, 9.0) for name, value in before.items()}
    weights["0.weight"], weights["9.bias"] = torch.zeros(2, 2), weights.pop("0.bias")
    problems = r"0.bias is missing; 9.bias is not in .*; 0.weight is \(2, 2\), the .* \(2, 3\);"
    with pytest.raises(CheckpointError, match=f"here .*{problems}"):
        load_weights(net, weights, where="here")
    with pytest.raises(CheckpointError, match="and 1 more"):
        check_same(before, {}, where="here")
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exported_weights_and_config_are_read_back(tmp_path, dtype):
    weights = snapshot(1).weights
    export_weights(tmp_path / "model", weights, tiny_config(), dtype=dtype)
    assert names(tmp_path / "model") == ["config.json", "model.safetensors"]
    exported = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(exported[name], value.to(dtype)) for name, value in weights.items())
    text = (tmp_path / "model" / "config.json").read_text("utf-8")
    assert from_dict(json.loads(text)) == tiny_config()
