"""What samples are compared with: pictures, or the moments that ADM's .npz files hold.

FID is defined between sets of one resolution. Pictures of a source are cut to squares and brought
to the side of the samples as training pictures are, which says so in the number's name if it was
not the model's own data. So is a small share that is enlarged: published numbers on COCO resize
every picture of val2014, the few below 256 pixels as well. More than that is refused, and so is an
.npz of another resolution.
"""

from __future__ import annotations

import math
import struct
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np

from matryoshka_diffusion.config import DataConfig, UsageError
from matryoshka_diffusion.data.source import Source
from matryoshka_diffusion.eval.pictures import FORMAT, ORIGINAL_SIDES, PictureSet, Shown, shown
from matryoshka_diffusion.eval.store import Store
from matryoshka_diffusion.files import cache_folder
from matryoshka_diffusion.metrics.frechet import Reference as Published
from matryoshka_diffusion.metrics.networks.inception_net import WIDTH
from matryoshka_diffusion.models.find import Progress
from matryoshka_diffusion.sampling import BATCH
from matryoshka_diffusion.train.distributed import World

MOST_ENLARGED = 0.05
"""The share of pictures below the compared side from which on a set is no reference."""
_PICTURES = "arr_0.npy"
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_ALONE = World()


@dataclass(frozen=True)
class Reference:
    """A set of real pictures.

    Attributes:
        name: for people.
        pictures: None where only moments are known.
        published: moments of Inception's features; None where they are those of the pictures.
        foreign: whether these are files that may have been resized; not the model's own data.
    """

    name: str
    pictures: PictureSet | None
    published: Published | None = None
    foreign: bool = False

    @property
    def count(self) -> int | None:
        """How many pictures; None where nobody says."""
        return None if self.pictures is None else self.pictures.count

    def flag(
        self, side: int, what: str, *, world: World = _ALONE, progress: Progress | None = None
    ) -> str | None:
        """What a number at `side` pixels has to say of these pictures, which it calls `what`.

        A collective: the pictures are looked at, once.

        Raises:
            UsageError: they have another resolution, or more than a few were enlarged.
        """
        if self.pictures is None:
            return f"{what} of unstated resolution"
        if self.pictures.side != side:
            raise UsageError(
                f"{self.name} has pictures of {self.pictures.side} pixels a side, the samples have "
                f"{side}: no distance is defined between resolutions"
            )
        if not self.foreign:
            return None
        self.pictures.fill([ORIGINAL_SIDES], world=world, progress=progress)
        sides = self.pictures.all(ORIGINAL_SIDES)
        small = sides[sides < side]
        if len(small) > MOST_ENLARGED * len(sides):
            raise UsageError(
                f"{self.name}: {len(small):,} of {len(sides):,} pictures have fewer than the "
                f"{side} pixels a side that are compared (the first one has {small[0]}): a set of "
                f"which more than {MOST_ENLARGED:.0%} is enlarged is no reference"
            )
        shrunk = [f"cut and shrunk to {side}"] if (sides > side).any() else []
        enlarged = [f"{len(small):,} of {len(sides):,} enlarged to {side}"] if len(small) else []
        changes = [*shrunk, *enlarged]
        return f"{what} {', '.join(changes)}" if changes else None


def of_source(source: Source, *, name: str | None = None, foreign: bool = False) -> Reference:
    """All pictures of a source; their features are kept in the cache."""
    return Reference(name or source.name, shown(source, reference_folder()), foreign=foreign)


def name_of(source: Source, data: DataConfig) -> str:
    """What a reference is called: of videos, also how its clips were cut out."""
    if source.frames is None:
        return source.name
    rate = "" if data.fps is None else f" at {data.fps:g} fps"
    begin = "the start" if data.clip == "start" else "a fixed place"
    return f"{source.name}, frame stride {data.frame_stride}{rate}, from {begin}"


def reference_folder() -> Path:
    """Where the features of references are kept."""
    return cache_folder("references")


# --- ADM's files -------------------------------------------------------------------------------


def of_npz(path: Path) -> Reference:
    """A reference batch as ADM publishes them: `mu` and `sigma`, pictures as `arr_0`, or both.

    Nothing in the file is run or unpickled, and its pictures are read a batch at a time.

    Raises:
        UsageError: there is no such file, or it is something else.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):  # an .npy by another name, which numpy would open
        raise UsageError(f"{path} is no reference batch that can be read: no .npz, which is a zip")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = set(arrays.files)
            published = _published(arrays["mu"], arrays["sigma"]) if "mu" in names else None
        pictures = _pictures(path) if "arr_0" in names else None
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is no reference batch that can be read: {error}") from error
    if published is None and pictures is None:
        raise UsageError(
            f"{path} holds {', '.join(sorted(names)) or 'nothing'}: a reference batch has mu and "
            "sigma, pictures as arr_0, or both"
        )
    return Reference(path.name, pictures, published)


def _published(mean: np.ndarray, covariance: np.ndarray) -> Published:
    if mean.shape != (WIDTH,) or covariance.shape != (WIDTH, WIDTH):
        raise ValueError(
            f"mu and sigma are {mean.shape} and {covariance.shape}, not those of {WIDTH:,} features"
        )
    return Published(mean.astype(np.float64), covariance.astype(np.float64))


class _Member:
    """The pictures of an .npz, a batch at a time.

    They are read where they lie: a row is an offset into the file. If they are compressed, they
    are read on from where the last batch ended, and only from the beginning to go back.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(_PICTURES)
            self.checksum = info.CRC
            self._stored = info.compress_type == zipfile.ZIP_STORED
            with archive.open(_PICTURES) as file:
                version = np.lib.format.read_magic(file)
                read = _HEADERS.get(version)
                if read is None:
                    raise ValueError(f"arr_0 has the unknown version {version}")
                self.shape, in_columns, dtype = read(file)
                self._begin = file.tell()
        self._place = _data_offset(path, info) if self._stored else 0
        if dtype != np.uint8 or len(self.shape) != 4 or in_columns or self.shape[3] not in (1, 3):
            raise ValueError(
                f"arr_0 is {dtype} of {self.shape}, not bytes of pictures (n, h, w, c)"
            )
        if self.shape[1] != self.shape[2]:
            raise ValueError(
                f"the pictures of arr_0 are {self.shape[1]}x{self.shape[2]}: no squares"
            )

    def read(self, rows: range) -> np.ndarray:
        size = math.prod(self.shape[1:])
        begin, count = self._begin + rows.start * size, len(rows) * size
        data = self._there(begin, count) if self._stored else self._onwards(begin, count)
        return np.frombuffer(data, np.uint8).reshape(len(rows), *self.shape[1:])

    def _there(self, begin: int, count: int) -> bytes:
        with open(self._path, "rb") as file:
            file.seek(self._place + begin)
            return file.read(count)

    def _onwards(self, begin: int, count: int) -> bytes:
        self._stream.seek(begin)  # forwards, it decompresses no more than what is skipped
        return self._stream.read(count)

    @cached_property
    def _stream(self) -> zipfile.ZipExtFile:
        """Open as long as this object lives."""
        return cast("zipfile.ZipExtFile", zipfile.ZipFile(self._path).open(_PICTURES))


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where in the file a member's bytes begin: after its local header, a name and an extra field.

    The lengths of these two are at bytes 26 and 28 of the header; the list at the end of a zip may
    have another extra field.
    """
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
    return info.header_offset + 30 + name + extra


def _pictures(path: Path) -> PictureSet:
    member = _Member(path)
    count, side = member.shape[:2]

    def make(rows: range, progress: Progress) -> Shown:
        return Shown(member.read(rows), [side] * len(rows))

    about = {
        "format": FORMAT,
        "file": path.name,
        "shape": list(member.shape),
        "crc32": member.checksum,
        "batch_size": BATCH,
    }
    store = Store.at(reference_folder(), about, make, BATCH)
    return PictureSet(path.name, count, side, lambda: store)
