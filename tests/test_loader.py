"""The loader: which sample comes when, and how it is cut, turned, augmented and described."""

from __future__ import annotations

import threading
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from matryoshka_diffusion.config import ConfigError, DataConfig, MixedData
from matryoshka_diffusion.data import decoded, loader
from matryoshka_diffusion.data.check import refuse_lost
from matryoshka_diffusion.data.loader import Batch, Loader, look_ahead
from matryoshka_diffusion.data.mix import turn
from matryoshka_diffusion.data.source import open_source
from matryoshka_diffusion.pyramid import to_float, to_uint8
from matryoshka_diffusion.rng import stream
from picturing import SIDE, noise, opened, save, toy, write_tar

WIDE, HIGH, SQUARE = SHAPES = ((SIDE, 40), (35, SIDE), (SIDE, SIDE))


def joined(batches: list[Batch]) -> dict[str, list]:
    """All columns of several batches, one after the other."""
    return {
        field.name: [row for batch in batches for row in getattr(batch, field.name) or ()]
        if field.name in ("captions", "keys")
        else torch.cat([getattr(batch, field.name) for batch in batches]).tolist()
        for field in fields(Batch)
        if field.name not in ("pixels", "features")
    }


# --- bytes and numbers -------------------------------------------------------------------------


def test_bytes_survive_the_way_to_numbers_and_back():
    pixels = np.arange(256, dtype=np.uint8)
    x = to_float(pixels)
    assert (x[0], x[-1]) == (-1.0, 1.0)
    for convention in ("symmetric", "released"):
        back = to_uint8(to_float(pixels, convention), convention)
        assert torch.equal(back, torch.from_numpy(pixels))
    assert to_uint8(torch.tensor([-7.0, 7.0, 0.6 / 127.5 - 1, 0.4 / 127.5 - 1])).tolist() == [
        *(0, 255),
        *(1, 0),
    ]


# --- which sample comes when -------------------------------------------------------------------


@given(
    count=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    first=st.integers(0, 10**9),
    spans=st.lists(st.integers(1, 7), min_size=1, max_size=5),
)
def test_any_split_of_a_span_gives_the_same_samples(count, seed, first, spans):
    options = {"flip": True, "augment": 0.3, "crop": "random"}
    whole = Loader(toy(count), seed, **options).batch(range(first, first + sum(spans)))
    starts = [first + sum(spans[:index]) for index in range(len(spans))]
    other = Loader(toy(count), seed, **options)  # a second loader, asked in another order
    ranges = [range(start, start + count) for start, count in zip(starts, spans, strict=True)]
    parts = [other.batch(ids) for ids in reversed(ranges)][::-1]
    assert joined([whole]) == joined(parts)
    assert whole.ids.tolist() == list(range(first, first + sum(spans)))


@given(shares=st.lists(st.floats(0.01, 10.0), min_size=1, max_size=5), first=st.integers(0, 10**12))
def test_parts_take_turns_by_their_shares(shares, first):
    turns = [turn(n, shares) for n in range(first, first + 50)]
    seen = {}
    for part, count in turns:
        assert count == seen.get(part, count - 1) + 1  # no sample twice, none left out
        seen[part] = count
    for part, count in seen.items():
        assert (
            abs(count - (first + 50) * shares[part] / sum(shares)) < len(shares) + 1 + first / 10**7
        )


def test_a_mix_gives_each_part_its_share_and_reads_each_in_its_own_order(tmp_path):
    for name, count in (("a/cat", 4), ("a/dog", 3), ("b/owl", 2), ("b/cat", 1)):
        for n in range(count):
            save(tmp_path / name / f"{n}.png", noise(SIDE, seed=ord(name[2]) + n))
    mix = [{"path": str(tmp_path / "a"), "share": 7}, {"path": str(tmp_path / "b"), "share": 3}]
    data = DataConfig(source="folder", mix=tuple(MixedData(**part) for part in mix))
    source = open_source(data, SIDE)
    assert source.classes == ("cat", "dog", "owl")
    assert source.keys[6:] == ["0:dog/2.png", "1:cat/0.png", "1:owl/0.png", "1:owl/1.png"]
    batch = Loader(source, 0).batch(range(20))
    keys = [*batch.keys]
    for part, share, size in ((0, 14, 7), (1, 6, 3)):
        given = [key for key in keys if key.startswith(f"{part}:")]
        assert len(given) == share
        assert len({*given[:size]}) == len({*given[size : 2 * size]}) == size
    assert batch.labels is not None
    for key, label in zip(keys, batch.labels, strict=True):
        assert source.classes[label] == key[2:5]
    alone = Loader(opened(tmp_path / "a"), 0).batch(range(14))
    ours = [n for n, key in enumerate(keys) if key.startswith("0:")]
    assert torch.equal(batch.picture[ours], alone.picture)
    pieces = [Loader(source, 0).batch(ids).keys for ids in (range(3), range(3, 20))]
    assert [*pieces[0], *pieces[1]] == keys
    for path in (tmp_path / "a").rglob("*.png"):
        path.with_suffix(".txt").write_text("a cat")
    with pytest.raises(
        ConfigError, match=r"mix\[1\]: .*/b has no captions.*mix\[0\]\.captions=none"
    ):
        open_source(data, SIDE)
    without = data.mix[0].model_copy(update={"captions": "none"})
    part = data.model_copy(update={"mix": (without, data.mix[1])})
    assert open_source(part, SIDE).classes == source.classes


def test_each_part_of_a_large_mix_is_shuffled_once_an_epoch(monkeypatch):
    count, shuffled = 40, []

    def counted(seed, *key):
        shuffled.append(key)
        return stream(seed, *key)

    source = toy(3 * count)
    samples = [sample._replace(part=n % count) for n, sample in enumerate(source.samples)]
    monkeypatch.setattr(loader, "stream", counted)
    Loader(replace(source, samples=samples, shares=(1 / count,) * count), 0).batch(range(6 * count))
    orders = [key for key in shuffled if key[0] == "order"]
    assert len(orders) == len({*orders}) == 2 * count


def test_what_stands_in_for_a_bad_sample_of_a_mix_is_of_its_part(tmp_path, monkeypatch):
    monkeypatch.setattr(decoded, "CACHED_PICTURES", 0)
    for name in ("a/0", "a/1", "b/0", "b/1"):
        save(tmp_path / f"{name}.png")
    mix = tuple(MixedData(path=str(tmp_path / name), share=1) for name in "ab")
    source = open_source(DataConfig(mix=mix, max_bad_fraction=1.0), SIDE)
    for name in ("a/1", "b/1"):
        (tmp_path / f"{name}.png").write_bytes(b"broken")
    with pytest.warns(UserWarning, match="stands in"):
        keys = [source[n].key for n in range(4)]
    assert keys == ["0:0.png", "0:0.png", "1:0.png", "1:0.png"]
    (tmp_path / "b" / "0.png").write_bytes(b"broken")
    wanted = pytest.raises(ValueError, match=r"data\.mix\[1\]: .*not one of 2 samples")
    with wanted, pytest.warns(UserWarning, match="stands in"):
        open_source(DataConfig(mix=mix, max_bad_fraction=1.0), SIDE)[3]


def test_lost_captions_of_a_part_name_its_key(tmp_path):
    for name in "ab":
        save(tmp_path / name / "0.png")
    (tmp_path / "b" / "1.prompt").write_text("x")
    mix = tuple(MixedData(path=str(tmp_path / name), share=1) for name in "ab")
    data = DataConfig(mix=mix)
    wanted = r'b.*"data\.mix\[1\]\.caption_suffixes=.*"data\.mix\[1\]\.captions=none"'
    with pytest.raises(ConfigError, match=wanted):
        refuse_lost(open_source(data, SIDE), data)


def test_every_epoch_is_another_permutation():
    source = toy(50)
    epochs = [Loader(source, 3).batch(range(n, n + 50)).keys for n in (0, 50, 100)]
    assert all(sorted(keys) == sorted(source.keys) for keys in epochs)
    assert len({*epochs, Loader(source, 4).batch(range(50)).keys}) == 4


def test_a_batch_holds_what_the_source_says():
    source = toy(10)
    batch = Loader(source, 0).batch(range(7, 13))
    rows = [source.keys.index(key) for key in batch.keys]
    pixels = torch.tensor(np.stack([source[row].picture for row in rows])).permute(0, 3, 1, 2)
    assert torch.equal(batch.picture, pixels)
    assert torch.equal(to_uint8(batch.numbers()), pixels)
    assert batch.picture.is_contiguous()
    assert batch.labels is not None
    assert batch.labels.tolist() == [row % 2 for row in rows]
    assert batch.original_side.tolist() == [10.0 + row for row in rows]
    assert all(text in source[row].captions for text, row in zip(batch.captions, rows, strict=True))
    bare = Loader(toy(2, captions=None, labels=None, classes=()), 0).batch(range(3))
    assert (bare.captions, bare.labels) == (("", "", ""), None)


def test_captions_and_flips_are_used_alike_and_none_is_flipped_without_flip():
    source = toy(1)
    plain = Loader(source, 0).batch(range(400))
    turned = Loader(source, 0, flip=True).batch(range(400)).picture
    assert 160 < plain.captions.count("one of 0") < 240
    assert (plain.picture == plain.picture[:1]).all()
    mirrored = (turned == plain.picture.flip(-1)).flatten(1).all(1)
    assert ((turned == plain.picture).flatten(1).all(1) ^ mirrored).all()
    assert 160 < mirrored.sum() < 240


def test_a_loader_shows_pictures_as_the_config_of_the_data_says(tmp_path):
    save(tmp_path / "a.png")
    options = {"crop": "random", "flip": True, "augment": 0.5, "pixels": "released"}
    data = DataConfig(source="folder", path=str(tmp_path), **options, clip="fixed")
    loader = Loader.of(opened(tmp_path), 3, data)
    assert {name: getattr(loader, name) for name in options} == options
    assert (loader.clip, loader.seed) == ("fixed", 3)


# --- crops -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A wide, a high and a square picture, already of the side that they are wanted at."""
    path = tmp_path_factory.mktemp("three") / "set"
    for number, shape in enumerate(SHAPES):
        save(path / f"{number}.png", noise(*shape, number))
    return path


def squares_of(pixels: np.ndarray) -> list[bytes]:
    """All squares along the longer side."""
    height, width = pixels.shape[:2]
    spots = range(max(height, width) - SIDE + 1)
    if height > width:
        return [pixels[spot : spot + SIDE].tobytes() for spot in spots]
    return [pixels[:, spot : spot + SIDE].tobytes() for spot in spots]


@pytest.mark.parametrize("form", ["folder", "shards on demand", "a part of a folder"])
def test_every_square_along_the_longer_side_is_shown(three, tmp_path, monkeypatch, form):
    if form == "shards on demand":
        monkeypatch.setattr(decoded, "CACHED_PICTURES", 0)
        parts = [(path.name, path.read_bytes()) for path in sorted(three.iterdir())]
        source = opened(write_tar(tmp_path / "s.tar", parts), kind="shards", crop="random")
    else:
        source = opened(three, crop="random")
        source = source.part([0, 1, 2]) if form.startswith("a part") else source
    batch = Loader(source, 0, crop="random").batch(range(900))
    shown = batch.picture.permute(0, 2, 3, 1).contiguous().numpy()
    for seed, (key, shape) in enumerate(zip(source.keys, SHAPES, strict=True)):
        counts = dict.fromkeys(squares_of(noise(*shape, seed)), 0)
        for row in (row for row, name in enumerate(batch.keys) if name == key):
            counts[shown[row].tobytes()] += 1
        fair = 300 / len(counts)
        assert all(fair / 4 < count < 4 * fair for count in counts.values())


def test_a_random_crop_belongs_to_its_sample(three):
    loader = Loader(opened(three, crop="random"), 3, crop="random")
    whole = loader.batch(range(100, 120)).picture
    parts = [loader.batch(range(*span)).picture for span in ((113, 120), (100, 113))]
    assert torch.equal(whole, torch.cat(parts[::-1]))
    assert len({picture.numpy().tobytes() for picture in whole}) > 3


# --- looking ahead -----------------------------------------------------------------------------


def test_looking_ahead_keeps_the_order_and_its_bound():
    taken = []

    def items():
        for n in range(20):
            taken.append(n)
            yield n

    results = look_ahead(lambda n: n * n, items(), workers=3, depth=4)
    for n, result in enumerate(results):
        assert result == n * n
        assert len(taken) <= n + 5


def test_an_exception_arrives_in_its_place_and_leaving_early_drops_the_rest():
    results = look_ahead(lambda n: 1 // (n - 2), range(9), workers=2, depth=3)
    assert [next(results), next(results)] == [-1, -1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    begun = []
    results = look_ahead(begun.append, range(1000), workers=1, depth=5)
    next(results)
    results.close()
    assert len(begun) <= 6
    assert not [thread for thread in threading.enumerate() if "look-ahead" in thread.name]
