"""Codecs: codes and back, found and refused, stored to the bit, in training and in sampling."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.cli.info import describe
from matryoshka_diffusion.codec import (
    WEIGHTS,
    CodeCache,
    LatentLoader,
    codec_folder,
    fingerprint,
    load_autoencoder,
    store_codes,
)
from matryoshka_diffusion.config import (
    CodecConfig,
    ConfigError,
    DataConfig,
    LevelConfig,
    ModelConfig,
    RunConfig,
    SamplingConfig,
    StageConfig,
    TrainConfig,
    UsageError,
)
from matryoshka_diffusion.configfile import override
from matryoshka_diffusion.data.loader import Loader
from matryoshka_diffusion.data.source import open_source
from matryoshka_diffusion.eval.sweep import averaged
from matryoshka_diffusion.models.diffusers import write_diffusers
from matryoshka_diffusion.models.find import find_model
from matryoshka_diffusion.models.save import average_model, export_model, without_paths
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.pyramid import to_uint8
from matryoshka_diffusion.runs import prepare as job
from matryoshka_diffusion.samplers import last
from matryoshka_diffusion.training.trainer import train
from matryoshka_diffusion.training.weights import export_weights
from picturing import save_noise

SIDES = (4, 8)
"""Of codes; pictures have four times as many pixels."""


def on_codes(
    codec: Path | None, *, factor: int = 4, channels: int = 4, **data: object
) -> RunConfig:
    """A small run on codes of 4 x 4 and 8 x 8."""
    inner = LevelConfig(side=4, widths=(32,), blocks=(1,), attention=(0,))
    outer = LevelConfig(side=8, widths=(32, 32), blocks=(0, 0), attention=(0, 0))
    return RunConfig(
        name="coded",
        model=ModelConfig(
            levels=(inner, outer),
            embedding=32,
            channels=channels,
            data_std=1.0,
            augment="augment" in data,
        ),
        data=DataConfig(**{"source": "folder", "path": "photos", **data}),  # pyright: ignore
        codec=CodecConfig(path=None if codec is None else str(codec), factor=factor),
        train=TrainConfig(
            stages=(StageConfig(levels=2, images=16, batch_size=4, lr=1e-3),),
            precision="fp32",
            layout="nchw",
            threads=1,
            log_every_images=1,
            preview_every_images=8,
        ),
        sampling=SamplingConfig(steps=2, threshold=("none",)),
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Twelve images of noise, larger than needed."""
    return save_noise(tmp_path_factory.mktemp("photos"), 12, 48, 40)


def pictures(count: int = 3, side: int = 32, colours: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, colours, side, side, generator=generator) * 2 - 1


# --- codes and back ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "shift", "scale"),
    [
        ({"scaling_factor": 0.5}, 0.0, 0.5),
        ({"scaling_factor": 2.0, "shift_factor": 0.25}, 0.25, 2.0),
        (
            {"scaling_factor": 0.5, "latents_mean": [0.0, 1.0, 2.0, 3.0], "latents_std": [4.0] * 4},
            [0.0, 1.0, 2.0, 3.0],
            0.125,
        ),
    ],
)
def test_codes_are_the_scaled_means_of_the_posterior(settings, shift, scale, tiny_codec):
    folder = tiny_codec(**settings)
    codec = load_autoencoder(on_codes(folder))
    model: Any = AutoencoderKL.from_pretrained(folder)
    with torch.no_grad():
        mean = model.encode(pictures()).latent_dist.mean
        expected = (mean - torch.tensor(shift).view(-1, 1, 1)) * scale
        codes = codec.encode(pictures())
        torch.testing.assert_close(codes, expected)
        torch.testing.assert_close(codec.decode(codes), model.decode(mean).sample)
    assert codes.shape == (3, 4, 8, 8)


def test_codes_are_float32_and_do_not_depend_on_the_batch_or_the_precision(tiny_codec):
    codec = load_autoencoder(on_codes(tiny_codec()))
    together = codec.encode(pictures(5))
    assert torch.equal(codec.encode(pictures(5)[3:4]), together[3:4])
    assert torch.equal(codec.decode(together[1:2]), codec.decode(together)[1:2])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec.encode(pictures(5)), together)
        assert codec.decode(together.bfloat16()).dtype == torch.float32


# --- what is no codec, or not the right one ------------------------------------------------------


def damaged(folder: Path, out: Path, **changes) -> Path:
    """A copy of a codec with other settings, or without some of its weights."""
    shutil.copytree(folder, out)
    settings = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**settings, **changes.get("settings", {})}))
    weights = load_file(out / WEIGHTS)
    change = changes.get("weights", lambda weights: weights)
    save_file(change(weights), out / WEIGHTS, {"format": "pt"})
    return out


def test_a_codec_that_does_not_fit_is_refused(tiny_codec, tmp_path):
    folder = tiny_codec()
    other = damaged(folder, tmp_path / "other", settings={"_class_name": "VQModel"})
    fewer = damaged(folder, tmp_path / "fewer", weights=lambda w: dict([*w.items()][1:]))
    odd = damaged(folder, tmp_path / "odd", settings={"norm_num_groups": 0})
    deep = damaged(folder, tmp_path / "deep", settings={"layers_per_block": 10**6})
    text = damaged(folder, tmp_path / "text", settings={"scaling_factor": "x"})
    unknown = damaged(folder, tmp_path / "unknown", settings={"down_block_types": ["Nope"]})
    bare = damaged(folder, tmp_path / "bare", settings={"latent_channels": None})
    (tmp_path / "pickled").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "pickled")
    for config, message in (
        (on_codes(None), r"codec\.path is not set: .*--codec PATH.*mdm train codec"),
        (on_codes(tmp_path / "gone"), r"codec\.path: there is no folder .*gone; if .* has moved"),
        (on_codes(tmp_path), r"codec\.path: .* holds no AutoencoderKL"),
        (on_codes(other), r"codec\.path: .* holds no AutoencoderKL"),
        (on_codes(tmp_path / "pickled"), r"has no diffusion_pytorch_model\.safetensors"),
        (on_codes(folder, factor=8), r"codec\.factor is 8, but .* 4 times .* codec\.factor=4"),
        (on_codes(folder, channels=3), r"model\.channels is 3, but .* have 4: add --set model\.ch"),
        (on_codes(fewer), r"codec\.path: the weights in .* do not fit .*missing_keys"),
        (on_codes(odd), r"codec\.path: .*odd is no codec"),
        (on_codes(deep), r"codec\.path: .*layers_per_block is more than 1,000"),
        (on_codes(text), r"codec\.path: .*text is no codec"),
        (on_codes(unknown), r"codec\.path: .*unknown is no codec"),
        (on_codes(bare), r"model\.channels is 4, but"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_autoencoder(config)


def test_codes_that_are_not_numbers_are_refused(tiny_codec, tmp_path):
    folder = damaged(
        tiny_codec(), tmp_path / "nan", weights=lambda w: {k: x * torch.nan for k, x in w.items()}
    )
    with pytest.raises(ValueError, match=r"codec\.path: .* not finite"):
        load_autoencoder(on_codes(folder)).encode(pictures())


def test_a_codec_is_found_and_known_by_what_codes_depend_on(tiny_codec, tmp_path):
    folder = tiny_codec()
    version = damaged(folder, tmp_path / "a", settings={"_diffusers_version": "9"})
    scaled = damaged(folder, tmp_path / "b", settings={"scaling_factor": 3.0})
    changed = damaged(
        folder, tmp_path / "c", weights=lambda w: {name: x + 1e-3 for name, x in w.items()}
    )
    for part in ("codec", "vae"):  # of a run, and of a pipeline
        shutil.copytree(folder, tmp_path / part / part)
        assert codec_folder(str(tmp_path / part)) == (tmp_path / part / part).resolve()
    keys = [fingerprint(path) for path in (folder, version, scaled, changed)]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


# --- stored codes --------------------------------------------------------------------------------


def cached(folder: Path, path: Path) -> CodeCache:
    return CodeCache(load_autoencoder(on_codes(folder)), path)


@pytest.mark.parametrize("flip", [False, True])
def test_stored_codes_are_the_fresh_ones_to_the_bit(flip, tiny_codec, photos, tmp_path):
    data = DataConfig(source="folder", path=str(photos), flip=flip)
    source = open_source(DataConfig(source="folder", path=str(photos)), 32)
    cache, fresh = (cached(tiny_codec(), tmp_path / name) for name in ("codes", "empty"))
    calls = []
    store_codes(cache, source, data, lambda done, total: calls.append((done, total)))
    assert calls == [(12, 12)]
    assert len(cache.store) == 12 * (1 + flip)
    assert cache.store.bytes > cache.bytes_of(12 * (1 + flip), 32)

    codec: Any = cache.codec
    codec._model.to("meta")  # nothing can be encoded any more
    loader = Loader(source, seed=3, flip=flip)
    stored, made = (LatentLoader(loader, one).batch(range(40)) for one in (cache, fresh))
    assert torch.equal(stored.picture, made.picture)
    assert stored.picture.is_contiguous()
    assert stored.keys == made.keys
    assert len(fresh.store) == 0


def test_codes_are_stored_once_and_survive_the_process(tiny_codec, tmp_path):
    x = list(pictures(4))
    cached(tiny_codec(), tmp_path).add(x[:3])
    again = cached(tiny_codec(), tmp_path)
    again.add([*x, x[3]])
    assert len(again.store) == 4
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    again.add(x)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_a_flipped_byte_of_a_code_is_noticed_and_mended(tiny_codec, tmp_path):
    x = pictures(3)
    cached(tiny_codec(), tmp_path).add(list(x))
    (path,) = tmp_path.glob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 64]))
    cache = cached(tiny_codec(), tmp_path)
    with pytest.warns(UserWarning, match="an entry is corrupt and is made again"):
        codes = cache.encode(x)
    assert torch.equal(codes, torch.cat([cache.codec.encode(one) for one in x.split(1)]))
    assert path.read_bytes() == whole


def test_pictures_of_other_numbers_or_shapes_are_other_pictures(tiny_codec, tmp_path):
    cache = cached(tiny_codec(), tmp_path)
    x = pictures(1)
    cache.add(list(x))
    for other in (x.flip(-1), x + 1e-6, x.reshape(1, 3, 16, 64)):
        assert torch.equal(cache.encode(other), cache.codec.encode(other))


# --- training ------------------------------------------------------------------------------------


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def train_run(config: RunConfig, folder: Path) -> dict[str, Tensor]:
    """Train on the data that `job.prepare` makes, as the command does; return the weights."""
    ready = job.prepare(config)
    return load_file(train(ready.config, ready.loader, folder) / "model.safetensors")


def test_training_is_the_same_with_and_without_stored_codes(
    tiny_codec, photos, own_cache, tmp_path, monkeypatch
):
    config = on_codes(tiny_codec(), path=str(photos), flip=True)
    stored = job.prepare(config)
    key = fingerprint(tiny_codec())
    assert stored.notes == f"codes of 12 pictures from {own_cache / 'codes' / key[:32]}-cpu"
    assert stored.config.codec is not None
    assert stored.config.codec.weights == key
    one = train_run(config, tmp_path / "stored")
    shutil.rmtree(own_cache / "codes")
    monkeypatch.setattr(job, "SMALL_BYTES", 0)
    assert "they would take 24,576 bytes" in job.prepare(config).notes
    other = train_run(config, tmp_path / "fresh")
    assert not list((own_cache / "codes").rglob("*.safetensors"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    lines = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("stored", "fresh")]
    losses = [[json.loads(line)["loss"] for line in text.splitlines()] for text in lines]
    assert losses[0] == losses[1]
    assert all(loss > 0 for loss in losses[0])


@pytest.mark.parametrize("change", [{"crop": "random"}, {"augment": 0.5}])
def test_what_is_never_shown_twice_is_not_stored(change, tiny_codec, photos, own_cache):
    config = on_codes(tiny_codec(), path=str(photos), **change)
    ready = job.prepare(config)
    assert ready.notes.endswith("no picture recurs as it was")
    assert ready.loader.batch(range(2)).picture.shape == (2, 4, 8, 8)


def test_pictures_of_another_number_of_channels_are_refused(tiny_codec, photos):
    config = on_codes(tiny_codec(colours=1), path=str(photos))
    with pytest.raises(ConfigError, match=r"of 1 channels, but .* has 3"):
        job.prepare(config)


def train_command(photos, codec, out) -> int:
    stages = "train.stages=[{levels: 1, images: 16, batch_size: 4, lr: 0.001}]"
    settings = ["model.embedding=32", "model.levels[0].widths=[32, 32]", "model.text=null",
                "encoder=null", "data.source=folder", "sampling.guidance=[1.0]", "sampling.steps=1",
                "train.preview_every_images=8", "data.held_out=0.25", stages]  # fmt: skip
    arguments = [word for setting in settings for word in ("--set", setting)]
    places = ["--data", str(photos), "--codec", str(codec), "--out", str(out)]
    return cli.main(["train", "openmoji", "--as", "latent", *places, *arguments])


def test_the_command_trains_watches_draws_and_shares(tiny_codec, own_cache, tmp_path, capsys):
    save_noise(tmp_path / "photos", 40)
    shutil.copytree(tiny_codec(), tmp_path / "there")
    out = tmp_path / "run"
    assert train_command(tmp_path / "photos", tmp_path / "there", out) == 0
    assert "codes of 40 pictures from" in capsys.readouterr().out
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["images_seen"] for line in lines if "held_out_loss_per_level" in line] == [8, 16]
    assert len(list((out / "previews").glob("*.png"))) == 2
    assert cli.main(["info", str(out)]) == 0
    assert f"4 times smaller along each side, by {tmp_path / 'there'}" in capsys.readouterr().out
    assert cli.main(["sample", str(out), "-n", "2", "-o", str(tmp_path / "samples")]) == 0

    assert cli.main(["export", str(out), "-o", str(tmp_path / "shared")]) == 0
    drawn = Matryoshka.load(out).sample(n=2).pictures
    shutil.rmtree(tmp_path / "there")
    (tmp_path / "shared").rename(tmp_path / "moved")
    model = Matryoshka.load(tmp_path / "moved")
    assert drawn.shape == (2, 64, 64, 3)
    assert (model.sample(n=2).pictures == drawn).all()
    assert model.picture_side == 64
    capsys.readouterr()
    assert cli.main(["sample", str(out), "-o", str(tmp_path / "more")]) == 2
    assert "codec.path: there is no folder" in capsys.readouterr().err


def test_a_run_goes_on_with_its_codec_and_with_no_other(tiny_codec, photos, own_cache, tmp_path):
    shutil.copytree(tiny_codec(), tmp_path / "codec")
    config = on_codes(tmp_path / "codec", path=str(photos))
    first = job.prepare(config).config
    train(first, job.prepare(config).loader, tmp_path / "run")
    again = job.find_config(str(tmp_path / "run"), None, [])
    assert job.prepare(again).config.codec == first.codec
    damaged(tiny_codec(), tmp_path / "scaled", settings={"scaling_factor": 3.0})
    shutil.rmtree(tmp_path / "codec")
    (tmp_path / "scaled").rename(tmp_path / "codec")
    with pytest.raises(ConfigError, match=r"codec\.path: .* not the codec that coded was trained"):
        job.prepare(again)
    with pytest.raises(ConfigError, match=r"codec\.weights is .* there"):
        train_run(config, tmp_path / "run")


@pytest.fixture(scope="module")
def half_way(tiny_codec, photos, tmp_path_factory):
    """A run with a checkpoint but no model yet, with averages to be put together."""
    out = tmp_path_factory.mktemp("half") / "run"
    shutil.copytree(tiny_codec(), out.parent / "there")
    config = on_codes(out.parent / "there", path=str(photos))
    power = ["train.ema_power=[0.05, 0.1]", "train.ema_snapshot_every_images=4"]
    train_run(override(config, power), out)
    shutil.rmtree(out / "model")
    return out


def path_of(config: Any) -> str:
    return config.codec.path


@pytest.mark.parametrize("finished", [False, True])
def test_a_moved_codec_is_named_in_the_config_or_lies_in_the_run(finished, half_way, tmp_path):
    run, moved = shutil.copytree(half_way, tmp_path / "run"), tmp_path / "moved"
    if finished:
        weights, config = find_model(run)
        export_weights(run / "model", weights, config)
    shutil.copytree(half_way.parent / "there", moved)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(half_way.parent / "there"), str(moved)))
    assert path_of(Matryoshka.load(run).config) == str(moved)
    shutil.move(moved, run / "codec")
    own = str(run / "codec")
    assert path_of(Matryoshka.load(run).config) == path_of(job.find_config(str(run))) == own
    model: Any = averaged(run, 0.05, Matryoshka.load(run))
    assert model.codec is not None, "kept without a folder"


def test_a_run_goes_on_with_a_codec_that_has_moved(half_way, tmp_path):
    run, moved = shutil.copytree(half_way, tmp_path / "run"), tmp_path / "moved"
    shutil.copytree(half_way.parent / "there", moved)
    ready = job.prepare(job.find_config(str(run), codec=str(moved)))
    train(ready.config, ready.loader, run)
    assert path_of(Matryoshka.load(run).config) == path_of(job.find_config(str(run))) == str(moved)


def test_only_a_models_own_codec_is_carried_along(half_way, tmp_path):
    run, there = shutil.copytree(half_way, tmp_path / "run"), tmp_path / "there"
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(half_way.parent / "there"), str(there)))
    damaged(half_way.parent / "there", there, settings={"scaling_factor": 3.0})
    for carry in (
        lambda: export_model(str(run), tmp_path / "model"),
        lambda: average_model(run, 0.08, tmp_path / "average"),
    ):
        with pytest.raises(ConfigError, match=r"is not the codec that coded was trained with"):
            carry()
    assert not (tmp_path / "model").exists()
    average_model(half_way, 0.08, tmp_path / "average")
    own = path_of(Matryoshka.load(tmp_path / "average").config)
    assert own == str(tmp_path / "average" / "codec")


def test_a_side_of_pictures_is_counted_in_pixels():
    assert on_codes(None, side=64).data_side == 64
    with pytest.raises(ValueError, match=r"data\.side is 40, .* in pixels, 32"):
        on_codes(None, side=40)


def test_a_codec_is_put_into_any_config(tiny_codec):
    changes = ["sampling.threshold=[none]", "model.channels=4"]
    config = job.find_config("folder-64", None, changes, codec=str(tiny_codec(factor=8)))
    assert config.codec == CodecConfig(path=str(tiny_codec(factor=8)), factor=8)
    assert config.data_side == 512
    kept = job.find_config("openmoji", as_="latent", codec=str(tiny_codec(factor=8)))
    assert kept.codec is not None
    assert kept.codec.factor == 4  # whose levels are of that; loading says so
    with pytest.raises(ConfigError, match=r"sampling\.threshold .*\[none\]"):
        job.find_config("folder-64", None, [], codec=str(tiny_codec()))


# --- sampling and sharing ------------------------------------------------------------------------


def test_every_level_is_decoded(tiny_codec):
    config = on_codes(tiny_codec())
    model = Matryoshka(NestedUNet(config.model), config)
    samples = model.sample(n=2, seed=5)
    assert [level.shape for level in samples.levels] == [(2, 16, 16, 3), (2, 32, 32, 3)]
    with pytest.raises(ConfigError, match=r"sampling\.threshold .*\[none\]"):
        model.sample(threshold="clip")

    state = last(model.stream(model.condition(None, None, 2)[1], (5, 6), config.sampling))
    for codes, drawn in zip(state.z, samples.levels, strict=True):
        expected = to_uint8(load_autoencoder(config).decode(codes)).permute(0, 2, 3, 1)
        assert (expected.numpy() == drawn).all()


def test_a_model_on_codes_is_shared_without_paths_and_never_with_diffusers(tiny_codec, tmp_path):
    config = on_codes(tiny_codec())
    assert without_paths(config).codec == CodecConfig()
    with pytest.raises(UsageError, match=r"codec\.path"):
        write_diffusers(Matryoshka(NestedUNet(config.model), config), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    export_weights(tmp_path, NestedUNet(config.model).state_dict(), without_paths(config))
    with pytest.raises(ConfigError, match=r"codec\.path is not set"):
        Matryoshka.load(tmp_path).sample()
    assert "--codec" in describe(on_codes(None))
