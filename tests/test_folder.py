"""Folders that people bring: captions, classes, bad files, and what the cache keeps of them."""

from __future__ import annotations

import errno
import json
import os

import pytest

from matryoshka_diffusion.config import Crop
from matryoshka_diffusion.data import decoded, image
from matryoshka_diffusion.data.augment import Cut
from matryoshka_diffusion.data.image import read_picture
from matryoshka_diffusion.files import UnreadableError
from picturing import COLOURS, noise, opened, reasons, save


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "decoded"


# --- classes and captions ----------------------------------------------------------------------


def test_sub_folders_are_classes(tmp_path):
    for name in ("dog/b.png", "cat/deep/a.jpg", "cat/c.webp", "cat/.hidden.png", ".git/x.png"):
        save(tmp_path / name)
    source = opened(tmp_path)
    assert source.keys == ["cat/c.webp", "cat/deep/a.jpg", "dog/b.png"]
    assert source.classes == ("cat", "dog")
    assert [source[n].label for n in range(3)] == [0, 0, 1]
    assert source[0].captions == ()
    assert (source.side, source.channels, source.bad) == (16, 3, ())
    assert source[0].original_side == 20
    save(tmp_path / "stray.png")
    with pytest.raises(ValueError, match=r"1 of 4 files.*stray\.png: it is not in a class"):
        opened(tmp_path)


def test_text_files_are_captions_and_win_over_classes(tmp_path):
    for name in ("cat/a", "dog/b"):
        save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"\ufeffa  {name[:3]}\n\n another \n", "utf-8")
    source = opened(tmp_path)
    assert source.classes == ()
    assert source.captions == [("a cat", "another"), ("a dog", "another")]


@pytest.mark.parametrize(("kind", "column"), [("jsonl", "text"), ("csv", "caption")])
def test_metadata_gives_captions(tmp_path, kind, column):
    for name in ("a.png", "sub/b.png", "c.png"):
        save(tmp_path / name)
    (tmp_path / "a.txt").write_text("the metadata wins")
    (tmp_path / "c.txt").write_text("only here")
    rows = [("./a.png", "one, two"), ("sub/b.png", "née\nBé"), ("a.png", "three")]
    path = tmp_path / f"metadata.{kind}"
    if kind == "jsonl":
        more = {"file_name": "a.png", column: ["four", "five"]}
        entries = [*({"file_name": a, column: b} for a, b in rows), more]
        path.write_text("\n".join(map(json.dumps, entries)) + "\n\n")
    else:
        path.write_text(f"file_name,{column}\n" + "\n".join(f'{a},"{b}"' for a, b in rows), "utf-8")
    more = ("four", "five") if kind == "jsonl" else ()
    source = opened(tmp_path)
    assert source.captions == [("one, two", "three", *more), ("only here",), ("née Bé",)]


def test_bad_captions_are_listed_with_reasons(tmp_path):
    for name in "abcdefg":
        save(tmp_path / f"{name}.png")
    texts = {"a": b"good", "b": b"caf\xe9", "c": b" \n \n", "d": b"x" * 70_000}
    for name, text in (texts | {"f": "UTF-16".encode("utf-16")}).items():
        (tmp_path / f"{name}.txt").write_bytes(text)
    (tmp_path / "g.txt").mkdir()
    source = opened(tmp_path, 1.0)
    assert source.keys == ["a.png"]
    assert {path: reason.split(",")[0] for path, reason in reasons(source).items()} == {
        "b.png": "its caption is not UTF-8",
        "c.png": "its caption is empty",
        "d.png": "d.txt is longer than 65",
        "e.png": "it has no caption",
        "f.png": "its caption is not UTF-8",
        "g.png": "it has no caption",
    }


def test_bad_metadata_lines_are_listed_with_their_numbers(tmp_path):
    for name in "abcd":
        save(tmp_path / f"{name}.png")
    path = tmp_path / "metadata.jsonl"
    path.write_bytes(
        b'{"file_name": "a.png", "text": "good"}\n'
        b"{broken\n"
        b'{"file_name": "../a.png", "text": "outside"}\n'
        b'{"file_name": "b.png", "text": "caf\xe9"}\n'
        b'{"file_name": "c.png", "text": "\\ud800"}\n'
        b'{"file_name": "d.png"}\n'
        b'["a.png"]\n' + b"[" * 100_000 + b"\n"
    )
    source = opened(tmp_path, 1.0)
    assert source.keys == ["a.png"]
    lines = [f"metadata.jsonl:{line}" for line in (2, 3, 7, 8)]
    assert list(reasons(source)) == ["b.png", "c.png", "d.png", *lines]
    path.unlink()
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\na.png,caf\xe9\nb.png,ok\nx.png,no\n")
    assert list(reasons(opened(tmp_path, 1.0))) == ["a.png", "c.png", "d.png", "metadata.csv:4"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name,text\na.png,x\n", r"metadata\.csv needs the columns file_name and text"),
        ("file_name,words\na.png,x\n", r"metadata\.csv needs the columns file_name and text"),
        ("file_name,text\na.png," + "x" * 200_000, r"metadata\.csv, line \d+: field larger"),
        ("file_name,text\na.png,x\n", "has both"),
    ],
)
def test_unusable_metadata_files_are_errors(tmp_path, text, reason):
    save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text(text)
    if reason == "has both":
        (tmp_path / "metadata.jsonl").write_text("")
    with pytest.raises(ValueError, match=reason):
        opened(tmp_path, 1.0)


# --- bad files ---------------------------------------------------------------------------------


def test_empty_and_missing_folders_say_what_to_put_there(tmp_path):
    (tmp_path / "readme.md").write_text("nothing")
    with pytest.raises(ValueError, match=r"holds no picture: put PNG, JPEG or WEBP.*class"):
        opened(tmp_path)
    save(tmp_path / "a.gif")
    with pytest.raises(ValueError, match=r"a\.gif: \.gif is not read: make it PNG"):
        opened(tmp_path)
    with pytest.raises(OSError, match=r"nowhere does not exist.*--data"):
        opened(tmp_path / "nowhere")
    with pytest.raises(OSError, match=r"readme\.md is a file of no known kind.*tar shards"):
        opened(tmp_path / "readme.md")


def test_bad_files_are_left_out_up_to_a_share(tmp_path):
    for index in range(8):
        save(tmp_path / f"{index}.png")
    (tmp_path / "3.png").write_bytes(b"broken")
    (tmp_path / "6.png").unlink()
    (tmp_path / "6.png").symlink_to(tmp_path / "gone.png")
    source = opened(tmp_path, 0.25)
    assert source.keys == [f"{index}.png" for index in (0, 1, 2, 4, 5, 7)]
    assert (list(reasons(source)), source.total) == (["3.png", "6.png"], 8)
    assert (source[5].picture == COLOURS[0]).all()
    with pytest.raises(ValueError, match=r"2 of 8 .*3\.png: not PNG.*max_bad_fraction.*0\.2"):
        opened(tmp_path, 0.2)
    for path in tmp_path.iterdir():
        path.unlink()
        path.write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"8 of 8 files .*and 3 more.*none is left"):
        opened(tmp_path, 1.0)


# --- decoded once, or on demand ----------------------------------------------------------------


def test_files_are_decoded_once_until_one_changes(tmp_path, monkeypatch):
    paths = [save(tmp_path / name) for name in ("a.png", "b.png")]
    (tmp_path / "c.png").write_bytes(b"broken")
    seen = []

    def counted(path, *options):
        seen.append(path.name)
        return read_picture(path, *options)

    monkeypatch.setattr(decoded, "read_picture", counted)
    first, again = opened(tmp_path, 0.5), opened(tmp_path, 0.5)
    assert sorted(seen) == ["a.png", "b.png", "c.png"]
    assert again.bad == first.bad
    assert [x.original_side for x in (first[0], again[1])] == [20, 20]
    save(paths[0], noise(16))
    os.utime(paths[0], ns=(1, 1))
    assert (opened(tmp_path, 0.5)[0].picture == noise(16)).all()
    assert len(seen) == 6
    opened(tmp_path, 0.5, side=8)
    assert len(seen) == 9
    assert (first[0].picture == COLOURS[0]).all()  # what is open stays as it was


@pytest.mark.parametrize("crop", ["centre", "random"])
def test_once_and_on_demand_are_the_same(tmp_path, monkeypatch, crop: Crop):
    for number, shape in enumerate(((16, 40), (35, 16), (16, 16))):
        save(tmp_path / f"{number}.png", noise(*shape, number))
    cuts = [Cut(place) for place in (0.0, 0.4, 0.99)]
    once = opened(tmp_path, crop=crop)
    monkeypatch.setattr(decoded, "CACHED_PICTURES", 0)
    demand = opened(tmp_path, crop=crop)
    assert once.threads == 1 < demand.threads
    for a, b in zip(once.many(range(3), cuts), demand.many(range(3), cuts), strict=True):
        assert (a.picture == b.picture).all()
        assert a[1:] == b[1:]


def test_what_the_system_cannot_read_is_asked_for_again(tmp_path, monkeypatch):
    """The error names the file, and not the cache that was being written."""
    path = save(tmp_path / "a.png")

    def fails(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(image, "open", fails, raising=False)
        with pytest.raises(UnreadableError, match=f"{path}: Too many open files"):
            opened(tmp_path, 1.0)
    assert opened(tmp_path).keys == ["a.png"]


def test_old_states_of_a_folder_leave_the_cache(tmp_path, cache):
    for index in range(3):
        for old in cache.rglob("*.*"):
            os.utime(old, (1e9, 1e9))  # nobody has written it for long
        save(tmp_path / "set" / f"{index}.png")
        opened(tmp_path / "set")
    assert sorted(path.suffix for path in cache.rglob("*.*")) == [".bin", ".json"]


def test_two_states_may_be_decoded_at_a_time(tmp_path, cache, monkeypatch):
    save(tmp_path / "set" / "a.png")
    stored = decoded._stored

    def stored_late(path, count):
        """Another process decodes between this one's writing and opening."""
        monkeypatch.setattr(decoded, "_stored", stored)
        save(tmp_path / "set" / "b.png")
        assert len(opened(tmp_path / "set")) == 2
        return stored(path, count)

    monkeypatch.setattr(decoded, "_stored", stored_late)
    assert len(opened(tmp_path / "set")) == 1


@pytest.mark.parametrize("damage", ["gone", "garbage", "of another set", "cut off"])
def test_a_damaged_cache_is_made_again(tmp_path, cache, damage):
    save(tmp_path / "set" / "a.png", noise(20))
    first = opened(tmp_path / "set")[0].picture
    (notes,) = cache.rglob("*.json")
    (binary,) = cache.rglob("*.bin")
    if damage == "gone":
        notes.unlink()
    elif damage == "cut off":
        binary.write_bytes(binary.read_bytes()[:-1])
    else:
        notes.write_text({"garbage": "{", "of another set": "[]"}[damage])
    with pytest.warns(UserWarning, match="corrupt and is made again"):
        source = opened(tmp_path / "set")
    assert (source[0].picture == first).all()
    assert source[0].original_side == 20
