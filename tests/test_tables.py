"""Parquet files and Hugging Face data sets: columns found, pictures read where they lie."""

from __future__ import annotations

import io
import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from matryoshka_diffusion.config import ConfigError, DataConfig
from matryoshka_diffusion.data import decoded, tables
from matryoshka_diffusion.data.check import refuse_lost
from matryoshka_diffusion.data.loader import Loader
from matryoshka_diffusion.data.source import Source, kind_of, open_source
from matryoshka_diffusion.files import MissingExtra
from matryoshka_diffusion.runs import prepare as job
from picturing import COLOURS, noise, opened, reasons, write_tar
from picturing import encode as encode_colour

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def encode(n: int, size=(20, 24)) -> bytes:
    return encode_colour(COLOURS[n % 4], size)


def parquet(path: Path | str, share: float = 0.0) -> Source:
    return opened(path, share, kind="parquet")


def colours(source: Source) -> list[int]:
    """The index of each picture's colour."""
    middles = (source[n].picture[8, 8].tolist() for n in range(len(source)))
    return [COLOURS.index(tuple(middle)) for middle in middles]


def write(path: Path, columns: dict, *, group: int = 4, metadata=None) -> Path:
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(columns).replace_schema_metadata(metadata)
    pyarrow.parquet.write_table(table, path, row_group_size=group)
    return path


def structs(pictures) -> list[dict]:
    return [{"bytes": picture, "path": None} for picture in pictures]


# --- parquet -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "large"), [("bytes", False), ("structs", True)])
def test_rows_come_in_order_with_captions(tmp_path, monkeypatch, form, large):
    if large:
        monkeypatch.setattr(decoded, "CACHED_PICTURES", 0)
    pictures = [encode(n) for n in range(10)]
    columns = {
        "image": structs(pictures) if form == "structs" else pictures,
        "caption": [[f"picture {n}", f"number  {n}"] if n % 2 else [f"no {n}"] for n in range(10)],
        "other": list(range(10)),
    }
    source = parquet(write(tmp_path / "p.parquet", columns, group=3))
    assert source.keys == [f"p.parquet:{n}" for n in range(10)]
    assert colours(source) == [n % 4 for n in range(10)]
    assert source.captions is not None
    assert source.captions[:2] == [("no 0",), ("picture 1", "number 1")]
    assert (source[3].original_side, source.classes, source.bad) == (20, (), ())


def test_several_files_are_one_set(tmp_path):
    for n in range(3):
        write(tmp_path / "d" / f"{n}.parquet", {"jpg": [encode(n)] * 2, "text": [f"of {n}"] * 2})
    for pattern in (f"{tmp_path}/d/{{0..2}}.parquet", f"{tmp_path}/d", f"{tmp_path}/d/*.parquet"):
        source = parquet(pattern)
        assert source.keys == [f"{n}.parquet:{row}" for n in range(3) for row in range(2)]
        assert colours(source) == [0, 0, 1, 1, 2, 2]
    assert source.captions == [(f"of {n // 2}",) for n in range(6)]


def test_classes_are_numbers_words_or_named_by_datasets(tmp_path):
    pictures = [encode(n) for n in range(3)]
    numbers = {"image": pictures, "label": [2, 0, 2]}
    about = {"info": {"features": {"label": {"names": ["cat", "dog", "owl"], "_type": "x"}}}}
    for columns, metadata, classes, labels in (
        (numbers, None, ("0", "1", "2"), [2, 0, 2]),
        (numbers, {"huggingface": json.dumps(about)}, ("cat", "dog", "owl"), [2, 0, 2]),
        (numbers, {"huggingface": "{"}, ("0", "1", "2"), [2, 0, 2]),
        (numbers, {"huggingface": "[" * 10_000}, ("0", "1", "2"), [2, 0, 2]),
        ({"image": pictures, "cls": ["owl", "cat", "owl"]}, None, ("cat", "owl"), [1, 0, 1]),
        ({"image": pictures, "cls": [True, False, True]}, None, ("0", "1"), [1, 0, 1]),
        ({"image": pictures, "label": [1.0, 0.0, 1.0]}, None, ("0", "1"), [1, 0, 1]),
    ):
        source = parquet(write(tmp_path / "p.parquet", columns, metadata=metadata))
        assert source.classes == classes
        assert [source[n].label for n in range(3)] == labels
        found = Loader(source, 0).batch(range(2)).labels
        assert found is not None
        assert found.dtype == torch.int64
    write(tmp_path / "q.parquet", {"image": pictures[:1], "label": ["cat"]})
    with pytest.raises(ValueError, match=r"numbers in some .* and words in others"):
        parquet(tmp_path)


@pytest.mark.parametrize("form", ["parquet", "shards"])
def test_files_in_sub_folders_beside_others_are_counted(tmp_path, form):
    suffix = {"parquet": ".parquet", "shards": ".tar"}[form]
    for folder in ("", "more", "more/still", ".hidden"):
        if form == "parquet":
            write(tmp_path / folder / "0.parquet", {"png": [encode(0)]})
        else:
            write_tar(tmp_path / folder / "0.tar", [("0.png", encode(0))])
    source = opened(tmp_path, kind=form)
    assert [(x.kind, x.count, x.example) for x in source.unused] == [
        (f"{suffix} files", 2, f"more/0{suffix}")
    ]
    with pytest.raises(ConfigError, match=rf"2, such as more/0\{suffix}.*data\.captions=none"):
        refuse_lost(source, DataConfig(source=form))


@pytest.mark.parametrize("form", ["parquet", "shards", "datasets"])
def test_another_column_of_images_is_not_taken_from_the_cache_of_the_first(tmp_path, form):
    columns = {"jpg": [encode(0)], "seg.png": [encode(1)]}
    path = str(tmp_path / "p")
    if form == "parquet":
        write(tmp_path / "p", columns)
    elif form == "shards":
        write_tar(tmp_path / "p", [(f"a.{name}", data) for name, (data,) in columns.items()])
        path = str((tmp_path / "p").rename(tmp_path / "p.tar"))
    else:
        pytest.importorskip("datasets").Dataset.from_dict(columns).save_to_disk(path)
        path = f"hf:{path}"
    for image, colour in ((None, 0), ("seg.png", 1), (None, 0)):
        assert colours(opened(path, kind=form, columns={"image": image})) == [colour]


@pytest.mark.parametrize(
    ("columns", "options", "captions"),
    [
        ({"prompt": ["a", "b"]}, {}, [("a",), ("b",)]),
        ({"TEXT": ["a", "b"], "URL": ["", ""]}, {}, [("a",), ("b",)]),
        ({"caption_1": ["b", "d"], "caption_0": ["a", None]}, {}, [("a", "b"), ("d",)]),
        ({"text": ["a", "b"], "prompt": ["", ""]}, {}, [("a",), ("b",)]),
        ({"text": ["", ""], "x": ["a", "b"]}, {"columns": {"caption": "x"}}, [("a",), ("b",)]),
        ({"text": ["", ""]}, {"captions": "none"}, None),
        ({"prompt": ["a", "b"], "title_text": ["", ""], "Description": ["", ""]}, {}, "caption"),
        ({"caption": pa.array([None, None], pa.string())}, {}, "caption"),
        ({"json": ['{"text": "a"}', ""]}, {}, "json"),
        ({"fine_label": [1, 0], "coarse_label": [0, 0]}, {}, None),
        ({"label": [[0, 1], [1, 0]]}, {}, "label"),
        ({"label": [0.5, 1.0]}, {}, "label"),
        ({"coarse_label": [0, 1]}, {}, "label"),
        ({"label": [[0, 1], [1, 0]]}, {"columns": {"label": ""}}, None),
        (
            {"text": ["a", "b"], "label": [0.5, 1]},
            {"columns": {"label": "label"}},
            "label is label",
        ),
        ({"words": ["a", "b"]}, {"columns": {"caption": "text"}}, ConfigError),
    ],
)
def test_columns_are_understood_chosen_or_named_when_lost(tmp_path, columns, options, captions):
    path = write(tmp_path / "p.parquet", {"Image": [encode(0), encode(1)], **columns})
    data = DataConfig(source="parquet", path=str(path), max_bad_fraction=0.0, **options)
    if captions is ConfigError:
        with pytest.raises(ConfigError, match=r"data\.columns\.caption is text.*Image, words"):
            open_source(data, 16)
        return
    source = open_source(data, 16)
    if isinstance(captions, str):
        with pytest.raises(ConfigError, match=rf"{captions}.*data\.c(olumns|aptions)"):
            refuse_lost(source, data)
    else:
        refuse_lost(source, data)
        assert source.captions == captions
        assert source.classes == (("0", "1") if "fine_label" in columns else ())


def test_files_of_several_splits_are_not_mixed_and_sub_folders_are_read(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / "data" / f"{split}-0-of-1.parquet", {"image": [encode(len(split))]})
    (tmp_path / "README.md").touch()
    assert kind_of(str(tmp_path)) == "parquet"
    for split, keys in (("train", ["train"]), ("all", ["test", "train"])):
        source = opened(tmp_path, kind="parquet", split=split)
        assert source.keys == [f"{key}-0-of-1.parquet:0" for key in keys]
        assert "README.md" in [one.example for one in source.unused]
    with pytest.raises(ConfigError, match=r"data\.split.* test, train"):
        parquet(tmp_path)
    assert len(parquet(f"{tmp_path}/data/train-*.parquet")) == 1


def test_bad_rows_are_attributed(tmp_path):
    latin = pa.array([b"caf\xe9"]).view(pa.string())
    texts = pa.concat_arrays([pa.array(["a", "b", None, " ", "e", "f"]), latin, pa.array(["h"])])
    pictures = [encode(0), b"broken", encode(2), encode(3), None, b"", encode(0), encode(0, (1, 1))]
    path = write(tmp_path / "p.parquet", {"image": pictures, "text": texts, "label": [0] * 8})
    source = parquet(path, 0.9)
    assert source.keys == ["p.parquet:0"]
    found = {path.split(":")[1]: reason for path, reason in reasons(source).items()}
    for row, reason in {
        "1": "not PNG, JPEG, WEBP",
        "2": "it has no caption, although others have one",
        "3": "its caption is empty",
        "4": "there is no picture in its row",
        "5": "it is empty",
        "6": "its caption or class is not UTF-8",
        "7": "too small: 1x1",
    }.items():
        assert reason in found[row]
    with pytest.raises(ValueError, match=r"7 of 8 files cannot be used \(p\.parquet:1"):
        parquet(path, 0.5)


def test_a_damaged_row_group_costs_its_rows_only(tmp_path):
    pictures = []
    for seed in range(9):
        file = io.BytesIO()
        Image.fromarray(noise(40, seed=seed)).save(file, "PNG")
        pictures.append(file.getvalue())
    path = write(tmp_path / "p.parquet", {"image": pictures}, group=3)
    start = pa.parquet.read_metadata(path).row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 8] = bytes(8)  # the page's header
    path.write_bytes(data)
    source = parquet(path, 0.5)
    assert source.keys == [f"p.parquet:{n}" for n in (0, 1, 2, 6, 7, 8)]
    assert [file.path for file in source.bad] == [f"p.parquet:{n}" for n in (3, 4, 5)]
    assert "row group 1 is damaged" in source.bad[0].reason


def test_tables_that_are_damaged_or_without_pictures_are_errors(tmp_path):
    path = write(tmp_path / "p.parquet", {"image": [encode(0)]})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"p\.parquet is damaged"):
        parquet(path, 1.0)
    with pytest.raises(ValueError, match="no column with pictures among caption, url"):
        parquet(write(tmp_path / "a.parquet", {"caption": ["x"], "url": ["y"]}), 1.0)
    with pytest.raises(ValueError, match="column image holds string, not bytes"):
        parquet(write(tmp_path / "b.parquet", {"image": ["a.png"]}), 1.0)


def test_only_the_last_row_groups_are_held(tmp_path, monkeypatch):
    monkeypatch.setattr(decoded, "CACHED_PICTURES", 0)
    columns = {"image": [encode(n) for n in range(12)]}
    source = parquet(write(tmp_path / "p.parquet", columns, group=3))
    read, whole = [], tables._File.pictures
    monkeypatch.setattr(
        tables._File, "pictures", lambda self, group: read.append(group) or whole(self, group)
    )
    assert colours(source) == [n % 4 for n in range(12)]
    assert read == [0, 1, 2, 3]
    assert source[0].key == "p.parquet:0"
    assert source[11].key == "p.parquet:11"
    assert read == [0, 1, 2, 3, 0]


@pytest.mark.parametrize("form", ["caption", "captions", "class", "bytes", "struct"])
def test_a_value_that_all_rows_repeat_does_not_fill_the_memory(tmp_path, form):
    """Parquet stores it once: 3 GB and more in some KB."""

    def repeated(value: str | bytes, count: int = 1_500) -> Any:
        return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), [value])

    letters, pictures = "x" * 2_000_000, pa.array([encode(0)] * 1_500)
    offsets = pa.array(range(0, 1_501_000, 1_000), pa.int32())
    columns: dict[str, Any] = {
        "caption": {"image": pictures, "text": repeated(letters)},
        "captions": {
            "image": pictures,
            "text": pa.ListArray.from_arrays(offsets, repeated(letters[:9_000], 1_500_000)),
        },
        "class": {"image": pictures, "label": repeated(letters)},
        "bytes": {"image": repeated(letters.encode())},
        "struct": {"image": pa.StructArray.from_arrays([repeated(letters.encode())], ["bytes"])},
    }[form]
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=1_500, store_schema=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="bytes when unpacked"):
        parquet(path, 0.9)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700 * 1024


def test_captions_are_the_same_however_parquet_stores_them(tmp_path):
    """In a dictionary, without one, or in one that is full after some rows."""
    texts = [f"{n % 7} {'long ' * (n % 50)}x" for n in range(600)]
    for form in (
        {"use_dictionary": False},
        {"use_dictionary": True, "dictionary_pagesize_limit": 1_000, "data_page_size": 500},
    ):
        columns = {"image": [encode(n % 6) for n in range(600)], "text": texts}
        pq.write_table(pa.table(columns), tmp_path / "p.parquet", row_group_size=250, **form)
        assert parquet(tmp_path / "p.parquet").captions == [(" ".join(t.split()),) for t in texts]
        columns["text"] = [[text, "b"] for text in texts]
        pq.write_table(pa.table(columns), tmp_path / "p.parquet", row_group_size=250, **form)
        assert parquet(tmp_path / "p.parquet").captions == [
            (" ".join(text.split()), "b") for text in texts
        ]


def test_captions_of_many_small_groups_are_read_many_at_a_time(tmp_path, monkeypatch):
    """However many groups there are, a value is no larger than its part of one of them."""
    monkeypatch.setattr(tables, "_SMALL", 2**20)
    monkeypatch.setattr(tables, "_MAX_RATIO", 1)
    columns = {"image": [encode(0)] * 3_000, "text": [f"picture {n}" for n in range(3_000)]}
    file = tables._File(
        str(write(tmp_path / "p.parquet", columns, group=64)), DataConfig(), tables.Tally()
    )
    groups = range(file.metadata.num_row_groups)
    table = file._whole(lambda opened: file._table(opened, ["text"], groups))
    assert table.column(0).to_pylist() == columns["text"]
    assert table.column(0).num_chunks < 200


def test_large_row_groups_of_a_large_set_are_warned_of(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(decoded, "CACHED_PICTURES", 100)
    for count, group, warned in ((600, 300, True), (600, 100, False), (90, 90, False)):
        recwarn.clear()
        parquet(write(tmp_path / "p.parquet", {"image": [encode(0)] * count}, group=group))
        assert any("row_group_size=64" in str(one.message) for one in recwarn) == warned


@pytest.mark.parametrize(("package", "extra"), [("pyarrow", "parquet"), ("datasets", "datasets")])
def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch, package, extra):
    (tmp_path / "p.parquet").touch()
    for module in (package, "pyarrow.parquet"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    path = str(tmp_path) if package == "pyarrow" else "hf:somebody/something"
    with pytest.raises(MissingExtra, match=rf"{package}.*: pip install .*\[{extra}\]"):
        opened(path, kind=extra)


# --- Hugging Face datasets ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def datasets():
    return pytest.importorskip("datasets")


def test_a_saved_data_set_is_read(tmp_path, datasets):
    features = datasets.Features(
        image=datasets.Image(),
        caption=datasets.Value("string"),
        label=datasets.ClassLabel(names=["cat", "dog"]),
    )
    columns = {
        "image": structs(encode(n) for n in range(6)),
        "caption": [f"picture {n}" for n in range(6)],
        "label": [n % 2 for n in range(6)],
    }
    table = datasets.Dataset.from_dict(columns, features=features).select([4, 3, 1, 0])
    table.save_to_disk(str(tmp_path / "saved"))
    config = job.find_config("folder-64", f"hf:{tmp_path / 'saved'}", [])
    assert config.data.source == "datasets"
    source = open_source(config.data, 16)
    assert colours(source) == [0, 3, 1, 0]
    assert source.captions == [(f"picture {n}",) for n in (4, 3, 1, 0)]
    assert [source[n].label for n in range(4)] == [0, 1, 1, 0]
    assert source.classes == ("cat", "dog")
    assert source.keys == [f"saved:{n}" for n in range(4)]  # the same wherever the folder is


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("state.json", "{}"),
        ("state.json", "[]"),
        ("state.json", '{"_data_files": [1]}'),
        ("state.json", "[" * 5_000),
        ("dataset_info.json", "[]"),
        ("data-00000-of-00001.arrow", "no arrow"),
    ],
)
def test_a_saved_data_set_that_is_damaged_is_named(file, content, tmp_path, datasets):
    datasets.Dataset.from_dict({"png": [encode(0)]}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / file).write_text(content)
    with pytest.raises(ValueError, match=f"{tmp_path}/saved is damaged"):
        opened(f"hf:{tmp_path}/saved", kind="datasets")


def test_splits_are_chosen_by_name(tmp_path, datasets):
    splits = {
        name: datasets.Dataset.from_dict({"png": [encode(n)]})
        for n, name in enumerate(("train", "test"))
    }
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    for split, expected in (("", [0]), ("@test", [1])):
        assert colours(opened(f"hf:{tmp_path}/saved{split}", kind="datasets")) == expected
    with pytest.raises(ConfigError, match="has the splits train, test"):
        opened(f"hf:{tmp_path}/saved@validation", kind="datasets")
    with pytest.raises(ConfigError, match=r"data\.split is test"):
        opened(f"hf:{tmp_path}/saved@train", kind="datasets", split="test")
    assert colours(opened(f"hf:{tmp_path}/saved", kind="datasets", split="test")) == [1]
    splits["train"].save_to_disk(str(tmp_path / "one"))
    assert colours(opened(f"hf:{tmp_path}/one", kind="datasets")) == [0]
    with pytest.raises(ConfigError, match=r"one holds one data set.*omit @test"):
        opened(f"hf:{tmp_path}/one@test", kind="datasets")


def test_a_clone_from_the_hub_is_read(tmp_path, datasets):
    write(tmp_path / "clone" / "data" / "train-00000-of-00001.parquet", {"image": [encode(2)]})
    assert colours(opened(f"hf:{tmp_path}/clone", kind="datasets")) == [2]


def test_a_picture_beside_the_table_is_read_and_a_bad_row_attributed(
    tmp_path, monkeypatch, datasets
):
    (tmp_path / "beside.png").write_bytes(encode(2))
    paths = [tmp_path / "beside.png", tmp_path / "gone.png"]
    cells = [
        *({"bytes": None, "path": str(path)} for path in paths),
        {"bytes": b"broken", "path": None},
        None,
    ]
    features = datasets.Features(image=datasets.Image())
    table = datasets.Dataset.from_dict({"image": cells}, features=features)
    monkeypatch.setattr(tables, "_opened", lambda *_: table)  # as one from the hub may be
    source = opened("hf:somebody/something", 0.9, kind="datasets")
    assert colours(source) == [2]
    assert [file.path for file in source.bad] == [f"somebody/something:{n}" for n in (1, 2, 3)]
    assert str(paths[1]) in source.bad[0].reason
