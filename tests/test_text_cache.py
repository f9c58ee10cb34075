"""What is stored is what was encoded, once, in any order of events; the rest is made on the fly."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from matryoshka_diffusion.cli.main import main as cli
from matryoshka_diffusion.cli.terminal import duration, size_text
from matryoshka_diffusion.config import EncoderConfig
from matryoshka_diffusion.draw.grid import save_png
from matryoshka_diffusion.text import feature_cache as cache_module
from matryoshka_diffusion.text.encoder import HiddenStates, load_encoder
from matryoshka_diffusion.text.feature_cache import FeatureCache

CAPTIONS = ["red apple", "", "a green apple on the table"]


class Counting(HiddenStates):
    """An encoder that remembers what it was asked: one row of 3 numbers for each letter and one.

    Its numbers are whole and small, so that bf16 holds them exactly.
    """

    key, width, max_tokens = "counting", 3, 20

    def __init__(self, dtype=torch.float32):
        self.dtype = dtype
        self.asked, self.rested = [], 0

    def __call__(self, captions):
        self.asked += captions
        return [self.features(caption) for caption in captions]

    def token_counts(self, captions):
        return [min(len(caption) + 1, self.max_tokens + 1) for caption in captions]

    def rest(self):
        self.rested += 1

    @staticmethod
    def features(caption):
        codes = [float(ord(character) % 128) for character in f"{caption}."[:20]]
        return torch.tensor(codes)[:, None] * torch.tensor([1.0, 0.5, -1.0])


def right(captions, features):
    expected = [Counting.features(caption) for caption in captions]
    return all(
        x.dtype == torch.float32 and torch.equal(x, y)
        for x, y in zip(features, expected, strict=True)
    )


def filled(folder, captions, dtype=torch.float32):
    """A cache that a process before this one has filled, behind an encoder of our own."""
    FeatureCache(Counting(dtype), folder).add(captions)
    return FeatureCache(Counting(dtype), folder)


def asked_of(cache) -> Counting:
    """The encoder of a cache, for what it was asked."""
    assert isinstance(cache.encoder, Counting)
    return cache.encoder


def chunks(folder):
    return sorted(folder.glob("*.safetensors"))


# --- storing and reading ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_stored_is_read_and_not_encoded(tmp_path, dtype):
    cache = filled(tmp_path, ["a", "bb", "", "a"], dtype)
    asked = ["", "bb", "a", "bb"]
    assert right(asked, cache(asked))
    assert asked_of(cache).asked == []
    assert len(cache.store) == 3
    assert cache([]) == []
    assert (cache.key, cache.width) == ("counting", 3)


def test_what_was_not_stored_is_encoded_once_a_batch_and_not_stored(tmp_path):
    cache = filled(tmp_path, ["a", ""])
    asked = ["new", "a", "new", "", "newer"]
    assert right(asked, cache(asked))
    assert asked_of(cache).asked == ["new", "newer"]
    assert right(["new"], cache(["new"]))
    assert asked_of(cache).asked == ["new", "newer", "new"]
    assert len(chunks(tmp_path)) == 1


def test_a_caption_is_stored_once_and_the_encoder_then_rests(tmp_path):
    cache = FeatureCache(Counting(), tmp_path)
    cache.add(["b", "a", "", "b", "ccc"])
    cache.add(["ccc", "new", "a"])
    assert sorted(asked_of(cache).asked) == ["", "a", "b", "ccc", "new"]
    assert asked_of(cache).rested == 2
    cache.add(["new"])
    assert len(chunks(tmp_path)) == 2


def test_features_are_ragged_on_disk(tmp_path):
    cache = filled(tmp_path, ["a" * n for n in range(20)], torch.bfloat16)
    tokens = sum(range(1, 21))
    assert tokens * 3 * 2 < cache.store.bytes < tokens * 3 * 2 + 20 * 44 + 600


@pytest.mark.parametrize("limit", ["captions", "bytes", "seconds"])
def test_many_captions_are_split_into_batches_and_chunks(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(cache_module, "_BATCH", 4)
    if limit == "captions":
        monkeypatch.setattr(cache_module, "_CHUNK", 10)
    elif limit == "bytes":
        monkeypatch.setattr(cache_module, "_BYTES", 8 * 10 * 3 * 4)  # two batches of 10 letters
    else:
        monkeypatch.setattr(cache_module, "_SECONDS", 0.0)
    captions = [f"picture {n:02}"[-9:] for n in range(25)]
    done = []
    cache = FeatureCache(Counting(), tmp_path)
    cache.add(captions, lambda *progress: done.append(progress))
    assert len(chunks(tmp_path)) == {"captions": 3, "bytes": 4, "seconds": 7}[limit]
    assert done[-1] == (25, 25)
    assert [count for count, _ in done] == sorted(count for count, _ in done)
    assert right(captions[::-1], cache(captions[::-1]))
    assert right(captions, FeatureCache(Counting(), tmp_path)(captions))


def test_captions_of_like_length_are_encoded_together(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_BATCH", 2)
    cache = FeatureCache(Counting(), tmp_path)
    cache.add(["long one", "a", "long two", "b"])
    assert asked_of(cache).asked == ["a", "b", "long one", "long two"]


def test_two_caches_may_fill_one_folder(tmp_path):
    one, other = FeatureCache(Counting(), tmp_path), FeatureCache(Counting(), tmp_path)
    for cache in (one, other):
        cache.add(["a", "b"])
        assert right(["a", "b"], cache(["a", "b"]))
    one.add(["c"])
    other.add(["b", "c", "d"])  # it has not seen the one's new chunk
    again = FeatureCache(Counting(), tmp_path)
    assert right(["d", "c", "b", "a"], again(["d", "c", "b", "a"]))
    assert asked_of(again).asked == []
    assert len(again.store) == 4


def test_the_default_folder_belongs_to_the_encoder(tmp_path, monkeypatch):
    monkeypatch.setenv("MDM_CACHE", str(tmp_path))
    FeatureCache(Counting()).add(["a"])
    assert len(chunks(tmp_path / "text" / "counting")) == 1


@pytest.mark.parametrize(
    "damage", ["truncated", "empty", "garbage", "no captions", "other width", "too few", "type"]
)
def test_a_corrupt_chunk_is_made_again_with_a_warning(tmp_path, damage):
    FeatureCache(Counting(), tmp_path).add(["keep"])
    (keep,) = chunks(tmp_path)
    FeatureCache(Counting(), tmp_path).add(["a", "b"])
    (broken,) = set(chunks(tmp_path)) - {keep}
    whole = broken.read_bytes()
    offsets = torch.tensor([0, 2, 4])
    other = {"values": torch.zeros(4, 2), "offsets": offsets}
    fitting = {"values": torch.zeros(4, 3), "offsets": offsets}
    names = {"captions": f'["{"0" * 32}", "{"1" * 32}"]'}
    broken.write_bytes(
        {
            "truncated": whole[:-1],
            "empty": b"",
            "garbage": b"\xff" * 64,
            "no captions": save(other),
            "other width": save(other, names),
            "too few": save(fitting, {"captions": f'["{"0" * 32}"]'}),
            "type": save({**fitting, "values": torch.zeros(4, 3).half()}, names),
        }[damage]
    )
    with pytest.warns(UserWarning, match=r"safetensors is corrupt and is made again"):
        cache = FeatureCache(Counting(), tmp_path)
    cache.add(["a", "keep", "b"])
    assert right(["a", "keep", "b"], cache(["a", "keep", "b"]))
    assert sorted(asked_of(cache).asked) == ["a", "b"]
    assert broken.read_bytes() == whole


def test_a_chunk_that_another_process_removes_is_passed_over(tmp_path, monkeypatch):
    FeatureCache(Counting(), tmp_path).add(["a"])
    (path,) = chunks(tmp_path)
    data = path.read_bytes()
    gone = path.with_name("0.safetensors")
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda *given: [*glob(*given), gone])
    assert len(FeatureCache(Counting(), tmp_path).store) == 1
    path.write_bytes(data[:-1])
    monkeypatch.setattr(warnings, "warn", lambda *_, **__: path.unlink())
    assert len(FeatureCache(Counting(), tmp_path).store) == 0


# --- interruptions ---------------------------------------------------------------------------

CAPTIONS_TO_KILL = [f"caption {n:02}" for n in range(40)]

KILLED = """
import os, signal, sys
from pathlib import Path
from matryoshka_diffusion import files
from matryoshka_diffusion.text import feature_cache as cache
from test_text_cache import CAPTIONS_TO_KILL, Counting

cache._BATCH, cache._CHUNK = 5, 10
count = 0

def killing(real):
    def call(*arguments):
        global count
        count += 1
        if count == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)
    return call

if sys.argv[2] == "encoding":
    Counting.__call__ = killing(Counting.__call__)
else:
    setattr(files.os, sys.argv[2], killing(getattr(os, sys.argv[2])))
cache.FeatureCache(Counting(), Path(sys.argv[1])).add(CAPTIONS_TO_KILL)
"""


@pytest.mark.parametrize(
    ("at", "time", "whole"),
    [("encoding", 6, 2), ("replace", 3, 2), ("fsync", 3, 1)],  # two fsyncs a chunk
)
def test_kill_9_costs_one_chunk_at_most(tmp_path, at, time, whole):
    command = [sys.executable, "-c", KILLED, str(tmp_path), at, str(time)]
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, check=False)
    assert killed.returncode == -signal.SIGKILL
    cache = FeatureCache(Counting(), tmp_path)
    assert len(cache.store) == whole * 10
    cache.add(CAPTIONS_TO_KILL)
    assert len(asked_of(cache).asked) == 40 - whole * 10
    assert right(CAPTIONS_TO_KILL, FeatureCache(Counting(), tmp_path)(CAPTIONS_TO_KILL))


def test_an_error_keeps_the_chunks_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_CHUNK", 2)

    class Failing(Counting):
        def __call__(self, captions):
            if "c" in captions:
                raise RuntimeError("out of memory")
            return super().__call__(captions)

    cache = FeatureCache(Failing(), tmp_path)
    with pytest.raises(RuntimeError, match="out of memory"):
        cache.add(["a", "b", "c", "d"])
    assert asked_of(cache).rested == 1
    assert right(["a", "b"], filled(tmp_path, [])(["a", "b"]))


def test_a_disk_that_fills_up_is_loud_and_keeps_the_chunks_before(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_CHUNK", 2)
    cache = FeatureCache(Counting(), tmp_path)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill_after_the_first(done, _):
        if done == 4:
            monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(OSError, match=rf"{tmp_path}/.*No space left.* bytes needed, .* free"):
        cache.add(["a", "b", "c", "d"], fill_after_the_first)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    assert right(["a", "b"], filled(tmp_path, [])(["a", "b"]))


def test_remains_of_a_killed_process_are_removed_when_they_are_old(tmp_path):
    old, new = tmp_path / ".x.safetensors.1.tmp", tmp_path / ".y.safetensors.2.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    FeatureCache(Counting(), tmp_path).add(["a"])
    assert new.exists()
    assert not old.exists()


# --- saying what it takes --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_size_is_known_before_it_starts(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(cache_module, "_SAMPLE", 500)
    lengths = np.random.default_rng(0).integers(0, 30, 3_000)
    captions = [f"{n:04}" + "x" * length for n, length in enumerate(lengths)]
    cache = FeatureCache(Counting(dtype), tmp_path)
    cache.add(captions[:1_000])
    before = cache.store.bytes
    plan = cache.estimate([*captions, *captions])
    assert plan.captions == 3_000
    assert plan.missing == captions[1_000:]
    assert plan.cut == pytest.approx((lengths[1_000:] > 15).mean(), abs=0.05)
    cache.add(plan.missing)
    assert plan.needed == pytest.approx(cache.store.bytes - before, rel=0.05)
    full = cache.estimate(captions)
    assert (full.missing, full.needed, full.cut) == ([], 0, 0.0)


def test_the_time_is_that_of_a_sample_of_like_captions(tmp_path, monkeypatch):
    clock = [0.0]

    class Slow(Counting):
        def __call__(self, captions):
            clock[0] += sum(map(len, captions))
            return super().__call__(captions)

    monkeypatch.setattr(cache_module.time, "perf_counter", lambda: clock[0])
    captions = [f"{n:03}" + "x" * (n % 11) for n in range(990)]  # 8 letters each on average
    cache = FeatureCache(Slow(), tmp_path)
    assert cache.seconds(captions) == pytest.approx(8 * 990, rel=0.05)
    assert len(asked_of(cache).asked) == 65
    few = FeatureCache(Slow(), tmp_path / "few")
    assert few.seconds(captions[:20]) > 0
    assert len(asked_of(few).asked) == 3, "a tenth of them, and the first"


def test_a_disk_that_is_too_small_is_refused_before(tmp_path, monkeypatch, capsys):
    save_png(np.zeros((64, 64, 3), np.uint8), tmp_path / "a.png", None)
    (tmp_path / "a.txt").write_text("nothing at all")
    usage = type(shutil.disk_usage(tmp_path))(1000, 990, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert cli(["embed", "folder-64", "--data", str(tmp_path)]) == 1
    assert re.search(
        r"do not fit into .*needed, 10 bytes free; .*MDM_CACHE", capsys.readouterr().err
    )


def test_sizes_and_times_are_readable():
    assert [size_text(n) for n in (12, 3_456, 7_890_000, 410_000_000_000)] == [
        "12 bytes", "3.46 kB", "7.89 MB", "410.0 GB",
    ]  # fmt: skip
    assert [size_text(n) for n in (999, 999_499, 999_600, 999_600_000)] == [
        "999 bytes", "999 kB", "1 MB", "1.0 GB",
    ]  # fmt: skip
    assert [duration(n) for n in (4.2, 600.0, 7_200.0)] == ["4 s", "10 min", "2.0 hours"]


# --- with real encoders ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["minilm", "t5"])
@pytest.mark.parametrize("half", [False, True])
def test_cached_features_are_those_on_the_fly(name, half, tiny_t5, tmp_path):
    """Bit for bit in the type that is stored, where the batch is the same."""
    path = str(tiny_t5) if name == "t5" else None
    encoder = load_encoder(EncoderConfig(name=name, path=path), half=half, stay=True)
    stored = torch.bfloat16 if half and name == "t5" else torch.float32
    assert encoder.dtype == stored
    fly = FeatureCache(encoder, tmp_path)(sorted(CAPTIONS, key=len))
    cache = FeatureCache(encoder, tmp_path)
    cache.add(CAPTIONS)
    for cached, direct in zip(cache(sorted(CAPTIONS, key=len)), fly, strict=True):
        assert torch.equal(cached, direct)
    (alone,) = encoder(CAPTIONS[:1])
    tolerance = 0.02 if stored == torch.bfloat16 else 1e-5
    torch.testing.assert_close(cache(CAPTIONS)[0], alone, rtol=tolerance, atol=tolerance)


def test_another_precision_or_length_has_another_folder(tiny_t5):
    configs = [EncoderConfig(name="t5", path=str(tiny_t5), max_tokens=n) for n in (16, 32)]
    encoders = [load_encoder(config, half=half) for config in configs for half in (False, True)]
    assert len({FeatureCache(encoder).folder for encoder in encoders}) == 4
