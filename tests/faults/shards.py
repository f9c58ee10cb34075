"""64 pictures in 4 tar shards with captions and classes, whole or damaged in known ways."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

NUM_SHARDS, PER_SHARD, CLASSES = 4, 16, 4
LAST = (NUM_SHARDS - 1) * PER_SHARD
"""First sample of the last shard, which is damaged as a file."""

Parts = list[tuple[str, bytes]]
Change = Callable[[Parts], Parts]


class Damage(NamedTuple):
    """Report that a damaged set should cause.

    Attributes:
        reported: names of the bad samples, such as "2.tar:00035"; one that is bad twice is there
            twice.
        late: those of them that only fail when they are decoded.
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
    """The members of a good sample: picture, caption, class."""
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
    """Write all samples, good."""
    for shard in range(NUM_SHARDS):
        numbers = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
        write(folder / f"{shard}.tar", [part for number in numbers for part in sample(number)])


# --- damage ----------------------------------------------------------------------------------


def changed(place: int, change: Callable[[bytes], bytes], form: str = "") -> Change:
    """Change the bytes of one member, and its extension if `form` is set."""

    def apply(parts: Parts) -> Parts:
        name, data = parts[place]
        name = str(Path(name).with_suffix(f".{form}")) if form else name
        return [*parts[:place], (name, change(data)), *parts[place + 1 :]]

    return apply


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


GREY = np.linspace(0, 65_535, 40 * 40).astype(np.uint16).reshape(40, 40)
MOVING = {"save_all": True, "append_images": [picture(0)]}
ODD_BUT_GOOD: tuple[Change, ...] = (
    changed(0, lambda data: encoded(opened(data).convert("CMYK"), "JPEG"), "jpg"),
    changed(0, lambda _: encoded(Image.fromarray(GREY))),
    changed(0, lambda data: encoded(opened(data), "WEBP", **MOVING), "webp"),
)
BAD_WHEN_DECODED: tuple[Change, ...] = (
    changed(0, lambda data: data[:40] + bytes(15) + data[55:]),  # around the start of the pixels
    changed(0, lambda data: data[: len(data) // 2]),
    changed(0, lambda _: encoded(Image.new("RGB", (1, 1)))),
)
BAD: tuple[Change, ...] = (
    *BAD_WHEN_DECODED,
    # These are found when the shard is indexed, before any picture is decoded.
    changed(0, lambda _: b""),
    changed(1, lambda _: b"caf\xe9"),
    lambda parts: [parts[0], parts[2]],
    changed(2, lambda _: b"a cat"),
)


def write_damaged(folder: Path, chance: random.Random) -> Damage:
    """Write shards in which every kind of damage lies somewhere."""
    numbers = chance.sample(range(LAST), len(BAD) + len(ODD_BUT_GOOD))
    change = dict(zip(numbers, (*BAD, *ODD_BUT_GOOD), strict=True))
    samples = [change.get(n, list)(sample(n)) for n in range(NUM_SHARDS * PER_SHARD)]
    reported = [_key(number) for number in numbers[: len(BAD)]]
    late = reported[: len(BAD_WHEN_DECODED)]

    # The members of two neighbours that are whole are mixed up: each key is there twice.
    first = _neighbours(change, chance)
    one, other = samples[first : first + 2]
    samples[first : first + 2] = [[one[0], other[0], *one[1:], *other[1:]], []]
    mixed = [_key(first), _key(first + 1)]
    lost = {*reported, *mixed}
    reported += 2 * mixed

    # A key that was there before comes again at the end of its shard: the first one is good.
    again = chance.choice([n for n in range(PER_SHARD - 1) if n not in {*change, first, first + 1}])
    samples[PER_SHARD - 1] = samples[PER_SHARD - 1] + sample(again)
    reported.append(_key(again))

    for shard in range(NUM_SHARDS):
        inside = samples[shard * PER_SHARD : (shard + 1) * PER_SHARD]
        write(folder / f"{shard}.tar", [part for parts in inside for part in parts])
    named, gone = _damage_last_shard(folder / f"{NUM_SHARDS - 1}.tar", chance)
    everything = {_key(number) for number in range(NUM_SHARDS * PER_SHARD)}
    return Damage(reported + named, late, everything - lost - gone)


def _key(number: int) -> str:
    return f"{number // PER_SHARD}.tar:{number:05}"


def _neighbours(taken: Collection[int], chance: random.Random) -> int:
    """The first of two samples of one shard that are not taken."""
    firsts = (n for n in range(LAST) if n % PER_SHARD < PER_SHARD - 1)
    return chance.choice([n for n in firsts if n not in taken and n + 1 not in taken])


def _damage_last_shard(path: Path, chance: random.Random) -> tuple[list[str], set[str]]:
    """Damage a header, and end the shard within a picture; return reported and lost samples."""
    with tarfile.open(path) as archive:
        pictures = [member for member in archive.getmembers() if member.name.endswith(".png")]
    broken, last = sorted(chance.sample(range(PER_SHARD), 2))
    data = bytearray(path.read_bytes())
    data[pictures[broken].offset + 130] ^= 1  # in the size: the checksum no longer fits
    path.write_bytes(data[: pictures[last].offset_data + pictures[last].size // 2])
    header = f"{path.name}:byte {pictures[broken].offset}"
    lost = {_key(LAST + number) for number in (broken, *range(last, PER_SHARD))}
    return [header, _key(LAST + broken), _key(LAST + last)], lost
