"""The sets that come in packages, how a config names data, and what reports say of a source."""

from __future__ import annotations

import gc
import gzip
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from matryoshka_diffusion.config import ConfigError, DataConfig
from matryoshka_diffusion.configfile import to_yaml
from matryoshka_diffusion.data import decoded, fashion_mnist
from matryoshka_diffusion.data.check import contact_sheet, describe, summary
from matryoshka_diffusion.data.source import Source, absolute, kind_of, open_source
from matryoshka_diffusion.runs import prepare as job
from picturing import COLOURS, encode, noise, opened, save, write_tar

# --- OpenMoji ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def openmoji() -> Source:
    return open_source(DataConfig(source="openmoji"), 16)


def test_openmoji_is_1904_captioned_pictures_in_code_point_order(openmoji):
    assert (openmoji.name, len(openmoji), openmoji.side, openmoji.channels) == (
        *("openmoji", 1904),
        *(16, 3),
    )
    codes = [[int(part, 16) for part in key.split("-") if part != "FE0F"] for key in openmoji.keys]
    assert codes == sorted(codes)
    assert not any(0x1F3FB <= code <= 0x1F3FF for codes_of_one in codes for code in codes_of_one)
    captions = dict(zip(openmoji.keys, openmoji.captions or (), strict=True))
    assert captions["1F34E"] == ("red apple",)
    assert captions["1F1ED-1F1F9"] == ("flag: Haiti", "flag of Haiti")
    assert captions["1F3F3-FE0F-200D-1F308"] == ("rainbow flag",)
    assert captions["1F552"] == ("three o'clock",)
    assert all(texts and all(texts) for texts in captions.values())
    assert not any(set(":_") & set(texts[-1]) for texts in captions.values())


def test_openmoji_is_drawn_on_white_in_its_colours_once_a_side(openmoji, monkeypatch):
    red, green, blue = openmoji[openmoji.keys.index("1F34E")].picture[8, 8].astype(int)
    assert red > 150 > max(green, blue)
    corners = np.stack([openmoji[n].picture[0, 0] for n in range(len(openmoji))])
    assert (corners == 255).all(axis=1).mean() > 0.99
    monkeypatch.setattr(decoded, "read_picture", None)
    assert len(open_source(DataConfig(source="openmoji"), 16)) == 1904


def test_openmoji_without_its_packages_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "emoji", None)
    with pytest.raises(ImportError, match=r"emoji: pip install .*\[openmoji\]"):
        open_source(DataConfig(source="openmoji"), 16)


# --- sets of millions --------------------------------------------------------------------------


def write_captioned(path: Path, count: int) -> Path:
    """A shard or a parquet file of one small picture, again and again with other captions."""
    picture, captions = encode(size=(8, 8)), [f"picture {n}" for n in range(count)]
    if path.suffix == ".tar":
        members = ((f"{n}.png", picture, f"{n}.txt", text) for n, text in enumerate(captions))
        return write_tar(
            path, [part for a, b, c, d in members for part in ((a, b), (c, d.encode()))]
        )
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    table = arrow.table({"image": [picture] * count, "caption": captions})
    parquet.write_table(table, path, row_group_size=64)
    return path


@pytest.mark.parametrize("name", ["s.tar", "s.parquet"])
def test_a_sample_that_is_not_decoded_yet_takes_400_bytes_at_most(name, tmp_path, monkeypatch):
    monkeypatch.setattr(decoded, "CACHED_PICTURES", 0)
    count, kind = 2_000, "shards" if name == "s.tar" else "parquet"
    path = write_captioned(tmp_path / name, count)
    opened(path, kind=kind)  # what is imported or indexed on the way is there from here on
    tracemalloc.start()
    try:
        source = opened(path, kind=kind)
        gc.collect()
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(source) == count
    assert kept / count < 400
    assert source[count - 1].captions == (f"picture {count - 1}",)


# --- Fashion-MNIST -----------------------------------------------------------------------------


def tiny_fashion(folder: Path, images=None, labels=None) -> Path:
    images = np.full((3, 28, 28), 9, np.uint8) if images is None else images
    labels = np.array([0, 9, 4], np.uint8) if labels is None else labels
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        head = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        (folder / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    return folder


def fashion(folder: Path, side: int = 32) -> Source:
    return open_source(DataConfig(source="fashion-mnist", path=str(folder)), side)


@pytest.mark.parametrize("side", [28, 32, 35])
def test_fashion_mnist_is_padded_with_black(tmp_path, side):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
    source = fashion(tiny_fashion(tmp_path, pixels), side)
    assert (len(source), source.side, source.channels) == (3, side, 1)
    example = source[1]
    assert example.label == source.classes.index("Ankle boot")
    assert example.captions == ()
    assert (example.key, example.original_side) == ("train-00001", 28)
    before = (side - 28) // 2
    assert (example.picture[before : before + 28, before : before + 28, 0] == pixels[1]).all()
    assert example.picture.sum() == pixels[1].sum()


@pytest.mark.skipif(not fashion_mnist.FOLDER.is_dir(), reason="needs Debian's package")
def test_fashion_mnist_of_debian_is_whole():
    source = open_source(DataConfig(source="fashion-mnist"), 32)
    assert np.bincount([x.label or 0 for x in source.samples]).tolist() == [6_000] * 10


def test_missing_or_shrunk_fashion_mnist_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"images-idx3.*apt-get install.*--data"):
        fashion(tmp_path)
    with pytest.raises(ConfigError, match="side of 32, not 16"):
        fashion(tiny_fashion(tmp_path), 16)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"labels": np.zeros(2, np.uint8)}, "do not match 2 labels"),
        ({"labels": np.array([1, 10, 2], np.uint8)}, "label 10 is not one of 10 classes"),
        ({"images": np.zeros((3, 27, 28), np.uint8)}, r"\(3, 27, 28\) do not match"),
    ],
)
def test_idx_files_that_disagree_are_refused(tmp_path, columns, reason):
    with pytest.raises(ValueError, match=reason):
        fashion(tiny_fashion(tmp_path, **columns))


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\0\0\x08\x02" + bytes(8), b"\0\0\x0d\x01" + bytes(8), b"\0\0\x08\x01\0\0"),
        *(b"\0\0\x08\x01\0\0\0\x03" + more for more in (b"ab", b"abcd")),
        *(b"\0\0\x08\x01\xff\xff\xff\xff", None),
    ],
)
def test_damaged_idx_files_are_named(tmp_path, data):
    path = tiny_fashion(tmp_path) / "train-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9] if data is None else gzip.compress(data))
    with pytest.raises(ValueError, match=r"labels-idx1-ubyte\.gz is corrupt .*fetch it again"):
        fashion(tmp_path)


# --- from a config -----------------------------------------------------------------------------


def test_a_config_whose_path_makes_no_sense_is_refused():
    with pytest.raises(ConfigError, match=r"data\.path.*--data"):
        open_source(DataConfig(source="folder"), 16)
    with pytest.raises(ConfigError, match=r"data\.path.*omit --data"):
        open_source(DataConfig(source="openmoji", path="somewhere"), 16)


def test_what_a_path_names_is_recognised(tmp_path):
    write_tar(tmp_path / "shards" / "0.tar", [])
    (tmp_path / "tables").mkdir()
    for name in ("0.parquet", "notes.tsv", "old.tar.gz", "._0.tar"):
        (tmp_path / "tables" / name).touch()
    write_tar(tmp_path / "photos" / "old.tar", [])
    (tmp_path / "photos" / "cat").mkdir()
    (tmp_path / "photos" / "cat" / "a.JPG").touch()
    names = ("shards", "shards/{0..9}.tar", "shards/0.tar", "shards/0.tar.gz", "list.tsv")
    expected = dict.fromkeys(names, "shards")
    expected |= {"tables": "parquet", "tables/*.parquet": "parquet"}
    expected |= {"photos": "folder", "nowhere": "folder"}
    assert {name: kind_of(f"{tmp_path}/{name}") for name in expected} == expected
    assert kind_of("s3://bucket/{0..9}.tar") == "shards"
    assert kind_of("hf:somebody/something") == "datasets"
    shards = job.find_config("folder-64", str(tmp_path / "shards"), [])
    assert shards.data.source == "shards"
    part = f"data.mix=[{{path: {tmp_path}/shards/../shards, share: 1}}]"
    mixed = job.find_config("folder-64", None, [part])
    assert [(x.source, x.path) for x in mixed.data.mix] == [("shards", str(tmp_path / "shards"))]
    (tmp_path / "mixed.yaml").write_text(to_yaml(mixed))
    other = job.find_config(str(tmp_path / "mixed.yaml"), str(tmp_path / "tables"), [])
    assert (other.data.mix, other.data.path) == ((), str(tmp_path / "tables"))
    folder = job.find_config("folder-64", str(tmp_path / "cat"), [])
    assert folder.data == DataConfig(source="folder", path=str(tmp_path / "cat"), flip=True)


def test_names_from_elsewhere_stay_and_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved").mkdir()
    here = tmp_path.resolve()
    assert absolute("d/{0..1}.tar") == f"{here}/d/{{0..1}}.tar"
    assert absolute("s3://b/{0..1}.tar") == "s3://b/{0..1}.tar"
    assert absolute("hf:a/b@train") == "hf:a/b@train"
    assert absolute("hf:saved@test") == f"hf:{here}/saved@test"
    assert absolute("hf:saved") == f"hf:{here}/saved"


@pytest.mark.parametrize(
    ("channels", "words", "expected"),
    [
        (1, "channel, grey\n", ([165], [9])),  # red at half opacity on white
        (2, "channels, grey with opacity", ([76, 128], [9, 255])),
        (3, "channels\n", ([255, 127, 127], [9, 9, 9])),
        (4, "channels, colour with opacity", ([255, 0, 0, 128], [9, 9, 9, 255])),
    ],
)
def test_the_model_decides_on_grey_colour_and_opacity(tmp_path, channels, words, expected):
    (tmp_path / "a.png").write_bytes(encode((255, 0, 0, 128), mode="RGBA"))
    (tmp_path / "b.png").write_bytes(encode(9, mode="L"))
    source = open_source(DataConfig(source="folder", path=str(tmp_path)), 16, channels=channels)
    for n, pixel in enumerate(expected):
        np.testing.assert_allclose(source[n].picture[8, 8], pixel, atol=1)
    assert f"{channels} {words}" in describe(source)
    assert f"16 px{words.removeprefix('channels').removeprefix('channel')}".strip() in summary(
        source
    )


# --- reports -----------------------------------------------------------------------------------


def test_describe_says_what_there_is(tmp_path):
    for name in ("cat/a.png", "cat/b.png", "dog/c.png"):
        save(tmp_path / name)
    save(tmp_path / "dog" / "d.png", noise(90, 10))
    (tmp_path / "dog" / "e.png").write_bytes(b"broken")
    text = describe(opened(tmp_path, 0.5))
    for part in ("4 pictures", "10 to 20 px", "1 of them below 16 px", "cat (2), dog (2)"):
        assert part in text
    assert "bad files 1\n    dog/e.png: not PNG" in text


def test_a_contact_sheet_shows_pictures_spread_over_the_set(tmp_path):
    for n, colour in enumerate(COLOURS):
        save(tmp_path / f"{n}.png", np.full((20, 20, 3), colour, np.uint8))

    def colours(sheet) -> set[tuple[int, ...]]:
        pixels = np.asarray(sheet).reshape(-1, 3)
        return set(map(tuple, pixels.tolist())) & set(COLOURS)

    source = opened(tmp_path)
    assert colours(contact_sheet(source)) == set(COLOURS)
    assert colours(contact_sheet(source, 2)) == {COLOURS[0], COLOURS[3]}
    for n in range(len(COLOURS)):
        (tmp_path / f"{n}.txt").write_text(f"picture {n}")
    wide = contact_sheet(opened(tmp_path))
    assert colours(wide) == set(COLOURS)
    assert wide.width > contact_sheet(source).width  # there is room for words
