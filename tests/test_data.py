"""Real sources, pictures that people bring (whole, broken, hostile), and the loader's order."""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import os
import struct
import threading
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile, PngImagePlugin

from matryoshka_diffusion.config import ConfigError, DataConfig
from matryoshka_diffusion.data import bad as folder_module
from matryoshka_diffusion.data import decoded
from matryoshka_diffusion.data import fashion_mnist as idx
from matryoshka_diffusion.data import image as images
from matryoshka_diffusion.data.bad import PictureError
from matryoshka_diffusion.data.check import describe
from matryoshka_diffusion.data.image import read_picture
from matryoshka_diffusion.data.loader import Loader, look_ahead, to_float, to_uint8
from matryoshka_diffusion.data.source import Source, array_source, open_source, read_all
from matryoshka_diffusion.files import UnreadableError

RED, WHITE = (200, 30, 40), (255, 255, 255)


def noise(side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def picture(path: Path, size: tuple[int, int] = (20, 20), colour=RED, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def toy(count: int, side: int = 4, captions=None) -> Source:
    array = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return array_source(
        name="toy",
        array=array,
        keys=[f"key {n}" for n in range(count)],
        original_sides=[10 + n for n in range(count)],
        captions=captions or [(f"one of {n}", f"two of {n}") for n in range(count)],
        labels=[n % 2 for n in range(count)],
        classes=("even", "odd"),
    )


def picture_folder(path, side, share=0.01) -> Source:
    return open_source(DataConfig(source="folder", path=str(path), max_bad_fraction=share), side)


def openmoji(side: int) -> Source:
    return open_source(DataConfig(source="openmoji"), side)


def captions_of(source: Source) -> dict[str, tuple[str, ...]]:
    examples = (source[index] for index in range(len(source)))
    return {example.key: example.captions for example in examples}


# --- bytes and numbers -----------------------------------------------------------------------


def test_bytes_survive_the_way_to_numbers_and_back():
    pixels = np.arange(256, dtype=np.uint8)
    x = to_float(pixels)
    assert (x[0], x[-1]) == (-1.0, 1.0)
    assert torch.equal(to_uint8(x), torch.from_numpy(pixels))


def test_numbers_are_rounded_and_clamped():
    x = torch.tensor([-7.0, 7.0, 0.6 / 127.5 - 1, 0.4 / 127.5 - 1])
    assert to_uint8(x).tolist() == [0, 255, 1, 0]


@pytest.mark.parametrize(("frames", "sizes"), [((), [64, 64, 2]), ((30,), [2] * 65)])
def test_all_is_read_64_pictures_or_frames_at_a_time(frames, sizes, monkeypatch):
    source = array_source(
        "x", np.zeros((130, *frames, 4, 4, 3), np.uint8), [str(n) for n in range(130)]
    )
    read, many = [], Source.many
    monkeypatch.setattr(
        Source, "many", lambda self, rows: read.append(len(rows)) or many(self, rows)
    )
    assert [example.key for example in read_all(source, range(130))] == source.keys
    assert read == sizes


# --- the loader ------------------------------------------------------------------------------


def equal(one, other) -> bool:
    return (
        torch.equal(one.picture, other.picture)
        and torch.equal(one.labels, other.labels)
        and torch.equal(one.original_side, other.original_side)
        and torch.equal(one.ids, other.ids)
        and (one.captions, one.keys) == (other.captions, other.keys)
    )


def joined(batches):
    return {
        "picture": torch.cat([batch.picture for batch in batches]),
        "ids": torch.cat([batch.ids for batch in batches]),
        "captions": sum((batch.captions for batch in batches), ()),
        "keys": sum((batch.keys for batch in batches), ()),
    }


@given(
    count=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    first=st.integers(0, 10**9),
    spans=st.lists(st.integers(1, 7), min_size=1, max_size=5),
)
def test_any_split_of_a_span_gives_the_same_samples(count, seed, first, spans):
    source = toy(count)
    whole = Loader(source, seed, flip=True).batch(range(first, first + sum(spans)))
    starts = [first + sum(spans[:index]) for index in range(len(spans))]
    other = Loader(source, seed, flip=True)  # a second loader, asked in another order
    ranges = [range(start, start + count) for start, count in zip(starts, spans, strict=True)]
    parts = joined([other.batch(ids) for ids in reversed(ranges)][::-1])
    assert torch.equal(whole.picture, parts["picture"])
    assert whole.ids.tolist() == parts["ids"].tolist() == list(range(first, first + sum(spans)))
    assert (whole.captions, whole.keys) == (parts["captions"], parts["keys"])


def test_every_epoch_is_another_permutation():
    source = toy(50)
    epochs = [
        Loader(source, 3).batch(range(50 * epoch, 50 * epoch + 50)).keys for epoch in range(3)
    ]
    assert all(sorted(keys) == sorted(source.keys) for keys in epochs)
    assert len(set(epochs)) == 3
    assert epochs[0] != Loader(source, 4).batch(range(50)).keys


def test_a_batch_holds_what_the_source_says():
    source = toy(10)
    batch = Loader(source, 0).batch(range(7, 13))
    rows = [source.keys.index(key) for key in batch.keys]
    assert torch.equal(
        to_uint8(batch.picture),
        torch.tensor(np.stack([source[row].picture for row in rows])).permute(0, 3, 1, 2),
    )
    assert batch.picture.is_contiguous()
    assert batch.labels is not None
    assert batch.labels.tolist() == [row % 2 for row in rows]
    assert batch.original_side.tolist() == [10.0 + row for row in rows]
    assert all(text in source[row].captions for text, row in zip(batch.captions, rows, strict=True))


def test_all_captions_of_a_picture_are_used_alike():
    captions = Loader(toy(1), 0).batch(range(400)).captions
    assert 160 < captions.count("one of 0") < 240


def test_half_the_pictures_are_mirrored_and_none_without_flip():
    source = toy(1)
    plain = Loader(source, 0).batch(range(200)).picture
    turned = Loader(source, 0, flip=True).batch(range(200)).picture
    assert (plain == plain[:1]).all()
    mirrored = (turned == plain.flip(-1)).flatten(1).all(1)
    assert ((turned == plain).flatten(1).all(1) ^ mirrored).all()
    assert 70 < mirrored.sum() < 130


def test_a_loader_shows_pictures_as_the_config_of_the_data_says(tmp_path):
    save = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save
    save(tmp_path / "a.png")
    source = picture_folder(tmp_path, 16, 0.0)
    given = {"crop": "random", "flip": True, "augment": 0.5, "pixels": "released", "clip": "fixed"}
    loader = Loader.of(source, 3, DataConfig(source="folder", path=str(tmp_path), **given))
    assert (loader.source, loader.seed) == (source, 3)
    assert {name: getattr(loader, name) for name in given} == given


def test_a_source_without_words_or_classes_gives_empty_captions_and_no_labels():
    source = array_source("bare", np.zeros((2, 4, 4, 1), np.uint8), ["a", "b"])
    batch = Loader(source, 0).batch(range(3))
    assert (batch.captions, batch.labels) == (("", "", ""), None)
    assert batch.picture.shape == (3, 1, 4, 4)


# --- looking ahead ---------------------------------------------------------------------------


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


def test_an_exception_arrives_in_its_place_and_the_threads_end():
    results = look_ahead(lambda n: 1 // (n - 2), range(9), workers=2, depth=3)
    assert [next(results), next(results)] == [-1, -1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert not [thread for thread in threading.enumerate() if "look-ahead" in thread.name]


def test_leaving_early_drops_the_rest():
    begun = []
    results = look_ahead(begun.append, range(1000), workers=1, depth=5)
    next(results)
    results.close()
    assert len(begun) <= 6
    assert not [thread for thread in threading.enumerate() if "look-ahead" in thread.name]


# --- OpenMoji --------------------------------------------------------------------------------


def test_openmoji_is_1904_captioned_pictures_in_code_point_order():
    source = openmoji(16)
    assert (len(source), source.side, source.channels, source.classes) == (1904, 16, 3, ())
    codes = [[int(part, 16) for part in key.split("-") if part != "FE0F"] for key in source.keys]
    assert codes == sorted(codes)
    assert not any(0x1F3FB <= code <= 0x1F3FF for codes_of_one in codes for code in codes_of_one)
    captions = captions_of(source)
    assert captions["1F34E"] == ("red apple",)
    assert captions["1F1ED-1F1F9"] == ("flag: Haiti", "flag of Haiti")
    assert captions["1F3F3-FE0F-200D-1F308"] == ("rainbow flag",)
    assert captions["1F552"] == ("three o'clock",)
    assert all(texts and all(texts) for texts in captions.values())
    assert not any(set(":_") & set(texts[-1]) for texts in captions.values())


def test_openmoji_is_drawn_on_white_in_its_colours():
    source = openmoji(16)
    red, green, blue = source[source.keys.index("1F34E")].picture[8, 8].astype(int)
    assert red > 150 > max(green, blue)
    corners = np.stack([source[n].picture[0, 0] for n in range(len(source))])
    assert (corners == 255).all(axis=1).mean() > 0.99


def test_openmoji_is_rendered_once_a_side(monkeypatch):
    openmoji(16)
    monkeypatch.setattr("matryoshka_diffusion.data.decoded.read_picture", None)
    assert len(openmoji(16)) == 1904


def test_openmoji_without_its_packages_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "emoji", None)
    with pytest.raises(ImportError, match=r'emoji: pip install "matryoshka-diffusion\[openmoji\]"'):
        openmoji(16)


# --- Fashion-MNIST ---------------------------------------------------------------------------


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def tiny_fashion(folder: Path, images=None, labels=None) -> Path:
    images = np.full((3, 28, 28), 9, np.uint8) if images is None else images
    labels = np.array([0, 9, 4], np.uint8) if labels is None else labels
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        (folder / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(idx_bytes(array)))
    return folder


@pytest.mark.parametrize("side", [28, 32, 35])
def test_fashion_mnist_is_padded_with_black(tmp_path, side):
    source = idx.fashion_mnist(side, tiny_fashion(tmp_path))
    assert (len(source), source.side, source.channels) == (3, side, 1)
    example = source[1]
    assert example.label == source.classes.index("Ankle boot")
    assert example.captions == ()
    assert (example.key, example.original_side) == ("train-00001", 28)
    before = (side - 28) // 2
    assert (example.picture[before : before + 28, before : before + 28] == 9).all()
    assert example.picture.sum() == 28 * 28 * 9


@pytest.mark.skipif(not idx.FOLDER.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_mnist_of_debian_is_whole():
    source = idx.fashion_mnist(32)
    assert len(source) == 60_000
    assert np.bincount(np.array([s.label for s in source.samples])).tolist() == [6_000] * 10


def test_a_side_below_28_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="needs a side of 32, not 16"):
        idx.fashion_mnist(16, tiny_fashion(tmp_path))


def test_missing_fashion_mnist_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"images-idx3.*apt-get install.*--data"):
        idx.fashion_mnist(32, tmp_path)


def test_idx_files_that_disagree_are_refused(tmp_path):
    with pytest.raises(ValueError, match="do not match 2 labels"):
        idx.fashion_mnist(32, tiny_fashion(tmp_path, labels=np.zeros(2, np.uint8)))
    with pytest.raises(ValueError, match="label 10 is not one of 10 classes"):
        idx.fashion_mnist(32, tiny_fashion(tmp_path, labels=np.array([1, 10, 2], np.uint8)))
    with pytest.raises(ValueError, match=r"\(3, 27, 28\) do not match"):
        idx.fashion_mnist(32, tiny_fashion(tmp_path, images=np.zeros((3, 27, 28), np.uint8)))


def test_a_damaged_gzip_file_is_named(tmp_path):
    path = tiny_fashion(tmp_path) / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for damaged in (whole[:-9], b"no gzip", whole[:12] + b"\xff\xff" + whole[14:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"images-idx3-ubyte\.gz is corrupt .*fetch it again"):
            idx.fashion_mnist(32, tmp_path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "corrupt"),
        (b"\0\0\x08\x02" + bytes(8), "does not begin"),
        (b"\0\0\x0d\x01" + bytes(8), "does not begin"),
        (b"\0\0\x08\x01\0\0", "corrupt"),
        (b"\0\0\x08\x01\0\0\0\x03ab", "cannot reshape"),
        (b"\0\0\x08\x01\0\0\0\x03abcd", "cannot reshape"),
        (b"\0\0\x08\x01\xff\xff\xff\xff", "beyond reason"),
    ],
)
def test_idx_bytes_are_judged_strictly(tmp_path, data, reason):
    path = tiny_fashion(tmp_path) / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(data))
    with pytest.raises(ValueError, match=reason):
        idx.fashion_mnist(32, tmp_path)


# --- one picture file ------------------------------------------------------------------------


def middle(path: Path, side: int = 16) -> tuple[int, ...]:
    return tuple(int(value) for value in read_picture(path, side).pixels[side // 2, side // 2])


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg", "wrong-suffix.png"])
def test_the_accepted_formats_decode(tmp_path, name):
    form = {"a.webp": "WEBP", "a.jpg": "JPEG", "wrong-suffix.png": "JPEG"}.get(name, "PNG")
    read = read_picture(picture(tmp_path / name, (40, 30), format=form), 16)
    assert read.pixels.shape == (16, 16, 3)
    assert read.original_side == 30
    assert np.abs(read.pixels.astype(int) - RED).max() <= 4


def test_a_picture_of_the_right_size_is_taken_bit_for_bit(tmp_path):
    Image.fromarray(noise(16)).save(tmp_path / "a.png")
    assert (read_picture(tmp_path / "a.png", 16).pixels == noise(16)).all()


@pytest.mark.parametrize("size", [(48, 16), (16, 48), (49, 16)])
def test_the_centre_square_is_cut(tmp_path, size):
    canvas = Image.new("RGB", size, WHITE)
    left, top = (size[0] - 16) // 2, (size[1] - 16) // 2
    canvas.paste(Image.fromarray(noise(16)), (left, top))
    canvas.save(tmp_path / "a.png")
    assert (read_picture(tmp_path / "a.png", 16).pixels == noise(16)).all()


def test_shrinking_averages_over_all_pixels(tmp_path):
    board = np.indices((256, 256)).sum(axis=0) % 2 * np.uint8(255)  # skipping gives 0 or 255
    Image.fromarray(board.astype(np.uint8)).save(tmp_path / "a.png")
    inner = read_picture(tmp_path / "a.png", 16).pixels[2:-2, 2:-2].astype(int)
    assert np.abs(inner - 127.5).max() < 3


def test_a_large_jpeg_is_shrunk_as_well_as_a_png(tmp_path):
    smooth = Image.fromarray(noise(8)).resize((1024, 1024), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "a.png")
    smooth.save(tmp_path / "a.jpg", quality=95)
    png, jpeg = (read_picture(tmp_path / name, 32) for name in ("a.png", "a.jpg"))
    assert png.original_side == jpeg.original_side == 1024
    assert np.abs(png.pixels.astype(int) - jpeg.pixels).mean() < 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(tmp_path, orientation):
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:4, :8] = RED
    stored = {  # how a camera stores what `orientation` turns upright
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    assert (read_picture(tmp_path / "a.png", 16).pixels == upright).all()


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    grey = np.full((16, 16), 100 * 257, np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert middle(tmp_path / "a.png") == (100, 100, 100)


def test_sixteen_bit_colour_keeps_its_high_bytes(tmp_path):
    row = b"\0" + struct.pack(">3H", *(value * 257 for value in RED)) * 16
    (tmp_path / "a.png").write_bytes(png_bytes(16, 16, row * 16, depth=16, colour=2))
    assert middle(tmp_path / "a.png") == RED


def test_cmyk_becomes_rgb(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red, green, blue = middle(tmp_path / "a.jpg")
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_what_is_transparent_is_white(tmp_path, mode):
    clear = Image.new("RGBA", (16, 16), (10, 10, 10, 0))
    if mode == "P":
        clear = Image.new("P", (16, 16), 3)
        clear.putpalette(bytes(range(256)) * 3)
    clear = clear.convert(mode)
    options = {"P": {"transparency": 3}, "RGB": {"transparency": (10, 10, 10)}}.get(mode, {})
    clear.save(tmp_path / "a.png", **options)
    assert middle(tmp_path / "a.png") == WHITE


def test_half_transparent_is_half_white(tmp_path):
    Image.new("RGBA", (16, 16), (0, 0, 0, 128)).save(tmp_path / "a.webp", lossless=True)
    assert abs(middle(tmp_path / "a.webp")[0] - 127) <= 1


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, form):
    later = [Image.new("RGB", (16, 16), WHITE)]
    options = {"save_all": True, "append_images": later, "lossless": True}
    picture(tmp_path / "a.png", (16, 16), format=form, **options)
    assert middle(tmp_path / "a.png") == RED


def png_bytes(width, height, rows: bytes, depth=8, colour=2, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = (
        chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + body


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize(
    "size", [(50_000, 50_000), (20_001, 20), (9_000, 8_000), (12_000, 12_000), (2**31 - 1, 16)]
)
def test_huge_pictures_are_refused_from_the_header(tmp_path, monkeypatch, size):
    (tmp_path / "a.png").write_bytes(png_bytes(size[0], size[1], b"", depth=1, colour=0))
    later = Image.new("RGB", (16, 16), WHITE)
    webp = picture(tmp_path / "a.webp", (16, 16), save_all=True, append_images=[later])
    data = bytearray(webp.read_bytes())
    canvas = data.index(b"VP8X") + 12
    for position, length in ((canvas, size[0]), (canvas + 3, size[1])):
        data[position : position + 3] = (min(length, 2**24) - 1).to_bytes(3, "little")
    webp.write_bytes(data)

    jpeg = picture(tmp_path / "a.jpg", (16, 16))
    data = bytearray(jpeg.read_bytes())
    frame = data.index(b"\xff\xc0") + 5
    data[frame : frame + 4] = struct.pack(">HH", *(min(length, 2**16 - 1) for length in size))
    jpeg.write_bytes(data)

    def allocate(*_):
        raise AssertionError("pixels were allocated")

    monkeypatch.setattr(ImageFile.ImageFile, "load", allocate)
    for path in (tmp_path / "a.png", webp, jpeg):
        with pytest.raises(PictureError, match="too large"):
            read_picture(path, 16)


@pytest.mark.parametrize("size", [(1, 1), (7, 100), (100, 7)])
def test_tiny_pictures_are_refused(tmp_path, size):
    with pytest.raises(PictureError, match="too small"):
        read_picture(picture(tmp_path / "a.png", size), 16)


BOMB = zlib.compress(bytes(50 * 2**20))
CHUNKS = {
    "compressed text": chunk(b"zTXt", b"k\0\0" + BOMB),
    "international text": chunk(b"iTXt", b"k\0\1\0\0\0" + BOMB),
    "many texts": chunk(b"tEXt", b"k\0" + bytes(2**20 - 2)) * 70,
    "colour profile": chunk(b"iCCP", b"k\0\0" + BOMB),
}


@pytest.mark.parametrize("kind", CHUNKS)
def test_a_chunk_does_not_unpack_beyond_bounds(tmp_path, kind):
    data = png_bytes(16, 16, bytes(16 * 49), extra=CHUNKS[kind])
    (tmp_path / "a.png").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(PictureError, match=r"too large|Too much memory"):
            read_picture(tmp_path / "a.png", 16)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 * 2**20


def test_a_file_beyond_all_reason_is_not_opened(tmp_path):
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(300 * 10**6)  # sparse
    with pytest.raises(PictureError, match="larger than 256 MB"):
        read_picture(tmp_path / "a.png", 16)


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused_whatever_their_name(tmp_path, form):
    picture(tmp_path / "a.png", format=form)
    with pytest.raises(PictureError, match="not a PNG, JPEG or WEBP"):
        read_picture(tmp_path / "a.png", 16)


def test_a_file_that_is_gone_cannot_be_read(tmp_path):
    with pytest.raises(UnreadableError, match=rf"cannot read {tmp_path}/a\.png: No such file"):
        read_picture(tmp_path / "a.png", 16)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # its remarks on damaged EXIF data
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_damaged_files_give_a_reason_or_a_picture_and_never_anything_else(tmp_path, form):
    info = PngImagePlugin.PngInfo()
    info.add_text("key", "value", zip=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"pnginfo": info} if form == "PNG" else {}
    path = tmp_path / "a.png"
    Image.fromarray(noise(24)).save(path, format=form, exif=exif, **options)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 30, max(1, len(whole) // 60)):
        path.write_bytes(whole[:length])
        with pytest.raises(PictureError):
            read_picture(path, 16)
    random = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for position in random.integers(0, min(len(whole), 400), random.integers(1, 4)):
            damaged[position] = random.integers(256)
        path.write_bytes(damaged)
        with contextlib.suppress(PictureError):
            assert read_picture(path, 16).pixels.shape == (16, 16, 3)


# --- folders ---------------------------------------------------------------------------------


def test_sub_folders_are_classes(tmp_path):
    for name in ("dog/b.png", "cat/deep/a.jpg", "cat/c.webp", "cat/.hidden.png", ".git/x.png"):
        picture(tmp_path / name)
    source = picture_folder(tmp_path, 16, 0.0)
    assert source.keys == ["cat/c.webp", "cat/deep/a.jpg", "dog/b.png"]
    assert source.classes == ("cat", "dog")
    assert [source[n].label for n in range(3)] == [0, 0, 1]
    assert source[0].captions == ()
    assert (source.side, source.channels, source.bad) == (16, 3, ())
    assert source[0].original_side == 20


def test_pictures_alone_are_unconditional(tmp_path):
    picture(tmp_path / "b.png")
    picture(tmp_path / "A.PNG")
    (tmp_path / "notes.txt").write_text("no sidecar")
    source = picture_folder(tmp_path, 16, 0.0)
    assert source.keys == ["A.PNG", "b.png"]
    assert (source.classes, source[0].label, source[0].captions) == ((), None, ())


def test_a_picture_beside_class_folders_is_bad(tmp_path):
    picture(tmp_path / "cat" / "a.png")
    picture(tmp_path / "stray.png")
    with pytest.raises(ValueError, match=r"1 of 2 files.*stray\.png: it is not in a class"):
        picture_folder(tmp_path, 16, 0.0)


def test_text_files_are_captions_and_win_over_classes(tmp_path):
    for name in ("cat/a", "dog/b"):
        picture(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"\ufeffa  {name[:3]}\n\n another \n", "utf-8")
    source = picture_folder(tmp_path, 16, 0.0)
    assert source.classes == ()
    assert source[0].captions == ("a cat", "another")
    assert source[1].captions == ("a dog", "another")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("column", ["text", "caption"])
def test_metadata_gives_captions(tmp_path, kind, column):
    picture(tmp_path / "a.png")
    picture(tmp_path / "sub" / "b.png")
    picture(tmp_path / "c.png")
    (tmp_path / "a.txt").write_text("the metadata wins")
    (tmp_path / "c.txt").write_text("only here")
    rows = [("./a.png", "one, two"), ("sub/b.png", "née\nBé"), ("a.png", "three")]
    path = tmp_path / f"metadata.{kind}"
    if kind == "jsonl":
        path.write_text(
            "\n".join(json.dumps({"file_name": a, column: b}) for a, b in rows) + "\n\n"
        )
    else:
        path.write_text(f"file_name,{column}\n" + "\n".join(f'{a},"{b}"' for a, b in rows), "utf-8")
    source = picture_folder(tmp_path, 16, 0.0)
    assert captions_of(source) == {
        "a.png": ("one, two", "three"),
        "c.png": ("only here",),
        "sub/b.png": ("née Bé",),
    }


def test_a_row_may_hold_several_captions(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": ["one", "two"]}')
    assert picture_folder(tmp_path, 16, 0.0)[0].captions == ("one", "two")


def test_bad_captions_are_listed_with_reasons(tmp_path):
    for name in "abcdefg":
        picture(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.txt").write_text(" \n \n")
    (tmp_path / "d.txt").write_text("x" * 70_000)
    (tmp_path / "f.txt").write_text("UTF-16", "utf-16")
    (tmp_path / "g.txt").mkdir()
    source = picture_folder(tmp_path, 16, 1.0)
    assert source.keys == ["a.png"]
    assert {file.path: file.reason.split(",")[0] for file in source.bad} == {
        "b.png": "its caption is not UTF-8",
        "c.png": "its caption is empty",
        "d.png": "d.txt is longer than 65",
        "e.png": "it has no caption",
        "f.png": "its caption is not UTF-8",
        "g.png": "it has no caption",
    }


def test_bad_metadata_lines_are_listed_with_their_numbers(tmp_path):
    for name in "abcd":
        picture(tmp_path / f"{name}.png")
    (tmp_path / "metadata.jsonl").write_bytes(
        b'{"file_name": "a.png", "text": "good"}\n'
        b"{broken\n"
        b'{"file_name": "../a.png", "text": "outside"}\n'
        b'{"file_name": "b.png", "text": "caf\xe9"}\n'
        b'{"file_name": "c.png", "text": "\\ud800"}\n'
        b'{"file_name": "d.png"}\n'
        b'["a.png"]\n' + b"[" * 100_000 + b"\n"
    )
    source = picture_folder(tmp_path, 16, 1.0)
    assert source.keys == ["a.png"]
    assert [file.path for file in source.bad] == [
        "b.png",
        "c.png",
        "d.png",
        *(f"metadata.jsonl:{line}" for line in (2, 3, 7, 8)),
    ]


def test_csv_captions_that_are_not_utf8_are_bad(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\na.png,caf\xe9\nb.png,ok\nx.png,no\n")
    source = picture_folder(tmp_path, 16, 1.0)
    assert [file.path for file in source.bad] == ["a.png", "metadata.csv:4"]


def test_unusable_metadata_files_are_errors(tmp_path):
    picture(tmp_path / "a.png")
    path = tmp_path / "metadata.csv"
    path.write_text("name,text\na.png,x\n")
    with pytest.raises(ValueError, match=r"metadata\.csv needs the columns file_name and text"):
        picture_folder(tmp_path, 16, 1.0)
    path.write_text("file_name,words\na.png,x\n")
    with pytest.raises(ValueError, match=r"metadata\.csv needs the columns file_name and text"):
        picture_folder(tmp_path, 16, 1.0)
    path.write_text("file_name,text\na.png," + "x" * 200_000)
    with pytest.raises(ValueError, match=r"metadata\.csv, line \d+: field larger"):
        picture_folder(tmp_path, 16, 1.0)
    path.write_text("file_name,text\na.png,x\n")
    (tmp_path / "metadata.jsonl").write_text("")
    with pytest.raises(ValueError, match="has both"):
        picture_folder(tmp_path, 16, 1.0)


def test_empty_and_missing_folders_say_what_to_put_there(tmp_path):
    (tmp_path / "readme.md").write_text("nothing")
    with pytest.raises(ValueError, match=r"holds no picture: put PNG, JPEG or WEBP.*class"):
        picture_folder(tmp_path, 16, 0.0)
    picture(tmp_path / "a.gif", format="GIF")
    with pytest.raises(ValueError, match=r"no picture \(a\.gif: \.gif is not read: make it PNG"):
        picture_folder(tmp_path, 16, 0.0)
    with pytest.raises(OSError, match=r"nowhere does not exist.*tar shards.*--data"):
        picture_folder(tmp_path / "nowhere", 16, 0.0)
    with pytest.raises(OSError, match=r"readme\.md is a file of no known kind.*tar shards"):
        picture_folder(tmp_path / "readme.md", 16, 0.0)


def test_bad_files_are_left_out_up_to_a_share(tmp_path):
    for index in range(8):
        picture(tmp_path / f"{index}.png")
    (tmp_path / "3.png").write_bytes(b"broken")
    (tmp_path / "6.png").unlink()
    (tmp_path / "6.png").symlink_to(tmp_path / "gone.png")
    source = picture_folder(tmp_path, 16, 0.25)
    assert source.keys == [f"{index}.png" for index in (0, 1, 2, 4, 5, 7)]
    assert [file.path for file in source.bad] == ["3.png", "6.png"]
    assert (source[5].picture == RED).all()
    with pytest.raises(
        ValueError, match=r"2 of 8 files cannot be used \(3\.png: not a PNG.*0\.2\)"
    ):
        picture_folder(tmp_path, 16, 0.2)


def test_nothing_but_bad_files_is_an_error_at_any_share(tmp_path):
    for index in range(7):
        (tmp_path / f"{index}.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"7 of 7 files .*and 2 more\)"):
        picture_folder(tmp_path, 16, 1.0)


def test_files_are_decoded_once_until_one_changes(tmp_path, monkeypatch):
    paths = [picture(tmp_path / name) for name in ("a.png", "b.png")]
    (tmp_path / "c.png").write_bytes(b"broken")
    seen = []

    def counted(path, side, crop):
        seen.append(path.name)
        return read_picture(path, side, crop)

    monkeypatch.setattr(decoded, "read_picture", counted)
    first = picture_folder(tmp_path, 16, 0.5)
    again = picture_folder(tmp_path, 16, 0.5)
    assert sorted(seen) == ["a.png", "b.png", "c.png"]
    assert again.bad == first.bad
    assert [x.original_side for x in (first[0], again[1])] == [20, 20]
    picture(paths[0], colour=WHITE)
    os.utime(paths[0], ns=(1, 1))
    assert (picture_folder(tmp_path, 16, 0.5)[0].picture == WHITE).all()
    assert len(seen) == 6
    picture_folder(tmp_path, 8, 0.5)
    assert len(seen) == 9
    assert (first[0].picture == RED).all()  # what is open stays as it was


def test_what_the_system_cannot_read_is_asked_for_again(tmp_path, monkeypatch):
    """It is an error that names the file, not one of the cache that was being written."""
    path = picture(tmp_path / "a.png")

    def fails(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(images, "open", fails, raising=False)
        with pytest.raises(UnreadableError, match=f"cannot read {path}: Too many open files"):
            picture_folder(tmp_path, 16, 1.0)
    assert picture_folder(tmp_path, 16, 0.0).keys == ["a.png"]


def test_old_states_of_a_folder_leave_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))
    for index in range(3):
        for old in (tmp_path / "cache").rglob("*.*"):
            os.utime(old, (1e9, 1e9))  # nobody has written it for long
        picture(tmp_path / "set" / f"{index}.png")
        picture_folder(tmp_path / "set", 16, 0.0)
    assert len(list((tmp_path / "cache").rglob("*.bin"))) == 1
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 1


@pytest.mark.parametrize("damage", ["gone", "garbage", "short"])
def test_broken_notes_of_the_cache_are_made_again(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))
    picture(tmp_path / "set" / "a.png")
    picture_folder(tmp_path / "set", 16, 0.0)
    (notes,) = (tmp_path / "cache").rglob("*.json")
    if damage == "gone":
        notes.unlink()
    else:
        notes.write_text({"garbage": "{", "short": "[]"}[damage])
    with pytest.warns(UserWarning, match="is corrupt and is made again"):
        source = picture_folder(tmp_path / "set", 16, 0.0)
    assert source[0].original_side == 20


# --- from a config, and for people -----------------------------------------------------------


def test_sources_open_from_a_config(tmp_path):
    assert open_source(DataConfig(source="openmoji"), 16).name == "openmoji"
    fashion = DataConfig(source="fashion-mnist", path=str(tiny_fashion(tmp_path)))
    assert open_source(fashion, 32).classes == idx.CLASSES
    picture(tmp_path / "a.png")
    source = open_source(DataConfig(source="folder", path=str(tmp_path)), 16)
    assert source[0].key == "a.png"


def test_a_config_whose_path_makes_no_sense_is_refused():
    with pytest.raises(ConfigError, match=r"data\.path is not set.*--data"):
        open_source(DataConfig(source="folder"), 16)
    with pytest.raises(ConfigError, match="OpenMoji comes from its package"):
        open_source(DataConfig(source="openmoji", path="somewhere"), 16)


def test_describe_says_what_there_is(tmp_path):
    for name in ("cat/a.png", "cat/b.png", "dog/c.png"):
        picture(tmp_path / name)
    picture(tmp_path / "dog" / "d.png", (10, 90))
    (tmp_path / "dog" / "e.png").write_bytes(b"broken")
    text = describe(picture_folder(tmp_path, 16, 0.5))
    for part in (
        "4 pictures",
        "16 px, 3 channels",
        "10 to 20 px on the shorter side, 1 of them below 16 px",
        "2: cat (2), dog (2)",
        "captions  none",
        "bad files 1",
        "dog/e.png: not a PNG, JPEG or WEBP picture",
    ):
        assert part in text


def test_describe_keeps_long_lists_short():
    captions = [(f"caption {n}",) for n in range(60)]
    source = toy(60, captions=captions)
    many = tuple(f"class {n}" for n in range(30))
    bad = tuple(folder_module.BadFile(f"{n}.png", "broken") for n in range(25))
    source = replace(source, classes=many, quarantine=folder_module.Quarantine("", bad))
    text = describe(source)
    assert "and 10 more" in text
    assert "and 5 more" in text
    assert '60 (60 distinct), such as "caption 0", "caption 1"' in text
