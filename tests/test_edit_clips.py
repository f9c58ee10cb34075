"""Edits of clips: what is read of a file, a folder or an array, and that it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence

from matryoshka_diffusion.cli.main import main
from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.data.given import Given, read_clip
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.pyramid import Resolution
from matryoshka_diffusion.training.weights import export_weights
from test_pipeline import Words, randomised
from tiny_run import FRAMES, tiny_video

LEVEL, SIDE = "4x8", 8


def video_model() -> Matryoshka:
    config = tiny_video(dropout=0.0)
    return Matryoshka(randomised(config), config, encoder=Words())


def clip(frames: int = FRAMES, side: int = SIDE) -> np.ndarray:
    """Flat frames, each lighter than the one before: no format changes them."""
    grey = np.arange(frames, dtype=np.uint8)[:, None, None, None] * 8 + 40
    return np.broadcast_to(grey, (frames, side, side, 3)).copy()


def written(frames: np.ndarray, path: Path) -> Path:
    """The clip as a file that moves, or as a folder of frames."""
    images = [Image.fromarray(frame) for frame in frames]
    if not path.suffix:
        path.mkdir()
        for number, image in enumerate(images):
            image.save(path / f"{number:03d}.png")
        return path
    options: dict[str, Any] = {"lossless": True} if path.suffix == ".webp" else {}
    images[0].save(path, save_all=True, append_images=images[1:], duration=100, **options)
    return path


@pytest.mark.parametrize("name", ["clip.gif", "clip.webp", "clip.png", "folder", "array", "bytes"])
@pytest.mark.parametrize("frames", [FRAMES, 20])
def test_a_kept_clip_comes_back_frame_by_frame(name: str, frames: int, tmp_path: Path):
    """A longer one is read as for training: every fourth frame of a video, each of a folder."""
    pixels = clip(frames, 2 * SIDE)
    given: Given = pixels
    if name != "array":
        file = written(pixels, tmp_path / name.replace("bytes", "clip.gif"))
        given = file.read_bytes() if name == "bytes" else file
    stride = 1 if frames == FRAMES or name in ("folder", "array") else 4
    drawn = video_model().edit("red", keep={LEVEL: given}, n=2, steps=2)
    expected = pixels[: FRAMES * stride : stride, ::2, ::2]
    assert np.array_equal(drawn.videos, np.stack([expected, expected]))
    assert np.array_equal(drawn.pictures[0], expected[0])


def test_a_mask_keeps_the_same_pixels_of_all_frames():
    model, pixels = video_model(), clip()
    white = np.zeros((SIDE, SIDE), np.uint8)
    white[:4] = 255
    options: dict[str, Any] = {"mask": white, "steps": 2, "n": 2}
    for drawn in (
        model.edit("red", image=pixels, **options).videos,
        model.edit("red", keep={LEVEL: pixels}, **options).videos,
    ):
        assert np.array_equal(drawn[:, :, 4:], np.stack([pixels[:, 4:]] * 2))
        assert not np.array_equal(drawn[0, :, :4], drawn[1, :, :4])


def test_a_region_holds_in_all_frames():
    model = video_model()
    right = np.zeros((SIDE, SIDE), np.uint8)
    right[:, 4:] = 255
    drawn = model.edit("red", regions=[(right, "blue thing")], steps=1).videos
    own = model.sample("blue thing", steps=1).videos
    assert np.abs(drawn[..., 4:, :].astype(int) - own[..., 4:, :]).max() <= 1


ASKED: dict[str, tuple[np.ndarray, str]] = {
    "short": (clip(3), "3 frames, a clip needs 4"),
    "an image": (clip()[0, :, :, 0], "uint8"),
}


@pytest.mark.parametrize(("given", "message"), ASKED.values(), ids=ASKED.keys())
def test_what_is_no_clip_is_refused(given: np.ndarray, message: str):
    with pytest.raises(UsageError, match=message):
        video_model().edit("red", keep={LEVEL: given})


def test_frames_of_several_sizes_are_refused(tmp_path: Path):
    folder = written(clip(), tmp_path / "folder")
    Image.fromarray(clip(1, 64)[0]).save(folder / "001.png")
    data = tiny_video().data
    level, finest = Resolution(SIDE, SIDE), Resolution(2 * SIDE, 2 * SIDE)
    with pytest.raises(UsageError, match="differ in size"):
        read_clip(folder, level, finest, frames=FRAMES, whole=FRAMES, data=data)


def test_the_command_keeps_a_clip(tmp_path: Path):
    config = tiny_video(dropout=0.0)
    nest = config.model.model_copy(update={"text": None})
    config = config.model_copy(update={"model": nest, "encoder": None})
    export_weights(tmp_path / "run" / "model", randomised(config).state_dict(), config)
    kept = written(clip(), tmp_path / "clip.gif")
    words = ["edit", str(tmp_path / "run"), "--steps", "2", "-o", str(tmp_path / "out.webp")]
    assert main([*words, "--keep", f"{LEVEL}={kept}"]) == 0
    with Image.open(tmp_path / "out.webp") as drawn:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(drawn)]
    assert np.array_equal(frames, clip())
