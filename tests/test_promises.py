"""What docs/promises.md says and no other file's tests show, one promise after the other."""

from __future__ import annotations

import hashlib
import json
import re
import resource
import shutil
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import releases
from faults import shards as tiny_shards
from faults.product import CONFIG
from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.config import DataConfig
from matryoshka_diffusion.data import decoded
from matryoshka_diffusion.data.bad import PictureError
from matryoshka_diffusion.data.image import read_picture
from matryoshka_diffusion.data.loader import Loader
from matryoshka_diffusion.data.source import Source, array_source, open_source
from matryoshka_diffusion.models.find import find_model
from matryoshka_diffusion.nn.nested import renamed
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.train import checkpoint
from matryoshka_diffusion.train.signals import Stopped
from matryoshka_diffusion.train.trainer import Trainer, train
from picturing import chunk, png_bytes
from test_pipeline import text_model
from test_released import Evil, tensors
from tiny_run import TinyPictures, digests, encode, stop_at, there, tiny_config

SHORT = "train.stages=[{levels: 1, images: 16, batch_size: 8, lr: 0.001}]"


# --- 1: bit-exact resume -----------------------------------------------------------------------


def ten_pictures() -> Source:
    """An epoch of ten: steps of four end in the middle of it."""
    return array_source(
        name="ten",
        array=np.random.default_rng(0).integers(0, 256, (10, 16, 16, 3), dtype=np.uint8),
        keys=[f"picture-{n}" for n in range(10)],
        original_sides=[20 + n for n in range(10)],
        captions=[(f"caption {n}", f"words {n}") for n in range(10)],
    )


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What training uses, for each sample: number, key, t and a hash of its noise."""
    samples = []
    real = Trainer.step

    def step(self: Any, inputs: Any) -> Any:
        noise = [level.numpy().tobytes() for level in inputs.noise]
        whole = hashlib.sha256(b"".join(noise)).hexdigest()
        rows = zip(inputs.ids, inputs.keys, inputs.t.tolist(), strict=True)
        samples.extend((*row, whole) for row in rows)
        return real(self, inputs)

    monkeypatch.setattr(Trainer, "step", step)
    return samples


def cursor(folder: Path) -> dict[str, Any]:
    """Where a run is, without the clock."""
    path = there(checkpoint.newest(folder / "checkpoints"))
    return {**json.loads((path / "state.json").read_text("utf-8")), "seconds": 0}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_six_steps_and_six_are_twelve_in_an_epochs_middle_and_between_micro_batches(
    tmp_path, used, precision
):
    config = tiny_config(accumulate=2, precision=precision)

    def go(name: str, **options: Any) -> None:
        loader = Loader(ten_pictures(), config.train.seed, flip=True)
        train(config, loader, tmp_path / name, encode=encode, **options)

    go("whole")
    whole = list(used)
    used.clear()
    with pytest.raises(Stopped):
        go("parts", hooks=[stop_at(24)])
    assert len(used) == 24
    go("parts")
    assert used == whole
    assert [number for number, *_ in whole] == list(range(48))
    assert sorted(key for _, key, *_ in whole[:10]) == sorted(ten_pictures().keys)
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")
    assert cursor(tmp_path / "parts") == cursor(tmp_path / "whole")


def test_how_many_threads_decode_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(decoded, "CACHED_PICTURES", 0)
    tiny_shards.write_whole(tmp_path / "shards")
    config = tiny_config(stages=tiny_config().train.stages[1:])
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(decoded, "THREADS", threads)
        data = DataConfig(source="shards", path=str(tmp_path / "shards"))
        loader = Loader(open_source(data, 16), 0)
        train(config, loader, tmp_path / str(threads), encode=encode)
        found.append(digests(tmp_path / str(threads)))
    assert found[0] == found[1]


@pytest.fixture
def command(tmp_path, monkeypatch) -> list[str]:
    """A command line that trains two steps."""
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))
    tiny_shards.write_whole(tmp_path / "shards")
    given = ["--data", str(tmp_path / "shards"), "--out", str(tmp_path / "run"), "--set", SHORT]
    return ["train", str(CONFIG), *given, "--device", "cpu"]


@pytest.mark.filterwarnings("default:.* is ignored")  # the command shows it
def test_the_same_command_goes_on_and_never_starts_over(command, tmp_path, capsys):
    assert cli.main(command) == 0
    done = digests(tmp_path / "run")
    (only,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert cli.main(command) == 0
    assert digests(tmp_path / "run") == done
    (only / "manifest.json").unlink()
    before = sorted((path, path.stat().st_mtime_ns) for path in only.iterdir())
    capsys.readouterr()
    assert cli.main(command) == 1
    ignored, refused = capsys.readouterr().err.splitlines()
    assert ignored.endswith("is ignored: manifest.json is missing")
    assert refused.endswith("holds no complete checkpoint: remove it to start the run over")
    assert sorted((path, path.stat().st_mtime_ns) for path in only.iterdir()) == before


# --- 10: decoding is bounded -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "head"), [(b"zTXt", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0"), (b"iCCP", b"k\0\0")]
)
def test_no_chunk_of_a_png_unpacks_beyond_bounds(tmp_path, kind, head):
    packer = zlib.compressobj()
    packed = b"".join(packer.compress(bytes(2**20)) for _ in range(200)) + packer.flush()
    bomb = chunk(kind, head + packed)
    path = tmp_path / "a.png"
    path.write_bytes(png_bytes(16, 16, bytes(16 * 49), extra=bomb))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PictureError, match="corrupt"):
        read_picture(path, 16)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


# --- 12: untrusted files run nothing -----------------------------------------------------------


def test_no_command_and_no_function_runs_what_a_checkpoint_names(command, tmp_path, capsys):
    evil, canary = tmp_path / "x.pth", tmp_path / "canary"
    torch.save({"state_dict": tensors(), "args": Evil(canary)}, evil)
    data, out = command[3], str(tmp_path / "out")
    for arguments in (
        ["train", str(evil), "--data", data, "--out", out],
        [*command, "--init", str(evil)],
        ["eval", str(evil), "-n", "1"],
    ):
        assert cli.main(arguments) == 1, arguments
    for load in (Matryoshka.load, Matryoshka.from_pretrained, find_model):
        with pytest.raises(ValueError, match=re.escape(str(evil))):
            load(evil)
    assert not canary.exists()
    assert "Traceback" not in capsys.readouterr().err


def test_a_run_writes_safetensors_and_plain_text_only(command, tmp_path):
    few = ["train.preview_every_images=8", "sampling.steps=2"]
    assert cli.main([*command, *(word for setting in few for word in ("--set", setting))]) == 0
    written = {path.suffix for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert written == {".safetensors", ".json", ".jsonl", ".yaml", ".png"}


def test_damaged_model_folders_give_clean_errors_and_take_little(tmp_path):
    """Fuzzed headers and configs, in a process of its own that must not hang."""
    model = tmp_path / "model"
    net = text_model()
    checkpoint.export_weights(model, net.net.state_dict(), net.config)
    script = """
import random, resource, signal, sys
from pathlib import Path
from matryoshka_diffusion.models.find import find_model
from matryoshka_diffusion.pipeline import Matryoshka
folder = Path(sys.argv[1])
find_model(folder)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
chance, refused = random.Random(0), 0
for name, first, last in (("model.safetensors", 0, 4_000), ("config.json", 0, 2_000)):
    whole = (folder / name).read_bytes()
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(first, min(last, len(data)))] = chance.randrange(256)
        (folder / name).write_bytes(data)
        signal.alarm(20)
        try:
            Matryoshka.load(folder)
        except (ValueError, OSError) as error:
            refused += 1
            assert str(folder) in str(error), error
        signal.alarm(0)
    (folder / name).write_bytes(whole)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert after - before < 200 * 1024, (before, after)
assert refused > 150, refused
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(model)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# --- 13: a wrong checkpoint never half-loads ---------------------------------------------------


ONE_LEVEL = tiny_config(stages=tiny_config().train.stages[:1])


@pytest.fixture(scope="module")
def one_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after two steps."""
    folder = tmp_path_factory.mktemp("one") / "run"
    with pytest.raises(Stopped):
        train(ONE_LEVEL, TinyPictures(), folder, encode=encode, hooks=[stop_at(8)])
    return folder


@pytest.mark.parametrize("part", checkpoint.TENSORS)
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda tensors, name: tensors.pop(name), "is missing"),
        (lambda tensors, name: tensors.update({f"{name}s": torch.zeros(1)}), "not in the network"),
        (lambda tensors, name: tensors.update({name: torch.zeros(7, 7)}), r"is \(7, 7\), the net"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_a_part_of_a_checkpoint_that_does_not_fit_is_refused_whole(
    one_run, tmp_path, part, damage, told
):
    folder = shutil.copytree(one_run, tmp_path / "run")
    path = checkpoint.newest(folder / "checkpoints")
    assert path is not None
    found = checkpoint.read(path)
    changed = dict(getattr(found, part))
    damage(changed, next(name for name in changed if "weight" in name))
    saved = replace(found, **{part: changed}, state={**found.state, "images_seen": 9})
    checkpoint.save(folder / "checkpoints", saved, keep=1)
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(checkpoint.CheckpointError, match=f"{part} does not fit .*{told}"):
        train(ONE_LEVEL, TinyPictures(), folder, encode=encode)
    assert (folder / "metrics.jsonl").read_bytes() == before


# --- 16: same seed, same picture ---------------------------------------------------------------


def test_a_picture_does_not_depend_on_the_memory_format_or_its_place():
    model = text_model()
    plain = model.sample(["red", "blue thing", "red"], n=2, seed=3)
    model.net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    packed = model.sample(["red", "blue thing", "red"], n=2, seed=3)
    for one, other in zip(plain.levels, packed.levels, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1
    alone = model.sample("red", n=1, seed=8)
    assert plain.seeds[5] == 8
    for many, one in zip(plain.levels, alone.levels, strict=True):
        assert np.abs(many[5].astype(int) - one[0]).max() <= 1


# --- 18: what a release has saved --------------------------------------------------------------


@pytest.mark.parametrize("release", sorted(path.name for path in releases.FOLDER.iterdir()))
def test_a_run_of_a_release_loads_and_goes_on(release, tmp_path):
    run = releases.rebuilt(release, tmp_path / "run")
    weights, config = find_model(run)
    assert config.name == "tiny"
    ema = load_file(run / "checkpoints" / f"{releases.SAVED_AT:010d}" / "ema.safetensors")
    assert weights.keys() == {renamed(name) for name in ema}
    assert all(torch.equal(weights[renamed(name)], value) for name, value in ema.items())
    expected = json.loads((releases.FOLDER / release / "losses.json").read_text("utf-8"))
    assert releases.go_on(run) == pytest.approx(expected, rel=1e-3)
    assert (run / "model" / "model.safetensors").exists()
