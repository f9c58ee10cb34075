"""64 pictures in 4 tar shards with captions and classes, whole or damaged in known ways."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

NUM_SHARDS, PER_SHARD, CLASSES = 4, 16, 4
Parts = list[tuple[str, bytes]]


class Damage(NamedTuple):
    """What a damaged set should be reported as.

    Attributes:
        reported: what names each bad sample, such as "2.tar:00035"; one that is bad twice is there
            twice.
        late: those of them that only show it when they are decoded.
        good: the samples that are still delivered.
    """

    reported: list[str]
    late: list[str]
    good: set[str]


def picture(number: int) -> Image.Image:
    """A smooth picture of its own for each number."""
    coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((40, 40), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=form, **options)
    return file.getvalue()


def sample(number: int) -> Parts:
    """The members of a good sample."""
    key = f"{number:05}"
    return [
        (f"{key}.png", encoded(picture(number))),
        (f"{key}.txt", f"picture {number}".encode()),
        (f"{key}.cls", str(number % CLASSES).encode()),
    ]


def write(path: Path, parts: Iterable[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in parts:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def write_whole(folder: Path) -> None:
    """All samples, good."""
    for shard in range(NUM_SHARDS):
        numbers = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
        write(folder / f"{shard}.tar", [part for number in numbers for part in sample(number)])


# --- damage ----------------------------------------------------------------------------------


def flipped(parts: Parts) -> Parts:
    """Fifteen bytes around the start of the compressed pixels are zero."""
    (name, data), *rest = parts
    return [(name, data[:40] + bytes(15) + data[55:]), *rest]


def cut(parts: Parts) -> Parts:
    (name, data), *rest = parts
    return [(name, data[: len(data) // 2]), *rest]


def emptied(parts: Parts) -> Parts:
    return [(parts[0][0], b""), *parts[1:]]


def tiny(parts: Parts) -> Parts:
    return [(parts[0][0], encoded(Image.new("RGB", (1, 1)))), *parts[1:]]


def latin(parts: Parts) -> Parts:
    return [parts[0], (parts[1][0], b"caf\xe9"), parts[2]]


def uncaptioned(parts: Parts) -> Parts:
    return [parts[0], parts[2]]


def unclassed(parts: Parts) -> Parts:
    return [parts[0], parts[1], (parts[2][0], b"a cat")]


def cmyk(parts: Parts) -> Parts:
    stem, image = Path(parts[0][0]).stem, Image.open(io.BytesIO(parts[0][1]))
    return [(f"{stem}.jpg", encoded(image.convert("CMYK"), "JPEG")), *parts[1:]]


def deep(parts: Parts) -> Parts:
    grey = np.linspace(0, 65_535, 40 * 40).astype(np.uint16).reshape(40, 40)
    return [(parts[0][0], encoded(Image.fromarray(grey))), *parts[1:]]


def animated(parts: Parts) -> Parts:
    stem, image = Path(parts[0][0]).stem, Image.open(io.BytesIO(parts[0][1]))
    moving = encoded(image, "WEBP", save_all=True, append_images=[picture(0)])
    return [(f"{stem}.webp", moving), *parts[1:]]


ODD_BUT_GOOD: tuple[Callable[[Parts], Parts], ...] = (cmyk, deep, animated)
BAD: tuple[Callable[[Parts], Parts], ...] = (
    flipped,
    cut,
    emptied,
    tiny,
    latin,
    uncaptioned,
    unclassed,
)
BAD_WHEN_DECODED = frozenset({flipped, cut, tiny})
"""The others are found when the shard is indexed, before any picture is decoded."""


def write_damaged(folder: Path, chance: random.Random) -> Damage:
    """Shards in which every kind of damage lies somewhere."""
    numbers = chance.sample(range((NUM_SHARDS - 1) * PER_SHARD), len(BAD) + len(ODD_BUT_GOOD))
    change = dict(zip(numbers, (*BAD, *ODD_BUT_GOOD), strict=True))
    shards = [
        [
            change.get(number, list)(sample(number))
            for number in range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
        ]
        for shard in range(NUM_SHARDS)
    ]
    reported = [_key(number) for number, how in change.items() if how in BAD]
    late = [_key(number) for number, how in change.items() if how in BAD_WHEN_DECODED]
    lost = {_key(number) for number, how in change.items() if how in BAD}

    # Of two neighbours that are whole, the members are mixed up: each key is there twice.
    first = _neighbours(change, chance)
    shard, place = divmod(first, PER_SHARD)
    one, other = shards[shard][place : place + 2]
    shards[shard][place : place + 2] = [[one[0], other[0], *one[1:], *other[1:]]]
    reported += 2 * [_key(first), _key(first + 1)]
    lost |= {_key(first), _key(first + 1)}

    # A key that was there before comes again at the end of its shard: the first one is good.
    again = chance.choice([n for n in range(PER_SHARD - 1) if n not in {*change, first, first + 1}])
    shards[0].append(sample(again))
    reported.append(_key(again))

    for shard, samples in enumerate(shards):
        write(folder / f"{shard}.tar", [part for parts in samples for part in parts])
    named, gone = _damage_last_shard(folder / f"{NUM_SHARDS - 1}.tar", chance)
    everything = {_key(number) for number in range(NUM_SHARDS * PER_SHARD)}
    return Damage(reported + named, late, everything - lost - gone)


def _key(number: int) -> str:
    return f"{number // PER_SHARD}.tar:{number:05}"


def _neighbours(taken: Iterable[int], chance: random.Random) -> int:
    """The first of two samples of one shard that are not taken."""
    last = (NUM_SHARDS - 1) * PER_SHARD
    firsts = (n for n in range(last) if n % PER_SHARD < PER_SHARD - 1)
    return chance.choice([n for n in firsts if not {n, n + 1} & set(taken)])


def _damage_last_shard(path: Path, chance: random.Random) -> tuple[list[str], set[str]]:
    """A header is damaged, and the shard ends within a picture: what comes after is gone."""
    with tarfile.open(path) as archive:
        pictures = [member for member in archive.getmembers() if member.name.endswith(".png")]
    broken, last = sorted(chance.sample(range(PER_SHARD), 2))
    data = bytearray(path.read_bytes())
    data[pictures[broken].offset + 130] ^= 1  # in the size: the checksum no longer fits
    path.write_bytes(data[: pictures[last].offset_data + pictures[last].size // 2])
    start = (NUM_SHARDS - 1) * PER_SHARD
    reported = [f"{path.name}:byte {pictures[broken].offset}", _key(start + broken)]
    lost = {_key(start + number) for number in (broken, *range(last, PER_SHARD))}
    return [*reported, _key(start + last)], lost
