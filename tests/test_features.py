"""Levels of features: their network and projection, in training, in sampling, and kept with it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.codec import CodeCache
from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import (
    ConfigError,
    DataConfig,
    FeaturesConfig,
    LevelConfig,
    ModelConfig,
    ProcessConfig,
    RunConfig,
    SamplingConfig,
    StageConfig,
    TrainConfig,
    UsageError,
)
from matryoshka_diffusion.configfile import override, to_yaml
from matryoshka_diffusion.denoiser import Thresholded
from matryoshka_diffusion.diffusion import FinestLoss, Process, matryoshka_loss
from matryoshka_diffusion.features import (
    FILE,
    EffNet,
    VisionTransformer,
    feature_map,
    fit,
    load_network,
    read_projection,
    write_projection,
)
from matryoshka_diffusion.files import MissingExtra
from matryoshka_diffusion.models.diffusers import MDMPipeline
from matryoshka_diffusion.models.save import export_model
from matryoshka_diffusion.nn.nested import NestedUNet, grow
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.runs import prepare as job
from matryoshka_diffusion.runs.grow import grow_run, next_level, warm_start
from matryoshka_diffusion.schedule import Cosine, instants
from matryoshka_diffusion.training.distributed import World
from matryoshka_diffusion.training.inputs import Feed
from matryoshka_diffusion.training.stages import Step
from matryoshka_diffusion.training.trainer import train
from nests import equal, noisy, run, wake
from picturing import save_noise
from tiny_models import make_vit

CHANNELS = 5


def semantic(network: Path, photos: Path, **train: Any) -> RunConfig:
    """Five features on 4 x 4 positions, then 8 and 16 pixels around them."""
    inner = LevelConfig(
        side=4, widths=(32,), blocks=(1,), attention=(0,), features=CHANNELS, shift_ratio=0.5
    )
    outer: dict[str, Any] = {"widths": (32, 32), "blocks": (0, 0), "attention": (0, 0)}
    levels = (inner, LevelConfig(side=8, **outer), LevelConfig(side=16, **outer))
    settings: dict[str, Any] = {
        "stages": (
            StageConfig(levels=1, images=8, batch_size=4, lr=1e-2),
            StageConfig(levels=3, images=8, batch_size=4, lr=1e-2, mix=(0.25, 0.25, 0.5)),
        ),
        "precision": "fp32",
        "layout": "nchw",
        "threads": 1,
        "ema_decay": 0.5,
        "log_every_images": 4,
        "preview_every_images": 8,
        "checkpoint_every_images": 4,
        "keep_checkpoints": 4,
    }
    return RunConfig(
        name="semantic",
        model=ModelConfig(levels=levels, embedding=32),
        data=DataConfig(source="folder", path=str(photos), held_out=0.25),
        features=FeaturesConfig(network=str(network)),
        train=TrainConfig(**(settings | train)),
        sampling=SamplingConfig(steps=2),
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Sixteen images of noise, larger than needed."""
    return save_noise(tmp_path_factory.mktemp("photos"), 16, 20, 18)


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    make_vit(folder)
    return folder


@pytest.fixture(scope="module")
def trained(vit, photos, tmp_path_factory) -> Path:
    """A finished run, its network in `vit` beside it and moved away since."""
    place = tmp_path_factory.mktemp("trained")
    shutil.copytree(vit, place / "vit")
    (place / "run.yaml").write_text(to_yaml(semantic(place / "vit", photos)))
    assert cli.main(["train", str(place / "run.yaml"), "--out", str(place / "run")]) == 0
    (place / "vit").rename(place / "moved")
    return place / "run"


def pictures(count: int = 3, side: int = 16, colours: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, colours, side, side, generator=generator) * 2 - 1


# --- networks ------------------------------------------------------------------------------------


@torch.no_grad()
def test_features_of_a_transformer_are_those_of_its_patches(vit):
    import transformers

    network = VisionTransformer(str(vit))
    model = transformers.ViTModel.from_pretrained(vit)
    x = pictures()
    tokens = model(pixel_values=x).last_hidden_state  # a class, then 4 x 4 patches row by row
    result = feature_map(network, x, 4)
    assert result.shape == (3, 24, 4, 4)
    torch.testing.assert_close(result[:, :, 1, 2], tokens[:, 1 + 4 + 2])
    assert feature_map(network, x, 6).shape == (3, 24, 6, 6), "other sides are interpolated"
    grey = x[:, :1]
    assert torch.equal(feature_map(network, grey, 4), feature_map(network, grey.expand(x.shape), 4))


@torch.no_grad()
def test_features_of_effnet_are_what_its_metric_averages():
    network = EffNet()
    x = pictures(1, 128)
    inner: Any = network._net
    bytes_of = ((x + 1) * 127.5).round()
    metric = inner(bytes_of.permute(0, 2, 3, 1).to(torch.uint8).numpy())
    features = feature_map(network, bytes_of / 127.5 - 1, 4)
    assert features.shape == (1, 320, 4, 4)
    net = inner._net
    last = net._swish(net._bn1(net._conv_head(features)))
    torch.testing.assert_close(last.mean((2, 3)).numpy(), metric, rtol=1e-3, atol=1e-4)


def test_what_is_no_vision_transformer_is_refused(tmp_path, vit, tiny_t5, monkeypatch):
    with pytest.raises(ConfigError, match=r"features\.network: .*nowhere.*effnet-lite0"):
        load_network(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"features\.network: .*effnet-lite0"):
        load_network(str(tiny_t5))
    broken = shutil.copytree(vit, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match=r"features\.network: .*broken"):
        load_network(str(broken))
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(MissingExtra, match=r"features\.network.*\[eval\]"):
        load_network("effnet-lite0")


# --- the projection ------------------------------------------------------------------------------


def some_maps(count: int = 4) -> list[Tensor]:
    """Correlated features of different scales, of which the last one is constant."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(8, 8, generator=generator) * torch.logspace(-2, 2, 8)[:, None]
    maps = torch.randn(count, 8, 20, 20, generator=generator)
    maps = torch.einsum("kd,bdyx->bkyx", mixing, maps) + 3.0
    maps[:, -1] = 7.0
    return list(maps.split(1))


def test_projected_features_are_uncorrelated_with_the_deviation_of_pixels():
    maps = some_maps()
    projected = torch.cat([fit(maps, 3, 0.5)(one) for one in maps]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(projected.mean(1), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(projected.cov(correction=0), 0.25 * torch.eye(3), atol=1e-3, rtol=0)


def test_no_channel_beats_the_first_at_explaining_the_standardised_features():
    """The scale of a feature does not count: each is divided by its deviation first."""
    maps = some_maps()
    x = torch.cat(maps).transpose(0, 1).flatten(1)[:-1].double()
    standard = torch.linalg.eigvalsh(x.corrcoef())
    first = fit(maps, 1, 1.0)(torch.cat(maps)).flatten().double()
    explained = torch.stack([torch.stack([first, row]).corrcoef()[0, 1] ** 2 for row in x]).sum()
    assert float(explained) == pytest.approx(float(standard[-1]), rel=1e-4)


def test_more_channels_than_directions_are_refused():
    assert len(fit(some_maps(), 7, 0.5).components) == 7
    with pytest.raises(ConfigError, match=r"model\.levels\[0\]\.features is 8, .* 7 directions"):
        fit(some_maps(), 8, 0.5)


def test_a_projection_is_kept_to_the_bit_and_another_file_is_refused(tmp_path):
    projection = fit(some_maps(), 3, 0.5)
    write_projection(tmp_path / FILE, projection, "hash")
    again, network = read_projection(tmp_path / FILE)
    assert network == "hash"
    assert equal(again, projection)
    for content in (b"no tensors", None):
        path = tmp_path / ("damaged" if content else "missing")
        path.write_bytes(content) if content else None
        with pytest.raises(ConfigError, match=rf"features\.path: .*{path.name}.*put .* back"):
            read_projection(path)


# --- the nest ------------------------------------------------------------------------------------


def test_levels_have_channels_of_their_own_and_grow_around_features(vit, photos):
    model = semantic(vit, photos).model
    small = wake(NestedUNet(model.first(1)))
    net = grow(small, model)
    predicted = run(net)
    assert [tuple(x.shape[1:]) for x in predicted] == [(5, 4, 4), (3, 8, 8), (3, 16, 16)]
    assert torch.equal(run(small, z=noisy(model)[:1])[0], predicted[0])


def test_features_have_no_threshold():
    z = tuple(torch.full((1, channels, 2, 2), 3.0) for channels in (5, 3))
    (now,) = instants(torch.tensor([0.5]), [Cosine(), Cosine()])
    features, pixels = Thresholded(lambda z, now: z, ("clip", "clip"), hidden=1)(z, now)
    assert features.unique().tolist() == [3.0]
    assert pixels.unique().tolist() == [1.0]


def test_the_first_level_of_pixels_never_sleeps(vit, photos):
    floors = semantic(vit, photos).model.floors
    assert floors((-3.0,)) == (-float("inf"), -float("inf"), -3.0)
    assert floors((-5.0, -4.0, -3.0)) == (-float("inf"), -float("inf"), -3.0)
    assert floors(None) == (-float("inf"),) * 3


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("features=null", "features go together"),
        ("model.levels.0.features=null", "features go together"),
        ("model.levels.1.features=3", r"levels\[1\]\.features"),
        ("model.levels.2.frames=4", r"whole images .*frames"),
        ("process.level_weights=[0, 1, 1]", r"level_weights is 0 for level 0"),
        ("codec={factor: 4}", "codec and features"),
    ],
)
def test_what_features_do_not_go_with(change, key, vit, photos):
    with pytest.raises(ConfigError, match=key):
        override(semantic(vit, photos), [change])


def test_a_level_of_features_alone_draws_nothing():
    inner = LevelConfig(side=4, widths=(32,), blocks=(1,), attention=(0,), features=5)
    with pytest.raises(ValueError, match=r"levels\[0\]\.features.*add a level of pixels"):
        ModelConfig(levels=(inner,), embedding=32)


# --- a run ---------------------------------------------------------------------------------------


def test_a_run_trains_features_first_and_shows_pixels_only(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss_per_level"] for line in lines if "loss_per_level" in line]
    assert [len(levels) for levels in losses] == [1, 1, 3, 3]
    key = "held_out_loss_per_level"
    assert [len(line[key]) for line in lines if key in line] == [1, 3]
    assert [path.name for path in (trained / "previews").glob("*")] == ["0000000016.png"]
    model = Matryoshka.load(trained)  # without its network, which has moved
    samples = model.sample(n=2)
    assert [level.shape for level in samples.levels] == [(2, 8, 8, 3), (2, 16, 16, 3)]
    late = model.sample(n=2, wake=0.0)
    assert (late.levels[0] != samples.levels[0]).any() or (late.pictures != samples.pictures).any()
    with pytest.raises(UsageError, match="level of features"):
        MDMPipeline.from_model(model)


def resumed(trained: Path, out: Path) -> Path:
    """The run of `trained` as it was after 8 of 16 images."""
    run = shutil.copytree(trained, out)
    shutil.rmtree(run / "model")
    for path in (run / "checkpoints").iterdir():
        if int("".join(filter(str.isdigit, path.name))) > 8:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return run


def test_an_unfinished_run_says_that_it_has_no_pixels_yet(trained, tmp_path):
    with pytest.raises(UsageError, match="only a level of features"):
        Matryoshka.load(resumed(trained, tmp_path / "run")).sample()


def test_a_resumed_run_ends_in_the_same_bits(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))  # features are made anew
    run = resumed(trained, tmp_path / "run")
    moved = str(trained.parent / "moved")
    with pytest.raises(ConfigError, match=r"features\.network: .*vit.*effnet-lite0"):
        job.prepare(job.find_config(str(run)), folder=run)
    ready = job.prepare(job.find_config(str(run), None, [f"features.network={moved}"]), folder=run)
    finished = train(ready.config, ready.loader, run)
    new, old = (load_file(one / "model.safetensors") for one in (finished, trained / "model"))
    assert new.keys() == old.keys()
    assert all(torch.equal(new[name], old[name]) for name in new)


def test_a_run_goes_on_with_its_network_and_projection_and_no_others(trained, tmp_path):
    run, moved = resumed(trained, tmp_path / "run"), trained.parent / "moved"
    make_vit(tmp_path / "other", seed=1)
    other = job.find_config(str(run), None, [f"features.network={tmp_path / 'other'}"])
    with pytest.raises(ConfigError, match=r"features\.network: .*other is not the network"):
        job.prepare(other, folder=run)
    change = [f"features.network={moved}"]
    projection, network = read_projection(run / FILE)
    scaled = projection._replace(components=2 * projection.components)
    write_projection(run / FILE, scaled, network)
    with pytest.raises(ConfigError, match=r"features\.path: .* is not the projection of semantic"):
        job.prepare(job.find_config(str(run), None, change), folder=run)
    (run / FILE).unlink()
    with pytest.raises(ConfigError, match=r"features\.path: there is no file"):
        job.prepare(job.find_config(str(run), None, [*change, "features.path=null"]), folder=run)


def test_a_model_carries_its_projection_to_further_training(trained, photos, tmp_path):
    out, moved = tmp_path / "model", trained.parent / "moved"
    config = export_model(str(trained), out)
    assert config.features is not None
    assert config.features.path is None
    drawn, again = (Matryoshka.load(one).sample(n=1).pictures for one in (trained, out))
    assert (drawn == again).all()
    assert equal(read_projection(out / FILE)[0], read_projection(trained / FILE)[0])

    change = [f"features.network={moved}"]
    tuned = job.prepare(job.find_config(str(out), str(photos), change), folder=tmp_path / "tuned")
    assert (tmp_path / "tuned" / FILE).read_bytes() == (trained / FILE).read_bytes()
    warm_start(tuned.config, tmp_path / "tuned")
    other = override(tuned.config, ["features.weights=another"])
    with pytest.raises(ConfigError, match=r"features\.path"):
        warm_start(other, tmp_path / "cold")

    grown = grow_run(
        str(out), lambda level: next_level(level, 32), tmp_path / "grown", change, data=str(photos)
    )
    ready = job.prepare(grown, folder=tmp_path / "grown")
    assert (tmp_path / "grown" / FILE).read_bytes() == (trained / FILE).read_bytes()
    assert ready.loader.batch([0]).features.shape == (1, CHANNELS, 4, 4)  # pyright: ignore


def test_ranks_see_the_features_that_one_process_sees(vit, photos, tmp_path):
    ready = job.prepare(semantic(vit, photos, condition_dropout=0.0))
    step = Step(stage=1, first=3, rows=(6, 4, 3), lr=(), ends_stage=False)

    def inputs(rank: int = 0, size: int = 1) -> Any:
        return Feed(ready.config, ready.loader, world=World(rank, size))(step)[0]

    alone, ranks = inputs(), [inputs(rank, 2) for rank in range(2)]
    assert alone.x[0].shape == (6, CHANNELS, 4, 4)
    for rank, part in enumerate(ranks):
        assert equal(part.x, tuple(level[rank::2] for level in alone.x))
        assert equal(part.noise, tuple(level[rank::2] for level in alone.noise))
    assert 0.1 < float(alone.x[0].std()) < 2.0


def test_stored_features_are_the_fresh_ones_to_the_bit(vit, photos, tmp_path):
    ready = job.prepare(semantic(vit, photos))
    assert "codes of 16 pictures" in ready.notes
    loader: Any = ready.loader
    codec, numbers = loader.features.codec, loader.loader.batch(range(8)).numbers()
    fresh = CodeCache(codec, tmp_path / "empty").encode(numbers)
    assert torch.equal(codec.encode(numbers[5:6]), fresh[5:6])
    codec._network = None  # nothing can be computed any more
    assert torch.equal(loader.batch(range(8)).features, fresh)


def test_a_level_of_features_learns():
    """The loss of two levels of features at fixed inputs falls in a few steps of their gradient."""
    inner = LevelConfig(side=4, widths=(32,), blocks=(1,), attention=(0,), features=5)
    outer = LevelConfig(side=8, widths=(32, 32), blocks=(0, 0), attention=(0, 0))
    net = NestedUNet(ModelConfig(levels=(inner, outer), embedding=32))
    process = Process.from_config(ProcessConfig(), net.config)
    x, noise, t = noisy(net.config), noisy(net.config, seed=1), torch.linspace(0.2, 0.8, 4)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = matryoshka_loss(net, x, Conditioning(), t, noise, process=process)
        losses.append(loss.per_level[0].item())
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


def test_a_loss_between_images_leaves_features_alone():
    inner = LevelConfig(side=4, widths=(32,), blocks=(1,), attention=(0,), features=5)
    outer = LevelConfig(side=8, widths=(32, 32), blocks=(0, 0), attention=(0, 0))
    net = NestedUNet(ModelConfig(levels=(inner, outer), embedding=32))
    x, noise, t = noisy(net.config), noisy(net.config, seed=1), torch.full((4,), 0.2)

    def excess(levels: int) -> list[float]:
        """What a distance of 1 between any images adds to the loss of each level."""
        process = Process.from_config(ProcessConfig(), net.config.first(levels))
        finest = FinestLoss(lambda one, other: torch.ones(len(one)), 1.0, -10.0, first=1)
        plain, more = (
            matryoshka_loss(
                *(net, x[:levels], Conditioning(), t, noise[:levels]), process=process, finest=one
            ).per_level
            for one in (None, finest)
        )
        return (more - plain).tolist()

    assert excess(1) == [0.0]
    assert excess(2) == pytest.approx([0.0, 1.0], abs=1e-5)
