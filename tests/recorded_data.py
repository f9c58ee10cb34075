"""Small data sets and models for `recordings.py`, made from fixed seeds."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from tiny_models import make_clip, make_codec, make_t5

SHAPES = ("disk", "square", "stripes")
COLOURS = {"red": (200, 30, 40), "green": (40, 160, 70), "blue": (40, 70, 200), "grey": (90,) * 3}


class Item(NamedTuple):
    """An image as a PNG file, with its captions and class."""

    name: str
    png: bytes
    captions: tuple[str, ...]
    label: int


def items() -> list[Item]:
    """48 images of three shapes in four colours, at many places, of two sizes."""
    images = []
    for number in range(48):
        draws = np.random.default_rng(number)
        shape = number % len(SHAPES)
        colour = list(COLOURS)[number // len(SHAPES) % len(COLOURS)]
        size = (48, 40) if number % 2 else (40, 52)
        x, y, half = (int(draws.integers(*ends)) for ends in ((14, 26), (14, 26), (6, 13)))
        file = io.BytesIO()
        image_of(SHAPES[shape], COLOURS[colour], size, (x, y), half).save(file, "PNG")
        captions = (f"a {colour} {SHAPES[shape]}", f"{SHAPES[shape]} in {colour}")
        images.append(Item(f"{number:02}", file.getvalue(), captions[: 1 + number % 2], shape))
    return images


def image_of(
    shape: str,
    colour: tuple[int, ...],
    size: tuple[int, int],
    place: tuple[int, int],
    half: int,
) -> Image.Image:
    """A shape on a background that is lighter on one side."""
    ramp = np.linspace(180, 250, size[0], dtype=np.uint8)
    image = Image.fromarray(np.broadcast_to(ramp[None, :, None], (*size[::-1], 3)).copy())
    draw, (x, y) = ImageDraw.Draw(image), place
    box = (x - half, y - half, x + half, y + half)
    if shape == "disk":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    else:
        for line in range(x - half, x + half, 4):
            draw.rectangle((line, box[1], line + 1, box[3]), fill=colour)
    return image


def make_folder(kind: str, folder: Path) -> None:
    """Write images with text files, in a folder for each class, or alone."""
    for item in items():
        place = folder / SHAPES[item.label] if kind == "classes" else folder
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{item.name}.png").write_bytes(item.png)
        if kind == "captions":
            (place / f"{item.name}.txt").write_text("\n".join(item.captions))


def make_tars(kind: str, folder: Path) -> None:
    """Write two shards; the caption or class of an image lies beside it."""
    folder.mkdir(parents=True)
    for number in range(2):
        with tarfile.open(folder / f"{number:05}.tar", "w") as shard:
            for item in items()[number::2]:
                members = {"png": item.png}
                if kind == "captions":
                    members["txt"] = "\n".join(item.captions).encode()
                    members["json"] = b'{"original_width": 96, "original_height": 80}'
                if kind == "classes":
                    members["cls"] = str(item.label).encode()
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{item.name}.{suffix}")
                    info.size = len(data)
                    shard.addfile(info, io.BytesIO(data))


def make_parquet(kind: str, folder: Path) -> None:
    """Write two tables of a few row groups."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    for number in range(2):
        part = items()[number::2]
        columns: dict[str, list[Any]] = {"image": [item.png for item in part]}
        if kind == "captions":
            columns["caption"] = [list(item.captions) for item in part]
        if kind == "classes":
            columns["label"] = [item.label for item in part]
        pq.write_table(pa.table(columns), folder / f"{number}.parquet", row_group_size=8)


def make_metadata(folder: Path) -> None:
    """Write images, and the captions of all in one file."""
    make_folder("plain", folder)
    rows = [{"file_name": f"{item.name}.png", "text": list(item.captions)} for item in items()]
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def make_saved(folder: Path) -> None:
    """Write a data set of Hugging Face with class names, through `save_to_disk`."""
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=list(SHAPES))
    )
    columns = {
        "image": [{"bytes": item.png, "path": None} for item in items()],
        "label": [item.label for item in items()],
    }
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(folder))


def make_damaged(folder: Path) -> None:
    """Write images of which one is cut off, one empty and one tiny."""
    make_folder("plain", folder)
    whole = (folder / "03.png").read_bytes()
    (folder / "03.png").write_bytes(whole[: len(whole) // 2])
    (folder / "05.png").write_bytes(b"")
    Image.new("RGB", (4, 4)).save(folder / "07.png")


def make_clips(folder: Path) -> None:
    """Write twelve animations of twelve frames, in which a shape moves."""
    folder.mkdir(parents=True)
    for number, (colour, shape) in enumerate(itertools.product(COLOURS, SHAPES)):
        frames = [
            image_of(shape, COLOURS[colour], (40, 32), (8 + 2 * n, 10 + number), 6)
            for n in range(12)
        ]
        path = folder / f"{number:02}.webp"
        options = {"save_all": True, "duration": 40, "lossless": True, "exact": True}
        frames[0].save(path, append_images=frames[1:], **options)
        path.with_suffix(".txt").write_text(f"a {colour} {shape}")


WORDS = ("a", "in", *SHAPES, *COLOURS)
"""The words of all captions."""
KINDS = ("captions", "classes", "plain")
MAKERS: dict[str, Callable[[Path], None]] = {
    **{f"{kind}-folder": partial(make_folder, kind) for kind in KINDS},
    **{f"{kind}-tars": partial(make_tars, kind) for kind in KINDS},
    **{f"{kind}-parquet": partial(make_parquet, kind) for kind in KINDS},
    "metadata": make_metadata,
    "saved": make_saved,
    "damaged": make_damaged,
    "clips": make_clips,
    "codec": make_codec,
    "t5": partial(make_t5, words=WORDS),
    "clip": partial(make_clip, words=WORDS),
}
"""Functions that write what commands name as `../made/NAME`, by name."""
