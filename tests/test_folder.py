"""Folders that people bring: captions, classes, bad files, and what the cache keeps of them."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from matryoshka_diffusion.config import ConfigError, Crop, DataConfig
from matryoshka_diffusion.data import decoded, image
from matryoshka_diffusion.data.augment import Cut
from matryoshka_diffusion.data.check import describe, refuse_lost
from matryoshka_diffusion.data.image import read_picture
from matryoshka_diffusion.files import UnreadableError
from matryoshka_diffusion.presets import preset
from matryoshka_diffusion.runs.prepare import complete
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
    assert source.captions == [("good",), ("UTF-16",)]
    assert {path: reason.split(",")[0] for path, reason in reasons(source).items()} == {
        "b.png": "its caption is not UTF-8",
        "c.png": "its caption is empty",
        "d.png": "d.txt is longer than 65",
        "e.png": "it has no caption",
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
        ('file_name,text\nb.png,x\na.png,"6 feet\nc.png,y', r"metadata\.csv, line 3: .*quotes"),
        ('file_name,text\na.png,"6\nb.png,"y"\n', r"metadata\.csv, line 2: .*quotes"),
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


TWO = {"a.png": "one", "b.png": "two"}


def table(*rows: tuple[str, str], sign: str = ",") -> str:
    return "\n".join(sign.join(row) for row in (("file_name", "text"), *rows))


@pytest.mark.parametrize(
    ("files", "options"),
    [
        *(({f"a{end}": "one", f"b{end}": "two"}, {}) for end in (".caption", ".TXT", ".png.txt")),
        ({"a.json": '{"prompt": "one"}', "b.json": '{"Caption": "two", "id": 7}'}, {}),
        (
            {
                "metadata.jsonl": '{"image": "a.png", "prompt": "one"}\n'
                '{"file": "b.png", "text": "two"}'
            },
            {},
        ),
        *(({"Metadata.csv": table(*TWO.items(), sign=sign)}, {}) for sign in (", ", ";", "\t")),
        ({"metadata.csv": table(("a", "one"), ("b", "two"))}, {}),
        ({"metadata.csv": "\ufeff" + table(*TWO.items())}, {}),
        ({"metadata.csv": table(*TWO.items()).encode("utf-16")}, {}),
        ({"a.txt": "one", "b.txt": "\n\x0btwo\u2028"}, {}),
        (
            {"a.txt": "x", "b.txt": "y", "a.tags": "one", "b.tags": "two"},
            {"caption_suffixes": (".tags",)},
        ),
        (
            {"metadata.csv": "file_name,text,words\na.png,x,one\nb.png,y,two"},
            {"columns": {"caption": "words"}},
        ),
    ],
)
def test_usual_spellings_are_understood(tmp_path, files, options):
    for name in TWO:
        save(tmp_path / name)
    for name, text in files.items():
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    source = opened(tmp_path, **options)
    assert dict(zip(source.keys, source.captions or (), strict=True)) == {
        name: (text,) for name, text in TWO.items()
    }
    refuse_lost(source, DataConfig(source="folder", **options))


def test_names_match_in_other_forms_of_unicode_and_with_separators_of_windows(tmp_path):
    for name in ("caf\u00e9.png", "nai\u0308ve.png", "sub/u\u0308.png", "x.png"):
        save(tmp_path / name)
    rows = [("cafe\u0301.png", "one"), ("sub\\\u00fc.png", "three"), ("x.png", "four")]
    (tmp_path / "metadata.csv").write_text(table(*rows), "utf-8")
    (tmp_path / "na\u00efve.txt").write_text("two")
    assert [texts for (texts,) in opened(tmp_path).captions or ()] == [
        "one",
        "two",
        "three",
        "four",
    ]


def test_lines_are_alternatives_or_one_caption_or_nothing(tmp_path):
    save(tmp_path / "cat" / "a.png")
    (tmp_path / "cat" / "a.txt").write_text("A cat.\r\n\r\n- mood: calm\x85\u2028still\n")
    for captions, expected in (
        ("lines", [("A cat.", "- mood: calm still")]),
        ("whole", [("A cat. - mood: calm still",)]),
        ("none", None),
    ):
        source = opened(tmp_path, captions=captions)
        assert source.captions == expected
        assert source.classes == (() if expected else ("cat",))


def test_a_line_with_more_or_fewer_fields_is_bad(tmp_path):
    for name in "abc":
        save(tmp_path / f"{name}.png")
    text = table(("a.png", "an apple, red"), ("b.png", '"a pear, green"')) + "\nc.png\n"
    (tmp_path / "metadata.csv").write_text(text)
    source = opened(tmp_path, 1.0)
    assert source.captions == [("a pear, green",)]
    assert {key: "quotes" in reason for key, reason in reasons(source).items()} == {
        "a.png": True,
        "c.png": True,
    }


def test_classes_come_from_records_too_and_in_the_order_of_numbers_or_the_wanted_one(tmp_path):
    for name in ("10/a.png", "9/b.png", "2/c.png"):
        save(tmp_path / "numbers" / name)
    assert opened(tmp_path / "numbers").classes == ("2", "9", "10")
    assert "the class with index 0 is 2" in describe(opened(tmp_path / "numbers"))
    wanted = ("10", "9", "2")
    source = opened(tmp_path / "numbers", classes=wanted)
    assert (source.classes, [source[n].label for n in range(3)]) == (wanted, [0, 2, 1])
    data = DataConfig(source="folder", path=str(tmp_path / "numbers"), classes=("10", "9", "x"))
    config = preset("folder-64").model_copy(update={"data": data})
    with pytest.raises(ConfigError, match=r"data\.classes .*x.*2, 9, 10"):
        complete(config, opened(tmp_path / "numbers"))
    rows = [
        {"file_name": f"{name}/{file}.png", "label": label}
        for name, file, label in (("10", "a", "owl"), ("9", "b", "cat"), ("2", "c", "owl"))
    ]
    (tmp_path / "numbers" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert opened(tmp_path / "numbers").classes == ("cat", "owl")


def test_links_are_followed_once_and_an_unreadable_folder_is_an_error(tmp_path, monkeypatch):
    for name in ("cat/a.png", "dog/b.png"):
        save(tmp_path / "store" / name)
    (tmp_path / "set").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "store" / name)
    (tmp_path / "store" / "dog" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "self").symlink_to("self")
    source = opened(tmp_path / "set", 0.4)
    assert source.keys == ["cat/a.png", "dog/b.png"]
    assert [file.path for file in source.bad] == ["self"]
    assert [(x.count, x.example) for x in source.unused] == [(1, "dog/up")]
    (tmp_path / "set" / "lost+found").mkdir()
    whole = os.scandir

    def refused(path):
        if Path(path).name in ("dog", "lost+found"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return whole(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(UnreadableError, match="set/dog: Permission denied"):
        opened(tmp_path / "set", 0.4)


@pytest.mark.parametrize("beside", [(), ("logo.png",), ("extra/c.png",)])
@pytest.mark.parametrize("inside", ["train/metadata.csv", "metadata.csv", None])
def test_splits_are_no_classes(tmp_path, inside, beside):
    for name in ("train/x/a.png", "test/x/b.png", *beside):
        save(tmp_path / name)
    if inside:
        rows = [(f"{part}/x/{name}.png", part) for part, name in (("train", "a"), ("test", "b"))]
        rows = [("x/a.png", "train")] if "/" in inside else rows
        (tmp_path / inside).write_text(table(*rows))
    with pytest.raises(ConfigError, match=r"data\.split is not set.* test, train"):
        opened(tmp_path)
    source = opened(tmp_path, split="train")
    assert source.keys == ["train/x/a.png"]
    assert (source.captions, source.classes) == (([("train",)], ()) if inside else (None, ("x",)))
    if not inside:
        names = {name.split("/")[0] for name in beside if "/" in name}
        assert opened(tmp_path, 0.4, split="all").classes == (*sorted(names), "test", "train")
        assert opened(tmp_path / "train").classes == ("x",)


@pytest.mark.parametrize(
    ("files", "kinds", "lost"),
    [
        ({"notes.md": "", "a.npy": "", "b.npy": ""}, {".md files": 1, ".npy files": 2}, ""),
        ({"captions.json": "{}"}, {"captions.json": 1}, "data.captions=none"),
        ({"Captions_val2014.json": "{}"}, {"captions_val2014.json": 1}, "metadata.jsonl"),
        ({"b.tar": "", "c.tar": ""}, {".tar files": 2}, "FOLDER"),
        ({"a.json": '{"boxes": []}'}, {".json files": 1, "keys or columns": 1}, ""),
        ({"a.json": '{"prompt": "x", "captions": "y"}'}, {".json files": 1}, "columns.caption="),
        ({"a.json": '{"label": [1]}'}, {".json files": 1}, "columns.label="),
        ({"a.txt": "x", "a.caption": "y"}, {".caption files": 1}, ""),
        ({"captions/a.txt": "x"}, {".txt files": 1}, "data.captions=none"),
        ({"b.caption": "x", "README.txt": "x"}, {".caption files": 1}, "data.captions=none"),
        ({"README.txt": "x", "LICENSE-2.0.txt": ""}, {"readme.txt": 1}, ""),
        ({"a.prompt": "x"}, {".prompt files": 1}, r"data\.caption_suffixes=\[\.prompt\]"),
        ({"labels.csv": "file,label\na.png,x"}, {"labels.csv": 1}, "columns.label=''"),
        ({"labels_train.csv": ""}, {"labels_train.csv": 1}, "metadata.jsonl"),
    ],
)
def test_what_is_not_used_is_listed_and_no_condition_is_lost(tmp_path, files, kinds, lost):
    save(tmp_path / "images" / "a.png")
    for name, text in files.items():
        path = tmp_path / ("." if "/" in name else "images") / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    source = opened(tmp_path)
    counts = {one.kind: one.count for one in source.unused}
    assert kinds.items() <= counts.items()
    for one in source.unused:
        assert one.example in describe(source)
    if lost:
        with pytest.raises(ConfigError, match=lost):
            refuse_lost(source, DataConfig(source="folder"))
    ignored = {"captions": "none", "columns": {"label": ""}} if lost else {}
    refuse_lost(opened(tmp_path, **ignored), DataConfig(source="folder", **ignored))


@pytest.mark.parametrize("name", ["dog/0_{}.txt", "texts/{}.caption"])
def test_a_few_texts_without_an_image_are_no_captions_of_a_set_of_classes(tmp_path, name):
    for key in ("cat/0", "cat/1", "dog/0", "dog/1"):
        save(tmp_path / f"{key}.png")
    (tmp_path / "texts").mkdir()
    for count in (1, 2):
        (tmp_path / name.format(count)).write_text("a cat")
        source, data = opened(tmp_path), DataConfig(source="folder")
        assert source.classes == ("cat", "dog")
        [one] = source.unused
        assert (one.count, one.example) == (count, name.format(1))
        assert one.example in describe(source)
        if count == 1:
            refuse_lost(source, data)
    with pytest.raises(ConfigError, match=r"may have captions .* 2, such as .*captions=none"):
        refuse_lost(source, data)
    (tmp_path / "captions.json").write_text("{}")
    (tmp_path / name.format(2)).unlink()
    with pytest.raises(ConfigError, match=r"captions\.json"):
        refuse_lost(opened(tmp_path), data)


@pytest.mark.parametrize(
    ("file", "role"), [("a.txt", "label"), ("a.md", "label"), ("a.txt", "caption")]
)
def test_a_column_that_is_named_and_not_read_is_an_error(tmp_path, file, role):
    save(tmp_path / "cat" / "a.png")
    (tmp_path / "cat" / file).write_text("x")
    options: dict[str, Any] = {"columns": {role: "kind"}}
    with pytest.raises(ConfigError, match=rf"data\.columns\.{role} is kind.* omit it"):
        refuse_lost(opened(tmp_path, **options), DataConfig(source="folder", **options))


# --- bad files ---------------------------------------------------------------------------------


def test_empty_and_missing_folders_say_what_to_put_there(tmp_path):
    (tmp_path / "readme.md").write_text("nothing")
    with pytest.raises(ValueError, match=r"holds no picture: put PNG, JPEG, WEBP.*class"):
        opened(tmp_path)
    (tmp_path / "a.jxl").touch()
    with pytest.raises(ValueError, match=r"a\.jxl: \.jxl is not read: make it PNG"):
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


def test_a_flipped_byte_in_the_cache_is_noticed_and_mended(tmp_path, cache):
    for n in range(3):
        save(tmp_path / "set" / f"{n}.png", noise(20, 30, seed=n))
    first = [example.picture for example in opened(tmp_path / "set").many(range(3))]
    files = [next(cache.rglob(f"*.{suffix}")) for suffix in ("bin", "json")]
    for file, step in zip(files, (97, 11), strict=True):
        whole = file.read_bytes()
        for place in range(0, len(whole), step):
            data = bytearray(whole)
            data[place] ^= 1 << place % 8
            file.write_bytes(data)
            with pytest.warns(UserWarning, match=r"\.bin.* corrupt and is made again"):
                found = opened(tmp_path / "set").many(range(3))
            assert all((one.picture == x).all() for one, x in zip(found, first, strict=True))
            assert [one.original_side for one in found] == [20] * 3
            assert file.read_bytes() == whole
