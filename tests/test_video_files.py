"""One video file: the right frames out of every container, within bounds, or a reason why not."""

from __future__ import annotations

import errno
import io
import os
import random
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from filming import animate, film, noise, numbers, shoot, steps
from matryoshka_diffusion.config import DataConfig
from matryoshka_diffusion.data import image
from matryoshka_diffusion.data import video as module
from matryoshka_diffusion.data.augment import Cut
from matryoshka_diffusion.data.bad import PictureError
from matryoshka_diffusion.data.image import read_picture
from matryoshka_diffusion.data.source import Picture
from matryoshka_diffusion.data.video import (
    Container,
    Deadline,
    Times,
    choose,
    clip_decoder,
    open_video,
    resampled,
)
from matryoshka_diffusion.files import UnreadableError

SUFFIXES = ("mp4", "m4v", "mov", "webm", "mkv", "avi", "webp", "gif")


def config(stride: int = 2, **options) -> DataConfig:
    return DataConfig(source="clips", **{"frame_stride": stride, "clip": "start", **options})


def decoder(
    count: int | None = 4, stride: int = 2, **options
) -> Callable[[Path | bytes, str, float | None], Picture]:
    data = config(stride, clip_frames=count or 4, **options)
    decode = clip_decoder(data, 16, count).decode
    return lambda file, key, start: decode(file, key, Cut(start=start))


def shown(file: Path | bytes, start: float = 0.0, **options) -> list[int]:
    """Numbers of the frames of `steps` in a clip of the file."""
    return numbers(decoder(**options)(file, "key", start).pixels)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> dict[str, Path]:
    """The same 24 frames in every container."""
    folder = tmp_path_factory.mktemp("videos")
    return {suffix: shoot(folder / f"a.{suffix}", steps(24)) for suffix in SUFFIXES}


@pytest.fixture(scope="module")
def moving(tmp_path_factory) -> dict[str, Path]:
    """40 frames of motion with key frames at irregular places and frames out of order."""
    folder = tmp_path_factory.mktemp("moving")
    coded = {"g": "7", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}
    return {
        "mp4": film(folder / "a.mp4", noise(40), options=coded),
        "mkv": film(folder / "a.mkv", noise(40), codec="libx264", options=coded),
        "webm": film(folder / "a.webm", noise(40), options={"g": "9"}),
        "avi": film(folder / "a.avi", noise(40), options={"g": "7", "bf": "2"}),
    }


# --- which frames ------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_container_gives_the_frames_that_were_put_in(videos, suffix):
    path = videos[suffix]
    assert shown(path) == [0, 2, 4, 6]
    assert shown(path, stride=5) == [0, 5, 10, 15]
    assert shown(path, 0.999) == [17, 19, 21, 23]
    assert shown(path, 0.5) == [9, 11, 13, 15]  # of 18 places the tenth
    assert shown(path.read_bytes(), 0.5) == [9, 11, 13, 15]
    still = decoder(None)(path, "key", 0.5)
    assert (still.pixels == decoder()(path, "key", 0.5).pixels[0]).all()
    assert min(still.size) == 32


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 9), st.floats(0, 1, exclude_max=True))
def test_clips_are_evenly_spaced_and_all_that_fit_are_chosen(count, length, stride, start):
    bare = Container.__new__(Container)
    bare.count = count
    needed = (length - 1) * stride + 1
    if count < needed:
        with pytest.raises(PictureError, match=f"a clip needs {needed}$"):
            choose(bare, config(stride), length, start)
        return
    chosen = choose(bare, config(stride), length, start)
    assert set(np.diff(chosen)) <= {stride}
    assert chosen[0] >= 0
    assert chosen[-1] < count
    last = choose(bare, config(stride), length, 1 - 2**-53)
    assert last[-1] == count - 1


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "avi"])
def test_seeking_gives_the_same_frames_as_decoding_everything(moving, suffix, monkeypatch):
    path, counted = moving[suffix], []
    whole = Container._from

    def counting(self, *opened):
        for pair in whole(self, *opened):
            counted.append(pair[0])
            yield pair

    def read(start: float) -> tuple[bytes, int]:
        counted.clear()
        return decoder(3, 2)(path, "key", start).pixels.tobytes(), len(counted)

    monkeypatch.setattr(Container, "_from", counting)
    sought = [read(place / 36 + 0.001) for place in range(36)]
    monkeypatch.setattr(Container, "_key_before", lambda self, stamp: None)
    assert [clip for clip, _ in sought] == [read(place / 36 + 0.001)[0] for place in range(36)]
    assert len({clip for clip, _ in sought}) == 36
    assert (max(walked for _, walked in sought) < 20) == (suffix != "avi")


def test_a_seek_that_leads_beyond_is_made_good(moving, monkeypatch):
    expected = decoder(3, 2)(moving["mp4"], "key", 0.4).pixels
    monkeypatch.setattr(Container, "_key_before", lambda self, stamp: max(self._keys))
    assert (decoder(3, 2)(moving["mp4"], "key", 0.4).pixels == expected).all()


def hidden(path: Path, places: Sequence[int]) -> bytes:
    """A WEBM whose packets at these places are decoded and not shown."""
    import av

    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        for number, packet in enumerate(container.demux(video=0)):
            if number in places:
                assert packet.pos is not None
                data[data.index(bytes(packet), packet.pos)] &= ~0x10
    return bytes(data)


def test_frames_that_are_never_shown_do_not_count(videos):
    """Two-pass VP8 stores such frames, for others to refer to."""
    data = hidden(videos["webm"], [3, 4, 20])
    with open_video(data) as video:
        assert video.count == 21
    assert shown(data) == [0, 2, 6, 8]
    assert shown(data, 0.999) == [16, 18, 21, 23]


# --- time --------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=30),
    st.integers(1, 50),
    st.floats(0.5, 60),
)
def test_what_is_nearest_in_time_is_shown(gaps, last, fps):
    starts = np.cumsum([0, *gaps]) / 25
    times = Times(starts, float(starts[-1]) + last / 25)
    found = resampled(times, fps)
    assert abs(len(found) - max(times.end * fps, 1)) <= 1
    for place, number in enumerate(found):
        distances = np.abs(starts - place / fps)
        assert distances[number] <= distances.min() + 1e-9


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "avi"])
def test_videos_are_brought_to_a_rate(videos, suffix):
    assert shown(videos[suffix], stride=1, fps=8.0) == [0, 3, 6, 9]  # of 24 a second
    assert shown(videos[suffix], 0.999, stride=1, fps=8.0) == [12, 15, 18, 21]
    assert shown(videos[suffix], stride=1, fps=48.0) == [0, 0, 1, 1]
    for fps, reason in ((4.0, "it has 4 frames at 4 a second, a clip needs 7"), (1e9, "more than")):
        with pytest.raises(PictureError, match=reason):
            shown(videos[suffix], fps=fps)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_variable_rate_counts_only_when_a_rate_is_asked_for(tmp_path, suffix):
    times = [0, 1, 2, 3, 12, 13, 14, 15]
    path = film(tmp_path / f"a.{suffix}", steps(8), times=times)
    assert shown(path) == [0, 2, 4, 6]
    assert shown(path, stride=4, fps=24.0) == [0, 3, 4, 4]  # at 0, 4, 8 and 12 of 16


@pytest.mark.parametrize("suffix", ["webp", "gif"])
def test_animations_last_as_long_as_their_frames_say(tmp_path, suffix):
    path = animate(tmp_path / f"a.{suffix}", steps(4), [100, 300, 100, 500])
    with open_video(path) as video:
        times = video.times()
    assert times.starts.tolist() == pytest.approx([0.0, 0.1, 0.4, 0.5])
    assert times.end == pytest.approx(1.0)  # the last frame stays, too
    assert shown(path, stride=2, fps=10.0) == [0, 1, 2, 3]
    with open_video(animate(tmp_path / f"b.{suffix}", steps(3), 0)) as video:
        assert video.times().end == pytest.approx(0.3)  # as browsers show frames of no time


# --- pixels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(33, 61), (61, 33), (40, 40)])
def test_frames_are_cut_and_averaged_as_pictures_are(tmp_path, shape):
    still = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    Image.fromarray(still).save(tmp_path / "a.png")
    path = film(tmp_path / "a.mkv", [still] * 7)  # lossless
    for crop in ("centre", "random"):
        expected = read_picture(tmp_path / "a.png", 16, crop)
        clip = decoder(crop=crop)(path, "key", 0.0)
        assert clip.pixels.shape == (4, *expected.pixels.shape)
        assert (clip.pixels == expected.pixels).all()
        assert clip.size == shape[::-1]


def test_a_camera_held_upright_gives_upright_frames(tmp_path):
    shape = (32, 64)
    still = np.zeros((*shape, 3), np.uint8)
    still[:, :32] = 255  # white on the left
    data = film(tmp_path / "a.mp4", [still] * 7).read_bytes()
    unit = 1 << 16
    as_it_is = struct.pack(">9i", unit, 0, 0, 0, unit, 0, 0, 0, 1 << 30)
    clockwise = struct.pack(">9i", 0, unit, 0, -unit, 0, 0, 0, 0, 1 << 30)
    place = data.index(as_it_is, data.index(b"tkhd"))
    turned = data[:place] + clockwise + data[place + len(as_it_is) :]
    clip = decoder(crop="random")(turned, "key", 0.0).pixels
    assert clip.shape == (4, 32, 16, 3)
    assert clip[:, :12].min() > 200  # now on top
    assert clip[:, 20:].max() < 50


def test_pixels_that_are_not_square_become_square_and_grey_ones_stay_grey(tmp_path):
    grey = film(tmp_path / "a.mkv", steps(8), pixels="gray")
    assert shown(grey) == [0, 2, 4, 6]
    path = film(tmp_path / "b.mkv", noise(7, (32, 32)), codec="mpeg4", options={"aspect": "2:1"})
    with open_video(path) as video:
        _, image = next(video.frames([0]))
    assert image.size == (64, 32)


@pytest.mark.parametrize("form", ["mov", "webp", "gif"])
def test_what_is_transparent_is_white(tmp_path, form):
    clear = np.zeros((32, 32, 4), np.uint8)
    clear[8:24, 8:24] = (200, 30, 40, 255)
    frames_of = [np.roll(clear, n, axis=0) for n in range(7)]
    path = tmp_path / f"a.{form}"
    if form == "mov":
        film(path, frames_of, codec="png")
    else:
        animate(path, frames_of, **({"disposal": 2} if form == "gif" else {}))
    clip = decoder()(path, "key", 0.0).pixels.astype(int)
    assert (clip[:, 0, 0] == 255).all()
    assert abs(clip[:, 9, 8] - (200, 30, 40)).max() < 12


# --- bounds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["mp4", "avi", "webm", "webp", "gif"])
def test_everything_is_bounded(videos, suffix, monkeypatch):
    path = videos[suffix]
    for where, name, value, reason in (
        (module, "VIDEOS", module.VIDEOS._replace(max_bytes=100), "the file is larger than"),
        (module, "MAX_PIXELS", 1000, "too large: 32x32|more than 1,000 pixels"),
        (module, "MAX_FRAMES", 20, "more than 20 frames"),
        (module, "MAX_SECONDS", -1.0, "takes longer than"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            with pytest.raises(PictureError, match=reason):
                shown(path)
    assert shown(path) == [0, 2, 4, 6]


def test_packets_without_a_frame_take_their_time_too(videos):
    class Patient(Deadline):
        left = 40

        def check(self) -> None:
            self.left -= 1
            if not self.left:
                raise PictureError("over")

    data = hidden(videos["webm"], range(2, 23))  # 24 packets, 3 frames
    video = Container(io.BytesIO(data), "matroska", Patient())
    with pytest.raises(PictureError, match="over"):
        list(video.frames([2]))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_too_short_or_cut_off_says_so(videos, suffix):
    with pytest.raises(PictureError, match=r"^it has 24 frames, a clip needs 61$"):
        shown(videos[suffix], count=16, stride=4)
    data = videos[suffix].read_bytes()
    if suffix not in ("webm", "mkv"):  # which have no stated length
        with pytest.raises(PictureError, match="truncated"):
            shown(data[: len(data) * 2 // 3], 0.999)


def test_time_in_which_nothing_is_decoded_does_not_count(monkeypatch):
    monkeypatch.setattr(module, "MAX_SECONDS", -1.0)
    with pytest.raises(PictureError, match="takes longer than"):
        shown(b"\0\0\0\x08free" * 9)  # boxes without an end
    monkeypatch.setattr(module, "MAX_SECONDS", 0.02)
    deadline = Deadline()
    time.sleep(0.04)
    deadline.check()


# --- what is no video --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"#EXTM3U\n#EXTINF:1,\n/etc/hostname\n",
        b"ffconcat version 1.0\nfile /etc/hostname\n",
        b"\x89PNG\r\n\x1a\n" + bytes(60),
        b"RIFF\x10\0\0\0WAVE" + bytes(40),
        b"moov",
        b"",
    ],
)
def test_other_formats_are_refused_whatever_their_name(tmp_path, data):
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(PictureError, match="not MP4, WEBM, AVI" if data else "it is empty"):
        shown(tmp_path / "a.mp4")


def test_sound_alone_and_unknown_codecs_are_named(videos, tmp_path):
    import av

    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    unknown = videos["mp4"].read_bytes().replace(b"avc1", b"zzzz")
    for file, reason in ((tmp_path / "a.mkv", "only sound"), (unknown, "codec is not known")):
        with pytest.raises(PictureError, match=reason):
            shown(file)


def test_without_pyav_the_extra_is_named(videos, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError, match=r"av.*pip install .*\[video\]"):
        shown(videos["mp4"])
    assert shown(videos["webp"]) == [0, 2, 4, 6]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_trouble_of_the_system_is_no_verdict_on_a_file(videos, suffix, monkeypatch):
    """The disk gives up in the middle; but a place that no file has is what a damaged one names."""

    class Failing(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            if self.tell():
                raise OSError(code, os.strerror(code))
            return super().read(min(size, 16) if size > 0 else size)

    monkeypatch.setattr(image, "open", lambda path, _: Failing(path), raising=False)
    code = errno.EIO
    with pytest.raises(UnreadableError, match=f"cannot read {videos[suffix]}: Input/output error"):
        shown(videos[suffix])
    code = errno.EINVAL
    with pytest.raises(PictureError, match="corrupt or truncated"):
        shown(videos[suffix])


def test_a_gif_is_whole_up_to_its_last_byte(tmp_path):
    """Although what is left would do: the file would be another clip after a second download."""
    whole = animate(tmp_path / "a.gif", noise(12)).read_bytes()
    clip = decoder()(whole, "key", 0.5).pixels
    for end in (*range(len(whole) // 2, len(whole), 97), len(whole) - 1):
        with pytest.raises(PictureError, match="truncated: the end marker of a GIF is missing"):
            decoder()(whole[:end], "key", 0.5)
    for more in (b"\0\0", b"\n", b"what a server has put there"):
        assert (decoder()(whole + more, "key", 0.5).pixels == clip).all()


def test_frames_that_a_decoder_gives_out_of_turn_are_put_in_order(moving, monkeypatch):
    def clips() -> list[bytes]:
        starts = [place / 36 + 0.001 for place in range(36)]
        return [decoder(3, 2)(moving["mp4"], "key", start).pixels.tobytes() for start in starts]

    expected, decoded = clips(), Container._decoded

    def out_of_turn(self, *opened):
        given = list(decoded(self, *opened))
        for n in range(0, len(given), 4):
            first, *others = given[n : n + 4]
            yield from (first, *reversed(others))

    monkeypatch.setattr(Container, "_decoded", out_of_turn)
    assert clips() == expected


def test_a_frame_that_cannot_be_decoded_is_missed(moving, monkeypatch):
    whole = Container._from

    def without_the_tenth(self, *opened):
        return (pair for pair in whole(self, *opened) if pair[0] != 10)

    monkeypatch.setattr(Container, "_from", without_the_tenth)
    with pytest.raises(PictureError, match="frame 10 of 40 cannot be decoded"):
        shown(moving["mp4"], stride=5)
    shown(moving["mp4"], stride=4)


@pytest.mark.parametrize("suffix", ["mp4", "webm", "avi", "mkv", "webp", "gif"])
def test_damage_gives_a_reason_or_a_clip_and_never_anything_else(moving, videos, suffix):
    good = (moving.get(suffix) or videos[suffix]).read_bytes()
    chance, reasons = random.Random(0), 0
    for _ in range(25):
        data = bytearray(good)
        for _ in range(chance.randrange(1, 12)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            clip = decoder()(bytes(data), "key", chance.random()).pixels
        except PictureError as error:
            reasons += bool(str(error))
        else:
            assert clip.shape == (4, 16, 16, 3)
    assert reasons
