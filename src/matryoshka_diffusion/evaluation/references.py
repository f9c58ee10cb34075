"""What samples are compared with: pictures, or the moments that ADM's .npz files hold.

FID is defined between sets of one resolution. Pictures of a source are cut to squares and brought
to the side of the samples as training pictures are, which says so in the number's name if it was
not the model's own data; what would have to be enlarged is refused, and so is an .npz of another
resolution.
"""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.data.batch import Source
from matryoshka_diffusion.eval.inception_net import WIDTH
from matryoshka_diffusion.eval.metrics import Reference as Published
from matryoshka_diffusion.evaluation.pictures import (
    BATCH,
    FORMAT,
    ORIGINAL_SIDES,
    PictureSet,
    Shown,
    shown,
)
from matryoshka_diffusion.evaluation.store import Store
from matryoshka_diffusion.files import cache_folder
from matryoshka_diffusion.pipeline import Progress
from matryoshka_diffusion.train.world import World

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
            UsageError: they have another resolution, or were enlarged.
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
        if (enlarged := sides < side).any():
            raise UsageError(
                f"{self.name}: {enlarged.sum():,} of {len(sides):,} pictures have fewer than the "
                f"{side} pixels a side that are compared (the first one has {sides[enlarged][0]}): "
                "what is enlarged is no reference"
            )
        return f"{what} cut and shrunk to {side}" if (sides > side).any() else None


def of_source(source: Source, *, name: str | None = None, foreign: bool = False) -> Reference:
    """All pictures of a source; their features are kept in the cache."""
    return Reference(name or source.name, shown(source, reference_folder()), foreign=foreign)


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
    """The pictures of an .npz, read where they lie: a row is an offset."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with zipfile.ZipFile(path) as archive:
            self.checksum = archive.getinfo(_PICTURES).CRC
            with archive.open(_PICTURES) as file:
                version = np.lib.format.read_magic(file)
                read = _HEADERS.get(version)
                if read is None:
                    raise ValueError(f"arr_0 has the unknown version {version}")
                self.shape, in_columns, dtype = read(file)
                self._begin = file.tell()
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
        with zipfile.ZipFile(self._path) as archive, archive.open(_PICTURES) as file:
            file.seek(self._begin + rows.start * size)
            data = file.read(len(rows) * size)
        return np.frombuffer(data, np.uint8).reshape(len(rows), *self.shape[1:])


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
    return PictureSet(path.name, count, side, Store.at(reference_folder(), about, make, BATCH))
