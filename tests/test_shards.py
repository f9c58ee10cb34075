"""Tar shards: read in place, whatever is in them, and nothing ever written to disk."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import struct
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.config import DataConfig
from matryoshka_diffusion.data import decoded, tar
from matryoshka_diffusion.data import shards as module
from matryoshka_diffusion.data.check import contact_sheet, describe
from matryoshka_diffusion.data.image import PICTURES, read_picture
from matryoshka_diffusion.data.loader import Loader
from matryoshka_diffusion.data.source import Source, absolute, kind_of, open_source
from matryoshka_diffusion.files import MissingExtra, UnreadableError
from matryoshka_diffusion.runs import prepare as job

COLOURS = [(200, 30, 40), (10, 180, 60), (20, 40, 220), (240, 240, 20), (90, 0, 90), (1, 2, 3)]
Parts = list[tuple[str, bytes]]


def shards(path: str, side: int, share: float) -> Source:
    return open_source(DataConfig(source="shards", path=path, max_bad_fraction=share), side)


def encode(colour=COLOURS[0], size=(20, 24), form="PNG", mode="RGB", **options) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, format=form, **options)
    return file.getvalue()


def write(path: Path, parts: Parts, form: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in parts:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def captioned(count: int, first: int = 0) -> Parts:
    """Pictures of one colour each, with captions."""
    return [
        part
        for n in range(first, first + count)
        for part in (
            (f"{n:05}.png", encode(COLOURS[n % 6])),
            (f"{n:05}.txt", f"picture {n}".encode()),
        )
    ]


def keys(source: Source) -> list[str]:
    return [source[n].key for n in range(len(source))]


def reasons(source: Source) -> dict[str, str]:
    """What people are told of each bad sample."""
    return {file.path: str(file).removeprefix(f"{file.path}: ") for file in source.bad}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def on_demand(monkeypatch):
    """Sets of any size are decoded on demand."""
    monkeypatch.setattr(decoded, "CACHED_PICTURES", 0)


def add_header(path: Path, **changes: bytes) -> Path:
    """Put a header with raw fields, and no bytes after it, before all others of a shard."""
    block = bytearray(tarfile.TarInfo("odd.png").tobuf(tarfile.USTAR_FORMAT))
    fields = {"name": (0, 100), "size": (124, 12), "type": (156, 1)}
    for field, value in changes.items():
        start, length = fields[field]
        block[start : start + length] = value.ljust(length, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    path.write_bytes(bytes(block) + path.read_bytes())
    return path


# --- what a shard holds ----------------------------------------------------------------------


def test_samples_come_in_order_with_captions_and_sides(tmp_path):
    parts = [
        ("a/x.y/1.jpg", encode(COLOURS[1], (40, 30), "JPEG")),
        ("a/x.y/1.txt", "\ufeffa  cat\n\nsome cat\n".encode()),
        ("a/x.y/1.embedding.npy", b"of no interest"),
        ("./2.WEBP", encode(COLOURS[2], form="WEBP", lossless=True)),
        ("2.json", b'{"caption": "a dog", "original_width": 900, "original_height": 700}'),
        ("3.json", b'{"text": ["a bird", "one bird"]}'),
        ("3.png", encode(COLOURS[3])),
        ("._3.png", b"what a Mac leaves"),
    ]
    source = shards(str(write(tmp_path / "s.tar", parts)), 16, 0.0)
    assert keys(source) == ["s.tar:a/x.y/1", "s.tar:2", "s.tar:3"]
    assert source.captions == [("a cat", "some cat"), ("a dog",), ("a bird", "one bird")]
    assert [source[n].original_side for n in range(3)] == [30, 700, 20]
    assert (source[1].picture == COLOURS[2]).all()
    assert (source.side, source.channels, source.classes, source.bad) == (16, 3, (), ())


def test_classes_are_numbers(tmp_path):
    parts = [
        part
        for n, label in enumerate((2, 0, 2))
        for part in ((f"{n}.png", encode()), (f"{n}.cls", f"{label}\n".encode()))
    ]
    source = shards(str(write(tmp_path / "s.tar", parts)), 16, 0.0)
    assert source.classes == ("0", "1", "2")
    assert [source[n].label for n in range(3)] == [2, 0, 2]
    assert source.captions is None


@pytest.mark.parametrize("large", [False, True])
def test_pictures_are_those_of_a_folder(tmp_path, monkeypatch, large):
    noise = np.random.default_rng(0).integers(0, 256, (31, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg", quality=90)
    write(tmp_path / "s.tar", [("a.jpg", (tmp_path / "a.jpg").read_bytes())])
    if large:
        monkeypatch.setattr(decoded, "CACHED_PICTURES", 0)
    source = shards(str(tmp_path / "s.tar"), 16, 0.0)
    assert (source.threads > 1) == large
    assert (source[0].picture == read_picture(tmp_path / "a.jpg", 16).pixels).all()
    assert source[0].original_side == 31


def test_several_shards_are_one_set_and_the_order_is_the_loader_s(tmp_path, on_demand):
    for n in range(3):
        write(tmp_path / "d" / f"{n:03}.tar", captioned(4, 4 * n))
    source = shards(f"{tmp_path}/d/{{000..002}}.tar", 16, 0.0)
    assert isinstance(source, Source)
    assert keys(source) == [f"{n // 4:03}.tar:{n:05}" for n in range(12)]
    loader = Loader(source, seed=1)
    whole = loader.batch(range(24))
    parts = [Loader(source, seed=1).batch(range(first, first + 6)) for first in (18, 6, 0, 12)]
    assert parts[1].keys == whole.keys[6:12]
    assert sorted(whole.keys[:12]) == sorted(whole.keys[12:]) == keys(source)
    for key, caption, picture in zip(whole.keys, whole.captions, whole.picture, strict=True):
        n = int(key.split(":")[1])
        assert caption == f"picture {n}"
        colour = ((picture[:, 0, 0] + 1) * 127.5).round().int().tolist()
        assert tuple(colour) == COLOURS[n % 6]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read(tmp_path, form):
    name = "/".join(["länge" * 12] * 5)
    parts = [(f"{name}.png", encode()), (f"{name}.txt", b"long"), *captioned(1)]
    source = shards(str(write(tmp_path / "s.tar", parts, form)), 16, 0.0)
    assert keys(source) == [f"s.tar:{name}", "s.tar:00000"]


def test_folders_and_other_members_are_passed_over(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x"}) as out:
        folder = tarfile.TarInfo("data")
        folder.type = tarfile.DIRTYPE
        out.addfile(folder)
        for name, data in (("data/a.png", encode()), ("README", b"hello"), ("b.npy", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mtime = 0.5  # makes a PAX header
            out.addfile(info, io.BytesIO(data))
    source = shards(str(path), 16, 0.0)
    assert keys(source) == ["s.tar:data/a"]
    assert source.bad == ()


def test_training_is_shown_the_same_whether_decoded_once_or_on_demand(tmp_path, monkeypatch):
    path = str(write(tmp_path / "s.tar", captioned(7)))
    once = Loader(shards(path, 16, 0.0), 3, flip=True).batch(range(5, 25))
    monkeypatch.setattr(decoded, "CACHED_PICTURES", 0)
    on_demand = Loader(shards(path, 16, 0.0), 3, flip=True).batch(range(5, 25))
    assert (once.picture == on_demand.picture).all()
    assert (once.keys, once.captions) == (on_demand.keys, on_demand.captions)
    assert (once.original_side == on_demand.original_side).all()


# --- which files -----------------------------------------------------------------------------


def test_patterns_count_with_zeros_in_several_places(tmp_path):
    assert module.expand(f"{tmp_path}/{{08..10}}-{{1..2}}.tar", ".tar") == [
        f"{tmp_path}/{n}.tar" for n in ("08-1", "08-2", "09-1", "09-2", "10-1", "10-2")
    ]
    for name in ("b.tar", "a.tar", "notes.txt"):
        (tmp_path / name).touch()
    both = [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
    assert module.expand(f"{tmp_path}/*.tar", ".tar") == both
    assert module.expand(str(tmp_path), ".tar") == both


@pytest.mark.parametrize("pattern", ["{5..1}.tar", "{0..99999999}.tar", "{0..9999}{0..9999}.tar"])
def test_ranges_that_are_slips_are_refused(pattern):
    with pytest.raises(ValueError, match="is no range, or gives too many names"):
        module.expand(pattern, ".tar")


def test_missing_and_compressed_shards_are_errors(tmp_path):
    write(tmp_path / "0.tar", captioned(1))
    with pytest.raises(FileNotFoundError, match=r"1\.tar: not found"):
        shards(f"{tmp_path}/{{0..1}}.tar", 16, 1.0)
    with pytest.raises(FileNotFoundError, match=r"no \.tar file is there"):
        shards(f"{tmp_path}/x*.tar", 16, 1.0)
    with pytest.raises(ValueError, match=r"0\.tar\.gz: .*plain \.tar files"):
        shards(f"{tmp_path}/0.tar.gz", 16, 1.0)
    write(tmp_path / "none.tar", [])
    with pytest.raises(ValueError, match=r"holds no sample: name .*--data"):
        shards(f"{tmp_path}/none.tar", 16, 1.0)


def test_shards_of_the_same_name_are_told_apart(tmp_path):
    for folder in ("a", "b"):
        write(tmp_path / folder / "0.tar", captioned(1))
    source = shards(f"{tmp_path}/*/0.tar", 16, 0.0)
    assert keys(source) == [f"{tmp_path}/{folder}/0.tar:00000" for folder in "ab"]


def test_what_a_path_names_is_recognised(tmp_path):
    write(tmp_path / "shards" / "0.tar", captioned(1))
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "0.parquet").touch()
    write(tmp_path / "photos" / "old.tar", [])
    (tmp_path / "photos" / "cat").mkdir()
    (tmp_path / "photos" / "cat" / "a.JPG").touch()
    expected = {
        "shards": "shards",
        "shards/{0..9}.tar": "shards",
        "shards/0.tar": "shards",
        "shards/0.tar.gz": "shards",
        "tables": "parquet",
        "tables/*.parquet": "parquet",
        "photos": "folder",
        "nowhere": "folder",
    }
    assert {name: kind_of(f"{tmp_path}/{name}") for name in expected} == expected
    assert kind_of("s3://bucket/{0..9}.tar") == "shards"
    assert kind_of("hf:somebody/something") == "datasets"


def test_names_from_elsewhere_stay_and_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved").mkdir()
    here = tmp_path.resolve()
    assert absolute("d/{0..1}.tar") == f"{here}/d/{{0..1}}.tar"
    assert absolute("s3://b/{0..1}.tar") == "s3://b/{0..1}.tar"
    assert absolute("hf:a/b@train") == "hf:a/b@train"
    assert absolute("hf:saved@test") == f"hf:{here}/saved@test"
    assert absolute("hf:saved") == f"hf:{here}/saved"


def test_a_preset_for_folders_takes_shards(tmp_path):
    write(tmp_path / "0.tar", captioned(3))
    config = job.find_config("folder-64", str(tmp_path), [])
    assert config.data.source == "shards"
    source = open_source(config.data, 16)
    assert keys(source)[0] == "0.tar:00000"
    assert job.all_captions(source) == ["picture 0", "picture 1", "picture 2"]
    assert job.complete(config, source).model.text is not None
    folder = job.find_config("folder-64", str(tmp_path / "cat"), [])
    assert folder.data == DataConfig(source="folder", path=str(tmp_path / "cat"), flip=True)


# --- the index -------------------------------------------------------------------------------


def test_the_index_is_made_once_until_the_shard_changes(tmp_path, monkeypatch):
    path = write(tmp_path / "s.tar", captioned(3))
    scanned = []

    def counted(file, size):
        scanned.append(size)
        return tar.members(file, size)

    monkeypatch.setattr(module, "members", counted)
    first = shards(str(path), 16, 0.0)
    assert keys(shards(str(path), 16, 0.0)) == keys(first)
    assert shards(str(path), 8, 0.0).captions == first.captions
    assert len(scanned) == 1
    write(path, captioned(3, 1))
    os.utime(path, ns=(1, 1))  # of the same size, and older
    assert keys(shards(str(path), 16, 0.0))[0] == "s.tar:00001"
    assert len(scanned) == 2


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"version": 1}', b"null"])
def test_a_damaged_index_is_made_again(tmp_path, damage):
    path = write(tmp_path / "s.tar", captioned(2))
    shards(str(path), 16, 0.0)
    (cached,) = (tmp_path / "cache" / "shards").iterdir()
    whole = cached.read_bytes()
    cached.write_bytes(damage)
    assert len(shards(str(path), 16, 0.0)) == 2
    assert cached.read_bytes() == whole


def test_indexing_reads_headers_and_not_pictures(tmp_path):
    size = 10 * 2**20
    path = write(tmp_path / "s.tar", [(f"{n}.png", bytes(size)) for n in range(4)])

    class Counting(io.FileIO):
        read_bytes = 0

        def read(self, count=-1, /):
            data = super().read(count)
            self.read_bytes += len(data)
            return data

    with Counting(path) as file:
        found = list(tar.members(file, path.stat().st_size))
        assert [member.size for member in found] == [size] * 4
        assert file.read_bytes == 5 * tar.BLOCK


def test_pictures_are_decoded_once(tmp_path, monkeypatch):
    path = write(tmp_path / "s.tar", captioned(3))
    shards(str(path), 16, 0.0)
    monkeypatch.setattr("matryoshka_diffusion.data.decoded.read_picture", None)
    assert (shards(str(path), 16, 0.0)[1].picture == COLOURS[1]).all()


# --- damage: counted, attributed, bounded ----------------------------------------------------


def test_a_truncated_shard_gives_what_came_before(tmp_path):
    path = write(tmp_path / "s.tar", captioned(5))
    with open(path, "rb") as file:
        cut = [member.start for member in tar.members(file, path.stat().st_size)][6] + 30
    path.write_bytes(path.read_bytes()[:cut])
    source = shards(str(path), 16, 0.5)
    assert keys(source) == ["s.tar:00000", "s.tar:00001", "s.tar:00002"]
    assert list(reasons(source)) == ["s.tar:00003"]
    assert "cut off: it claims" in reasons(source)["s.tar:00003"]
    assert f"at byte {cut - 30 - 512:,}" in reasons(source)["s.tar:00003"]


def test_a_shard_cut_between_its_members_is_noticed(tmp_path):
    path = write(tmp_path / "s.tar", captioned(2))
    with open(path, "rb") as file:
        end = [member.start for member in tar.members(file, path.stat().st_size)][-1] + 512
    path.write_bytes(path.read_bytes()[:end])
    source = shards(str(path), 16, 0.5)
    assert len(source) == 2
    assert reasons(source) == {
        f"s.tar:byte {end}": f"cut off: the end marker of a tar file is missing (at byte {end:,})"
    }


@pytest.mark.parametrize("large", [False, True])
def test_flipped_bytes_in_a_picture_cost_that_picture(tmp_path, monkeypatch, large):
    path = write(tmp_path / "s.tar", captioned(4))
    with open(path, "rb") as file:
        start = [member.start for member in tar.members(file, path.stat().st_size)][2]
    data = bytearray(path.read_bytes())
    data[start + 45 : start + 60] = bytes(15)
    path.write_bytes(data)
    if not large:
        source = shards(str(path), 16, 0.5)
        assert keys(source) == ["s.tar:00000", "s.tar:00002", "s.tar:00003"]
    else:
        monkeypatch.setattr(decoded, "CACHED_PICTURES", 0)
        source = shards(str(path), 16, 0.5)
        assert source.bad == ()
        with pytest.warns(UserWarning, match=r"s\.tar:00001: corrupt .*1 bad so far"):
            assert source[1].key == "s.tar:00002"
    (file,) = source.bad
    assert file.path == "s.tar:00001"
    assert file.offset == start
    assert (len(source) + (not large), source.total) == (4, 4)


def test_a_damaged_header_costs_one_sample_and_not_the_rest(tmp_path):
    path = write(tmp_path / "s.tar", captioned(4))
    with open(path, "rb") as file:
        header = [member.start for member in tar.members(file, path.stat().st_size)][2] - 512
    data = bytearray(path.read_bytes())
    data[header + 130] ^= 1  # in the size; the checksum no longer fits
    path.write_bytes(data)
    source = shards(str(path), 16, 0.9)
    assert keys(source) == ["s.tar:00000", "s.tar:00002", "s.tar:00003"]
    assert reasons(source) == {
        f"s.tar:byte {header}": f"damaged: no tar header where one should be (at byte {header:,})",
        "s.tar:00001": f"it has no PNG, JPEG or WEBP picture (at byte {header + 1536:,})",
    }


def test_each_damaged_header_is_counted(tmp_path):
    path = write(tmp_path / "s.tar", captioned(6))
    with open(path, "rb") as file:
        starts = [member.start for member in tar.members(file, path.stat().st_size)]
    data = bytearray(path.read_bytes())
    for part in (2, 4, 5):
        data[starts[part] - 512 + 130] ^= 1
    path.write_bytes(data)
    source = shards(str(path), 16, 0.9)
    assert keys(source) == [f"s.tar:{n:05}" for n in (0, 3, 4, 5)]
    damaged = [file.path for file in source.bad if "no tar header" in file.reason]
    assert damaged == [f"s.tar:byte {starts[part] - 512}" for part in (2, 4)]


def test_odd_pictures_are_converted_or_refused(tmp_path):
    frames = [Image.new("RGB", (20, 24), COLOURS[1])]
    deep = io.BytesIO()
    Image.fromarray(np.full((16, 16), 100 * 257, np.uint16)).save(deep, "PNG")
    parts = [
        ("a-cmyk.jpg", encode((0, 255, 255, 0), form="JPEG", mode="CMYK", quality=100)),
        ("b-deep.png", deep.getvalue()),
        ("c-moving.webp", encode(form="WEBP", save_all=True, append_images=frames, lossless=True)),
        ("d-tiny.png", encode(size=(1, 1))),
        ("e-empty.png", b""),
        ("f-gif.gif", encode(form="GIF")),
        ("g-gif.png", encode(form="GIF")),
    ]
    source = shards(str(write(tmp_path / "s.tar", parts)), 16, 0.9)
    assert keys(source) == ["s.tar:a-cmyk", "s.tar:b-deep", "s.tar:c-moving"]
    middles = [source[n].picture[8, 8].astype(int) for n in range(3)]
    assert np.abs(middles[0] - (255, 0, 0)).max() < 16
    assert middles[1].tolist() == [100] * 3
    assert middles[2].tolist() == list(COLOURS[0])
    found = reasons(source)
    assert "too small: 1x1" in found["s.tar:d-tiny"]
    assert "its picture is empty" in found["s.tar:e-empty"]
    assert "not a PNG, JPEG or WEBP" in found["s.tar:g-gif"]
    assert "f-gif" in "".join(found)


def test_bad_text_beside_pictures_is_attributed(tmp_path):
    png = encode()
    names = ("good", "latin", "blank", "long", "none", "json", "list", "unclear")
    extra: dict[str, Parts] = {
        "good": [("good.txt", b"a cat")],
        "latin": [("latin.txt", b"caf\xe9")],
        "blank": [("blank.txt", b" \n")],
        "long": [("long.txt", b"x" * 70_000)],
        "none": [],
        "json": [("json.json", b'{"caption": "caf\xe9"}')],
        "list": [("list.json", b"[1]")],
        "unclear": [("unclear.jpg", png), ("unclear.txt", b"two pictures")],
    }
    parts = [part for name in names for part in [(f"{name}.png", png), *extra[name]]]
    source = shards(str(write(tmp_path / "s.tar", parts)), 16, 0.9)
    assert keys(source) == ["s.tar:good"]
    assert {path: reason.split(" (")[0] for path, reason in reasons(source).items()} == {
        "s.tar:latin": "its caption is not UTF-8",
        "s.tar:blank": "its caption is empty",
        "s.tar:long": ".txt is longer than 65,536 bytes",
        "s.tar:none": "it has no caption, although others have one",
        "s.tar:json": "its .json is damaged or not UTF-8",
        "s.tar:list": "its .json is no object with names",
        "s.tar:unclear": "it has more than one picture: its key may be there twice",
    }
    assert all(re.search(r"\(at byte [\d,]+\)$", reason) for reason in reasons(source).values())


def test_bad_classes_are_attributed(tmp_path):
    labels = {"a": b"1", "b": b"-1", "c": b"cat", "d": b"9999999", "e": b"1" * 99, "f": None}
    parts = [
        part
        for name, label in labels.items()
        for part in [(f"{name}.png", encode()), *([(f"{name}.cls", label)] if label else [])]
    ]
    source = shards(str(write(tmp_path / "s.tar", parts)), 16, 0.9)
    assert (keys(source), source.classes) == (["s.tar:a"], ("0", "1"))
    found = reasons(source)
    assert found.keys() == {f"s.tar:{name}" for name in "bcdef"}
    assert "its .cls is no whole number" in found["s.tar:b"]
    assert found["s.tar:d"].startswith("its class 9999999 is not one of 100,000 (at byte ")
    assert found["s.tar:f"].startswith("it has no class, although others have one (at byte ")


def test_keys_that_come_twice_or_lie_apart_are_attributed(tmp_path):
    png = encode()
    parts = [
        *[("a.png", png), ("a.txt", b"first")],
        *[("b.png", png), ("c.png", png), ("b.txt", b"apart"), ("c.txt", b"apart")],
        *[("a.png", png), ("a.txt", b"again")],
        *[("d.png", png), ("d.txt", b"one"), ("d.txt", b"two")],
    ]
    source = shards(str(write(tmp_path / "s.tar", parts)), 16, 0.9)
    assert keys(source) == ["s.tar:a"]
    assert source.captions == [("first",)]
    found = [(file.path.split(":")[1], file.reason) for file in source.bad]
    assert sorted(key for key, _ in found) == ["a", "b", "b", "c", "c", "d"]
    assert sum("its key was used before" in reason for _, reason in found) == 3
    assert sum("more than one .txt" in reason for _, reason in found) == 1


def test_too_many_bad_samples_are_an_error(tmp_path):
    parts = [*captioned(3), ("broken.png", b"broken"), ("broken.txt", b"x")]
    path = str(write(tmp_path / "s.tar", parts))
    assert len(shards(path, 16, 0.25)) == 3
    with pytest.raises(ValueError, match=r"1 of 4 files .*s\.tar:broken: not a PNG.*0\.24"):
        shards(path, 16, 0.24)
    with pytest.raises(ValueError, match=r"1 of 1 files cannot be used.*none is left"):
        shards(str(write(tmp_path / "t.tar", parts[-2:])), 16, 1.0)


# --- decoding on demand ----------------------------------------------------------------------


def with_broken(tmp_path, broken: set[int], count: int = 8) -> str:
    parts = captioned(count)
    for n in broken:
        parts[2 * n] = (parts[2 * n][0], b"broken")
    return str(write(tmp_path / "s.tar", parts))


def test_a_bad_picture_is_replaced_by_the_next_good_one_in_any_order(tmp_path, on_demand):
    path = with_broken(tmp_path, {2, 3, 7})
    expected = [f"s.tar:{n:05}" for n in (0, 1, 4, 4, 4, 5, 6, 0)]
    for order in (range(8), range(7, -1, -1)):
        source = shards(path, 16, 0.5)
        with pytest.warns(UserWarning, match="stands in for it") as seen:
            found = {n: source[n].key for n in order}
        assert [found[n] for n in range(8)] == expected
        assert len(seen) == len(source.bad) == 3
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # said once, and it is not read again
            assert [example.key for example in source.many(range(8))] == expected
    with pytest.warns(UserWarning, match="stands in for it"):
        assert [example.key for example in shards(path, 16, 0.5).many(range(8))] == expected


def test_too_many_bad_pictures_end_the_run(tmp_path, on_demand):
    source = shards(with_broken(tmp_path, {2, 3, 7}), 16, 0.25)
    with pytest.warns(UserWarning, match="stands in for it"):
        assert source[2].key == "s.tar:00004"
    with (
        pytest.warns(UserWarning, match="stands in for it"),
        pytest.raises(ValueError, match=r"3 of 8 files cannot be used.*0\.25"),
    ):
        source[7]


def test_a_set_without_a_good_picture_ends(tmp_path, on_demand):
    source = shards(with_broken(tmp_path, set(range(4)), 4), 16, 1.0)
    with (
        pytest.warns(UserWarning, match="stands in for it"),
        pytest.raises(ValueError, match="4 of 4 files cannot be used"),
    ):
        source[0]


def test_a_set_on_demand_is_indexed_like_a_sequence(tmp_path, on_demand):
    source = shards(str(write(tmp_path / "s.tar", captioned(3))), 16, 0.0)
    assert source[-1].key == "s.tar:00002"
    with pytest.raises(IndexError):
        source[3]


def test_a_shard_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """And not the file of the cache that its pictures were being written to."""
    path = write(tmp_path / "s.tar", captioned(3))

    def fails(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(type(module.fsspec.filesystem("file")), "cat_file", fails)
        with pytest.raises(UnreadableError, match=f"cannot read {path}: Input/output error"):
            shards(str(path), 16, 0.0)
    assert len(shards(str(path), 16, 0.0)) == 3


def test_a_shard_that_shrinks_later_is_bad_data(tmp_path, on_demand):
    path = write(tmp_path / "s.tar", captioned(3))
    source = shards(str(path), 16, 0.9)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.warns(UserWarning, match="0000[012]: it is empty"):
        assert source[2].key == "s.tar:00000"


# --- hostile archives ------------------------------------------------------------------------


def everything_below(folder: Path) -> set[str]:
    found = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return {name for name in found if not name.startswith("cache")}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": b"../x.png"}, "its name leads outside"),
        ({"name": b"a/../../x.png"}, "its name leads outside"),
        ({"name": b"..\\x.png"}, "its name leads outside"),
        ({"name": b"/tmp/x.png"}, "its name leads outside"),
        ({"name": b"C:\\x.png"}, "its name leads outside"),
        ({"type": b"1"}, "it is a link"),
        ({"type": b"2"}, "it is a link"),
        ({"type": b"2", "size": b"77777777777"}, "it is a link"),
        ({"type": b"3"}, "it is a device"),
        ({"type": b"4"}, "it is a device"),
        ({"type": b"6"}, "it is a pipe"),
        ({"type": b"S"}, "it is a sparse file"),
        ({"type": b"Z"}, "it is of the unknown tar type b'Z'"),
        ({"size": b"\x80" + bytes(3) + (2**60).to_bytes(8, "big")}, "it claims 1,152,921,504"),
        ({"size": b"77777777777"}, "cut off: it claims 8,589,934,591"),
        ({"type": b"L", "size": b"77777777777"}, "its name or PAX header claims"),
        ({"type": b"x", "size": b"00000777777"}, "its name or PAX header claims 262,143 bytes"),
        ({"size": b"-1"}, "damaged: no tar header"),
        ({"size": b"\xff" * 12}, "damaged: no tar header"),
        ({"size": b"12_7"}, "damaged: no tar header"),
    ],
)
def test_hostile_members_are_refused_and_the_rest_is_read(tmp_path, changes, reason):
    path = add_header(write(tmp_path / "d" / "s.tar", captioned(3)), **changes)
    before = everything_below(tmp_path)
    source = shards(str(path), 16, 0.5)
    assert keys(source) == ["s.tar:00000", "s.tar:00001", "s.tar:00002"]
    (bad,) = source.bad
    assert reason in bad.reason
    assert bad.offset == 0
    assert everything_below(tmp_path) == before


def test_a_hostile_name_in_an_extension_is_judged(tmp_path):
    outside = "/".join([".."] * 60) + "/etc/passwd.png"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        parts = [(outside, encode()), *captioned(3)]
        source = shards(str(write(tmp_path / f"{form}.tar", parts, form)), 16, 0.5)
        assert len(source) == 3
        assert "leads outside" in source.bad[0].reason


def test_pax_headers_may_claim_what_they_like(tmp_path):
    for number, (key, value) in enumerate(
        [("size", str(2**60)), ("GNU.sparse.realsize", "1"), ("GNU.sparse.map", "0,1")]
    ):
        path = tmp_path / f"{number}.tar"
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as out:
            for name, data in [("odd.png", encode()), *captioned(3)]:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                info.pax_headers = {key: value} if name == "odd.png" else {}
                out.addfile(info, io.BytesIO(data))
        source = shards(str(path), 16, 0.5)
        assert len(source) == 3
        assert [file.path for file in source.bad] == [f"{number}.tar:odd"]
        assert ("cut off" if key == "size" else "a sparse file") in source.bad[0].reason


@pytest.mark.parametrize(
    "data", [b"", b"9", b"9 x", b"99999 a=b\n", b"0 =\n", b"-5 a=b\n", b"6 a=b\n7 xx\n", b" = \n"]
)
def test_damaged_pax_records_end_quietly(data):
    assert tar._pax(data) == {}


def test_random_damage_never_raises_anything_but_our_errors(tmp_path):
    whole = write(tmp_path / "s.tar", captioned(3), tarfile.PAX_FORMAT).read_bytes()
    random = np.random.default_rng(0)
    path = tmp_path / "damaged.tar"
    for _ in range(150):
        damaged = bytearray(whole[: random.integers(len(whole))])
        for position in random.integers(0, max(len(damaged), 1), 5 * bool(damaged)):
            damaged[position] = random.integers(256)
        path.write_bytes(damaged)
        with open(path, "rb") as file:
            for member in tar.members(file, len(damaged)):
                assert 0 <= member.start <= len(damaged)
                assert member.flaw or member.start + member.size <= len(damaged)
        module._index(str(path), f"{len(damaged)} {random.random()}", PICTURES)


def test_huge_pictures_inside_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 1, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header + bytes(60)
    source = shards(
        str(write(tmp_path / "s.tar", [("bomb.png", bomb), ("a.png", encode())])), 16, 1.0
    )
    assert keys(source) == ["s.tar:a"]
    write(tmp_path / "t.tar", [("large.png", bytes(101))])
    [large] = module.shards(str(tmp_path / "t.tar"), PICTURES._replace(max_bytes=100)).samples
    assert large.flaw == "its picture is too large"


# --- files elsewhere -------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path):
    """Two shards in fsspec's file system in memory."""
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    for n in range(2):
        data = write(tmp_path / f"{n}.tar", captioned(3, 3 * n)).read_bytes()
        system.pipe_file(f"/bucket/{n}.tar", data)
    yield system
    system.rm("/bucket", recursive=True)


@pytest.mark.parametrize("pattern", ["memory://bucket/{0..1}.tar", "memory://bucket/*.tar"])
def test_shards_elsewhere_are_read_by_ranges(elsewhere, monkeypatch, on_demand, pattern):
    source = shards(pattern, 16, 0.0)
    assert keys(source) == [f"{n // 3}.tar:{n:05}" for n in range(6)]
    asked = []
    whole = type(elsewhere).cat_file

    def counted(self, path, start=None, end=None, **kwargs):
        asked.append((path, start, end))
        return whole(self, path, start=start, end=end, **kwargs)

    monkeypatch.setattr(type(elsewhere), "cat_file", counted)
    assert (source[4].picture == COLOURS[4]).all()
    ((path, start, end),) = asked
    assert (path, end - start) == ("/bucket/1.tar", len(encode(COLOURS[4])))


def test_what_fails_elsewhere_names_the_address(elsewhere):
    with pytest.raises(OSError, match=r"memory://bucket/2\.tar: not found"):
        shards("memory://bucket/{0..2}.tar", 16, 0.0)
    with pytest.raises(ValueError, match="nosuchservice"):
        shards("nosuchservice://a.tar", 16, 0.0)


def test_addresses_without_fsspec_name_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(MissingExtra, match=r"s3://bucket/0\.tar.*s3fs.*pip install .*\[remote\]"):
        shards("s3://bucket/0.tar", 16, 0.0)


# --- for people ------------------------------------------------------------------------------


@pytest.mark.parametrize("large", [False, True])
def test_data_check_reports_on_shards_and_draws_a_sheet(tmp_path, monkeypatch, capsys, large):
    if large:
        monkeypatch.setattr(decoded, "CACHED_PICTURES", 0)
    path = with_broken(tmp_path, {5})
    check = ["data", "check", path, "--sheet", str(tmp_path / "sheet.png")]
    allowed = ["--set", "data.max_bad_fraction=0.125"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert cli.main([*check, *allowed]) == 0
        shown = capsys.readouterr().out
        for part in ("shards", "picture 2", "bad files 1", "s.tar:00005: not a PNG", "at byte"):
            assert part in shown
        with Image.open(tmp_path / "sheet.png") as sheet:
            assert min(sheet.size) > 96
        assert cli.main(check) == 1
    assert "1 of 8 files are bad" in capsys.readouterr().err


def test_a_contact_sheet_shows_pictures_spread_over_the_set(tmp_path):
    bare = [(f"{n}.png", encode(COLOURS[n % 6])) for n in range(6)]
    source = shards(str(write(tmp_path / "s.tar", bare)), 16, 0.0)

    def colours(sheet) -> set[tuple[int, ...]]:
        pixels = np.asarray(sheet).reshape(-1, 3)
        return set(map(tuple, pixels.tolist())) & set(COLOURS)

    assert colours(contact_sheet(source)) == set(COLOURS)
    assert colours(contact_sheet(source, 2)) == {COLOURS[0], COLOURS[3]}
    captions = shards(str(write(tmp_path / "t.tar", captioned(6))), 16, 0.0)
    wide, narrow = contact_sheet(captions), contact_sheet(source)
    assert colours(wide) == set(COLOURS)
    assert wide.width > narrow.width  # there is room for words
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet(source, 0)


def test_describe_counts_what_turns_out_bad_while_it_looks(tmp_path, on_demand):
    source = shards(with_broken(tmp_path, {1}), 16, 1.0)
    with pytest.warns(UserWarning, match="stands in for it"):
        text = describe(source)
    assert "bad files 1" in text
    assert json.dumps("picture 0") in text
