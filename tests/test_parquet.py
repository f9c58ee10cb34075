"""Parquet files and Hugging Face data sets: columns found, pictures read where they lie."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from matryoshka_diffusion.config import DataConfig
from matryoshka_diffusion.data import decoded
from matryoshka_diffusion.data import tables as parquet_module
from matryoshka_diffusion.data.loader import Loader
from matryoshka_diffusion.data.source import Source, open_source
from matryoshka_diffusion.data.tables import split_of
from matryoshka_diffusion.files import MissingExtra
from matryoshka_diffusion.runs import prepare as job

COLOURS = [(200, 30, 40), (10, 180, 60), (20, 40, 220), (240, 240, 20)]


def parquet(path: str, side: int, share: float) -> Source:
    return open_source(DataConfig(source="parquet", path=path, max_bad_fraction=share), side)


def hugging_face(name: str, side: int, share: float) -> Source:
    data = DataConfig(source="datasets", path=f"hf:{name}", max_bad_fraction=share)
    return open_source(data, side)


def encode(n: int, size=(20, 24)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, COLOURS[n % 4]).save(file, "PNG")
    return file.getvalue()


def keys(source: Source) -> list[str]:
    return [source[n].key for n in range(len(source))]


def colours(source: Source) -> list[int]:
    """The index of each picture's colour."""
    middles = (source[n].picture[8, 8].tolist() for n in range(len(source)))
    return [COLOURS.index(tuple(middle)) for middle in middles]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))


# --- parquet ---------------------------------------------------------------------------------


@pytest.fixture
def pa():
    return pytest.importorskip("pyarrow")


def write(path: Path, columns: dict, *, group: int = 4, metadata=None) -> str:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(columns).replace_schema_metadata(metadata)
    pyarrow.parquet.write_table(table, path, row_group_size=group)
    return str(path)


def structs(pictures) -> list[dict]:
    return [{"bytes": picture, "path": None} for picture in pictures]


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("form", ["bytes", "structs"])
def test_rows_come_in_order_with_captions(tmp_path, monkeypatch, pa, form, large):
    if large:
        monkeypatch.setattr(decoded, "CACHED_PICTURES", 0)
    pictures = [encode(n) for n in range(10)]
    columns = {
        "image": structs(pictures) if form == "structs" else pictures,
        "caption": [[f"picture {n}", f"number  {n}"] if n % 2 else [f"no {n}"] for n in range(10)],
        "other": list(range(10)),
    }
    source = parquet(write(tmp_path / "p.parquet", columns, group=3), 16, 0.0)
    assert (source.threads > 1) == large
    assert keys(source) == [f"p.parquet:{n}" for n in range(10)]
    assert colours(source) == [n % 4 for n in range(10)]
    assert source.captions is not None
    assert source.captions[:2] == [("no 0",), ("picture 1", "number 1")]
    assert (source[3].original_side, source.classes, source.bad) == (20, (), ())


def test_several_files_are_one_set(tmp_path, pa):
    for n in range(3):
        write(tmp_path / "d" / f"{n}.parquet", {"jpg": [encode(n)] * 2, "text": [f"of {n}"] * 2})
    for pattern in (f"{tmp_path}/d/{{0..2}}.parquet", f"{tmp_path}/d", f"{tmp_path}/d/*.parquet"):
        source = parquet(pattern, 16, 0.0)
        assert keys(source) == [f"{n}.parquet:{row}" for n in range(3) for row in range(2)]
        assert colours(source) == [0, 0, 1, 1, 2, 2]
    config = job.find_config("folder-64", str(tmp_path / "d"), [])
    assert config.data.source == "parquet"
    assert job.all_captions(open_source(config.data, 16)) == ["of 0", "of 1", "of 2"]


def test_classes_are_numbers_words_or_named_by_datasets(tmp_path, pa):
    pictures = [encode(n) for n in range(3)]
    numbers = {"image": pictures, "label": [2, 0, 2]}
    about = {"info": {"features": {"label": {"names": ["cat", "dog", "owl"], "_type": "x"}}}}
    for columns, metadata, classes, labels in (
        (numbers, None, ("0", "1", "2"), [2, 0, 2]),
        (numbers, {"huggingface": json.dumps(about)}, ("cat", "dog", "owl"), [2, 0, 2]),
        (numbers, {"huggingface": "{"}, ("0", "1", "2"), [2, 0, 2]),
        ({"image": pictures, "cls": ["owl", "cat", "owl"]}, None, ("cat", "owl"), [1, 0, 1]),
    ):
        path = write(tmp_path / f"{len(classes)}{classes[0]}.parquet", columns, metadata=metadata)
        source = parquet(path, 16, 0.0)
        assert source.classes == classes
        assert [source[n].label for n in range(3)] == labels


def test_classes_may_be_yes_and_no_but_not_numbers_and_words(tmp_path, pa):
    write(tmp_path / "0.parquet", {"image": [encode(0), encode(1)], "label": [True, False]})
    source = parquet(str(tmp_path / "0.parquet"), 16, 0.0)
    labels = Loader(source, 0).batch(range(2)).labels
    assert labels is not None
    assert labels.dtype == torch.int64
    assert source.classes == ("0", "1")
    write(tmp_path / "1.parquet", {"image": [encode(0)], "label": ["cat"]})
    with pytest.raises(ValueError, match="numbers in some of the rows and words in others"):
        parquet(str(tmp_path), 16, 0.0)


def test_bad_rows_are_attributed(tmp_path, pa):
    latin = pa.array([b"caf\xe9"]).view(pa.string())
    texts = pa.concat_arrays([pa.array(["a", "b", None, " ", "e", "f"]), latin, pa.array(["h"])])
    pictures = [encode(0), b"broken", encode(2), encode(3), None, b"", encode(0), encode(0, (1, 1))]
    labels = [0, 0, 0, 0, 0, 0, 0, 0]
    path = write(tmp_path / "p.parquet", {"image": pictures, "text": texts, "label": labels})
    source = parquet(path, 16, 0.9)
    assert keys(source) == ["p.parquet:0"]
    found = {file.path.split(":")[1]: file.reason for file in source.bad}
    for row, reason in {
        "1": "not a PNG, JPEG or WEBP",
        "2": "it has no caption, although others have one",
        "3": "its caption is empty",
        "4": "there is no picture in its row",
        "5": "it is empty",
        "6": "its caption or class is not UTF-8",
        "7": "too small: 1x1",
    }.items():
        assert reason in found[row]
    with pytest.raises(ValueError, match=r"7 of 8 files cannot be used \(p\.parquet:1"):
        parquet(path, 16, 0.5)


def test_a_damaged_row_group_costs_its_rows_only(tmp_path, pa):
    noise = np.random.default_rng(0).integers(0, 256, (9, 40, 40, 3), dtype=np.uint8)
    pictures = []
    for pixels in noise:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        pictures.append(file.getvalue())
    path = write(tmp_path / "p.parquet", {"image": pictures}, group=3)
    footer = pa.parquet.read_metadata(path)
    start = footer.row_group(1).column(0).data_page_offset
    data = bytearray(Path(path).read_bytes())
    data[start : start + 8] = bytes(8)  # the page's header
    Path(path).write_bytes(data)
    source = parquet(path, 16, 0.5)
    assert keys(source) == [f"p.parquet:{n}" for n in (0, 1, 2, 6, 7, 8)]
    assert [file.path for file in source.bad] == [f"p.parquet:{n}" for n in (3, 4, 5)]
    assert "row group 1 is damaged" in source.bad[0].reason


def test_a_file_without_its_footer_is_an_error_that_names_it(tmp_path, pa):
    path = Path(write(tmp_path / "p.parquet", {"image": [encode(0)]}))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"p\.parquet is damaged"):
        parquet(str(path), 16, 1.0)


def test_tables_without_pictures_are_errors(tmp_path, pa):
    words = write(tmp_path / "a.parquet", {"caption": ["x"], "url": ["y"]})
    with pytest.raises(ValueError, match="no column with pictures among caption, url"):
        parquet(words, 16, 1.0)
    with pytest.raises(ValueError, match="column image holds string, not bytes"):
        parquet(write(tmp_path / "b.parquet", {"image": ["a.png"]}), 16, 1.0)


def test_only_the_last_row_groups_are_held(tmp_path, monkeypatch, pa):
    monkeypatch.setattr(decoded, "CACHED_PICTURES", 0)
    source = parquet(
        write(tmp_path / "p.parquet", {"image": [encode(n) for n in range(12)]}, group=3), 16, 0.0
    )
    read = []
    whole = parquet_module._File.pictures

    def counted(self, group):
        read.append(group)
        return whole(self, group)

    monkeypatch.setattr(parquet_module._File, "pictures", counted)
    assert colours(source) == [n % 4 for n in range(12)]
    assert read == [0, 1, 2, 3]
    assert source[0].key == "p.parquet:0"
    assert source[11].key == "p.parquet:11"
    assert read == [0, 1, 2, 3, 0]


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "p.parquet").touch()
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtra, match=r"pyarrow.*: pip install .*\[parquet\]"):
        parquet(str(tmp_path), 16, 0.0)


# --- Hugging Face datasets -------------------------------------------------------------------


@pytest.fixture(scope="module")
def datasets():
    return pytest.importorskip("datasets")


@pytest.mark.parametrize("large", [False, True])
def test_a_saved_data_set_is_read(tmp_path, monkeypatch, datasets, large):
    if large:
        monkeypatch.setattr(decoded, "CACHED_PICTURES", 0)
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
    assert (source.threads > 1) == large
    assert colours(source) == [0, 3, 1, 0]
    assert source.captions == [(f"picture {n}",) for n in (4, 3, 1, 0)]
    assert [source[n].label for n in range(4)] == [0, 1, 1, 0]
    assert source.classes == ("cat", "dog")
    assert keys(source)[1] == f"{tmp_path / 'saved'}:1"


def test_splits_are_chosen_by_name(tmp_path, datasets):
    splits = {
        name: datasets.Dataset.from_dict({"png": [encode(n)]})
        for n, name in enumerate(("train", "test"))
    }
    folder = str(tmp_path / "saved")
    datasets.DatasetDict(splits).save_to_disk(folder)
    assert colours(hugging_face(folder, 16, 0.0)) == [0]
    assert colours(hugging_face(f"{folder}@test", 16, 0.0)) == [1]
    with pytest.raises(ValueError, match="its splits are train, test"):
        hugging_face(f"{folder}@validation", 16, 0.0)


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
    monkeypatch.setattr(parquet_module, "_opened", lambda *_: table)  # as one from the hub may be
    source = hugging_face("somebody/something", 16, 0.9)
    assert colours(source) == [2]
    assert [file.path for file in source.bad] == [f"somebody/something:{n}" for n in (1, 2, 3)]
    assert source.bad[0].reason == f"its picture is a file that does not exist, {paths[1]}"


def test_places_and_splits_are_told_apart(tmp_path):
    assert split_of("somebody/something") == ("somebody/something", "")
    assert split_of("somebody/something@test") == ("somebody/something", "test")
    assert split_of("/a@b/c") == ("/a@b/c", "")
    (tmp_path / "x@y").mkdir()
    assert split_of(f"{tmp_path}/x@y") == (f"{tmp_path}/x@y", "")
    assert split_of(f"{tmp_path}/x@y@test") == (f"{tmp_path}/x@y", "test")


def test_data_sets_without_the_package_name_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"datasets: pip install .*\[datasets\]"):
        hugging_face("somebody/something", 16, 0.0)
