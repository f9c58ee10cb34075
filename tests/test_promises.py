"""Promises of docs/promises.md that no other file tests."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import resource
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from faults import shards
from faults.product import CONFIG
from matryoshka_diffusion import tensorfile
from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.config import DataConfig, EncoderConfig
from matryoshka_diffusion.configfile import changed, load_config, to_yaml
from matryoshka_diffusion.data import decoded
from matryoshka_diffusion.data.image import read_picture
from matryoshka_diffusion.data.loader import Loader
from matryoshka_diffusion.data.source import open_source
from matryoshka_diffusion.metrics.inception import Inception
from matryoshka_diffusion.metrics.networks import CLIP
from matryoshka_diffusion.models.diffusers import MDMPipeline
from matryoshka_diffusion.models.find import find_model
from matryoshka_diffusion.models.released import load_released
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.text.encoder import load_encoder
from matryoshka_diffusion.training import checkpoint
from matryoshka_diffusion.training.weights import export_weights
from picturing import chunk, noise, png_bytes, save
from ranks import fork
from test_pipeline import text_model
from test_released import Evil, tensors
from tiny_run import digests, there

SHORT = "train.stages=[{levels: 1, images: 16, batch_size: 8, lr: 0.001}]"


# --- commands ----------------------------------------------------------------------------------


def test_how_many_threads_decode_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(decoded, "CACHED_PICTURES", 0)
    shards.write_whole(tmp_path / "shards")
    batches = []
    for threads in (1, 3):
        monkeypatch.setattr(decoded, "THREADS", threads)
        data = DataConfig(source="shards", path=str(tmp_path / "shards"))
        batches.append(Loader(open_source(data, 16), 0).batch(range(100)))
    assert torch.equal(batches[0].picture, batches[1].picture)
    assert batches[0].keys == batches[1].keys


@pytest.fixture
def command(tmp_path, monkeypatch) -> list[str]:
    """A command line that trains two steps."""
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))
    shards.write_whole(tmp_path / "shards")
    words = ["--data", str(tmp_path / "shards"), "--out", str(tmp_path / "run")]
    settings = [SHORT, "train.preview_every_images=8", "sampling.steps=2"]
    words += [word for setting in settings for word in ("--set", setting)]
    return ["train", str(CONFIG), *words, "--device", "cpu"]


@pytest.mark.filterwarnings("default:.* is ignored")  # the command shows it
def test_the_same_command_goes_on_and_never_starts_over(command, tmp_path, capsys):
    assert cli.main(command) == 0
    done = digests(tmp_path / "run")
    written = {path.suffix for path in (tmp_path / "run").rglob("[!.]*") if path.is_file()}
    assert written == {".safetensors", ".json", ".jsonl", ".yaml", ".png"}, "no pickles"
    (only,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert cli.main(command) == 0
    assert digests(tmp_path / "run") == done
    (only / "manifest.json").unlink()
    before = sorted((path, path.stat().st_mtime_ns) for path in only.iterdir())
    capsys.readouterr()
    assert cli.main(command) == 1
    ignored, refused = capsys.readouterr().err.splitlines()
    assert ignored.endswith("is ignored: manifest.json is missing")
    assert re.search("no complete checkpoint: remove it", refused)
    assert sorted((path, path.stat().st_mtime_ns) for path in only.iterdir()) == before


@pytest.mark.filterwarnings("default:.* goes on with other data")  # the command shows it
def test_a_run_goes_on_with_its_own_data_wherever_that_is_and_with_no_other(tmp_path, capsys):
    data, run = tmp_path / "data", tmp_path / "run"
    for n in range(8):
        save(data / f"class{n % 4}" / f"{n}.png", noise(16, seed=n))
    words = ["--out", str(run), "--device", "cpu", "--set", SHORT]
    assert cli.main(["train", str(CONFIG), "--data", str(data), *words]) == 0
    weights = digests(run)["model.safetensors"]
    moved = data.rename(tmp_path / "moved")
    go_on = ["train", str(run), "--data", str(moved), "--device", "cpu"]
    assert cli.main(go_on) == 0
    assert digests(run)["model.safetensors"] == weights
    assert load_config(run / "config.yaml").data.path == str(moved)
    (moved / "class0" / "0.png").rename(moved / "class0" / "x.png")
    capsys.readouterr()
    assert cli.main(go_on) == 2
    assert re.search(r"other data: keys is .*--data-changed", capsys.readouterr().err)
    save(moved / "class1" / "9.png", noise(16, seed=9))
    assert cli.main(go_on) == 2
    assert re.search(r"other data: images is 8 there, 9 now", capsys.readouterr().err)
    assert cli.main([*go_on, "--data-changed"]) == 0
    assert "goes on with other data: images is 8 there, 9 now" in capsys.readouterr().err
    first, *_, last = json.loads((run / "environment.json").read_text("utf-8"))
    assert (first["data"]["images"], last["data"]["images"]) == (8, 9)
    assert cli.main(go_on) == 0, "it is the data of the run now"


@pytest.mark.filterwarnings("default:.* does not say which data")
def test_checkpoints_know_the_data_where_the_config_does_not(tmp_path, capsys):
    """As a config of an earlier version, or one from which somebody removed the identity."""
    data, run = tmp_path / "data", tmp_path / "run"
    for n in range(8):
        save(data / f"class{n % 4}" / f"{n}.png", noise(16, seed=n))
    words = ["--out", str(run), "--device", "cpu", "--set", SHORT]
    assert cli.main(["train", str(CONFIG), "--data", str(data), *words]) == 0
    config, go_on = run / "config.yaml", ["train", str(run), "--device", "cpu"]
    forgetful = to_yaml(changed(load_config(config), [("data.identity", None)]))
    save(data / "class1" / "9.png", noise(16, seed=9))
    config.write_text(forgetful)
    assert cli.main(go_on) == 2
    assert re.search(r"other data: images is 8 there, 9 now", capsys.readouterr().err)
    assert config.read_text() == forgetful
    for path in (run / "checkpoints").glob("*"):
        rewrite_state(path, lambda state: state["config"]["data"].pop("identity"))
    assert cli.main(go_on) == 0
    assert "does not say which data it was trained on" in capsys.readouterr().err
    assert there(load_config(config).data.identity).images == 9
    for path in (run / "checkpoints").glob("*"):
        rewrite_state(path, lambda state: state["config"].clear())
    assert cli.main(go_on) == 1
    assert re.search(r"state\.json: config: .*remove .*checkpoints", capsys.readouterr().err)


def rewrite_state(path, edit):
    """Edit the state of a checkpoint in place, and its manifest, too."""
    state = json.loads((path / checkpoint.STATE).read_bytes())
    edit(state)
    data = json.dumps(state).encode()
    (path / checkpoint.STATE).write_bytes(data)
    manifest = json.loads((path / checkpoint.MANIFEST).read_bytes())
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest[checkpoint.STATE] = entry
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))


# --- decoding is bounded -----------------------------------------------------------------------


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
    assert not read_picture(path, 16).pixels.any()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


# --- untrusted files run nothing ---------------------------------------------------------------


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


def load_damaged(folder: Path) -> None:
    """Load a model folder with fuzzed headers and configs; fail if that takes long or much."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    chance, refused, unnamed = random.Random(0), 0, 0
    for name, size in (("model.safetensors", 4_000), ("config.json", 2_000)):
        original = (folder / name).read_bytes()
        for _ in range(60):
            data = bytearray(original)
            for _ in range(chance.randint(1, 3)):
                data[chance.randrange(min(size, len(data)))] = chance.randrange(256)
            (folder / name).write_bytes(data)
            signal.alarm(60)
            try:
                Matryoshka.load(folder)
            except (ValueError, OSError) as error:
                refused += 1
                unnamed += str(folder) not in str(error)
            signal.alarm(0)
        (folder / name).write_bytes(original)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 200 * 1024, (before, after)
    assert refused > 60
    assert unnamed == 0
    os._exit(7)


def test_damaged_model_folders_give_clean_errors_and_take_little(tmp_path):
    """In a process of its own, which an alarm ends if it hangs."""
    net = text_model()
    export_weights(tmp_path / "model", net.net.state_dict(), net.config)
    assert fork(load_damaged, tmp_path / "model") == 7


@pytest.mark.parametrize(
    "read",
    [
        Matryoshka.load,
        lambda folder: load_released(folder / "model.safetensors"),
        lambda folder: checkpoint.Stored([folder / "model.safetensors"]),
        lambda folder: Inception(folder / "model.safetensors"),
        lambda folder: CLIP(folder),
        lambda folder: load_encoder(EncoderConfig(name="t5", path=str(folder))),
        lambda folder: MDMPipeline.from_pretrained(folder.parent),
    ],
)
def test_no_header_of_a_model_is_read_before_its_length_is_judged(read, tmp_path, monkeypatch):
    net = text_model()
    export_weights(tmp_path / "model", net.net.state_dict(), net.config)
    monkeypatch.setattr(tensorfile, "LARGEST_HEADER", 64)
    with pytest.raises((ValueError, OSError), match=r"model\.safetensors: .*header"):
        read(tmp_path / "model")


# --- same seed, same picture -------------------------------------------------------------------


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
