"""Squares out of longer pictures: in the middle as ever, or somewhere else for every sample."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from matryoshka_diffusion.config import Crop, DataConfig
from matryoshka_diffusion.data import decoded
from matryoshka_diffusion.data.augment import cut_square
from matryoshka_diffusion.data.check import contact_sheet, describe
from matryoshka_diffusion.data.image import read_picture
from matryoshka_diffusion.data.loader import Loader, to_uint8
from matryoshka_diffusion.data.source import Source, open_source
from matryoshka_diffusion.runs import prepare as job

SIDE = 16
WIDE, HIGH, SQUARE = (SIDE, 40), (35, SIDE), (SIDE, SIDE)


def all_pictures(source):
    return np.stack([source[index].picture for index in range(len(source))])


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "PNG")
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def three(tmp_path) -> Path:
    """A wide, a high and a square picture, already of the side that they are wanted at."""
    for number, shape in enumerate((WIDE, HIGH, SQUARE)):
        save(tmp_path / "set" / f"{number}.png", noise(*shape, number))
    return tmp_path / "set"


def opened(path: Path | str, crop: Crop = "centre") -> Source:
    kind = "shards" if str(path).endswith(".tar") else "folder"
    return open_source(DataConfig(source=kind, path=str(path), crop=crop), SIDE)


def squares_of(pixels: np.ndarray) -> list[bytes]:
    """All squares along the longer side."""
    height, width = pixels.shape[:2]
    spots = range(max(height, width) - SIDE + 1)
    if height > width:
        return [pixels[spot : spot + SIDE].tobytes() for spot in spots]
    return [pixels[:, spot : spot + SIDE].tobytes() for spot in spots]


# --- one picture -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(61, 37), (37, 62), (50, 50), (16, 200)])
def test_a_centre_crop_resizes_the_middle_square_alone(tmp_path, shape):
    pixels = noise(*shape)
    edge, (top, left) = min(shape), ((length - min(shape)) // 2 for length in shape)
    box = (left, top, left + edge, top + edge)
    expected = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.LANCZOS, box)
    read = read_picture(save(tmp_path / "a.png", pixels), SIDE, "centre")
    assert (read.pixels == np.asarray(expected)).all()


@pytest.mark.parametrize(
    ("shape", "kept"),
    [((61, 37), (26, 16)), ((37, 61), (16, 26)), ((50, 50), (16, 16)), ((32, 960), (16, 64))],
)
def test_for_a_random_crop_the_longer_side_stays_up_to_a_bound(tmp_path, shape, kept):
    read = read_picture(save(tmp_path / "a.png", noise(*shape)), SIDE, "random")
    assert read.pixels.shape == (*kept, 3)
    assert read.original_side == min(shape)


def test_of_a_panorama_the_middle_stays(tmp_path):
    pixels = noise(SIDE, 10 * SIDE)
    read = read_picture(save(tmp_path / "a.png", pixels), SIDE, "random")
    assert (read.pixels == pixels[:, 3 * SIDE : 7 * SIDE]).all()


@given(
    st.integers(1, 9), st.integers(1, 9), st.floats(0, 1, exclude_max=True, allow_subnormal=False)
)
def test_a_square_is_cut_at_its_place_and_inside(height, width, place):
    pixels = noise(height, width)
    side, spare = min(height, width), abs(height - width)
    found = cut_square(pixels, place)
    spot = min(int(place * (spare + 1)), spare)
    along = pixels[spot:] if height > width else pixels[:, spot:]
    assert found.shape == (side, side, 3)
    assert (found == along[:side, :side]).all()


def test_a_cache_that_was_cut_off_is_made_again(three):
    first = all_pictures(opened(three, crop="random"))
    (path,) = (three.parent / "cache").rglob("*.bin")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="is corrupt and is made again"):
        again = opened(three, crop="random")
    assert (all_pictures(again) == first).all()


# --- sources and the loader --------------------------------------------------------------------


def tarred(folder: Path) -> str:
    path = folder.parent / "s.tar"
    with tarfile.open(path, "w") as archive:
        for picture in sorted(folder.iterdir()):
            info = tarfile.TarInfo(picture.name)
            info.size = picture.stat().st_size
            archive.addfile(info, io.BytesIO(picture.read_bytes()))
    return str(path)


@pytest.mark.parametrize("form", ["folder", "shards", "shards on demand", "a part of a folder"])
def test_every_square_along_the_longer_side_is_shown(three, monkeypatch, form):
    monkeypatch.setattr(decoded, "CACHED_PICTURES", 0 if "demand" in form else 3)
    if form.startswith("shards"):
        source: Source = opened(tarred(three), crop="random")
    else:
        source = opened(three, crop="random")
    if form.startswith("a part"):
        source = source.part([0, 1, 2])
    batch = Loader(source, 0, crop="random").batch(range(900))
    shown = to_uint8(batch.picture).permute(0, 2, 3, 1).contiguous().numpy()
    for key, shape in zip(source.keys, (WIDE, HIGH, SQUARE), strict=True):
        seed = (WIDE, HIGH, SQUARE).index(shape)
        counts = dict.fromkeys(squares_of(noise(*shape, seed)), 0)
        for row in (row for row, name in enumerate(batch.keys) if name == key):
            counts[shown[row].tobytes()] += 1
        fair = 300 / len(counts)
        assert all(fair / 4 < count < 4 * fair for count in counts.values())


def test_once_and_on_demand_are_the_same_under_a_random_crop(three, monkeypatch):
    path = tarred(three)
    once = Loader(opened(path, crop="random"), 3, crop="random").batch(range(5, 25))
    monkeypatch.setattr(decoded, "CACHED_PICTURES", 0)
    on_demand = Loader(opened(path, crop="random"), 3, crop="random").batch(range(5, 25))
    assert (once.picture == on_demand.picture).all()
    assert once.keys == on_demand.keys


@given(seed=st.integers(0, 2**31), first=st.integers(0, 10**9), cut=st.integers(1, 8))
def test_a_random_crop_belongs_to_its_sample(tmp_path_factory, seed, first, cut):
    folder = tmp_path_factory.mktemp("set")
    save(folder / "a.png", noise(*WIDE))
    source = opened(folder, crop="random")
    whole = Loader(source, seed, crop="random").batch(range(first, first + 9)).picture
    parts = [
        Loader(source, seed, crop="random").batch(range(*span)).picture
        for span in ((first, first + cut), (first + cut, first + 9))
    ]
    assert (whole[:cut] == parts[0]).all()
    assert (whole[cut:] == parts[1]).all()
    assert len({picture.numpy().tobytes() for picture in whole}) > 1


def test_a_config_asks_for_the_crop_and_everything_else_sees_squares(three):
    config = job.find_config("folder-64", str(three), ["data.crop=random"])
    ready = job.prepare(config)
    assert ready.loader.loader.crop == "random"
    source = open_source(config.data, SIDE)
    assert all_pictures(source).shape == (3, SIDE, SIDE, 3)
    assert (source[0].picture == noise(*WIDE)[:, 12:28]).all()
    assert "3 pictures" in describe(source)
    assert contact_sheet(source).width > 0


def test_centre_is_the_default_and_draws_nothing(three):
    source = opened(three)
    assert job.find_config("folder-64", str(three), []).data.crop == "centre"
    plain, again = (Loader(source, seed).batch(range(3)) for seed in (0, 0))
    assert (plain.picture == again.picture).all()
    for key, picture in zip(plain.keys, to_uint8(plain.picture).permute(0, 2, 3, 1), strict=True):
        middle = read_picture(three / key, SIDE).pixels
        assert (picture.numpy() == middle).all()
