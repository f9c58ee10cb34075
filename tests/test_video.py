"""A video run from end to end: grown from an image run, trained in mixed batches, sampled."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from matryoshka_diffusion import job
from matryoshka_diffusion.config import (
    ConfigError,
    RunConfig,
    StageConfig,
    UsageError,
    override,
)
from matryoshka_diffusion.data.batch import Batch
from matryoshka_diffusion.info import describe
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.presets import preset
from matryoshka_diffusion.train.curriculum import Step
from matryoshka_diffusion.train.feed import Feed
from matryoshka_diffusion.train.trainer import train
from tiny_run import TinyPictures, tiny_config

FRAMES = 4


class TinyClips(TinyPictures):
    """Pictures of `TinyPictures` that move to the right, a pixel a frame."""

    def batch(self, ids: range) -> Batch:
        batch = super().batch(ids)
        frames = [batch.picture.roll(n, dims=3) for n in range(FRAMES)]
        return Batch(**{**vars(batch), "picture": torch.stack(frames, dim=2)})


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


@pytest.fixture(scope="module")
def video_run(image_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("video") / "run"
    changes = ["train.stages[0].images=8", "train.stages[0].mix=[0.5, 0.5]"]
    job.grow_run(str(image_run), partial(job.next_frames, frames=FRAMES), folder, changes)
    train(job.find_config(str(folder), None, []), TinyClips(), folder)
    return folder


def inputs(config: RunConfig, rows: tuple[int, ...]):
    return Feed(config, TinyClips())(Step(0, 0, rows, 0.1, False))


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
    finer = partial(job.next_frames, frames=FRAMES)
    job.grow_run(str(image_run), finer, tmp_path / "grown")
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
        def batch(self, ids: range) -> Batch:
            if ids.start >= 4:
                raise Killed
            return super().batch(ids)

    changes = [
        "train.stages[0].images=8",
        "train.stages[0].mix=[0.5, 0.5]",
        "train.checkpoint_every_images=4",
    ]
    finer = partial(job.next_frames, frames=FRAMES)
    config = job.grow_run(str(image_run), finer, tmp_path, changes)
    with pytest.raises(Killed):
        train(config, Dying(), tmp_path)
    train(config, TinyClips(), tmp_path)
    found, expected = (Matryoshka.load(run).net.state_dict() for run in (tmp_path, video_run))
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp-2m"])
def test_a_clip_depends_on_its_seed_and_not_on_its_batch(video_run: Path, sampler: str):
    model = Matryoshka.load(video_run)
    options: dict[str, Any] = {"sampler": sampler, "steps": 3, "threshold": "dynamic"}
    together = model.sample(n=3, seed=2, **options)
    alone = model.sample(n=1, seed=4, **options)
    difference = together.videos[2:].astype(int) - alone.videos.astype(int)
    assert abs(difference).max() <= 1
    assert together.levels[0].shape == (3, 8, 8, 3)
    assert (together.pictures == together.levels[0]).all()


def test_videos_are_of_video_models_and_pictures_of_picture_levels(image_run: Path):
    samples = Matryoshka.load(image_run).sample(n=1, steps=1)
    with pytest.raises(UsageError, match="the model draws pictures, no clips: take `pictures`"):
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
    with pytest.raises(ConfigError, match=r"codec is for pictures, but model\.levels\[-1\] has"):
        override(config, ["codec={path: x}", "sampling.threshold=[none]"])
    with pytest.raises(ConfigError, match=r"data\.augment is for pictures"):
        override(config, ["data.augment=0.1", "model.augment=true"])
    with pytest.raises(ConfigError, match="an upsampler draws pictures, but"):
        override(config, ["model.coarse={side: 4}", "sampling.coarse_noise=0.1"])


LEVEL = "model.levels[1]."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([LEVEL + "frames=null"], "halve_frames and frame_attention: the level has no frames"),
        ([LEVEL + "halve_frames=[true]"], "halve_frames needs one entry for each of the 2 steps"),
        ([LEVEL + "frame_attention=[1]"], "frame_attention needs one entry for each of the 3"),
        ([LEVEL + "halve=[true, false]"], "a step halves the side or the frames, not both"),
        ([LEVEL + "frames=6"], "frames 6 cannot be halved 2 times"),
        ([LEVEL + "frames=8"], r"levels\[1\] does not nest .* it has frames 2, but .* has none"),
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
    still = job.next_level(moving, 16).model_copy(update={"frames": None})
    levels: list[dict[str, Any]] = [
        level.model_dump(mode="json") for level in (*config.model.levels, still)
    ]
    with pytest.raises(ValueError, match=r"levels\[2\] does not nest .*frames 1.* has 4"):
        job.from_dict(
            {**config.model_dump(mode="json"), "model": {"levels": levels, "embedding": 32}}
        )
