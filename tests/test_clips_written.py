"""Clips as files: all their frames, as fast and as large; whole or not at all."""

from __future__ import annotations

import itertools
import json
import weakref
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image, ImageSequence
from PIL.ExifTags import Base

from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.data.video import open_video
from matryoshka_diffusion.draw import clips
from matryoshka_diffusion.draw.grid import SETTINGS_KEY
from matryoshka_diffusion.files import MissingExtra

SETTINGS = {"captions": ["red apple, naïve 🍎"] * 500, "seeds": [7]}
NOISE = np.random.default_rng(0)


class Decoded(NamedTuple):
    frames: np.ndarray
    begins: list[float]  # seconds
    seconds: float
    settings: Any


def smooth(frames=6, height=24, width=32):
    """Colours that drift, as in a film without noise."""
    k, y, x = np.mgrid[0:frames, 0:height, 0:width].astype(float)
    waves = [np.sin(x / 20 + k / 3), np.cos(y / 15 - k / 5), np.sin((x + y) / 30 + k / 4)]
    return (127.5 + 110 * np.stack(waves, axis=-1)).round().astype(np.uint8)


def noise(frames=5, height=7, width=9, channels=3):
    return NOISE.integers(0, 256, (frames, height, width, channels), dtype=np.uint8)


def decode(path):
    """Decode a file as a player does: FFmpeg an MP4, Pillow the others."""
    if path.suffix == ".mp4":
        return decode_mp4(path)
    with Image.open(path) as file:
        assert file.n_frames == 1 or file.info["loop"] == 0  # forever
        comment = file.info.get("comment", b"").decode() or file.getexif().get(
            Base.ImageDescription
        )
        frames, durations = [], []
        for image in ImageSequence.Iterator(file):
            frames.append(np.asarray(image.convert("RGB")))
            durations.append(image.info.get("duration", 0) / 1000)
    begins = list(itertools.accumulate(durations, initial=0.0))
    return Decoded(np.stack(frames), begins[:-1], begins[-1], settings_in(comment))


def settings_in(comment):
    return json.loads(comment)[SETTINGS_KEY] if comment else None


def decode_mp4(path):
    av = pytest.importorskip("av")
    with av.open(str(path)) as container:
        (stream,) = container.streams
        decoded = list(container.decode(stream))
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in decoded])
        assert (stream.codec_context.name, stream.frames) == ("h264", len(frames))
        seconds = float(stream.duration * stream.time_base)
        assert float(stream.average_rate) == pytest.approx(len(frames) / seconds)
        settings = settings_in(container.metadata.get("comment"))
        return Decoded(frames, [frame.time for frame in decoded], seconds, settings)


def psnr(a, b):
    """Decibels; a mean square of a hundredth stands in for none."""
    return 10 * np.log10(255**2 / max(((a.astype(float) - b) ** 2).mean(), 0.01))


@pytest.mark.parametrize("suffix", clips.SUFFIXES)
@pytest.mark.parametrize("fps", [24000 / 1001, 3.0])
def test_a_clip_comes_back_with_its_frames_its_times_and_its_settings(suffix, fps, tmp_path):
    clip, path = smooth(), tmp_path / f"new/clip{suffix}"
    clips.save_clip(clip, path, fps, SETTINGS)
    decoded = decode(path)
    unit = {".mp4": 1e-5, ".webp": 1e-3, ".gif": 1e-2}[suffix]
    assert decoded.frames.shape == clip.shape
    np.testing.assert_allclose(decoded.begins, np.arange(6) / fps, rtol=0, atol=0.51 * unit)
    assert decoded.seconds == pytest.approx(6 / fps, abs=0.51 * unit)
    assert decoded.settings == SETTINGS
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", clips.SUFFIXES)
def test_our_own_reader_finds_every_frame_also_equal_ones(suffix, tmp_path):
    clip = smooth(6, 16, 24)[[0, 1, 1, 2, 3, 3]]
    clips.save_clip(clip, tmp_path / f"a{suffix}", 12.5, SETTINGS)
    with open_video(tmp_path / f"a{suffix}") as film:
        times = film.times()
        np.testing.assert_allclose(times.starts, np.arange(6) / 12.5, rtol=0, atol=1e-6)
        assert (film.count, times.end) == (6, pytest.approx(6 / 12.5))
        frames = [np.asarray(image.convert("RGB")) for _, image in film.frames(range(6))]
    assert psnr(clip, np.stack(frames)) > 28
    if suffix == ".webp":
        np.testing.assert_array_equal(frames, clip)


@pytest.mark.parametrize("suffix", clips.SUFFIXES)
@pytest.mark.parametrize(("frames", "height", "width"), [(1, 16, 16), (3, 7, 9), (2, 1, 1)])
def test_any_size_and_a_single_frame(suffix, frames, height, width, tmp_path):
    clip = smooth(frames, height, width)
    clips.save_clip(clip, tmp_path / f"a{suffix}", 8.0, None)
    decoded = decode(tmp_path / f"a{suffix}")
    assert decoded.frames.shape == clip.shape
    assert decoded.settings is None
    assert psnr(clip, decoded.frames) > 35


def test_an_mp4_loses_little_and_keeps_colours(tmp_path):
    clip = smooth(4, 32, 32)
    clips.save_clip(clip, tmp_path / "a.mp4", 8.0, None)
    assert psnr(clip, decode(tmp_path / "a.mp4").frames) > 38
    for colour in ((200, 20, 20), (20, 180, 20), (20, 20, 220), (0, 0, 0), (255, 255, 255)):
        clips.save_clip(np.full((2, 16, 16, 3), colour, np.uint8), tmp_path / "b.mp4", 8.0, None)
        assert np.abs(decode(tmp_path / "b.mp4").frames.astype(int) - colour).max() <= 4, colour


def test_an_mp4_streams_is_the_same_every_time_and_plays_everywhere(tmp_path):
    av = pytest.importorskip("av")
    for name in ("a.mp4", "b.mp4"):
        clips.save_clip(smooth(), tmp_path / name, 8.0, SETTINGS)
    written = (tmp_path / "a.mp4").read_bytes()
    assert written == (tmp_path / "b.mp4").read_bytes()
    assert 0 < written.find(b"moov") < written.find(b"mdat"), "its index comes first"
    clips.save_clip(smooth(2, 15, 16), tmp_path / "odd.mp4", 8.0, None)
    for name, pixels in (("a.mp4", "yuv420p"), ("odd.mp4", "yuv444p")):
        with av.open(str(tmp_path / name)) as container:
            assert container.streams.video[0].codec_context.pix_fmt == pixels


@pytest.mark.parametrize("channels", [1, 3])
def test_a_webp_and_pngs_lose_nothing(channels, tmp_path):
    clip = noise(channels=channels)
    expected = np.broadcast_to(clip, (*clip.shape[:3], 3))
    clips.save_clip(clip, tmp_path / "a.webp", 8.0, None)
    np.testing.assert_array_equal(decode(tmp_path / "a.webp").frames, expected)
    clips.save_clip(clip, tmp_path / "a", 8.0, SETTINGS)
    files = sorted((tmp_path / "a").iterdir())
    assert [file.name for file in files] == [f"{n:04d}.png" for n in range(5)]
    for file, frame in zip(files, expected, strict=True):
        with Image.open(file) as image:
            assert image.mode == {1: "L", 3: "RGB"}[channels]
            assert json.loads(image.info[SETTINGS_KEY]) == SETTINGS
            np.testing.assert_array_equal(np.asarray(image.convert("RGB")), frame)


def test_a_gif_of_256_colours_loses_nothing_and_does_not_flicker(tmp_path):
    palette = noise(1, 1, 256)[0, 0]
    for clip in (palette[NOISE.integers(0, 256, (5, 7, 9))], noise(channels=1)):
        clips.save_clip(clip, tmp_path / "a.gif", 8.0, None)
        expected = np.broadcast_to(clip, (5, 7, 9, 3))
        np.testing.assert_array_equal(decode(tmp_path / "a.gif").frames, expected)
    clip = smooth(4, 32, 32)
    clip[:, :16] = clip[0, :16]
    clips.save_clip(clip, tmp_path / "a.gif", 8.0, None)
    decoded = decode(tmp_path / "a.gif").frames
    assert psnr(clip, decoded) > 28
    assert (decoded[:, :16] == decoded[0, :16]).all()
    assert (decoded[:, 16:] != decoded[0, 16:]).any()


def test_frames_are_encoded_one_by_one(tmp_path):
    frames, alive = [], []

    def clip():
        for number in range(12):
            frame = np.full((16, 16, 3), number, np.uint8)
            frames.append(weakref.ref(frame))
            alive.append(sum(reference() is not None for reference in frames))
            yield frame
            del frame

    for path in (tmp_path / "a.mp4", tmp_path / "a.webp", tmp_path / "a"):
        clips.save_clip(clip(), path, 8.0, None)
        assert max(alive) < 5


@pytest.mark.parametrize("name", ["a.mp4", "a.webp", "a.gif", "a"])
def test_a_clip_appears_whole_or_not_at_all(name, tmp_path):
    def torn():
        yield from smooth(3)
        raise RuntimeError("no more")

    for fault, error in ((torn(), RuntimeError), ([*smooth(2), *smooth(1, 8, 8)], ValueError)):
        with pytest.raises(error, match=r"no more|one size"):
            clips.save_clip(fault, tmp_path / name, 8.0, None)
        assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"file/{name}"):
        clips.save_clip(smooth(1), tmp_path / "file" / name, 8.0, None)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("name", "fps", "message"),
    [
        ("a.avi", 8.0, r"a\.avi: .*\.mp4, \.webp, \.gif"),
        ("a.png", 8.0, r"a\.png"),
        ("a.gif", 60.0, "60 frames per second; .* 0.01 to 50"),
        ("a.webp", 1e9, r"1e\+09 frames per second; .* 0.01 to 90"),
        ("a.MP4", 0.001, r"a\.MP4: 0.001 frames per second"),
    ],
)
def test_an_unknown_form_or_rate_is_refused(name, fps, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        clips.save_clip(smooth(1), tmp_path / name, fps, None)


@pytest.mark.parametrize(("suffix", "most"), [(".mp4", 16384), (".webp", 16383), (".gif", 65535)])
def test_frames_are_as_large_as_a_file_can_hold(suffix, most, tmp_path):
    path = tmp_path / f"a{suffix}"
    clips.save_clip(np.zeros((1, 2, most, 3), np.uint8), path, 8.0, None)
    assert decode(path).frames.shape == (1, 2, most, 3)
    with pytest.raises(UsageError, match=f"2 x {most + 1} pixels; .* {most} a side"):
        clips.save_clip(np.zeros((1, most + 1, 2, 3), np.uint8), path, 8.0, None)


def test_a_clip_has_frames_of_colours(tmp_path):
    with pytest.raises(ValueError, match="at least one frame"):
        clips.save_clip([], tmp_path / "a.webp", 8.0, None)
    with pytest.raises(ValueError, match=r"\(4, 4, 5\)"):
        clips.save_clip(noise(2, 4, 4, 5), tmp_path / "a.webp", 8.0, None)
    assert not list(tmp_path.iterdir())


def test_a_missing_encoder_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(clips, "_av", lambda: SimpleNamespace(codecs_available={"libvpx"}))
    with pytest.raises(MissingExtra, match="libx264"):
        clips.check_clip(tmp_path / "a.mp4", 8.0)
    monkeypatch.undo()
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(MissingExtra, match=r'pip install ".*\[video\]"'):
        clips.check_clip(tmp_path / "a.mp4", 8.0)
    clips.check_clip(tmp_path / "a.webp", 8.0)
