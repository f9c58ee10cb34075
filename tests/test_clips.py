"""Sets of clips: folders, shards and emoji as sources, and what a run is shown of them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from filming import animate, film, noise, numbers, shoot, steps
from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.codec import can_store
from matryoshka_diffusion.config import ClipStart, ConfigError, DataConfig, RunConfig
from matryoshka_diffusion.configfile import override
from matryoshka_diffusion.data import video
from matryoshka_diffusion.data.augment import Cut
from matryoshka_diffusion.data.bad import NoneUsable
from matryoshka_diffusion.data.check import contact_sheet, describe, summary
from matryoshka_diffusion.data.loader import Loader
from matryoshka_diffusion.data.source import Source, kind_of, open_source, with_source
from matryoshka_diffusion.eval.reference import shrunk
from matryoshka_diffusion.files import UnreadableError
from matryoshka_diffusion.presets import preset
from matryoshka_diffusion.pyramid import Resolution, shrink
from matryoshka_diffusion.runs import prepare as job
from picturing import reasons, write_tar

SIDE, FRAMES = 16, 4
CHOICES = ("start", "fixed", "random")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Six animations of 20 frames, two of them in a sub-folder, all with captions."""
    path = tmp_path_factory.mktemp("folder")
    for number in range(6):
        name = f"{'deep/' * (number > 3)}{number}.webp"
        animate(path / name, noise(20, (20, 28), number))
        (path / name).with_suffix(".txt").write_text(f"clip {number}\nnumber {number}")
    return path


def data(path: Path | str, **options) -> DataConfig:
    usual = {"source": "clips", "frame_stride": 2, "clip_frames": FRAMES}
    return DataConfig(**{**usual, "path": str(path), **options})


def opened(path: Path | str, frames: int | None = FRAMES, **options) -> Source:
    return open_source(data(path, **options), SIDE, frames)


# --- folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", CHOICES)
def test_a_folder_is_read_as_one_of_pictures_is(folder, clip):
    source = opened(folder, clip=clip)
    assert (source.threads > 1) == (clip == "random") == (not can_store(data(folder, clip=clip)))
    assert source.keys == ["0.webp", "1.webp", "2.webp", "3.webp", "deep/4.webp", "deep/5.webp"]
    assert source.captions == [(f"clip {n}", f"number {n}") for n in range(6)]
    assert (source.total, source.bad, source.channels, source.frames) == (6, (), 3, FRAMES)
    assert source[5].picture.shape == (FRAMES, SIDE, SIDE, 3)
    assert source[5].original_side == 20


def test_bad_videos_are_counted_and_too_many_are_an_error(tmp_path):
    for name in ("cat/a.mp4", "cat/b.gif", "dog/c.avi"):
        shoot(tmp_path / name, steps(9))
    film(tmp_path / "cat" / "short.mp4", steps(3))
    (tmp_path / "dog" / "cut.mp4").write_bytes((tmp_path / "cat" / "a.mp4").read_bytes()[:-30])
    (tmp_path / "dog" / "old.wmv").touch()
    source = opened(tmp_path, clip="start", max_bad_fraction=0.5)
    assert source.keys == ["cat/a.mp4", "cat/b.gif", "dog/c.avi"]
    assert source.classes == ("cat", "dog")
    assert [numbers(source[n].picture) for n in range(3)] == [[0, 2, 4, 6]] * 3
    reasons_by_name = reasons(source)
    assert reasons_by_name["cat/short.mp4"] == "it has 3 frames, a clip needs 7"
    assert reasons_by_name["dog/cut.mp4"].startswith("truncated: it has")
    assert reasons_by_name["dog/old.wmv"].startswith(".wmv is not read: make it MP4")
    with pytest.raises(ValueError, match="files cannot be used"):
        opened(tmp_path, clip="start")


def test_reports_speak_of_clips(folder, tmp_path, capsys):
    source = opened(folder, clip="start")
    assert "6 clips of 4 frames" in describe(source)
    assert "6 clips of 4 frames of 16 px, captions" in summary(source)
    stills, moving = contact_sheet(opened(folder, None), 6), contact_sheet(source, 6)
    assert moving.height > stills.height  # four frames of each in as many columns
    for number in range(3):
        animate(tmp_path / "set" / f"{number}.webp", noise(2 if number == 1 else 61, (9, 9)))
    words = ["data", "check", str(tmp_path / "set"), "--sheet", str(tmp_path / "sheet.png")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert cli.main([*words, "--set", "data.source=clips"]) == 1
    output = capsys.readouterr()
    assert "1.webp: it has 2 frames, a clip needs 61" in output.out
    assert "1 of 3 files are bad" in output.err
    assert (tmp_path / "sheet.png").is_file()


def test_what_lies_beside_videos_is_passed_over(tmp_path):
    """Previews of the same name, be they still or not, and shards that were made of the folder."""
    film(tmp_path / "in" / "a.mp4", steps(8))
    animate(tmp_path / "in" / "b.gif", steps(8))
    for name in ("a.WEBP", "b.png"):
        Image.new("RGB", (20, 20)).save(tmp_path / "in" / name)
    files = sorted((tmp_path / "in").iterdir())
    shard = write_tar(tmp_path / "old.tar", [(file.name, file.read_bytes()) for file in files])
    for path, keys in ((tmp_path, ["in/a.mp4", "in/b.gif"]), (shard, ["old.tar:a", "old.tar:b"])):
        source = opened(path, clip="start")
        assert (source.keys, source.bad) == (keys, ())
        assert [numbers(source[n].picture) for n in range(2)] == [[0, 2, 4, 6]] * 2
    (tmp_path / "in" / "a.mp4").unlink()  # what is left beside the shard may be a preview of it
    assert opened(tmp_path, clip="start").keys == ["old.tar:a", "old.tar:b"]


def test_a_folder_without_videos_says_what_to_put_there(tmp_path):
    with pytest.raises(ValueError, match=r"holds no video: put MP4, WEBM, AVI.*NAME\.mp4"):
        opened(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.path is not set: give a folder.*MP4"):
        open_source(DataConfig(source="clips"), SIDE)


def test_the_next_good_video_stands_in_for_a_bad_one(tmp_path):
    """A video that cannot be read now is an error, and no checkpoint remembers it."""
    for number in range(6):
        animate(tmp_path / f"{number}.webp", steps(3 if number in (2, 3) else 9))
    source = opened(tmp_path, max_bad_fraction=0.5)
    with pytest.warns(UserWarning, match=r"[23]\.webp: it has 3 frames, a clip needs 7"):
        stood_in = source.many([2, 1, 3])
    assert [example.key for example in stood_in] == ["4.webp", "1.webp", "4.webp"]
    assert [file.path for file in source.bad] == ["2.webp", "3.webp"]
    (tmp_path / "1.webp").rename(tmp_path / "away")
    with pytest.raises(UnreadableError, match=r"1\.webp: No such file"):
        source.many([0, 1])
    assert len(source.quarantine.state()) == 2
    (tmp_path / "away").rename(tmp_path / "1.webp")
    assert source[1].key == "1.webp"


# --- decoded once, or on demand ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "crop"), [(FRAMES, "centre"), (FRAMES, "random"), (None, "random")]
)
def test_clips_that_do_not_vary_are_decoded_once(folder, tmp_path, monkeypatch, frames, crop):
    monkeypatch.setenv("MDM_CACHE", str(tmp_path))
    cuts = [Cut(n / 6) for n in range(6)]
    options = {"clip": "fixed", "crop": crop}
    once = opened(folder, frames, **options)
    with monkeypatch.context() as patch:
        patch.setattr(video, "open_video", None)
        assert opened(folder, frames, **options).keys == once.keys  # from the cache
        for change in ({"frame_stride": 1}, {"clip": "start"}, {"fps": 10.0}):
            with pytest.raises(TypeError):
                opened(folder, frames, **{**options, **change})
    monkeypatch.setattr(video, "CACHED_BYTES", 0)
    demand = opened(folder, frames, **options)
    assert once.threads == 1 < demand.threads
    for a, b in zip(once.many(range(6), cuts), demand.many(range(6), cuts), strict=True):
        assert (a.picture == b.picture).all()
        assert a[1:] == b[1:]


# --- where a clip begins -----------------------------------------------------------------------


@pytest.mark.parametrize("clip", CHOICES)
def test_pictures_are_the_first_frames_of_what_a_run_on_clips_is_shown(folder, clip):
    moving, still = (
        Loader(
            opened(folder, frames, clip=clip, crop="random"), 0, clip=clip, crop="random", flip=True
        )
        for frames in (FRAMES, None)
    )
    for first in (0, 7):
        videos, pictures = (one.batch(range(first, first + 9)) for one in (moving, still))
        assert videos.picture.shape == (9, 3, FRAMES, SIDE, SIDE)
        assert (videos.picture[:, :, 0] == pictures.picture).all()
        assert (videos.keys, videos.captions) == (pictures.keys, pictures.captions)


def test_a_clip_begins_where_the_config_says(tmp_path):
    for number in range(4):
        animate(tmp_path / f"{number}.gif", steps(23))

    def beginnings(clip: ClipStart, *spans: tuple[int, int], seed: int = 0) -> list[int]:
        loader = Loader(opened(tmp_path, clip=clip), seed, clip=clip)
        batches = torch.cat([loader.batch(range(*span)).picture for span in spans])
        clips = [numbers(one) for one in batches.movedim(1, -1).numpy()]
        assert all(set(np.diff(one)) == {2} for one in clips)
        return [one[0] for one in clips]

    assert beginnings("start", (0, 8)) == [0] * 8
    fixed = {n: opened(tmp_path, clip="fixed")[n].picture.tobytes() for n in range(4)}
    assert len(set(fixed.values())) > 1
    assert fixed == {n: opened(tmp_path)[n].picture.tobytes() for n in range(4)}
    draws = beginnings("random", (0, 120))
    assert set(draws) == set(range(17))  # of 23 frames, 17 have 6 after them
    assert (
        beginnings("random", (13, 50), (0, 5), (50, 120)) == draws[13:50] + draws[:5] + draws[50:]
    )
    assert beginnings("random", (0, 120), seed=1) != draws


def test_all_frames_are_mirrored_and_cut_alike(folder):
    source = opened(folder, clip="start", crop="random")
    plain = Loader(source, 0, crop="random").batch(range(30)).picture
    turned = Loader(source, 0, crop="random", flip=True).batch(range(30)).picture
    mirrored = (turned == plain.flip(-1)).flatten(1).all(1)
    assert ((turned == plain).flatten(1).all(1) ^ mirrored).all()
    assert 5 < mirrored.sum() < 25
    small = shrunk(source, SIDE // 2, FRAMES)
    assert (small.frames, small.side) == (FRAMES, 8)
    expected = np.stack([shrink(frame, Resolution(8, 8)) for frame in source[0].picture])
    assert (small[0].picture == expected).all()


# --- shards ------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", ["start", "random"])
def test_shards_hold_clips(folder, tmp_path, clip):
    members = []
    for number in range(4):
        members.append((f"{number}.webp", (folder / f"{number}.webp").read_bytes()))
        members.append((f"{number}.jpg", b"a thumbnail, which is passed over"))
        members.append((f"{number}.json", json.dumps({"caption": f"clip {number}"}).encode()))
    members += [("4.jpg", b"no clip"), ("4.txt", b"words"), ("5.mp4", b""), ("5.txt", b"words")]
    source = opened(write_tar(tmp_path / "a.tar", members), clip=clip, max_bad_fraction=0.5)
    assert source.keys == [f"a.tar:{number}" for number in range(4)]
    assert source.captions == [(f"clip {number}",) for number in range(4)]
    assert [file.reason[:18] for file in source.bad] == ["it has no MP4, WEB", "its video is empty"]
    cuts = [Cut(start=0.4 if clip == "random" else None)] * 4
    same = opened(folder, clip=clip).many(range(4), cuts)
    for a, b in zip(source.many(range(4), cuts), same, strict=True):
        assert (a.picture == b.picture).all()


def test_shards_of_pictures_are_told_that_a_model_of_clips_wants_videos(tmp_path):
    parts = [("0.png", b"a picture"), ("0.txt", b"its caption")]
    captioned = write_tar(tmp_path / "a.tar", parts)
    with pytest.raises(NoneUsable, match=r"it has no MP4.*; clips of 4 frames"):
        opened(captioned)
    with pytest.raises(NoneUsable, match=r"none is left to learn from$"):
        opened(captioned, None)
    with pytest.raises(NoneUsable, match=r"holds no sample.*; clips of 4 frames"):
        opened(write_tar(tmp_path / "b.tar", parts[:1]))


def test_a_shard_may_be_read_for_its_pictures_or_for_its_clips(folder, tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    clip = animate(tmp_path / "a.gif", steps(9)).read_bytes()
    members = [("0.gif", clip), ("0.png", (tmp_path / "a.png").read_bytes())]
    path = write_tar(tmp_path / "a.tar", members)
    assert opened(path, clip="start")[0].picture.max() > 0
    pictures = open_source(DataConfig(source="shards", path=str(path)), SIDE)
    assert pictures.frames is None
    assert (pictures[0].picture == 0).all()


# --- Fluent emoji ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emoji(tmp_path_factory) -> Path:
    """A small package of the same make."""
    package = tmp_path_factory.mktemp("emoji") / "package"
    clear = [np.zeros((32, 32, 4), np.uint8) for _ in range(8)]
    for place, frame in enumerate(clear):
        frame[8:24, 8 + place : 16 + place] = (200, 30, 40, 255)
    moving = {"1f34e": 8, "1f400": 8, "1f3f3-fe0f-200d-1f308": 8, "1f44b-1f3fb": 8, "1f32c-fe0f": 3}
    for name, count in moving.items():
        animate(package / "assets" / f"{name}.webp", clear[:count])
    Image.fromarray(clear[0]).save(package / "assets" / "1f1e6-1f1f1.webp")
    (package / "assets" / "notes.webp").touch()
    (package / "package.json").write_text("{}")
    return package


@pytest.mark.parametrize("inside", ["..", ".", "assets"])
def test_fluent_emoji_are_captioned_clips_on_white(emoji, inside):
    pytest.importorskip("emoji")
    source = opened(emoji / inside, source="fluent-emoji", clip="start")
    assert source.keys == ["1f34e", "1f3f3-fe0f-200d-1f308", "1f400"]
    assert source.captions == [("red apple",), ("rainbow flag",), ("rat",)]
    assert (source.frames, source.bad) == (FRAMES, ())
    apple = source[0].picture.astype(int)
    assert (apple[:, 0, 0] == 255).all()
    reddest = [np.argmax(frame[8, :, 0] - frame[8, :, 1]) for frame in apple]
    assert reddest == sorted(set(reddest))  # it moves to the right


def test_damaged_emoji_are_attributed(emoji, tmp_path):
    pytest.importorskip("emoji")
    for path in (emoji / "assets").glob("1f*.webp"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "1f34e.webp").write_bytes((emoji / "assets" / "1f34e.webp").read_bytes()[:-9])
    source = opened(tmp_path, source="fluent-emoji", clip="start", max_bad_fraction=0.5)
    assert [(file.path, file.reason[:9]) for file in source.bad] == [("1f34e", "truncated")]


def test_without_the_package_its_name_is_told(tmp_path):
    pytest.importorskip("emoji")
    with pytest.raises(FileNotFoundError, match=r"anim-1, or .* --set data\.source=clips"):
        opened(tmp_path / "gone", source="fluent-emoji")
    with pytest.raises(ValueError, match=r"holds no animation.* --set data\.source=clips"):
        opened(tmp_path, source="fluent-emoji")
    with pytest.raises(ConfigError, match="npm package"):
        open_source(DataConfig(source="fluent-emoji"), SIDE)


# --- from a config -----------------------------------------------------------------------------


def of_frames(config: RunConfig, frames: int) -> RunConfig:
    """The config with that many frames in its finest level."""
    *coarser, finest = config.model.levels
    levels = (*coarser, finest.model_copy(update={"frames": frames}))
    model = config.model.model_copy(update={"levels": levels})
    return config.model_copy(update={"model": model})


def test_a_model_of_clips_needs_clips_and_one_of_pictures_pictures(folder):
    config = job.find_config("folder-64", None, [f"data={data(folder).model_dump_json()}"])
    assert job.complete(config, opened(folder, None)).model.text is not None
    with pytest.raises(ConfigError, match=r"clips .* has clips of 4 frames"):
        job.complete(config, opened(folder))
    with pytest.raises(ConfigError, match=r"clips of 16 frames.*--set data\.source=clips"):
        job.complete(of_frames(config, 16), opened(folder, None))


def test_a_folder_of_videos_is_recognised(tmp_path):
    shoot(tmp_path / "a" / "b.webp", steps(2))
    assert kind_of(str(tmp_path)) == "folder"  # it may be a picture
    shoot(tmp_path / "videos" / "in" / "b.mp4", steps(2))
    (tmp_path / "videos" / "old.tar").touch()
    assert kind_of(str(tmp_path / "videos")) == "clips"
    assert kind_of(str(tmp_path)) == "folder"
    for hidden in ("._a.png", ".thumbnails/a.png"):  # as training passes it over, too
        (tmp_path / "videos" / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / "videos" / hidden).touch()
    config = override(preset("folder-64"), [f'data.path="{tmp_path / "videos"}"'])
    assert with_source(config).data.source == "clips"


@pytest.mark.parametrize(
    ("name", "source"),
    [("", "clips"), ("a.tar", "clips"), ("a.parquet", "parquet"), ("hf:a", "datasets")],
)
def test_a_model_of_clips_looks_for_videos(tmp_path, name, source):
    animate(tmp_path / "a.gif", steps(2))  # of which a model of pictures would take none
    path = name if name.startswith("hf:") else str(tmp_path / name)
    config = override(preset("folder-64"), [f"data.path={json.dumps(path)}"])
    assert with_source(of_frames(config, 16)).data.source == source


def test_clips_without_pyav_name_the_extra_before_anything_is_read(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError, match=r'pip install "matryoshka-diffusion\[video\]"'):
        opened(folder)
