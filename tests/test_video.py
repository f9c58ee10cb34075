"""A video run from end to end: grown from an image run, trained in mixed batches, sampled."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from filming import animate, steps
from matryoshka_diffusion.cli.info import describe
from matryoshka_diffusion.config import (
    ConfigError,
    LevelConfig,
    LoraConfig,
    RunConfig,
    StageConfig,
    UsageError,
)
from matryoshka_diffusion.configfile import from_dict, override
from matryoshka_diffusion.data.loader import Batch
from matryoshka_diffusion.nn.lora import attach
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.presets import preset
from matryoshka_diffusion.runs import prepare as job
from matryoshka_diffusion.runs.grow import grow_run, next_frames, next_level
from matryoshka_diffusion.training.inputs import Feed
from matryoshka_diffusion.training.stages import Step
from matryoshka_diffusion.training.step import diffusion
from matryoshka_diffusion.training.trainer import Trainer, train
from matryoshka_diffusion.training.weights import export_weights
from tiny_run import FRAMES, TinyClips, TinyPictures, encode, tiny_config, tiny_video


def image_config(**train: Any) -> RunConfig:
    """The coarsest level of the tiny run, without text."""
    config = tiny_config(stages=(StageConfig(levels=1, images=8, batch_size=4, lr=1e-2),), **train)
    model = config.model.first(1).model_copy(update={"text": None})
    return config.model_copy(update={"model": model, "encoder": None})


@pytest.fixture(scope="module")
def image_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("image") / "run"
    train(image_config(), TinyClips(), folder)
    return folder


def grown(image_run: Path, out: Path, *changes: str, data: str | None = "films") -> RunConfig:
    """A run of `FRAMES` frames around the image run, on a folder of videos that is not there."""
    finer = partial(next_frames, frames=FRAMES)
    return grow_run(str(image_run), finer, out, changes, data=data)


@pytest.fixture(scope="module")
def video_run(image_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("video") / "run"
    changes = ["train.stages[0].images=8", "train.stages[0].mix=[0.5, 0.5]"]
    grown(image_run, folder, *changes)
    train(job.find_config(str(folder), None, []), TinyClips(), folder)
    return folder


def inputs(config: RunConfig, rows: tuple[int, ...]):
    return Feed(config, TinyClips())(Step(0, 0, rows, (), False))[0]


def test_the_levels_of_a_clip_are_its_first_frame_and_all_of_it(video_run: Path):
    config = job.find_config(str(video_run), None, [])
    assert [level.size for level in config.model.levels] == ["8", "4x8"]
    picture, clip = inputs(config, (4, 2)).x
    assert (picture.shape, clip.shape) == ((4, 3, 8, 8), (2, 3, 4, 8, 8))
    assert torch.equal(clip[:, :, 0], picture[:2])
    assert not torch.equal(clip[:, :, 1], picture[:2])


def test_noise_of_a_level_belongs_to_the_sample_whatever_the_batch(video_run: Path):
    config = job.find_config(str(video_run), None, [])
    whole, fewer = inputs(config, (4, 4)).noise, inputs(config, (4, 1)).noise
    assert torch.equal(whole[1][:1], fewer[1])
    assert whole[1][0, 0, 0].ne(whole[1][0, 0, 1]).any(), "each frame has its own"


def test_growing_in_time_keeps_what_the_image_run_draws(image_run: Path, tmp_path: Path):
    """Bit for bit at step 0, through the sampler, noise on the frames or not."""
    grown(image_run, tmp_path / "grown")
    options: dict[str, Any] = {"n": 3, "seed": 5, "steps": 4}
    before = Matryoshka.load(image_run).sample(**options)
    after = Matryoshka.load(tmp_path / "grown").sample(**options)
    assert (after.pictures == before.pictures).all()
    assert after.videos.shape == (3, FRAMES, 8, 8, 3)


def test_a_mixed_batch_trains_both_levels(image_run: Path, video_run: Path):
    before = Matryoshka.load(image_run).net.levels[0].state_dict()
    after = Matryoshka.load(video_run).net
    assert any(not torch.equal(x, before[key]) for key, x in after.levels[0].state_dict().items())
    assert any(x.any() for x in after.levels[1].head.parameters())


def test_a_video_run_that_is_killed_goes_on_as_if_it_had_not_been(
    image_run: Path, video_run: Path, tmp_path: Path
):
    class Killed(Exception):
        pass

    class Dying(TinyClips):
        def batch(self, ids: Sequence[int]) -> Batch:
            if ids[0] >= 4:
                raise Killed
            return super().batch(ids)

    changes = [
        "train.stages[0].images=8",
        "train.stages[0].mix=[0.5, 0.5]",
        "train.checkpoint_every_images=4",
    ]
    config = grown(image_run, tmp_path, *changes)
    with pytest.raises(Killed):
        train(config, Dying(), tmp_path)
    train(config, TinyClips(), tmp_path)
    found, expected = (Matryoshka.load(run).net.state_dict() for run in (tmp_path, video_run))
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp-2m"])
def test_a_clip_depends_on_its_seed_and_not_on_its_batch(video_run: Path, sampler: str):
    model = Matryoshka.load(video_run, precision="fp32")
    options: dict[str, Any] = {"sampler": sampler, "steps": 3, "threshold": "dynamic"}
    together = model.sample(n=3, seed=2, **options)
    alone = model.sample(n=1, seed=4, **options)
    difference = together.videos[2:].astype(int) - alone.videos.astype(int)
    assert abs(difference).max() <= 1
    assert together.levels[0].shape == (3, 8, 8, 3)
    assert (together.pictures == together.levels[0]).all()


def test_few_clips_are_drawn_together(video_run: Path, monkeypatch: pytest.MonkeyPatch):
    """All frames count, unless somebody says."""
    monkeypatch.setattr("matryoshka_diffusion.sizes.PIXELS", 2 * FRAMES * 8**2)
    model, sizes = Matryoshka.load(video_run), []
    stream = model.stream
    monkeypatch.setattr(
        model,
        "stream",
        lambda cond, seeds, *rest: sizes.append(len(seeds)) or stream(cond, seeds, *rest),
    )
    model.sample(n=3, steps=1)
    model.sample(n=3, steps=1, batch_size=3)
    assert sizes == [2, 1, 3]


def test_videos_are_of_video_models_and_pictures_of_picture_levels(image_run: Path):
    samples = Matryoshka.load(image_run).sample(n=1, steps=1)
    with pytest.raises(UsageError, match="no clips: take `pictures`"):
        _ = samples.videos
    clips_only = type(samples)((samples.pictures[:, None],), ("",), (0,), {})
    with pytest.raises(UsageError, match="there are clips only: take `videos`"):
        _ = clips_only.pictures


def test_info_shows_frames(video_run: Path):
    """Of each level its size; of each width its frames and its attention over them (Appendix A)."""
    lines = describe(job.find_config(str(video_run), None, [])).splitlines()
    assert [line.split()[1] for line in lines[2:4]] == ["8x8", "4x8x8"]
    header, inner, moving, fine = describe(preset("webvid-16x256")).splitlines()[1:5]
    frames, over = header.index("frames"), header.index("attention over")
    end = over + len("attention over them")
    cells = [(line[frames:over].strip(), line[over:end].strip()) for line in (inner, moving, fine)]
    assert cells == [("", ""), ("16 8 4 2 1", "1 1 1 1 0"), ("16 16 16", "0 0 0")]
    assert "frames" not in describe(preset("cc12m-64"))


def test_what_is_for_pictures_is_refused_for_clips(video_run: Path):
    config = job.find_config(str(video_run), None, [])
    with pytest.raises(ConfigError, match=r"codec .* model\.levels\[-1\] has frames: omit"):
        override(config, ["codec={path: x}", "sampling.threshold=[none]"])
    with pytest.raises(ConfigError, match=r"data\.augment .* omit"):
        override(config, ["data.augment=0.1", "model.augment=true"])
    with pytest.raises(ConfigError, match=r"coarse: .*frames; omit"):
        override(config, ["model.coarse={side: 4}", "sampling.coarse_noise=0.1"])


LEVEL = "model.levels[1]."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([LEVEL + "frames=null"], "halve_frames and frame_attention .* set frames"),
        ([LEVEL + "halve_frames=[true]"], "halve_frames has 1 .* need 2"),
        ([LEVEL + "frame_attention=[1]"], "frame_attention has 1 .* need 3"),
        ([LEVEL + "halve=[true, false]"], "halve and halve_frames: .* two steps"),
        ([LEVEL + "frames=6"], "frames 6 cannot be halved 2 times"),
        ([LEVEL + "frames=8"], r"levels\[1\] does not nest .* frames 2, not none"),
        ([LEVEL + "heads=3"], "heads 3 does not divide the attending width 32"),
    ],
)
def test_levels_with_frames_that_do_not_fit_are_refused(
    video_run: Path, change: list[str], message: str
):
    config = job.find_config(str(video_run), None, [])
    with pytest.raises(ConfigError, match=message):
        override(config, change)


def test_a_picture_level_cannot_be_put_around_clips(video_run: Path):
    config = job.find_config(str(video_run), None, [])
    moving = config.model.levels[1]
    still = next_level(moving, 16).model_copy(update={"frames": None})
    levels: list[dict[str, Any]] = [
        level.model_dump(mode="json") for level in (*config.model.levels, still)
    ]
    with pytest.raises(ValueError, match=r"levels\[2\] does not nest .*frames 1, not 4"):
        from_dict({**config.model_dump(mode="json"), "model": {"levels": levels, "embedding": 32}})


# --- data of a run that is grown in time -------------------------------------------------------


def test_a_run_grown_in_time_is_trained_on_the_videos_it_was_given(
    image_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The config that is written is the one that training asks for, from any folder."""
    monkeypatch.chdir(tmp_path)
    config = grown(image_run, tmp_path / "run", "data.frame_stride=2")
    assert config.data.source == "clips"
    assert config.data.path == str(tmp_path / "films")
    assert config.data.frame_stride == 2
    assert job.find_config(str(tmp_path / "run"), None, []) == config


@pytest.mark.parametrize("before", ["shards", "parquet", "clips", "openmoji"])
def test_new_data_of_a_grown_run_is_what_lies_there(image_run: Path, tmp_path: Path, before: str):
    """Not what the old run was trained on, unless somebody says so."""
    model = Matryoshka.load(image_run)
    config = override(model.config, [f"data.source={before}", "data.path=/old"])
    export_weights(tmp_path / "model", model.net.state_dict(), config)
    (tmp_path / "stills").mkdir()
    Image.fromarray(steps(1)[0]).save(tmp_path / "stills" / "a.png")
    animate(tmp_path / "films" / "a.webp", steps(FRAMES))

    def source(finer: partial[LevelConfig], data: str, *changes: str) -> str:
        out = tmp_path / f"on {data}{changes}"
        grown = grow_run(str(tmp_path / "model"), finer, out, changes, data=str(tmp_path / data))
        return grown.data.source

    longer = partial(next_frames, frames=FRAMES)
    assert source(partial(next_level, side=16), "stills") == "folder"
    assert source(longer, "films") == "clips"
    assert source(longer, "films", "data.source=fluent-emoji") == "fluent-emoji"


def test_a_run_on_pictures_is_not_grown_in_time_without_videos(image_run: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"4 frames, .*: give videos with --data"):
        grown(image_run, tmp_path / "run", data=None)
    assert not (tmp_path / "run").exists()


def test_augmentation_ends_where_clips_begin(tmp_path: Path):
    config = override(image_config(), ["model.augment=true", "data.augment=0.1"])
    train(config, TinyPictures(), tmp_path / "image")
    assert grown(tmp_path / "image", tmp_path / "run").data.augment == 0.0


def test_a_model_of_clips_is_tuned_at_its_own_pace(video_run: Path, tmp_path: Path):
    config = override(job.find_config(str(video_run), None, []), ["data.frame_stride=2"])
    weights = Matryoshka.load(video_run).net.state_dict()
    export_weights(tmp_path / "model", weights, config)
    tuning = job.find_config(str(tmp_path / "model"), None, [])
    assert tuning.data.frame_stride == 2


# --- what training offers, on clips ------------------------------------------------------------


def learn(rows: tuple[int, ...] = (4, 2), **settings: Any) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of a step of a network that says something."""
    config = tiny_video(**{"precision": "fp32", **settings})
    trainer = Trainer(diffusion(config))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for parameter in trainer.net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    inputs = Feed(config, TinyClips(), encode)(Step(0, 0, rows, (0.0,) * len(rows), False))
    loss = trainer.step(inputs).loss
    return loss, {name: p.grad for name, p in trainer.net.named_parameters()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rows", [(4, 2), (4, 0)])
def test_recomputed_clips_have_the_same_gradients(rows: tuple[int, ...], precision: str):
    loss, gradients = learn(rows, precision=precision)
    again, recomputed = learn(rows, precision=precision, recompute=(0, 1))
    assert again == loss
    assert all(torch.equal(recomputed[name], gradients[name]) for name in gradients)


def test_clips_in_channels_last_have_the_same_loss():
    losses = [learn(layout=layout, dropout=0.0)[0] for layout in ("nchw", "channels_last")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_parts_of_a_batch_of_clips_add_up():
    assert learn(accumulate=2, dropout=0.0)[0] == pytest.approx(learn(dropout=0.0)[0], rel=1e-5)


def test_bf16_is_close_to_fp32_on_clips():
    assert learn(precision="bf16", dropout=0.0)[0] == pytest.approx(learn(dropout=0.0)[0], rel=0.02)


def test_adapters_are_put_around_attention_over_frames():
    net = attach(NestedUNet(tiny_video().model), LoraConfig(rank=2, levels=(1,)))
    adapted = {name.rsplit(".", 2)[0] for name, p in net.named_parameters() if p.requires_grad}
    assert {name.rsplit(".", 1)[1] for name in adapted} == {"qkv", "out"}
    assert all("frame_attention" in name for name in adapted)
