"""The same pictures in every form that `--data` takes: run it, look at the files, copy one.

    python examples/data_forms.py forms [--side 96] [--count 1904]
    mdm data check forms/classes
    mdm train folder-64 --data 'forms/shards/{00000..00003}.tar' --out runs/shards

OpenMoji is rendered once (extras `openmoji`, `parquet` and `datasets`) and written as
`classes/`, `sidecar/`, `metadata/`, `shards/`, `parquet/` and `saved/`.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

SHARDS = 4
CLASSES = ("clock", "face", "flag", "person", "thing")
_PEOPLE = frozenset({"man", "men", "woman", "women", "person", "people", "boy", "girl"})


class Item(NamedTuple):
    """One picture as a PNG file, and all that the forms say about it."""

    name: str
    png: bytes
    captions: tuple[str, ...]
    label: int
    side: int


def openmoji_items(side: int, count: int) -> Iterator[Item]:
    """Images spread evenly over OpenMoji, in its order."""
    from matryoshka_diffusion.config import DataConfig
    from matryoshka_diffusion.data.source import open_source

    source = open_source(DataConfig(source="openmoji"), side)
    for place in range(count):
        example = source[place * len(source) // count]
        yield to_item(example.key, example.picture, example.captions)


def to_item(name: str, pixels: np.ndarray, captions: Sequence[str]) -> Item:
    """A picture as a file; its class is guessed from the words of its caption."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    label = CLASSES.index(_class(captions[0]))
    return Item(name, file.getvalue(), tuple(captions), label, min(pixels.shape[:2]))


def _class(caption: str) -> str:
    words = caption.replace(":", " ").replace("-", " ").split()
    if _PEOPLE & set(words):
        return "person"
    named = (name for name in ("clock", "face", "flag") if name in words)
    return "clock" if "o'clock" in words else next(named, "thing")


# --- the forms ---------------------------------------------------------------------------------


def write_classes(items: Sequence[Item], folder: Path) -> Path:
    """A sub-folder for each class."""
    for item in items:
        _write(folder / CLASSES[item.label] / f"{item.name}.png", item.png)
    return folder


def write_sidecar(items: Sequence[Item], folder: Path) -> Path:
    """A text file beside each picture, one caption a line."""
    for item in items:
        _write(folder / f"{item.name}.png", item.png)
        _write(folder / f"{item.name}.txt", "\n".join(item.captions).encode())
    return folder


def write_metadata(items: Sequence[Item], folder: Path) -> Path:
    """One `metadata.jsonl` for all pictures of a folder."""
    for item in items:
        _write(folder / f"{item.name}.png", item.png)
    rows = [{"file_name": f"{item.name}.png", "text": list(item.captions)} for item in items]
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    _write(folder / "metadata.jsonl", lines.encode())
    return folder


def write_shards(items: Sequence[Item], folder: Path) -> Path:
    """WebDataset shards: the members of a sample share a name and lie side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(SHARDS):
        with tarfile.open(folder / f"{number:05}.tar", "w") as archive:
            for item in items[number::SHARDS]:
                size = {"original_width": item.side, "original_height": item.side}
                for suffix, data in (
                    ("png", item.png),
                    ("txt", "\n".join(item.captions).encode()),
                    ("json", json.dumps(size).encode()),
                ):
                    info = tarfile.TarInfo(f"{item.name}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return folder / f"{{00000..{SHARDS - 1:05}}}.tar"


def write_parquet(items: Sequence[Item], folder: Path) -> Path:
    """Two parquet files with small row groups, so that any picture is quickly read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    for number in range(2):
        part = items[number::2]
        columns = {
            "image": [item.png for item in part],
            "caption": [list(item.captions) for item in part],
        }
        pq.write_table(pa.table(columns), folder / f"{number}.parquet", row_group_size=32)
    return folder / "*.parquet"


def write_saved(items: Sequence[Item], folder: Path) -> Path:
    """A Hugging Face data set with named classes, as `save_to_disk` writes it."""
    import datasets

    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES))
    )
    columns = {
        "image": [{"bytes": item.png, "path": None} for item in items],
        "label": [item.label for item in items],
    }
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(folder))
    return folder


FORMS = {
    "classes": write_classes,
    "sidecar": write_sidecar,
    "metadata": write_metadata,
    "shards": write_shards,
    "parquet": write_parquet,
    "saved": write_saved,
}


def data_argument(form: str, written: Path) -> str:
    """Argument of `--data` for a form."""
    return f"hf:{written}" if form == "saved" else str(written)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write OpenMoji in every form that --data takes.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--side", type=int, default=96, help="of the pictures, in pixels (96)")
    parser.add_argument("--count", type=int, default=1904, help="pictures (all 1904)")
    options = parser.parse_args()
    items = list(openmoji_items(options.side, options.count))
    for form, write in FORMS.items():
        print(f"--data '{data_argument(form, write(items, options.folder / form))}'")


if __name__ == "__main__":
    main()
