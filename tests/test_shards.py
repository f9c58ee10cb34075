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
from contextlib import nullcontext
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from matryoshka_diffusion.config import ConfigError, DataConfig
from matryoshka_diffusion.data import decoded, patterns, remote, shards, tar
from matryoshka_diffusion.data.check import describe, refuse_lost
from matryoshka_diffusion.data.image import PICTURES
from matryoshka_diffusion.data.source import Source, kind_of
from matryoshka_diffusion.files import MissingExtra, UnreadableError
from picturing import COLOURS, Parts, encode, reasons, write_tar
from picturing import opened as opened_kind

DATA = DataConfig(source="shards")
STANDS_IN = "stands in for it"


def opened(path: Path | str, share: float = 0.0, **options) -> Source:
    return opened_kind(path, share, kind="shards", **options)


def captioned(count: int, first: int = 0) -> Parts:
    """Pictures of one colour each, with captions."""
    parts: Parts = []
    for n in range(first, first + count):
        parts.append((f"{n:05}.png", encode(COLOURS[n % 6])))
        parts.append((f"{n:05}.txt", f"picture {n}".encode()))
    return parts


def keys(count: int, *without: int) -> list[str]:
    return [f"s.tar:{n:05}" for n in range(count) if n not in without]


def members(path: Path) -> list[tar.Member]:
    with open(path, "rb") as file:
        return list(tar.members(file, path.stat().st_size))


@pytest.fixture
def on_demand(monkeypatch):
    """Sets of any size are decoded on demand."""
    monkeypatch.setattr(decoded, "CACHED_PICTURES", 0)


@pytest.fixture
def s(tmp_path) -> Path:
    """A shard of six samples."""
    return write_tar(tmp_path / "s.tar", captioned(6))


# --- what a shard holds ------------------------------------------------------------------------


def test_samples_come_in_order_with_captions_and_sides(tmp_path):
    parts = [
        ("a/x.y/1.jpg", encode(COLOURS[1], (40, 30), "JPEG")),
        ("a/x.y/1.txt", "\ufeffa  cat\n\nsome cat\n".encode()),
        ("a/x.y/1.embedding.npy", b"of no interest"),
        ("README", b"hello"),
        ("./2.WEBP", encode(COLOURS[2], form="WEBP", lossless=True)),
        ("2.json", b'{"caption": "a dog", "original_width": 900, "original_height": 700}'),
        ("3.json", b'{"text": ["a bird", "one bird"]}'),
        ("3.png", encode(COLOURS[3])),
        ("._3.png", b"what a Mac leaves"),
    ]
    source = opened(write_tar(tmp_path / "s.tar", parts))
    assert source.keys == ["s.tar:a/x.y/1", "s.tar:2", "s.tar:3"]
    assert source.captions == [("a cat", "some cat"), ("a dog",), ("a bird", "one bird")]
    assert [source[n].original_side for n in range(3)] == [30, 700, 20]
    assert (source[1].picture == COLOURS[2]).all()
    assert (source.side, source.channels, source.classes, source.bad) == (16, 3, (), ())


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_folders_are_read(tmp_path, form):
    name, path = "/".join(["länge" * 12] * 5), tmp_path / "s.tar"
    with tarfile.open(path, "w", format=form, pax_headers={"comment": "x"}) as archive:
        folder = tarfile.TarInfo("data")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for member in (f"{name}.png", "b/a.png"):
            info = tarfile.TarInfo(member)
            info.size, info.mtime = len(encode()), 0.5  # which makes a PAX header
            archive.addfile(info, io.BytesIO(encode()))
    source = opened(path)
    assert (source.keys, source.bad) == ([f"s.tar:{name}", "s.tar:b/a"], ())


# --- which files -------------------------------------------------------------------------------


def test_patterns_count_with_zeros_in_several_places(tmp_path):
    assert patterns.expand(f"{tmp_path}/{{08..10}}-{{1..2}}.tar", ".tar") == [
        f"{tmp_path}/{n}.tar" for n in ("08-1", "08-2", "09-1", "09-2", "10-1", "10-2")
    ]
    for name in ("b.tar", "a.tar", "notes.txt", "._a.tar"):
        (tmp_path / name).touch()
    both = [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
    assert patterns.expand(f"{tmp_path}/*.tar", ".tar") == both
    assert patterns.expand(str(tmp_path), ".tar") == both
    for pattern in ("{5..1}.tar", "{0..99999999}.tar", "{0..9999}{0..9999}.tar"):
        with pytest.raises(ValueError, match="too many names"):
            patterns.expand(pattern, ".tar")


@pytest.mark.parametrize("pattern", ["*/*.tar", "*/0.tar", "", "{0..1}/*.tar"])
def test_a_folder_behind_a_pattern_that_cannot_be_read_is_an_error(tmp_path, monkeypatch, pattern):
    """`glob` would pass it over."""
    for name in ("0", "1", "lost+found"):
        write_tar(tmp_path / name / "0.tar", captioned(1))

    whole, place = os.scandir, f"{tmp_path}/{pattern}"

    def refused(path):
        if Path(path).name in ("1", "lost+found"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return whole(path)

    assert [Path(path).parent.name for path in patterns.expand(place, ".tar")] == ["0", "1"]
    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(UnreadableError, match=f"{tmp_path}/1: Permission denied"):
        patterns.expand(place, ".tar")


def test_missing_and_compressed_shards_are_errors_and_equal_names_told_apart(tmp_path):
    write_tar(tmp_path / "0.tar", captioned(1))
    write_tar(tmp_path / "none.tar", [])
    for name, error, reason in (
        ("{0..1}.tar", UnreadableError, r"1\.tar: not found"),
        ("x*.tar", FileNotFoundError, r"no \.tar file is there"),
        ("0.tar.gz", ValueError, r"0\.tar\.gz: decompress it"),
        ("none.tar", ValueError, r"holds no sample: .*--data"),
    ):
        with pytest.raises(error, match=reason):
            opened(f"{tmp_path}/{name}", 1.0)
    for folder in ("a", "b"):
        write_tar(tmp_path / folder / "0.tar", captioned(1))
    source = opened(f"{tmp_path}/*/0.tar")
    assert source.keys == ["a/0.tar:00000", "b/0.tar:00000"]  # the same wherever the folder is
    addresses = [f"s3://bucket/{folder}/0.tar" for folder in ("a", "b/c")]
    assert patterns.short_names(addresses) == ["a/0.tar", "b/c/0.tar"]


def test_brackets_and_braces_in_a_path_that_exists_are_letters(tmp_path):
    folder = tmp_path / "[v2] {0..1}"
    for n in range(2):
        write_tar(folder / f"{n}.tar", captioned(1, n))
    for name in ("", "0.tar", "*.tar", "{0..1}.tar", "[01].tar"):
        assert len(opened(folder / name)) == (1 if name == "0.tar" else 2)


# --- captions in tables, and names of other kinds ----------------------------------------------


def test_tables_of_captions_are_those_of_the_released_trainer(tmp_path):
    for n in range(2):
        names = [f"{n}{m}.jpg" for m in range(3)]
        parts = [(name, encode(COLOURS[n], form="JPEG")) for name in names]
        write_tar(tmp_path / f"images_{n}.tar", parts)
        rows = [f'images_{n}.tar\t{name}\t"a ""{name}"", first"' for name in names[:2]]
        rows.append(f"images_{n}.tar\t{names[0]}\tanother")
        (tmp_path / f"images_{n}.tsv").write_text("\n".join(["tar\tfile\tcaption", *rows]))
    (tmp_path / "training.tsv").write_text("filename\nimages_0.tsv\nimages_1.tsv\n")
    texts = [[(f'a "{n}0.jpg", first', "another"), (f'a "{n}1.jpg", first',)] for n in range(2)]
    for name, expected in (
        ("training.tsv", [*texts[0], *texts[1]]),
        ("", [*texts[0], *texts[1]]),
        ("images_1.tsv", texts[1]),
        ("images_1.tar", texts[1]),
    ):
        path = str(tmp_path / name)
        assert kind_of(path) == "shards"
        source = opened(path)
        assert source.captions == expected
        assert "samples that the .tsv does not name" in [one.kind for one in source.unused]
    (tmp_path / "images_1.tsv").write_text("tar\tfile\tcaption\nimages_1.tar\tgone.jpg\tx")
    with pytest.raises(ValueError, match=r"gone: its \.tsv names it"):
        opened(tmp_path / "images_1.tsv")
    (tmp_path / "images_1.tsv").write_text("name\tcaption\nx\ty")
    with pytest.raises(ValueError, match=r"images_1\.tsv needs the columns tar, file and caption"):
        opened(tmp_path / "training.tsv")


@pytest.mark.parametrize("name", ["./s.tar", "/elsewhere/s.tar", "../gone/s.tar", "D:\\x\\s.tar"])
@pytest.mark.parametrize("opens", ["s.tar", "s.tsv"])
def test_a_table_from_another_place_serves_the_shard_beside_it(tmp_path, name, opens):
    write_tar(tmp_path / "s.tar", [(f"{n}.png", encode()) for n in range(3)])
    texts = ['6" of snow', '"a cat"', '"a" and "b"']
    rows = [f"{name}\t./{n}.png\t{text}" for n, text in enumerate(texts)]
    (tmp_path / "s.tsv").write_text("\n".join(["tar\tfile\tcaption", *rows]))
    captions = opened(tmp_path / opens).captions
    assert captions == [('6" of snow',), ("a cat",), ('"a" and "b"',)]


def test_a_list_names_tables_and_neither_itself_nor_another_list(tmp_path):
    write_tar(tmp_path / "s.tar", captioned(1))
    names = {"a": "a", "b": "c", "c": "b"}
    for name, other in names.items():
        (tmp_path / f"{name}.tsv").write_text(f"filename\n{other}.tsv")
    for name, other in names.items():
        with pytest.raises(ValueError, match=rf"{name}\.tsv names .*{other}\.tsv, which is a list"):
            opened(tmp_path / f"{name}.tsv")


@pytest.mark.parametrize("row", ["t.tar\t0.png\tx", "s.tar\tgone.png\tx", ""])
def test_a_table_that_names_no_sample_of_its_shard_is_an_error(tmp_path, row):
    write_tar(tmp_path / "s.tar", [("0.png", encode())])
    write_tar(tmp_path / "t.tar", captioned(300))
    (tmp_path / "s.tsv").write_text(f"tar\tfile\tcaption\n{row}")
    with pytest.raises(ValueError, match=r"s\.tsv names no sample of .*s\.tar: .*rename"):
        opened(tmp_path, 0.5)


def test_members_that_are_no_sample_are_counted_and_can_be_named(tmp_path):
    parts = [(f"{n}.in.png", encode()) for n in range(3)]
    parts += [(f"{n}.out.txt", b"a cat") for n in range(3)]
    path = write_tar(tmp_path / "s.tar", [*sorted(parts), ("x.png", encode()), ("x.npy", b"")])
    source = opened(path)
    assert {(one.kind, one.count, one.example) for one in source.unused} == {
        (".npy members", 1, "x.npy"),
        (".png members with further dots", 3, "0.in.png"),
        (".txt members with further dots", 3, "0.out.txt"),
    }
    with pytest.raises(ConfigError, match=r"0\.out\.txt.*data\.captions=none"):
        refuse_lost(source, DATA)
    named = {"columns": {"image": "in.png"}, "caption_suffixes": (".out.txt",)}
    assert opened(path, **named).captions == [("a cat",)] * 3
    with pytest.raises(ValueError, match=r"holds no sample.*3, such as 0\.in\.png"):
        opened(write_tar(tmp_path / "t.tar", sorted(parts)))


@pytest.mark.parametrize("texts", [1, 3])
def test_texts_of_no_sample_are_an_error_if_most_classes_would_lose_one(tmp_path, texts):
    samples = [
        (f"{n}{end}", data)
        for n in "0123"
        for end, data in ((".png", encode()), (".cls", n.encode()))
    ]
    others = [(f"{n}.out.txt", b"a cat") for n in range(texts)]
    source = opened(write_tar(tmp_path / "s.tar", sorted([*samples, *others])))
    assert (len(source), source.captions, len(source.classes)) == (4, None, 4)
    with pytest.raises(ConfigError, match="may have captions") if texts > 1 else nullcontext():
        refuse_lost(source, DATA)


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("metadata.json", r"NAME\.txt.*captions=none"),
        ("set/Captions_val.json", r"NAME\.txt.*captions=none"),
        ("labels.csv", r"NAME\.cls.*columns\.label=''"),
        ("README.txt", ""),
    ],
)
def test_members_about_many_images_are_no_samples_and_are_named(tmp_path, name, lost):
    source = opened(write_tar(tmp_path / "s.tar", [("a.png", encode()), (name, b"{}")]))
    assert (source.total, source.bad) == (1, ())
    [one] = source.unused
    assert (one.kind, one.count, one.example) == (Path(name).name.lower(), 1, name)
    with pytest.raises(ConfigError, match=lost) if lost else nullcontext():
        refuse_lost(source, DATA)


@pytest.mark.parametrize("suffix", [".prompt", ".text"])
def test_members_with_a_suffix_of_captions_are_not_lost(tmp_path, suffix):
    path = write_tar(tmp_path / "s.tar", [("a.png", encode()), (f"a{suffix}", b"a cat")])
    with pytest.raises(ConfigError, match=rf"a\{suffix}.*caption_suffixes=\[\{suffix}\]"):
        refuse_lost(opened(path), DATA)
    assert opened(path, caption_suffixes=(suffix,)).captions == [("a cat",)]


def test_records_give_captions_and_classes_by_their_usual_names(tmp_path):
    records = {
        "a": {"label": 1, "prompt": "x"},
        "b": {"label": 0.0, "Captions": ["y", "z"]},
        "c": {"label": 1, "text": {"en": "of another type"}},
    }
    parts: Parts = []
    for key, record in records.items():
        parts += [(f"{key}.png", encode()), (f"{key}.json", json.dumps(record).encode())]
    source = opened(write_tar(tmp_path / "s.tar", parts), 0.4)
    assert source.captions == [("x",), ("y", "z")]
    assert [source[n].label for n in range(2)] == [1, 0]
    assert list(reasons(source)) == ["s.tar:c"]
    source = opened(write_tar(tmp_path / "t.tar", [*parts, ("c.caption", b"wins")]))
    assert source.captions == [("x",), ("y", "z"), ("wins",)]


# --- the index ---------------------------------------------------------------------------------


def test_the_index_is_made_once_until_the_shard_changes(s, monkeypatch):
    scanned, whole = [], tar.members
    monkeypatch.setattr(shards, "members", lambda *file: scanned.append(1) or whole(*file))
    assert opened(s).keys == opened(s, side=8).keys == keys(6)
    assert len(scanned) == 1
    write_tar(s, captioned(6, 1))
    os.utime(s, ns=(1, 1))  # of the same size, and older
    assert opened(s).keys[0] == "s.tar:00001"
    assert len(scanned) == 2


@pytest.mark.parametrize("damage", [b"", b"{", b"[4, 1, null]", b"null"])
def test_a_damaged_index_is_made_again(s, tmp_path, monkeypatch, damage):
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))
    opened(s)
    (cached,) = (tmp_path / "cache" / "shards").iterdir()
    whole = cached.read_bytes()
    cached.write_bytes(damage)
    assert len(opened(s)) == 6
    assert cached.read_bytes() == whole


def test_indexing_reads_headers_and_not_pictures(tmp_path):
    size = 2**20
    path = write_tar(tmp_path / "s.tar", [(f"{n}.png", bytes(size)) for n in range(4)])

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


# --- damage: counted, attributed, bounded ------------------------------------------------------


def test_a_truncated_shard_gives_what_came_before(s):
    starts = [member.start for member in members(s)]
    whole = s.read_bytes()
    s.write_bytes(whole[: starts[6] + 30])
    source = opened(s, 0.5)
    assert source.keys == keys(3)
    assert list(reasons(source)) == ["s.tar:00003"]
    assert "cut off: it claims" in reasons(source)["s.tar:00003"]
    assert f"at byte {starts[6] - 512:,}" in reasons(source)["s.tar:00003"]
    end = starts[3] + 512  # between two members
    s.write_bytes(whole[:end])
    source = opened(s, 0.5)
    assert source.keys == keys(2)
    assert "end marker" in reasons(source)[f"s.tar:byte {end}"]


@pytest.mark.parametrize("large", [False, True])
def test_flipped_bytes_in_a_picture_cost_that_picture(s, monkeypatch, large):
    start = members(s)[2].start
    data = bytearray(s.read_bytes())
    data[start + 45 : start + 60] = bytes(15)
    s.write_bytes(data)
    if large:
        monkeypatch.setattr(decoded, "CACHED_PICTURES", 0)
    source = opened(s, 0.5)
    if large:
        assert source.bad == ()
        with pytest.warns(UserWarning, match=r"s\.tar:00001: corrupt .*1 bad so far"):
            assert source[1].key == "s.tar:00002"
    else:
        assert source.keys == keys(6, 1)
    (file,) = source.bad
    assert (file.path, file.offset, source.total) == ("s.tar:00001", start, 6)


def test_a_damaged_header_costs_one_sample_and_not_the_rest(s):
    starts = [member.start for member in members(s)]
    data = bytearray(s.read_bytes())
    for part in (2, 6, 7):
        data[starts[part] - 512 + 130] ^= 1  # in the size; the checksum no longer fits
    s.write_bytes(data)
    source = opened(s, 0.9)
    assert source.keys == keys(6, 1, 3)
    found = reasons(source)
    for header in (starts[2] - 512, starts[6] - 512):
        assert "no tar header" in found[f"s.tar:byte {header}"]
        assert f"at byte {header:,}" in found[f"s.tar:byte {header}"]
    assert found["s.tar:00001"].startswith("it has no PNG, JPEG, WEBP")
    assert len(found) == 3


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
        ("f-gif.gif", encode(form="PPM")),
        ("g-gif.png", encode(form="PPM")),
    ]
    source = opened(write_tar(tmp_path / "s.tar", parts), 0.9)
    assert source.keys == ["s.tar:a-cmyk", "s.tar:b-deep", "s.tar:c-moving"]
    middles = [source[n].picture[8, 8].astype(int) for n in range(3)]
    assert np.abs(middles[0] - (255, 0, 0)).max() < 16
    assert [middle.tolist() for middle in middles[1:]] == [[100] * 3, list(COLOURS[0])]
    found = reasons(source)
    assert list(found) == [f"s.tar:{name}" for name in ("d-tiny", "e-empty", "f-gif", "g-gif")]
    assert "too small: 1x1" in found["s.tar:d-tiny"]
    assert "its picture is empty" in found["s.tar:e-empty"]
    assert "not PNG, JPEG, WEBP" in found["s.tar:g-gif"]


def test_bad_text_beside_pictures_is_attributed(tmp_path):
    texts: dict[str, tuple[str, bytes, str]] = {
        "good": (".txt", b"a cat", ""),
        "latin": (".txt", b"caf\xe9", "not UTF-8"),
        "blank": (".txt", b" \n", "its caption is empty"),
        "long": (".txt", b"x" * 70_000, ".txt is longer than 65,536 bytes"),
        "none": (".npy", b"", "it has no caption"),
        "json": (".json", b'{"caption": "caf\xe9"}', "not UTF-8"),
        "list": (".json", b"[1]", "its .json is no object with names"),
        "twice": (".jpg", encode(), "more than one picture"),
    }
    parts: Parts = []
    for name, (suffix, data, _) in texts.items():
        parts += [(f"{name}.png", encode()), (f"{name}{suffix}", data)]
    source = opened(write_tar(tmp_path / "s.tar", parts), 0.9)
    assert source.keys == ["s.tar:good"]
    found = reasons(source)
    assert found.keys() == {f"s.tar:{name}" for name in texts if name != "good"}
    for path, reason in found.items():
        assert texts[path.removeprefix("s.tar:")][2] in reason
        assert re.search(r"\(at byte [\d,]+\)$", reason)


def test_classes_are_numbers_and_bad_ones_are_attributed(tmp_path):
    labels = {"a": b"2\n", "b": b"-1", "c": b"cat", "d": b"9999999", "e": b"1" * 99, "f": None}
    parts: Parts = []
    for name, label in labels.items():
        parts += [(f"{name}.png", encode()), *([(f"{name}.cls", label)] if label else [])]
    source = opened(write_tar(tmp_path / "s.tar", parts), 0.9)
    assert (source.keys, source.classes) == (["s.tar:a"], ("0", "1", "2"))
    assert (source[0].label, source.captions) == (2, None)
    found = reasons(source)
    assert found.keys() == {f"s.tar:{name}" for name in "bcdef"}
    assert "9999999 is not one of 100,000 (at byte " in found["s.tar:d"]
    assert "it has no class, although others have one (at byte " in found["s.tar:f"]


def test_keys_that_come_twice_or_lie_apart_are_attributed(tmp_path):
    png = encode()
    parts = [
        *[("a.png", png), ("a.txt", b"first")],
        *[("b.png", png), ("c.png", png), ("b.txt", b"apart"), ("c.txt", b"apart")],
        *[("a.png", png), ("a.txt", b"again")],
        *[("d.png", png), ("d.txt", b"one"), ("d.txt", b"two")],
    ]
    source = opened(write_tar(tmp_path / "s.tar", parts), 0.9)
    assert (source.keys, source.captions) == (["s.tar:a"], [("first",)])
    found = [(file.path.split(":")[1], file.reason) for file in source.bad]
    assert sorted(key for key, _ in found) == ["a", "b", "b", "c", "c", "d"]
    assert sum("its key was used before" in reason for _, reason in found) == 3
    assert sum("more than one .txt" in reason for _, reason in found) == 1


def test_too_many_bad_samples_are_an_error(tmp_path):
    parts = [*captioned(3), ("broken.png", b"broken"), ("broken.txt", b"x")]
    path = write_tar(tmp_path / "s.tar", parts)
    assert len(opened(path, 0.25)) == 3
    with pytest.raises(ValueError, match=r"1 of 4 files .*s\.tar:broken: not PNG.*0\.24"):
        opened(path, 0.24)
    with pytest.raises(ValueError, match=r"1 of 1 files .*none is left"):
        opened(write_tar(tmp_path / "t.tar", parts[-2:]), 1.0)


# --- decoding on demand ------------------------------------------------------------------------


def with_broken(tmp_path, broken: set[int], count: int = 8) -> Path:
    parts = captioned(count)
    for n in broken:
        parts[2 * n] = (parts[2 * n][0], b"broken")
    return write_tar(tmp_path / "s.tar", parts)


def test_a_bad_picture_is_replaced_by_the_next_good_one_in_any_order(tmp_path, on_demand):
    path = with_broken(tmp_path, {2, 3, 7})
    expected = [f"s.tar:{n:05}" for n in (0, 1, 4, 4, 4, 5, 6, 0)]
    for order in (range(8), range(7, -1, -1)):
        source = opened(path, 0.5)
        with pytest.warns(UserWarning, match=STANDS_IN) as seen:
            found = {n: source[n].key for n in order}
        assert [found[n] for n in range(8)] == expected
        assert len(seen) == len(source.bad) == 3
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # said once, and it is not read again
            assert [example.key for example in source.many(range(8))] == expected


def test_too_many_bad_pictures_end_the_run(tmp_path, on_demand):
    source = opened(with_broken(tmp_path, {2, 3, 7}), 0.25)
    with pytest.warns(UserWarning, match=STANDS_IN):
        assert source[2].key == "s.tar:00004"
    assert "bad files 2" in describe(source.part(range(7)))
    everything_bad = opened(with_broken(tmp_path, set(range(4)), 4), 1.0)
    for bad, row, reason in (
        (source, 7, r"3 of 8 files cannot be used.*0\.25"),
        (everything_bad, 0, "4 of 4 files cannot be used"),
    ):
        warned = pytest.warns(UserWarning, match=STANDS_IN)
        with warned, pytest.raises(ValueError, match=reason):
            bad[row]


def test_a_shard_that_cannot_be_read_is_named_and_one_that_shrinks_is_bad(s, monkeypatch):
    """Trouble of the system is no verdict, and names the shard, not the file of the cache."""

    def fails(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(type(fsspec.filesystem("file")), "cat_file", fails)
        with pytest.raises(UnreadableError, match=f"{s}: Input/output error"):
            opened(s)
    monkeypatch.setattr(decoded, "CACHED_PICTURES", 0)
    source = opened(s, 0.9)
    s.write_bytes(s.read_bytes()[:700])
    with pytest.warns(UserWarning, match="0000[12345]: it is empty"):
        assert source[2].key == "s.tar:00000"


# --- hostile archives --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": b"a/../../x.png"}, "leads outside"),
        ({"name": b"..\\x.png"}, "leads outside"),
        ({"name": b"/tmp/x.png"}, "leads outside"),
        ({"name": b"C:\\x.png"}, "leads outside"),
        ({"type": b"1"}, "it is a link"),
        ({"type": b"2", "size": b"77777777777"}, "it is a link"),
        ({"type": b"3"}, "it is a device"),
        ({"type": b"6"}, "it is a pipe"),
        ({"type": b"S"}, "it is a sparse file"),
        ({"type": b"Z"}, "unknown tar type b'Z'"),
        ({"size": b"\x80" + bytes(3) + (2**60).to_bytes(8, "big")}, "it claims 1,152,921,504"),
        ({"size": b"77777777777"}, "cut off: it claims 8,589,934,591"),
        ({"type": b"L", "size": b"77777777777"}, "its name or PAX header claims"),
        ({"type": b"x", "size": b"00000777777"}, "its name or PAX header claims 262,143 bytes"),
        ({"size": b"-1"}, "no tar header"),
        ({"size": b"\xff" * 12}, "no tar header"),
        ({"size": b"12_7"}, "no tar header"),
    ],
)
def test_hostile_members_are_refused_and_the_rest_is_read(s, tmp_path, changes, reason):
    block = bytearray(tarfile.TarInfo("odd.png").tobuf(tarfile.USTAR_FORMAT))
    fields = {"name": (0, 100), "size": (124, 12), "type": (156, 1)}
    for field, value in changes.items():
        start, length = fields[field]
        block[start : start + length] = value.ljust(length, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    s.write_bytes(bytes(block) + s.read_bytes())
    before = set(tmp_path.rglob("*"))
    source = opened(s, 0.5)
    assert source.keys == keys(6)
    (bad,) = source.bad
    assert reason in bad.reason
    assert bad.offset == 0
    assert set(tmp_path.rglob("*")) == before


def test_a_hostile_name_in_an_extension_is_judged(tmp_path):
    outside = "/".join([".."] * 60) + "/etc/passwd.png"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        parts = [(outside, encode()), *captioned(3)]
        source = opened(write_tar(tmp_path / f"{form}.tar", parts, form), 0.5)
        assert len(source) == 3
        assert "leads outside" in source.bad[0].reason


def test_pax_headers_may_claim_what_they_like(tmp_path):
    claims = {"size": str(2**60), "GNU.sparse.realsize": "1", "GNU.sparse.map": "0,1"}
    for key, value in claims.items():
        path = tmp_path / f"{key}.tar"
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as out:
            for name, data in [("odd.png", encode()), *captioned(3)]:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                info.pax_headers = {key: value} if name == "odd.png" else {}
                out.addfile(info, io.BytesIO(data))
        source = opened(path, 0.5)
        assert len(source) == 3
        assert list(reasons(source)) == [f"{key}.tar:odd"]
        assert ("cut off" if key == "size" else "a sparse file") in source.bad[0].reason
    for data in (b"", b"9", b"9 x", b"99999 a=b\n", b"0 =\n", b"-5 a=b\n", b"6 a=b\n7 xx\n"):
        assert tar._pax(data) == {}


def test_random_damage_never_raises_anything_but_our_errors(tmp_path):
    path = write_tar(tmp_path / "s.tar", captioned(3), tarfile.PAX_FORMAT)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for number in range(100):
        damaged = bytearray(whole[: random.integers(len(whole))])
        for position in random.integers(0, max(len(damaged), 1), 5 * bool(damaged)):
            damaged[position] = random.integers(256)
        path.write_bytes(damaged)
        for member in members(path):
            assert 0 <= member.start <= len(damaged)
            assert member.flaw or member.start + member.size <= len(damaged)
        with open(path, "rb") as file:
            list(shards._ShardReader(file, DATA, PICTURES).samples(len(damaged)))
        if number % 30 == 0:
            shards.shards(str(path), DATA)


def test_huge_pictures_inside_are_refused_before_they_are_decoded(tmp_path):
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 1, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header + bytes(60)
    parts = [("bomb.png", bomb), ("a.png", encode())]
    assert opened(write_tar(tmp_path / "s.tar", parts), 1.0).keys == ["s.tar:a"]
    path = write_tar(tmp_path / "t.tar", [("large.png", bytes(101))])
    [large] = shards.shards(str(path), DATA, PICTURES._replace(max_bytes=100)).samples
    assert large.flaw == "its picture is too large"


# --- files elsewhere ---------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path):
    """Two shards in fsspec's file system in memory."""
    system = fsspec.filesystem("memory")
    for n in range(2):
        data = write_tar(tmp_path / f"{n}.tar", captioned(3, 3 * n)).read_bytes()
        system.pipe_file(f"/bucket/{n}.tar", data)
    yield system
    system.rm("/bucket", recursive=True)


@pytest.mark.parametrize("pattern", ["memory://bucket/{0..1}.tar", "memory://bucket/*.tar"])
def test_shards_elsewhere_are_read_by_ranges(elsewhere, monkeypatch, on_demand, pattern):
    source = opened(pattern)
    assert source.keys == [f"{n // 3}.tar:{n:05}" for n in range(6)]
    ranges, whole = [], type(elsewhere).cat_file

    def counted(self, path, start=0, end=0, **kwargs):
        ranges.append((path, end - start))
        return whole(self, path, start=start, end=end, **kwargs)

    monkeypatch.setattr(type(elsewhere), "cat_file", counted)
    assert (source[4].picture == COLOURS[4]).all()
    assert ranges == [("/bucket/1.tar", len(encode(COLOURS[4])))]


@pytest.mark.parametrize("pattern", ["list.tsv", "?.tsv", "{0..1}.tsv"])
@pytest.mark.parametrize("folder", ["", "./", "/of/another/machine/", "memory://bucket/"])
def test_tables_of_shards_elsewhere_are_read_where_they_are_named(elsewhere, pattern, folder):
    elsewhere.pipe_file("/bucket/list.tsv", b"filename\n0.tsv\n./1.tsv\n")
    for n in range(2):
        table = f"tar\tfile\tcaption\n{folder}{n}.tar\t{3 * n:05}.png\tof {n}"
        elsewhere.pipe_file(f"/bucket/{n}.tsv", table.encode())
    source = opened(f"memory://bucket/{pattern}")
    assert dict(zip(source.keys, source.captions or (), strict=True)) == {
        "0.tar:00000": ("of 0",),
        "1.tar:00003": ("of 1",),
    }
    assert (source[1].picture == COLOURS[3]).all()


def test_what_fails_elsewhere_names_the_address(elsewhere, monkeypatch, on_demand):
    with pytest.raises(OSError, match=r"memory://bucket/2\.tar: not found"):
        opened("memory://bucket/{0..2}.tar")
    with pytest.raises(ValueError, match="nosuchservice"):
        opened("nosuchservice://a.tar")
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(MissingExtra, match=r"s3://bucket/0\.tar.*s3fs.*pip install .*\[remote\]"):
        opened("s3://bucket/0.tar")
    source = opened("memory://bucket/0.tar")

    def fails(*_, **__):
        raise RuntimeError("503")  # a service's own error

    monkeypatch.setattr(type(elsewhere), "cat_file", fails)
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0))
    with pytest.raises(UnreadableError, match=r"memory://bucket/0\.tar: 503"):
        source[0]
    assert source.bad == ()
